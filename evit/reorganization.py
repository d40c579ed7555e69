"""The method of EViT as pure functions: which tokens a block keeps, and what becomes of the others."""
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

from evit.gather import gather_rows


class Reorganization(NamedTuple):
    """What a block did with N tokens.

    Attributes:
        idx: (B, k), positions of the kept tokens; None if it kept all.
        sizes: (B, k), how many patches each stands for; None unless the others were merged.
        other_idx: (B, N − k), positions of the others; None unless they were merged.
        nearest: (B, N − k), which of the k each of them joined.
        tokens, scores: (B, N, C) and (B, N), the tokens themselves and what ranked them, if asked for.
    """
    idx: torch.Tensor = None
    sizes: torch.Tensor = None
    other_idx: torch.Tensor = None
    nearest: torch.Tensor = None
    tokens: torch.Tensor = None
    scores: torch.Tensor = None


# --- Ways to treat the tokens that are not kept ---------------------------------------------------------------------

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
    remaining = gather_rows(tokens, idx)                                               # (B, k, C)
    if fuse:
        # Kept tokens get weight 0, which saves computing the complement of idx. Without autocast, because casting
        # all tokens would cost more than this product saves.
        with torch.autocast(tokens.device.type, enabled=False):
            weights = scores.scatter(1, idx, 0.).to(tokens.dtype).unsqueeze(1)         # (B, 1, N)
            remaining = torch.cat([remaining, weights @ tokens], dim=1)                # (B, k + 1, C)
    return remaining, idx


def merge_into_nearest(tokens, others, sizes, other_sizes):
    """Merge each of the other tokens into the token that it is most similar to, by the cosine.

    A token becomes the mean of all that it stands for, weighted by their sizes: the joining of DiffRate (ICCV 2023)
    and Token Merging (ICLR 2023), here for the tokens that EViT does not keep. The matrix product in place of a scatter
    with a reduction exports to every runtime.

    Args:
        tokens: (B, k, C), the kept ones.
        others: (B, n, C).
        sizes, other_sizes: (B, k) and (B, n), how many patches each stands for.
    Returns:
        tokens (B, k, C), their sizes (B, k), and for each of the others the position of the token it joined (B, n).
    """
    similarities = others.detach() @ F.normalize(tokens.detach(), dim=-1).transpose(1, 2)         # (B, n, k), scaled
    nearest = similarities.argmax(dim=-1)                                                       # (B, n)
    joins = nearest.unsqueeze(-1) == torch.arange(tokens.shape[1], device=tokens.device)        # (B, n, k)
    weights = joins * other_sizes.unsqueeze(-1)                                                 # (B, n, k)
    merged_sizes = sizes + weights.sum(dim=1)                                                   # (B, k)
    sums = sizes.unsqueeze(-1) * tokens + weights.transpose(1, 2) @ others                      # (B, k, C)
    return sums / merged_sizes.unsqueeze(-1), merged_sizes, nearest


def merge_tokens(tokens, scores, k, sizes=None):
    """Keep the k tokens with the highest scores; merge the others into them.

    Args:
        tokens, scores, k: as in `reorganize_tokens`.
        sizes: (B, N), how many patches each token stands for; None for one each.
    Returns:
        tokens (B, k, C) and the `Reorganization`.
    """
    with torch.autocast(tokens.device.type, enabled=False):        # bfloat16 similarities would choose other tokens
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        sizes = torch.ones_like(scores, dtype=dtype) if sizes is None else sizes
        order = scores.argsort(dim=1, descending=True)                                 # (B, N)
        rows = gather_rows(tokens.to(dtype), order)                                    # (B, N, C)
        merged, merged_sizes, nearest = merge_into_nearest(
            *rows.tensor_split([k], dim=1), *sizes.gather(1, order).tensor_split([k], dim=1))
    idx, other_idx = order.tensor_split([k], dim=1)
    return merged.to(tokens.dtype), Reorganization(idx, merged_sizes, other_idx, nearest)


def drop_tokens(tokens, scores, k, sizes=None):
    """Keep the k tokens with the highest scores; drop the others. As `merge_tokens` otherwise."""
    remaining, idx = reorganize_tokens(tokens, scores, k)
    return remaining, Reorganization(idx)


def fuse_tokens(tokens, scores, k, sizes=None):
    """Keep the k tokens with the highest scores; fuse the others into one. As `merge_tokens` otherwise."""
    remaining, idx = reorganize_tokens(tokens, scores, k, fuse=True)
    return remaining, Reorganization(idx)


class Way(NamedTuple):
    """A way to treat the tokens that a block does not keep.

    If its `Reorganization` has sizes, the tokens count for so many patches in later attention (`size_bias`) and in
    average pooling. Otherwise, an extra token counts in average pooling for all patches that it stands for.

    Attributes:
        function: (tokens (B, N, C), scores (B, N), k, sizes (B, N) or None) → tokens (B, k + extra_tokens, C), the kept
            ones first, and the `Reorganization`.
        participle: what the other tokens are then, for tables and captions.
        extra_tokens: how many tokens follow the kept ones, 0 or 1.
    """
    function: Callable
    participle: str
    extra_tokens: int = 0


WAYS = {
    'drop': Way(drop_tokens, 'dropped'),
    'fuse': Way(fuse_tokens, 'fused', extra_tokens=1),
    'merge': Way(merge_tokens, 'merged'),
}


# --- Scores ---------------------------------------------------------------------------------------------------------

def class_attention(q, k, scale, bias=None):
    """Softmax attention of the class token to every token, averaged over heads (Eq. 2).

    Computed in float32 or better, because it decides which tokens are kept. It is a sum of products instead of a matrix
    product, which autocast or TF32 would round; for a single row that is no slower.

    Args:
        q: (B, H, N, D); only row 0, the class token's query, is read.
        k: (B, H, N, D).
        scale: factor of the product, 1/√D.
        bias: added to the logits of each key, (B, 1, 1, N), or None.
    Returns:
        (B, N); each row sums to 1.
    """
    query = q[:, :, :1].to(torch.promote_types(q.dtype, torch.float32)) * scale        # (B, H, 1, D)
    logits = (query * k).sum(dim=-1)                                                   # (B, H, N)
    if bias is not None:
        logits = logits + bias.squeeze(2)
    return logits.softmax(dim=-1).mean(dim=1)


# What ranks the tokens of a block: functions of its queries, keys and values (B, H, N, D), the factor 1/√D and the bias of
# `class_attention` → (B, N), prefix tokens included, of which the highest are kept
SCORES = {
    'class_attention': lambda q, k, v, scale, bias=None: class_attention(q, k, scale, bias),
}


# --- Bookkeeping ----------------------------------------------------------------------------------------------------

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


def weigh_by_size(x, sizes, num_patches, include_prefix=False):
    """Scale tokens so that their plain mean is the mean over the patches that they stand for.

    Args:
        x: (B, P + n, C), with P prefix tokens.
        sizes: (B, n), how many patches each of the others stands for; `num_patches` in all.
        include_prefix: whether the prefix tokens are part of the mean, as one patch each.
    """
    prefix, tokens = x.tensor_split([x.shape[1] - sizes.shape[1]], dim=1)
    share = tokens.shape[1] / num_patches
    if include_prefix:
        share = x.shape[1] / (num_patches + prefix.shape[1])
        prefix = prefix * share
    weights = (sizes.to(torch.promote_types(x.dtype, torch.float32)) * share).to(x.dtype)
    return torch.cat([prefix, tokens * weights.unsqueeze(-1)], dim=1)


def size_bias(sizes, num_prefix_tokens, dtype):
    """Proportional attention: log(size), added to the logits of a key, lets it count as many times (Token Merging, §3).

    Args:
        sizes: (B, n), how many patches each token stands for; each prefix token counts once.
    Returns:
        (B, 1, 1, P + n) of `dtype`, an attention mask.
    """
    return F.pad(sizes.log(), (num_prefix_tokens, 0)).to(dtype)[:, None, None]


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
    # Sizes are taken from `patches`, so that a graph with a dynamic batch size can be exported
    idx = patches[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[3])     # (B, 1 or H, n, 2D)
    return table.expand(patches.shape[0], -1, -1, -1).gather(2, idx)
