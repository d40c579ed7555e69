"""The attention and the blocks of timm's vision transformers, which can reorganise their tokens."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from timm.layers.attention import AttentionRope
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Attention, Block

from evit.attention_kernel import attention, is_chosen
from evit.reorganization import SCORES, WAYS, Reorganization, size_bias
from evit.settings import num_kept

# --- Attention ------------------------------------------------------------------------------------------------------

class ScoringAttention:
    """Mixin for an attention of timm, which then also returns the scores that rank the tokens.

    Modifications: `attention` has scaled_dot_product_attention always used, except in 16-bit inference on a CPU, where
    the faster form is. The scores never need the (N, N) matrix.
    """

    def forward(self, x, score=None, attn_mask=None, is_causal=False, **kwargs):
        """(B, N, C) → (B, N, C), and with `score`, a function of `SCORES`, the scores (B, N), after any rotation."""
        if is_causal:
            kwargs['is_causal'] = True                 # older versions of timm have no such argument
        if score is None and (is_causal or not is_chosen(x)):
            return super().forward(x, attn_mask=attn_mask, **kwargs)
        q, k, v = self.project(x, **kwargs)                                            # (B, H, N, D) each
        x = attention(q, k, v, attn_mask, self.attn_drop.p if self.training else 0.)
        x = self.proj_drop(self.proj(self.norm(x.transpose(1, 2).flatten(2))))         # (B, N, C)
        return x if score is None else (x, score(q, k, v, self.scale, attn_mask))

    def project(self, x, rope=None):
        """(B, N, C) → queries, keys and values, (B, H, N, D) each; `rope` rotates queries and keys of the patches."""
        B, N, _ = x.shape
        if self.qkv is None:                           # Eva's with three layers, of which keys may have fewer heads
            head_dim = self.q_proj.out_features // self.num_heads
            q, k, v = (layer(x).reshape(B, N, -1, head_dim).transpose(1, 2)
                       for layer in (self.q_proj, self.k_proj, self.v_proj))
        else:
            if getattr(self, 'q_bias', None) is None:
                qkv = self.qkv(x)
            else:                                      # Eva's without a bias of the keys
                qkv = F.linear(x, self.qkv.weight, torch.cat([self.q_bias, self.k_bias, self.v_bias]))
            q, k, v = qkv.reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self.rotate(q, rope).type_as(v), self.rotate(k, rope).type_as(v)
        if k.shape[1] < self.num_heads:                # grouped-query attention: neighbouring heads share keys, values
            k, v = (t.repeat_interleave(self.num_heads // t.shape[1], dim=1) for t in (k, v))
        return q, k, v

    def rotate(self, q, rope):
        """Rotate the patches' queries or keys (B, H, N, D); the prefix tokens have no place."""
        prefix, patches = q.tensor_split([self.num_prefix_tokens], dim=2)
        return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=self.rotate_half)], dim=2)


class EViTAttention(ScoringAttention, Attention):
    """Attention of a `VisionTransformer`."""


class EViTEvaAttention(ScoringAttention, EvaAttention):
    """Attention of an `Eva`."""


class EViTRopeAttention(ScoringAttention, AttentionRope):
    """Attention of an `Eva` with a bias of the keys, such as DINOv3's relatives."""


# --- Blocks ---------------------------------------------------------------------------------------------------------

class InplaceGELU(nn.GELU):
    """nn.GELU, in place if no gradient needs the input: the hidden layer of an MLP is then in memory once."""

    def forward(self, x):
        if torch.is_grad_enabled():
            return super().forward(x)
        return torch.ops.aten.gelu_(x, approximate=self.approximate)


class ReorganizingBlock:
    """Mixin for a block of timm, which can then reorganise its tokens between attention and MLP.

    Modifications: GELU in place; `keep_rate`, `token_settings` and `num_prefix_tokens`, which `to_evit` sets. Prefix
    tokens (class, distillation, registers) are protected: they are never dropped, fused or merged. A block that keeps
    all tokens runs timm's own forward.
    """

    def forward(self, x, keep_rate=None, k=None, sizes=None, get_idx=False, get_tokens=False, get_scores=False,
                **kwargs):
        """(B, P + N, C) → (B, P + k [+ 1], C) with P protected tokens.

        Args:
            keep_rate: fraction of the N tokens to keep; None for the block's own rate.
            k: number of tokens to keep, instead of a rate.
            sizes: (B, N), how many patches each token stands for, if they were merged (proportional attention).
            get_idx: also return the `Reorganization`, None if all tokens were kept.
            get_tokens: with the tokens from which k were kept.
            get_scores: with their scores, also if all tokens were kept.
            kwargs: what the attention takes, such as `rope`.
        """
        settings, num_prefix = self.token_settings, self.num_prefix_tokens
        num_tokens, done = x.shape[1] - num_prefix, None
        if k is None:
            k = num_kept(num_tokens, self.keep_rate if keep_rate is None else keep_rate)
        if sizes is not None:
            kwargs['attn_mask'] = size_bias(sizes, num_prefix, x.dtype)
        if k >= num_tokens and not get_scores:
            x = super().forward(x, **kwargs)
        else:
            x, scores = self.attend(x, SCORES[settings.score], **kwargs)
            scores = scores[:, num_prefix:]
            done = Reorganization(sizes=sizes)
            if k < num_tokens:
                prefix, tokens = x.tensor_split([num_prefix], dim=1)
                remaining, done = WAYS[settings.way].function(tokens, scores, k, sizes)
                done = done._replace(tokens=tokens) if get_tokens else done
                x = torch.cat([prefix, remaining], dim=1)
            done = done._replace(scores=scores) if get_scores else done
            x = self.feed_forward(x)
        return (x, done) if get_idx else x


class EViTBlock(ReorganizingBlock, Block):
    """The block of a `VisionTransformer`."""

    def attend(self, x, score, **kwargs):
        """Attention and its residual; → tokens (B, N, C), scores (B, N)."""
        attn, scores = self.attn(self.norm1(x), score, **kwargs)
        return x + self.drop_path1(self.ls1(attn)), scores

    def feed_forward(self, x):
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class EViTEvaBlock(ReorganizingBlock, EvaBlock):
    """The block of an `Eva`."""

    def attend(self, x, score, **kwargs):
        attn, scores = self.attn(self.norm1(x), score, **kwargs)
        return x + self.drop_path1(attn if self.gamma_1 is None else self.gamma_1 * attn), scores

    def feed_forward(self, x):
        mlp = self.mlp(self.norm2(x))
        return x + self.drop_path2(mlp if self.gamma_2 is None else self.gamma_2 * mlp)


class EViTEvaBlockPostNorm(ReorganizingBlock, EvaBlockPostNorm):
    """The block of an `Eva` that normalises after attention and MLP."""

    def attend(self, x, score, **kwargs):
        attn, scores = self.attn(x, score, **kwargs)
        return x + self.drop_path1(self.norm1(attn)), scores

    def feed_forward(self, x):
        return x + self.drop_path2(self.norm2(self.mlp(x)))
