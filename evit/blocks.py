"""timm's blocks, made to reorganise their tokens."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Mlp, apply_rot_embed_cat
from timm.layers.attention import AttentionRope
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Attention, Block
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from evit.attention_kernel import attention, is_chosen
from evit.merging import size_bias
from evit.reorganization import SCORES, WAYS, Reorganization
from evit.settings import num_kept

# --- Attention ------------------------------------------------------------------------------------------------------

class ScoringAttention:
    """Mixin for an attention of timm, which then also returns the scores that rank the tokens.

    Modifications: then it uses `attention`, so scaled_dot_product_attention except in some inference on a CPU, and the
    scores never need the (N, N) matrix.
    """

    def forward(self, x, score=None, attn_mask=None, num_queries=None, is_causal=False, **kwargs):
        """(B, N, C) → (B, N, C), and with `score`, a function of `SCORES`, the scores (B, N), after any rotation.

        With `num_queries`, only the first so many tokens attend, to all: (B, Q, C). They are prefix tokens.
        """
        if is_causal:
            kwargs['is_causal'] = True                 # older versions of timm have no such argument
        if score is None and num_queries is None and (is_causal or not is_chosen(x)):
            return super().forward(x, attn_mask=attn_mask, **kwargs)
        q, k, v = self.project(x, num_queries, **kwargs)                               # (B, H, Q or N, D) each
        x = attention(q, k, v, attn_mask, self.attn_drop.p if self.training else 0.)
        x = self.norm(x.transpose(1, 2).flatten(2))                                    # (B, N, C)
        x = self.proj_drop(self.proj(x))
        return x if score is None else (x, score(q, k, v, self.scale, attn_mask))

    def project(self, x, num_queries=None, rope=None):
        """(B, N, C) → queries, keys and values, (B, H, N, D) each; `rope` rotates queries and keys of the patches.

        With `num_queries`, there are queries of the first so many tokens only.
        """
        if self.qkv is None:                           # Eva's with three layers, of which keys may have fewer heads
            q, k, v = self.q_proj(x[:, :num_queries]), self.k_proj(x), self.v_proj(x)
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
            if getattr(self, 'q_bias', None) is not None:                  # Eva's without a bias of the keys
                bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
            if num_queries is None:
                q, k, v = F.linear(x, weight, bias).chunk(3, dim=-1)       # (B, N, H·D) each
            else:
                width = len(weight) // 3
                biases = (None, None) if bias is None else bias.tensor_split([width])
                q = F.linear(x[:, :num_queries], weight[:width], biases[0])
                k, v = F.linear(x, weight[width:], biases[1]).chunk(2, dim=-1)
        head_dim = q.shape[-1] // self.num_heads       # keys and values may have fewer heads
        q, k, v = (part.unflatten(-1, (-1, head_dim)).transpose(1, 2) for part in (q, k, v))
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q = (q if num_queries else self.rotate(q, rope)).type_as(v)    # prefix tokens have no place
            k = self.rotate(k, rope).type_as(v)
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

class EViTMlp(Mlp):
    """timm's MLP.

    Modifications: GELU is in place where nothing else needs its input, neither a gradient nor a hook; the hidden layer
    is then in memory once.
    """

    def forward(self, x):
        """(B, N, C) → (B, N, C)."""
        x = self.fc1(x)
        if self.owns_hidden_layer():
            x = torch.ops.aten.gelu_(x, approximate=self.act.approximate)
        else:
            x = self.act(x)
        return self.drop2(self.fc2(self.norm(self.drop1(x))))

    def owns_hidden_layer(self):
        """Whether nothing but GELU gets to see the output of `fc1`."""
        return (not torch.is_grad_enabled() and type(self.fc1) is nn.Linear and type(self.act) is nn.GELU
                and not is_hooked(self.fc1) and not is_hooked(self.act)
                and not _global_forward_hooks and not _global_forward_pre_hooks)


def is_hooked(module):
    """Whether a hook of its own sees the inputs, the outputs or the gradients of a module."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                or module._backward_pre_hooks)


class ReorganizingBlock:
    """Mixin for a block of timm, which can then reorganise its tokens between attention and MLP.

    Modifications: `keep_rate`, `token_settings` and `num_prefix_tokens`, which `to_evit` sets. Prefix tokens (class,
    distillation, registers) are protected: they are never dropped, fused or merged. A block that keeps all tokens runs
    timm's own forward.
    """

    @property
    def keep_rate(self):
        """The fraction of tokens to keep."""
        return float(self._keep_rate)

    @keep_rate.setter
    def keep_rate(self, rate):
        self._keep_rate = repr(float(rate))            # torch.compile would make a float that changes a variable

    def forward(self, x, keep_rate=None, k=None, sizes=None, prefix_only=False, get_idx=False, get_tokens=False,
                get_scores=False, **kwargs):
        """(B, P + N, C) → (B, P + k [+ 1], C) with P protected tokens.

        Args:
            keep_rate: fraction of the N tokens to keep; None for the block's own rate.
            k: number of tokens to keep, instead of a rate.
            sizes: (B, N), how many patches each token stands for, if they were merged (proportional attention).
            prefix_only: if all tokens are kept, compute the protected ones only, (B, P, C).
            get_idx: also return the `Reorganization`, None if all tokens were kept.
            get_tokens: with the tokens before and after.
            get_scores: with their scores, also if all tokens were kept.
            kwargs: what the attention takes, such as `rope`.
        """
        settings, num_prefix = self.token_settings, self.num_prefix_tokens
        num_tokens, done, way = x.shape[1] - num_prefix, None, WAYS[settings.way]
        if k is None:
            k = num_kept(num_tokens, self.keep_rate if keep_rate is None else keep_rate)
        if sizes is not None:
            kwargs['attn_mask'] = size_bias(sizes, num_prefix, x.dtype)
        if k >= num_tokens and not get_scores:
            if prefix_only:
                x = self.feed_forward(self.attend(x, num_queries=num_prefix, **kwargs)[0])
            else:
                x = super().forward(x, **kwargs)
        else:
            score = SCORES[settings.score] if way.needs_scores or get_scores else None
            x, scores = self.attend(x, score=score, **kwargs)
            scores = scores if scores is None else scores[:, num_prefix:]
            done = Reorganization(sizes=sizes)
            if k < num_tokens:
                prefix, tokens = x.tensor_split([num_prefix], dim=1)
                remaining, done = way.function(tokens, scores, k, sizes)
                done = done._replace(tokens=tokens, remaining=remaining) if get_tokens else done
                x = torch.cat([prefix, remaining], dim=1)
            done = done._replace(scores=scores) if get_scores else done
            x = self.feed_forward(x)
        return (x, done) if get_idx else x

    def run_attention(self, x, score=None, **kwargs):
        """The attention of tokens (B, N, C) and, with a score, the scores (B, N), None without."""
        result = self.attn(x, score=score, **kwargs)
        return result if score is not None else (result, None)


class EViTBlock(ReorganizingBlock, Block):
    """The block of a `VisionTransformer`."""

    def attend(self, x, num_queries=None, **kwargs):
        """Attention and its residual; → tokens (B, N, C), or the first `num_queries`, and the scores (B, N) or None."""
        attn, scores = self.run_attention(self.norm1(x), num_queries=num_queries, **kwargs)
        return x[:, :num_queries] + self.drop_path1(self.ls1(attn)), scores

    def feed_forward(self, x):
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class EViTEvaBlock(ReorganizingBlock, EvaBlock):
    """The block of an `Eva`."""

    def attend(self, x, num_queries=None, **kwargs):
        attn, scores = self.run_attention(self.norm1(x), num_queries=num_queries, **kwargs)
        return x[:, :num_queries] + self.drop_path1(attn if self.gamma_1 is None else self.gamma_1 * attn), scores

    def feed_forward(self, x):
        mlp = self.mlp(self.norm2(x))
        return x + self.drop_path2(mlp if self.gamma_2 is None else self.gamma_2 * mlp)


class EViTEvaBlockPostNorm(ReorganizingBlock, EvaBlockPostNorm):
    """The block of an `Eva` that normalises after attention and MLP."""

    def attend(self, x, num_queries=None, **kwargs):
        attn, scores = self.run_attention(x, num_queries=num_queries, **kwargs)
        return x[:, :num_queries] + self.drop_path1(self.norm1(attn)), scores

    def feed_forward(self, x):
        return x + self.drop_path2(self.norm2(self.mlp(x)))
