"""EViT: vision transformers that reorganise their tokens.

Method: "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations" (ICLR 2022).
In a few blocks, between attention and MLP, the tokens that the class token attends to most are kept and the others
are dropped, or fused into one (`evit/reorganization.py`). Everything else is timm's vision transformer, subclassed
here. A model of timm becomes an EViT with the weights that it has::

    model = timm.create_model('vit_base_patch14_reg4_dinov2.lvd142m', pretrained=True)
    model = to_evit(model, base_keep_rate=0.7, fuse_token=True)
    logits = model(images)                                # each block at its own rate
    logits = model(images, keep_rate=0.9)                 # another rate for this call
    logits, kept = model(images, get_idx=True)            # and which tokens each reorganising block kept

Importing this module registers `VARIANTS`, the EViTs made of DeiTs, with timm::

    model = timm.create_model('deit_small_patch16_shrink_base', base_keep_rate=0.7, fuse_token=True)
"""
import dataclasses
import inspect
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models import (PretrainedCfg, build_model_with_cfg, checkpoint, generate_default_cfgs, get_pretrained_cfg,
                         register_model)
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Attention, Block, VisionTransformer, checkpoint_filter_fn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from evit.blocks import (AttentionRope, EViTAttention, EViTBlock, EViTEvaAttention, EViTEvaBlock, EViTEvaBlockPostNorm,
                         EViTMlp, EViTRopeAttention, is_hooked)
from evit.feature_maps import FeatureMaps
from evit.lvvit import LVViT
from evit.pooling import WeighedPooling
from evit.position_embedding import ResizedPositions, resize_pos_embed     # noqa: F401, for code that imports it here
from evit.reorganization import WAYS, patches_after, rope_rows
from evit.reorganization import class_attention, reorganize_tokens         # noqa: F401, for code that imports them here
from evit.settings import TokenSettings, num_kept

SAVE_SELECTION = partial(create_selective_checkpoint_contexts, [
    torch.ops.aten.topk.default, torch.ops.aten.sort.default, torch.ops.aten.argmax.default,
    torch.ops.aten.max.dim])


class TokenReorganization(FeatureMaps, WeighedPooling, ResizedPositions):
    """Mixin that adds token reorganisation to a vision transformer of timm.

    Modifications: as `forward` says. Where the head pools by average, a fused token counts as many patches as it stands
    for.

    Args:
        kwargs: those of `to_evit`; all others are timm's.
    """

    def __init__(self, *args, **kwargs):
        settings = {name: kwargs.pop(name) for name in TOKEN_ARGUMENTS & kwargs.keys()}
        super().__init__(*args, **kwargs)
        to_evit(self, **settings)

    def forward(self, x, keep_rate=None, kept_counts=None, get_idx=False):
        """Classify images.

        Args:
            x: images (B, 3, H, W).
            keep_rate: None for each block's own rate; a number instead of `base_keep_rate` (1 or more keeps all
                tokens); or a sequence with a rate for each of the `depth` blocks.
            kept_counts: how many tokens each of the `depth` blocks keeps, None for all (see the method of this name),
                instead of a rate. A compiled model needs one graph for all integers, but a graph for each rate.
            get_idx: also return the kept positions.
        Returns:
            logits (B, num_classes); with `get_idx`, (logits, [(B, k) for each reorganising block]). Positions count the
            tokens of the block's input without the protected ones. The output has the kept tokens in the order of
            these positions, then the fused token, so that positions of successive blocks compose.
        """
        x, rope = self.embed(x)                                                        # (B, P + N, C)
        num_patches = x.shape[1] - self.num_prefix_tokens
        x, stages = self.run_blocks(x, rope, keep_rate, kept_counts, prefix_only=self.reads_prefix_only())
        logits = self.classify(self.norm(x), stages, num_patches)
        return (logits, [stage.idx for stage in stages if stage]) if get_idx else logits

    def forward_features(self, x, keep_rate=None):
        """Images (B, 3, H, W) → the remaining tokens (B, P + n, C), normalised."""
        return self.norm(self.run_blocks(*self.embed(x), keep_rate)[0])

    def embed(self, x):
        """Images (B, 3, H, W) → tokens (B, P + N, C), and the rotary position embedding, None without one."""
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x)))), None

    def run_blocks(self, x, rope, keep_rate=None, kept_counts=None, observed=(), prefix_only=False):
        """Run all blocks on tokens (B, P + N, C).

        Args:
            rope: as `embed` returns it.
            keep_rate, kept_counts: as in `forward`.
            observed: blocks whose scores are returned, too.
            prefix_only: whether the last block may leave out the tokens after the prefix tokens.
        Returns:
            tokens (B, P + n, C), and for each block its `Reorganization`, None if it kept all tokens.
        """
        rates = self.block_keep_rates(keep_rate if kept_counts is None else 1.)
        counts = len(rates) * [None] if kept_counts is None else kept_counts
        patches, sizes, stages, num_patches = None, None, [], x.shape[1] - self.num_prefix_tokens
        for i, (rate, k) in enumerate(zip(rates, counts, strict=True)):
            x, done = self.run_block(i, x, rope, patches, sizes=sizes, keep_rate=rate, k=k, get_scores=i in observed,
                                     prefix_only=prefix_only and i == len(rates) - 1)
            stages.append(done)
            if done is not None:
                sizes = done.sizes
            if done is not None and done.idx is not None and rope is not None:
                patches = patches_after(patches, done.idx, num_patches)
        return x, stages

    def run_block(self, i, x, rope, patches, **kwargs):
        """Run block `i` on tokens (B, P + n, C); → tokens and the block's `Reorganization`.

        Args:
            rope: as `embed` returns it.
            patches: the patch of each token (B, n [+ 1]), see `patches_after`; None for all in their order.
            kwargs: of the block's forward.
        """
        if rope is not None:
            rope = rope[i] if self.rope_mixed else rope
            num_tokens = x.shape[1] - self.num_prefix_tokens
            kwargs['rope'] = rope if patches is None else rope_rows(rope, patches[:, :num_tokens])
        block = partial(self.blocks[i], get_idx=True, **kwargs)
        if not self.grad_checkpointing:
            return block(x)
        # A compiled backward pass might round the scores otherwise and, at a near tie, select other tokens
        saved = {'context_fn': SAVE_SELECTION} if torch.compiler.is_compiling() else {}
        return checkpoint(block, x, use_reentrant=False, **saved)

    def reads_prefix_only(self):
        """Whether the head reads the prefix tokens only, and nobody watches the last block or the norm by a hook."""
        if self.global_pool != 'token' or self.cls_token is None or getattr(self, 'attn_pool', None) is not None:
            return False
        return not any(is_hooked(module) for part in (self.blocks[-1], self.norm) for module in part.modules())

    def block_keep_rates(self, keep_rate=None):
        """The rate of each block for the `keep_rate` of `forward`; ValueError if it is not valid."""
        if keep_rate is None:
            return [block.keep_rate for block in self.blocks]
        if not hasattr(keep_rate, '__len__'):
            keep_rate = self.token_settings.block_rates(keep_rate, len(self.blocks), self.patch_embed.num_patches,
                                                        self.embed_dim)
        if len(keep_rate) != len(self.blocks) or not all(rate > 0 for rate in keep_rate):
            raise ValueError(f'keep_rate must be above 0, one number or one for each of {len(self.blocks)} blocks')
        return keep_rate

    def kept_counts(self, keep_rate=None):
        """How many tokens each block keeps of an image of the model's input size, None for all of them.

        `keep_rate` is as in `forward`, the result as its `kept_counts`.
        """
        counts, num_tokens = [], self.patch_embed.num_patches
        for rate in self.block_keep_rates(keep_rate):
            k = num_kept(num_tokens, rate)
            counts.append(k if k < num_tokens else None)
            num_tokens = k + WAYS[self.token_settings.way].extra_tokens if k < num_tokens else k
        return tuple(counts)


class EViT(TokenReorganization, VisionTransformer):
    """A `VisionTransformer` that reorganises its tokens."""


class EViTDistilled(TokenReorganization, VisionTransformerDistilled):
    """A `VisionTransformer` with a distillation token, which is protected, that reorganises its tokens."""


class EViTEva(TokenReorganization, Eva):
    """An `Eva` that reorganises its tokens, with the rows of the rotary position embedding that are theirs."""

    def embed(self, x):
        x, rope = self._pos_embed(self.patch_embed(x))
        return self.norm_pre(x), rope


class EViTLVViT(TokenReorganization, LVViT):
    """An `LVViT` that reorganises its tokens.

    A fused token takes part in the maximum over the tokens' logits, on which the paper says nothing. In training, its
    logits have no label.
    """

    def reads_prefix_only(self):
        return False

    def forward(self, x, keep_rate=None, kept_counts=None, get_idx=False, mixed=None):
        """As any EViT's; or with `mixed`, in training, what `TokenLabelingLoss` takes.

        Args:
            mixed: (N,), true for patches that each image takes from the one in the same place of the reversed batch
                (MixToken).
        Returns:
            with `mixed`: logits of the class token (B, K), of the remaining tokens (B, n, K), and the patch of each
            (B, n), N for a fused one.
        """
        if mixed is None:
            return super().forward(x, keep_rate, kept_counts, get_idx)
        x, _ = self.embed(x)                                                           # (B, P + N, C)
        num_patches = x.shape[1] - self.num_prefix_tokens
        x = torch.where(F.pad(mixed, (self.num_prefix_tokens, 0)).unsqueeze(-1), x.flip(0), x)
        x, stages = self.run_blocks(x, None, keep_rate, kept_counts)
        logits, token_logits = self.forward_heads(self.norm(x))
        patches = torch.arange(num_patches, device=x.device).expand(len(x), -1)        # (B, N)
        for stage in filter(None, stages):
            patches = patches_after(patches, stage.idx, num_patches)
        return logits, token_logits, patches[:, :token_logits.shape[1]]


# --- Any model of timm ----------------------------------------------------------------------------------------------

EVIT_CLASSES = {
    VisionTransformer: EViT, VisionTransformerDistilled: EViTDistilled, Eva: EViTEva, LVViT: EViTLVViT,
    Block: EViTBlock, EvaBlock: EViTEvaBlock, EvaBlockPostNorm: EViTEvaBlockPostNorm,
    Attention: EViTAttention, EvaAttention: EViTEvaAttention, AttentionRope: EViTRopeAttention,
    Mlp: EViTMlp,
}
TIMM_CLASSES = {ours: theirs for theirs, ours in EVIT_CLASSES.items()}
UNSERVED = {
    **dict.fromkeys(['Beit', 'VisionTransformerRelPos', 'VisionTransformerSAM'],
                    'its attention has a relative position bias'),
    'NaFlexVit': 'a batch of it has images of several sizes (NaFlex)',
}


def to_evit(model, base_keep_rate=None, drop_loc=None, fuse_token=None, merge_token=None, uniform=None,
            token_counts=None, way=None, score=None, settings=None):
    """Turn a vision transformer of timm into an EViT, in place: its parameters and their names stay.

    timm's methods go on to work, `from_evit` turns it back. A call on an EViT changes the settings that it names.

    Args:
        model: a `VisionTransformer`, `VisionTransformerDistilled` or `Eva`; one without a class token can only merge.
        base_keep_rate: fraction of tokens that a reorganising block keeps, in (0, 1]; 0.7 by default.
        drop_loc: numbers of the reorganising blocks, from 0; by default after a quarter, a half and three quarters of
            the blocks, as in the paper (3, 6 and 9 of 12).
        fuse_token: fuse the other tokens into one instead of dropping them.
        merge_token: merge the tokens that are most similar to others into these (`merge_tokens`), which from then on
            count for all that they stand for (`size_bias`); for weights that were trained with all tokens. By default
            in more blocks, with as much work as fusing at the same rate (`merging_blocks`, `merging_rate`).
        uniform, token_counts, way, score: as in `TokenSettings`.
        settings: the `TokenSettings` to start from; those of the model if it is an EViT.
    Returns:
        the model.
    Raises:
        ValueError: it cannot be an EViT, for the reason that the message names, a rate, a count or a block number is
            out of range, or tokens are to be fused and merged. The model is unchanged then.
    """
    reason = obstacle(model)
    if reason:
        raise ValueError(f'{type(model).__name__} cannot become an EViT: {reason}')
    settings = settings or getattr(model, 'token_settings', TokenSettings())
    settings = settings.updated(base_keep_rate, drop_loc, fuse_token, merge_token, uniform, token_counts, way, score)
    if model.cls_token is None and WAYS[settings.way].needs_scores and settings.score == 'class_attention':
        raise ValueError(f'{type(model).__name__} has no class token, whose attention ranks the tokens; merging needs '
                         'none: merge_token=True')
    rates = settings.own_rates(len(model.blocks), model.patch_embed.num_patches, model.num_prefix_tokens,
                               model.embed_dim)
    swap_classes(model, EVIT_CLASSES)
    model.token_settings = settings
    for block, rate in zip(model.blocks, rates):
        block.token_settings, block.keep_rate, block.num_prefix_tokens = settings, rate, model.num_prefix_tokens
    return model


TOKEN_ARGUMENTS = inspect.signature(to_evit).parameters.keys() - {'model'}


def from_evit(model):
    """Turn an EViT back into timm's model, in place; → the model. Raises ValueError if it is none."""
    if type(model) not in TIMM_CLASSES:
        raise ValueError(f'{type(model).__name__} is no EViT')
    swap_classes(model, TIMM_CLASSES)
    del model.token_settings
    for block in model.blocks:
        del block.token_settings, block._keep_rate, block.num_prefix_tokens
    return model


def swap_classes(model, classes):
    """Give the parts of a model that an EViT changes the classes {present class: other class}."""
    blocks = list(model.blocks)
    for module in (model, *blocks, *(block.attn for block in blocks), *(block.mlp for block in blocks)):
        module.__class__ = classes.get(type(module), type(module))


def obstacle(model):
    """Why a model cannot become an EViT, as half a sentence; None if it can."""
    def is_served(module):
        return type(module) in EVIT_CLASSES or isinstance(module, tuple(TIMM_CLASSES))

    if not is_served(model):
        return UNSERVED.get(type(model).__name__,
                            'it is no VisionTransformer or Eva of timm, or it is a subclass or a wrapper of one')
    for block in model.blocks:
        if not is_served(block):
            return f'its blocks are {type(block).__name__}; Block, EvaBlock and EvaBlockPostNorm are served'
        if not is_served(block.attn):
            return (f'its attention is {type(block.attn).__name__}; Attention, EvaAttention and AttentionRope are '
                    'served')
        if getattr(block.attn, 'gate', None) is not None:
            return 'its attention is gated'
    return None


# --- Registered models ----------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Variant:
    """A registered model: of SIZES, whether it has a distillation token, input size in pixels, keep rate."""
    size: str
    distilled: bool = False
    img_size: int = 224
    keep_rate: float = 0.7

    @property
    def is_lvvit(self):
        """Whether it has an auxiliary classifier of the patch tokens."""
        return self.size in LVVITS


def is_lvvit(name):
    """Whether a model has an auxiliary classifier of the patch tokens."""
    return name in VARIANTS and VARIANTS[name].is_lvvit


DEITS = {
    'tiny': dict(embed_dim=192, num_heads=3, depth=12),
    'small': dict(embed_dim=384, num_heads=6, depth=12),
    'base': dict(embed_dim=768, num_heads=12, depth=12),
}
LVVITS = {
    'lvvit_t': dict(embed_dim=240, num_heads=4, depth=12, skip_lam=1.),
    'lvvit_s': dict(embed_dim=384, num_heads=6, depth=16, skip_lam=2.),
    'lvvit_m': dict(embed_dim=512, num_heads=8, depth=20, skip_lam=2.),
}
SIZES = DEITS | LVVITS

VARIANTS = {
    'deit_tiny_patch16_shrink_base': Variant('tiny'),
    'deit_small_patch16_shrink_base': Variant('small'),
    'deit_base_patch16_shrink_base': Variant('base'),
    'deit_tiny_distilled_patch16_shrink_base': Variant('tiny', distilled=True),
    'deit_small_distilled_patch16_shrink_base': Variant('small', distilled=True),
    'deit_base_distilled_patch16_shrink_base': Variant('base', distilled=True),
    'deit_small_patch16_224_shrink_base': Variant('small'),
    'deit_small_patch16_224_shrink': Variant('small', keep_rate=0.7),
    'deit_small_patch16_224_shrink05': Variant('small', keep_rate=0.5),
    'deit_small_patch16_272_shrink': Variant('small', img_size=272, keep_rate=0.7),
    'deit_small_patch16_288_shrink06': Variant('small', img_size=288, keep_rate=0.6),
    'deit_small_patch16_304_shrink05': Variant('small', img_size=304, keep_rate=0.5),
    'lvvit_t': Variant('lvvit_t', keep_rate=1.),
    'lvvit_s': Variant('lvvit_s', keep_rate=1.),
    'lvvit_m': Variant('lvvit_m', keep_rate=1.),
    'lvvit_t_shrink_base': Variant('lvvit_t'),
    'lvvit_s_shrink_base': Variant('lvvit_s'),
    'lvvit_m_shrink_base': Variant('lvvit_m'),
}


def _pretrained_cfg(variant):
    """timm's entry for the DeiT of a variant, whose weights `pretrained=True` loads; an LV-ViT has none."""
    if variant.is_lvvit:
        return PretrainedCfg(crop_pct=1. if variant.size == 'lvvit_m' else 0.9, fixed_input_size=True,
                             first_conv='patch_embed.conv1', classifier=('head', 'aux_head'))
    deit = get_pretrained_cfg(f'deit_{variant.size}{"_distilled" if variant.distilled else ""}_patch16_224')
    return dataclasses.replace(deit, input_size=(3, variant.img_size, variant.img_size))


default_cfgs = generate_default_cfgs({name: _pretrained_cfg(variant) for name, variant in VARIANTS.items()})


def _register(name, variant):
    def create(pretrained=False, **kwargs):
        kwargs = dict(patch_size=16, base_keep_rate=variant.keep_rate, **SIZES[variant.size]) | kwargs
        return build_model_with_cfg(
            EViTLVViT if variant.is_lvvit else EViTDistilled if variant.distilled else EViT, name, pretrained,
            pretrained_filter_fn=partial(checkpoint_filter_fn, antialias=False),
            feature_cfg=dict(out_indices=kwargs.pop('out_indices', 3), feature_cls='getter'), **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f'EViT on {variant}.'
    return register_model(create)


# timm finds them by name; these are for `models_evit.deit_small_patch16_shrink_base` and torch.hub
globals().update({name: _register(name, variant) for name, variant in VARIANTS.items()})
