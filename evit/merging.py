"""The merging of similar tokens as pure functions.

The pairs are those of Token Merging (ICLR 2023, §3): two sets in turn, of which the first looks for its nearest in the
second. What differs: similarity is that of the tokens themselves instead of their keys; the tokens join by a matrix
product instead of a scatter with a reduction, which exports to every runtime; any number can leave.
"""
import math
from functools import lru_cache

import torch
import torch.nn.functional as F

from evit.gather import gather_rows


def merge_tokens(tokens, sizes, k):
    """Of N tokens, merge the N − k that are most similar (cosine) to a token of the other half into these.

    A token becomes the mean of all that it stands for, weighted by their sizes. If more than half of the tokens are to
    leave, the other set is k tokens, evenly spaced.

    Args:
        tokens: (B, N, C), without prefix tokens.
        sizes: (B, N), how many patches each stands for; None for one each.
        k: how many stay, k < N.
    Returns:
        tokens (B, k, C), their sizes (B, k) and positions (B, k), and of those that left the positions (B, N − k) and
        which of the k each joined (B, N − k).
    """
    with torch.autocast(tokens.device.type, enabled=False):        # bfloat16 similarities would choose other tokens
        x = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        if sizes is None:
            sizes = x.new_ones(x.shape[:2])
        num_targets = min(k, x.shape[1] // 2)
        candidates, targets = split(x, num_targets)                                    # (B, M, C), (B, T, C)
        candidate_sizes, target_sizes = split(sizes, num_targets)                      # (B, M), (B, T)
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        candidate_places, target_places = split(places, num_targets)

        lengths, target_lengths = split(x.detach().norm(dim=-1).clamp_min(1e-12), num_targets)         # (B, M), (B, T)
        products = candidates.detach() @ targets.detach().transpose(1, 2)              # (B, M, T)
        best, nearest = (products / target_lengths.unsqueeze(1)).max(dim=-1)           # (B, M) each
        order = (best / lengths).argsort(dim=1)                                        # the least similar first
        staying, leaving = order.tensor_split([k - num_targets], dim=1)                # (B, k − T), (B, N − k)
        joins = nearest.gather(1, leaving)                                             # (B, N − k)

        ones = joins.unsqueeze(1) == torch.arange(num_targets, device=x.device).unsqueeze(-1)          # (B, T, N − k)
        weights = ones * candidate_sizes.gather(1, leaving).unsqueeze(1)
        merged_sizes = target_sizes + weights.sum(dim=-1)                              # (B, T)
        merged = torch.baddbmm((target_sizes / merged_sizes).unsqueeze(-1) * targets,
                               weights / merged_sizes.unsqueeze(-1), gather_rows(candidates, leaving))       # (B, T, C)
        return (torch.cat([gather_rows(candidates, staying), merged], dim=1).to(tokens.dtype),
                torch.cat([candidate_sizes.gather(1, staying), merged_sizes], dim=1),
                torch.cat([candidate_places.gather(1, staying), target_places], dim=1),
                candidate_places.gather(1, leaving), joins + (k - num_targets))


def split(x, num_targets):
    """(B, N, …) → candidates (B, N − T, …) and T targets, evenly spaced (B, T, …)."""
    num_tokens = x.shape[1]
    if num_targets == num_tokens // 2:
        return x[:, ::2], x[:, 1::2]
    targets = (2 * torch.arange(num_targets, device=x.device) + 1) * num_tokens // (2 * num_targets)
    is_target = torch.zeros(num_tokens, dtype=torch.int64, device=x.device).scatter(0, targets, 1)
    return x.index_select(1, is_target.argsort(stable=True)[:num_tokens - num_targets]), x.index_select(1, targets)


def size_bias(sizes, num_prefix_tokens, dtype):
    """Proportional attention: log(size), added to the logits of a key, lets it count as many times (Token Merging, §3).

    Args:
        sizes: (B, n), how many patches each token stands for; each prefix token counts once.
    Returns:
        (B, 1, 1, P + n) of `dtype`, an attention mask.
    """
    length = num_prefix_tokens + sizes.shape[1]
    # The memory-efficient kernel of a GPU would copy a mask whose rows do not begin at a multiple of 8 numbers
    bias = F.pad(sizes.log(), (num_prefix_tokens, -length % 8)).to(dtype)
    return bias[:, None, None, :length]


# --- The schedule ---------------------------------------------------------------------------------------------------

def merging_blocks(depth):
    """The first two blocks, then every second up to three quarters of the depth: 0, 1, 3, 5, 7, 9 of 12."""
    return 0, *range(1, 3 * depth // 4 + 1, 2)


@lru_cache
def merging_rate(depth, keep_rate, num_patches, dim):
    """The rate in `merging_blocks` at which merging costs as much as fusing at `keep_rate` in the blocks of the paper.

    Counted are multiply–accumulates of attention, MLP (4 times as wide) and similarities, per channel and image; of the
    last block, which computes what the class token needs, keys and values only.
    """
    def cost(rate, blocks, fuses):
        num_tokens, total = num_patches, 0.
        for i in range(depth - 1):
            k = math.ceil(rate * num_tokens) if i in blocks else num_tokens
            total += 4 * dim * num_tokens + 2 * num_tokens ** 2
            if k < num_tokens and not fuses:
                total += num_tokens ** 2 / 4 + (num_tokens - k) * num_tokens / 2
            num_tokens = k + (k < num_tokens and fuses)
            total += 8 * dim * num_tokens
        return total + 2 * dim * num_tokens

    target = cost(keep_rate, (depth // 4, depth // 2, 3 * depth // 4), fuses=True)
    low, high, blocks = 0., 1., merging_blocks(depth)
    for _ in range(40):
        rate = (low + high) / 2
        low, high = (rate, high) if cost(rate, blocks, fuses=False) <= target else (low, rate)
    return low
