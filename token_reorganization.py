"""The method of EViT: which tokens a block keeps, and what becomes of the others.

The pure functions come first; the attention and the blocks of timm that use them follow.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from timm.layers.attention import AttentionRope
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Attention, Block


# --- Pure functions -------------------------------------------------------------------------------------------------

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


def patches_after(patches, idx, num_patches):
    """The patch of each token after a block.

    Args:
        patches: the patch of each of the block's input tokens, (B, n) or more columns; None for all in their order.
        idx: (B, k), the positions that it kept.
        num_patches: number of patches N, the number given to a fused token, which stands for no one patch.
    Returns:
        (B, k + 1); the last column, N, is for a fused token, whether there is one or not.
    """
    return F.pad(idx if patches is None else patches.gather(1, idx), (0, 1), value=num_patches)


def patches_per_token(kept, num_patches):
    """How many patches each of the last tokens stands for, if every block fused the others: (B, n), integers.

    A token begins as one patch; a fused one stands for all those of the tokens that it replaces, so the sum stays
    `num_patches`.

    Args:
        kept: [(B, k) for each reorganising block], at least one.
    """
    sizes = torch.ones_like(kept[0][:, :1]).expand(-1, num_patches)                    # (B, N)
    for idx in kept:
        sizes = sizes.gather(1, idx)                                                   # (B, k)
        sizes = torch.cat([sizes, num_patches - sizes.sum(1, keepdim=True)], dim=1)    # (B, k + 1)
    return sizes


def rope_rows(rope, patches):
    """The rows of a rotary position embedding for tokens that are no longer all the patches in their order.

    A fused token is not rotated, like the class token and the registers: it stands for no one place, and a mean of
    rotations would be none. The model has learnt to attend to such tokens.

    Args:
        rope: sines, then cosines: (N, 2D), (H, N, 2D) if the heads differ, or (B, 1 or H, N, 2D).
        patches: (B, n), the patch of each token, N for a fused one.
    Returns:
        (B, 1 or H, n, 2D).
    """
    sines, cosines = rope[(None,) * (4 - rope.ndim)].chunk(2, dim=-1)                  # (B or 1, H or 1, N, D)
    table = torch.cat([F.pad(sines, (0, 0, 0, 1)), F.pad(cosines, (0, 0, 0, 1), value=1.)], dim=-1)
    return table.take_along_dim(patches[:, None, :, None], dim=2)


# --- Attention ------------------------------------------------------------------------------------------------------

class ScoringAttention:
    """Mixin for an attention of timm, which then also returns the class token's attention to each token.

    Modifications: with `return_scores`, it always uses scaled_dot_product_attention, and computes the class token's row
    of the attention in addition, never the (N, N) matrix.
    """

    def forward(self, x, return_scores=False, **kwargs):
        """(B, N, C) → (B, N, C), and with `return_scores` the class token's attention (B, N), after any rotation."""
        if not return_scores:
            return super().forward(x, **kwargs)
        q, k, v = self.project(x, **kwargs)                                            # (B, H, N, D) each
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.)
        x = self.norm(x.transpose(1, 2).flatten(2))                                    # (B, N, C)
        return self.proj_drop(self.proj(x)), class_attention(q, k, self.scale)

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

    Modifications: GELU in place; `keep_rate`, `fuse_token` and `num_prefix_tokens`, which `to_evit` sets. Prefix tokens
    (class, distillation, registers) are protected: they are never dropped or fused. A block that keeps all tokens runs
    timm's own forward.
    """

    def forward(self, x, keep_rate=None, tokens=None, get_idx=False, get_input=False, **kwargs):
        """(B, P + N, C) → (B, P + k [+ 1], C) with P protected tokens.

        Args:
            keep_rate: fraction of the N tokens to keep; None for the block's own rate.
            tokens: number of tokens k to keep, instead of a rate.
            get_idx: also return the kept positions (B, k), None if all tokens were kept.
            get_input: return a third value, the N tokens from which k were kept (B, N, C), or None.
            kwargs: what the attention takes, such as `rope`.
        """
        num_tokens = x.shape[1] - self.num_prefix_tokens
        k = num_kept(num_tokens, self.keep_rate if keep_rate is None else keep_rate) if tokens is None else tokens
        if k >= num_tokens:
            x, idx, tokens = super().forward(x, **kwargs), None, None
        else:
            x, scores = self.attend(x, **kwargs)
            prefix, tokens = x.tensor_split([self.num_prefix_tokens], dim=1)
            kept, idx = reorganize_tokens(tokens, scores[:, self.num_prefix_tokens:], k, self.fuse_token)
            x = self.feed_forward(torch.cat([prefix, kept], dim=1))
        if get_input:
            return x, idx, tokens
        return (x, idx) if get_idx else x


class EViTBlock(ReorganizingBlock, Block):
    """The block of a `VisionTransformer`."""

    def attend(self, x, **kwargs):
        """Attention and its residual; → tokens (B, N, C), the class token's attention (B, N)."""
        attn, scores = self.attn(self.norm1(x), return_scores=True, **kwargs)
        return x + self.drop_path1(self.ls1(attn)), scores

    def feed_forward(self, x):
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class EViTEvaBlock(ReorganizingBlock, EvaBlock):
    """The block of an `Eva`."""

    def attend(self, x, **kwargs):
        attn, scores = self.attn(self.norm1(x), return_scores=True, **kwargs)
        return x + self.drop_path1(attn if self.gamma_1 is None else self.gamma_1 * attn), scores

    def feed_forward(self, x):
        mlp = self.mlp(self.norm2(x))
        return x + self.drop_path2(mlp if self.gamma_2 is None else self.gamma_2 * mlp)


class EViTEvaBlockPostNorm(ReorganizingBlock, EvaBlockPostNorm):
    """The block of an `Eva` that normalises after attention and MLP."""

    def attend(self, x, **kwargs):
        attn, scores = self.attn(x, return_scores=True, **kwargs)
        return x + self.drop_path1(self.norm1(attn)), scores

    def feed_forward(self, x):
        return x + self.drop_path2(self.norm2(self.mlp(x)))
