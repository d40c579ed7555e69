"""The method of EViT as pure functions: what becomes of the tokens of a block."""
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

from evit.gather import gather_rows
from evit.merging import merge_tokens, merging_blocks, merging_rate


class Reorganization(NamedTuple):
    """What a block did with N tokens.

    Attributes:
        idx: (B, k), positions of the kept tokens; None if it kept all.
        sizes: (B, k), how many patches each stands for; None unless the others were merged.
        other_idx: (B, N − k), positions of the others; None unless they were merged.
        nearest: (B, N − k), which of the k each of them joined.
        tokens, remaining: (B, N, C) and (B, k [+ 1], C), the tokens before and after, if asked for.
        scores: (B, N), what ranks the tokens, if asked for.
    """
    idx: torch.Tensor = None
    sizes: torch.Tensor = None
    other_idx: torch.Tensor = None
    nearest: torch.Tensor = None
    tokens: torch.Tensor = None
    remaining: torch.Tensor = None
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


def drop_tokens(tokens, scores, k, sizes=None):
    """Keep the k tokens with the highest scores; drop the others (`Way`)."""
    remaining, idx = reorganize_tokens(tokens, scores, k)
    return remaining, Reorganization(idx)


def fuse_tokens(tokens, scores, k, sizes=None):
    """Keep the k tokens with the highest scores; fuse the others into one (`Way`)."""
    remaining, idx = reorganize_tokens(tokens, scores, k, fuse=True)
    return remaining, Reorganization(idx)


def merge_similar_tokens(tokens, scores, k, sizes=None):
    """Merge the N − k tokens that are most similar to another one into that, whatever their scores (`Way`)."""
    remaining, *done = merge_tokens(tokens, sizes, k)
    merged_sizes, idx, other_idx, nearest = done
    return remaining, Reorganization(idx, merged_sizes, other_idx, nearest)


def paper_blocks(depth):
    """After a quarter, a half and three quarters of the blocks, as in the paper: 3, 6 and 9 of 12."""
    return tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))


class Way(NamedTuple):
    """A way to treat the tokens that a block does not keep.

    If its `Reorganization` has sizes, the tokens count for so many patches in later attention (`size_bias`) and in
    pooling. Otherwise, an extra token counts in average pooling for all patches that it stands for.

    Attributes:
        function: (tokens (B, N, C), scores (B, N), k, sizes (B, N) or None) → tokens (B, k + extra_tokens, C), the kept
            ones first, and the `Reorganization`.
        participle: what the other tokens are then, for tables and captions.
        extra_tokens: how many tokens follow the kept ones, 0 or 1.
        needs_scores: whether the function reads the scores. If not, they may be None, so a model needs no class token.
        blocks: depth → numbers of the default blocks.
        block_rate: (depth, keep rate of the model, number of patches, width) → the rate in these blocks; None for
            the same.
    """
    function: Callable
    participle: str
    extra_tokens: int = 0
    needs_scores: bool = True
    blocks: Callable = paper_blocks
    block_rate: Callable = None


WAYS = {
    'drop': Way(drop_tokens, 'dropped'),
    'fuse': Way(fuse_tokens, 'fused', extra_tokens=1),
    'merge': Way(merge_similar_tokens, 'merged', needs_scores=False, blocks=merging_blocks, block_rate=merging_rate),
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


# What ranks the tokens of a block: functions of its queries, keys and values (B, H, N, D), the factor 1/√D and the bias
# of `class_attention` → (B, N), prefix tokens included, of which the highest are kept
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
