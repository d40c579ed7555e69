"""EViT: vision transformers that reorganise their tokens.

Method: "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations" (ICLR 2022).
In a few blocks, between attention and MLP, the tokens that the class token attends to most are kept and the others
are dropped, or fused into one. Everything else is timm's vision transformer, subclassed here.

Importing this module registers the models of `VARIANTS` with timm::

    model = timm.create_model('deit_small_patch16_shrink_base', base_keep_rate=0.7, fuse_token=True)
    logits = model(images)                                # each block at its own rate
    logits = model(images, keep_rate=0.9)                 # another rate in the `drop_loc` blocks, for this call
    logits, kept = model(images, get_idx=True)            # and which tokens each reorganising block kept
"""
import dataclasses
import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, get_pretrained_cfg, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, VisionTransformer, checkpoint_filter_fn


def num_kept(num_tokens, keep_rate):
    """How many of `num_tokens` tokens a block of rate `keep_rate` keeps: k = ceil(rate · N), at most N (§3.2)."""
    return num_tokens if keep_rate >= 1 else math.ceil(keep_rate * num_tokens)


def reorganize_tokens(tokens, scores, k, fuse=False):
    """Keep the k tokens with the highest scores; drop the others, or fuse them into one, placed last (§3.2, §3.3).

    The fused token is the sum of score · token over the tokens that are not kept; the scores are not renormalised.

    Args:
        tokens: (B, N, C), without the class token and other protected ones.
        scores: (B, N), attention of the class token to each of them.
        k: number of tokens to keep, k < N.
        fuse: whether to append the fused token.
    Returns:
        tokens (B, k, C), or (B, k + 1, C) with the fused one, and their positions in the input (B, k).
    """
    idx = scores.topk(k, dim=1, sorted=False).indices                                  # (B, k)
    kept = tokens.gather(1, idx.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))        # (B, k, C)
    if fuse:
        # Kept tokens get weight 0, which saves computing the complement of idx. Without autocast, because casting
        # all tokens would cost more than this product saves.
        with torch.autocast(tokens.device.type, enabled=False):
            weights = scores.scatter(1, idx, 0.).to(tokens.dtype).unsqueeze(1)         # (B, 1, N)
            kept = torch.cat([kept, weights @ tokens], dim=1)                          # (B, k + 1, C)
    return kept, idx


def class_attention(q, k, scale):
    """Softmax attention of the class token to every token, averaged over heads (Eq. 2).

    Computed in float32 or better, because it decides which tokens are kept. It is a sum of products instead of a matrix
    product, which autocast or TF32 would round; for a single row that is no slower.

    Args:
        q: (B, H, N, D); only row 0, the class token's query, is read.
        k: (B, H, N, D).
        scale: factor of the product, 1/√D.
    Returns:
        (B, N); each row sums to 1.
    """
    query = q[:, :, :1].to(torch.promote_types(q.dtype, torch.float32)) * scale        # (B, H, 1, D)
    return (query * k).sum(dim=-1).softmax(dim=-1).mean(dim=1)                         # (B, H, N) → (B, N)


class ScoringAttention(Attention):
    """timm's Attention that can also return how much the class token attends to each token.

    Modifications: always uses scaled_dot_product_attention; with `return_scores`, the class token's row of the
    attention is computed in addition, never the (N, N) matrix.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.fused_attn = True

    def forward(self, x, return_scores=False, **kwargs):
        """(B, N, C) → (B, N, C), and with `return_scores` the class token's attention (B, N)."""
        if not return_scores:
            return super().forward(x, **kwargs)
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (3, B, H, N, D)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.)
        x = self.norm(x.transpose(1, 2).reshape(B, N, -1))                             # (B, N, C)
        return self.proj_drop(self.proj(x)), class_attention(q, k, self.scale)


class InplaceGELU(nn.GELU):
    """nn.GELU, in place if no gradient needs the input: the hidden layer of an MLP is then in memory once."""

    def forward(self, x):
        return super().forward(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)


class EViTBlock(Block):
    """timm's Block that can reorganise its tokens between attention and MLP.

    Modifications: GELU in place; `keep_rate`, `fuse_token` and `num_prefix_tokens`, which the model sets. Prefix tokens
    (class, distillation, registers) are protected: they are never dropped or fused. A block that keeps all tokens
    computes the same as timm's.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, 'attn_layer': ScoringAttention})
        if type(self.mlp.act) is nn.GELU:
            self.mlp.act = InplaceGELU()
        self.keep_rate = 1.
        self.fuse_token = False
        self.num_prefix_tokens = 1

    def forward(self, x, keep_rate=None, tokens=None, get_idx=False):
        """(B, P + N, C) → (B, P + k [+ 1], C) with P protected tokens.

        Args:
            keep_rate: fraction of the N tokens to keep; None for the block's own rate.
            tokens: number of tokens k to keep, instead of a rate.
            get_idx: also return the kept positions (B, k), None if all tokens were kept.
        """
        num_tokens = x.shape[1] - self.num_prefix_tokens
        k = num_kept(num_tokens, self.keep_rate if keep_rate is None else keep_rate) if tokens is None else tokens
        if k >= num_tokens:
            x, idx = super().forward(x), None
        else:
            attn, scores = self.attn(self.norm1(x), return_scores=True)
            x = x + self.drop_path1(self.ls1(attn))
            prefix, tokens = x.tensor_split([self.num_prefix_tokens], dim=1)
            tokens, idx = reorganize_tokens(tokens, scores[:, self.num_prefix_tokens:], k, self.fuse_token)
            x = torch.cat([prefix, tokens], dim=1)
            x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return (x, idx) if get_idx else x


class TokenReorganization:
    """Mixin that adds token reorganisation to a timm vision transformer.

    Args:
        base_keep_rate: fraction of tokens that a reorganising block keeps, in (0, 1].
        drop_loc: numbers of the reorganising blocks, from 0.
        fuse_token: fuse the other tokens into one instead of dropping them.
    Raises:
        ValueError: a rate or a block number is out of range, or the model has no class token.
    """

    def __init__(self, *args, base_keep_rate=0.7, drop_loc=(3, 6, 9), fuse_token=False, **kwargs):
        super().__init__(*args, block_fn=EViTBlock, **kwargs)
        if not 0 < base_keep_rate <= 1:
            raise ValueError(f'the keep rate must lie in (0, 1], not {base_keep_rate}')
        if not all(0 <= i < len(self.blocks) for i in drop_loc):
            raise ValueError(f'drop_loc {tuple(drop_loc)} names a block outside 0 to {len(self.blocks) - 1}')
        if not self.has_class_token:
            raise ValueError('the model has no class token, whose attention ranks the tokens')
        self.base_keep_rate = base_keep_rate
        self.drop_loc = tuple(drop_loc)
        for i, block in enumerate(self.blocks):
            block.keep_rate = base_keep_rate if i in self.drop_loc else 1.
            block.fuse_token = fuse_token
            block.num_prefix_tokens = self.num_prefix_tokens

    def forward(self, x, keep_rate=None, tokens=None, get_idx=False):
        """Classify images.

        Args:
            x: images (B, 3, H, W).
            keep_rate: None for each block's own rate; a number for the `drop_loc` blocks (1 or more keeps all
                tokens); or a sequence with a rate for each of the `depth` blocks.
            tokens: how many tokens each of the `depth` blocks keeps, None for all (see `token_counts`), instead of a
                rate. A compiled model needs one graph for all integers, but a graph for each rate.
            get_idx: also return the kept positions.
        Returns:
            logits (B, num_classes); with `get_idx`, (logits, [(B, k) for each reorganising block]). Positions count the
            tokens of the block's input without the protected ones. The output has the kept tokens in the order of
            these positions, then the fused token, so that positions of successive blocks compose.
        """
        x, kept = self.forward_tokens(x, keep_rate, tokens)
        logits = self.forward_head(x)
        return (logits, kept) if get_idx else logits

    def forward_features(self, x, keep_rate=None):
        """Images (B, 3, H, W) → the remaining tokens (B, P + n, C), normalised."""
        return self.forward_tokens(x, keep_rate)[0]

    def forward_tokens(self, x, keep_rate=None, tokens=None):
        """Images (B, 3, H, W) → tokens (B, P + n, C), [kept positions (B, k) for each reorganising block]."""
        x = self._pos_embed(self.patch_embed(x))                                       # (B, P + N, C)
        x = self.norm_pre(self.patch_drop(x))
        kept = []
        rates = self.block_keep_rates(keep_rate if tokens is None else 1.)
        for block, rate, k in zip(self.blocks, rates, len(rates) * [None] if tokens is None else tokens, strict=True):
            run = partial(checkpoint, block) if self.grad_checkpointing else block
            x, idx = run(x, rate, k, True)
            if idx is not None:
                kept.append(idx)
        return self.norm(x), kept

    def forward_intermediates(self, x, indices=None, *args, output_fmt='NCHW', **kwargs):
        """timm's, with each block at its own rate; ValueError for output_fmt='NCHW' if tokens are dropped."""
        if output_fmt == 'NCHW' and min(self.block_keep_rates()) < 1:
            raise ValueError("the remaining tokens form no grid; use output_fmt='NLC' or a keep rate of 1")
        return super().forward_intermediates(x, indices, *args, output_fmt=output_fmt, **kwargs)

    def block_keep_rates(self, keep_rate=None):
        """The rate of each block for the `keep_rate` of `forward`; ValueError if it is not valid."""
        if keep_rate is None:
            return [block.keep_rate for block in self.blocks]
        if not hasattr(keep_rate, '__len__'):
            keep_rate = [keep_rate if i in self.drop_loc else 1. for i in range(len(self.blocks))]
        if len(keep_rate) != len(self.blocks) or not all(rate > 0 for rate in keep_rate):
            raise ValueError(f'keep_rate must be above 0, one number or one for each of {len(self.blocks)} blocks')
        return keep_rate

    def token_counts(self, keep_rate=None):
        """How many tokens each block keeps of an image of the model's input size, None for all of them.

        `keep_rate` is as in `forward`, the result as its `tokens`.
        """
        counts, num_tokens = [], self.patch_embed.num_patches
        for block, rate in zip(self.blocks, self.block_keep_rates(keep_rate)):
            k = num_kept(num_tokens, rate)
            counts.append(k if k < num_tokens else None)
            num_tokens = k + (block.fuse_token and k < num_tokens)
        return tuple(counts)

    def set_input_size(self, img_size=None, patch_size=None):
        """timm's, but the position embedding is resized as on loading a checkpoint (`resize_pos_embed`)."""
        pos_embed, grid_size = self.pos_embed, self.patch_embed.grid_size
        super().set_input_size(img_size, patch_size)
        if self.patch_embed.grid_size != grid_size:
            resized = resize_pos_embed(pos_embed.detach(), self, grid_size)
            self.pos_embed = nn.Parameter(resized, requires_grad=pos_embed.requires_grad)


class EViT(TokenReorganization, VisionTransformer):
    """A DeiT that reorganises its tokens."""


class EViTDistilled(TokenReorganization, VisionTransformerDistilled):
    """A DeiT with a distillation token, which is protected, that reorganises its tokens."""


def resize_pos_embed(pos_embed, model, grid_size=None):
    """Resize a position embedding (1, P + N, C) to the grid of `model`: bicubic without antialiasing, as in DeiT.

    `grid_size` is its present grid (rows, columns), a square if None.
    """
    num_prefix_tokens = 0 if model.no_embed_class else model.num_prefix_tokens
    return resample_abs_pos_embed(pos_embed, model.patch_embed.grid_size, grid_size, num_prefix_tokens, antialias=False)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A registered model: size of the DeiT, whether it has a distillation token, input size in pixels, keep rate."""
    size: str
    distilled: bool = False
    img_size: int = 224
    keep_rate: float = 0.7


SIZES = {
    'tiny': dict(embed_dim=192, num_heads=3),
    'small': dict(embed_dim=384, num_heads=6),
    'base': dict(embed_dim=768, num_heads=12),
}

VARIANTS = {
    **{f'deit_{size}_patch16_shrink_base': Variant(size) for size in SIZES},
    **{f'deit_{size}_distilled_patch16_shrink_base': Variant(size, distilled=True) for size in SIZES},
    'deit_small_patch16_224_shrink_base': Variant('small'),
    'deit_small_patch16_224_shrink': Variant('small', keep_rate=0.7),
    'deit_small_patch16_224_shrink05': Variant('small', keep_rate=0.5),
    'deit_small_patch16_272_shrink': Variant('small', img_size=272, keep_rate=0.7),
    'deit_small_patch16_288_shrink06': Variant('small', img_size=288, keep_rate=0.6),
    'deit_small_patch16_304_shrink05': Variant('small', img_size=304, keep_rate=0.5),
}


def _pretrained_cfg(variant):
    """timm's entry for the DeiT of a variant, whose weights `pretrained=True` loads."""
    deit = get_pretrained_cfg(f'deit_{variant.size}{"_distilled" if variant.distilled else ""}_patch16_224')
    return dataclasses.replace(deit, input_size=(3, variant.img_size, variant.img_size))


default_cfgs = generate_default_cfgs({name: _pretrained_cfg(variant) for name, variant in VARIANTS.items()})


def _register(name, variant):
    def create(pretrained=False, **kwargs):
        kwargs = dict(patch_size=16, depth=12, base_keep_rate=variant.keep_rate, **SIZES[variant.size]) | kwargs
        return build_model_with_cfg(
            EViTDistilled if variant.distilled else EViT, name, pretrained,
            pretrained_filter_fn=partial(checkpoint_filter_fn, antialias=False), **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f'EViT on {variant}.'
    return register_model(create)


globals().update({name: _register(name, variant) for name, variant in VARIANTS.items()})
