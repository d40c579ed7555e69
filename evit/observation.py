"""What an EViT does with images: which patches it keeps, merges and attends to.

A stage is a reorganising block, even if it keeps all of its tokens at rate 1.
"""
import math
from typing import NamedTuple

import torch

from evit.eval_mode import eval_mode
from evit.reorganization import Reorganization, patches_after


def patches_of_tokens(kept, batch_size, num_patches, device=None):
    """The patch of each token before the first stage and after each stage: [(B, n)], one more than there are stages.

    The positions of a stage number the tokens that the stage before it output: the kept ones in the order of their
    positions, then the fused one, if any. A fused token gets the number after the last patch, which stands for no
    patch in later stages; without fusing, no position refers to it.

    Args:
        kept: [(B, k) for each stage], the positions kept among the stage's input without the protected tokens; None
            for a stage that kept all.
        batch_size, num_patches, device: of the result, also without any stage.
    """
    patches = [torch.arange(num_patches, device=device).expand(batch_size, -1)]        # (B, N)
    for idx in kept:
        patches.append(patches[-1] if idx is None else patches_after(patches[-1], idx, num_patches))
    return patches


def compose_positions(kept, batch_size, num_patches, device=None):
    """Which image patches still have their own token after each stage: bool (B, stages, num_patches).

    The arguments are those of `patches_of_tokens`.
    """
    masks = torch.zeros(batch_size, len(kept), num_patches + 1, dtype=torch.bool, device=device)
    for mask, patches in zip(masks.unbind(1), patches_of_tokens(kept, batch_size, num_patches, device)[1:]):
        mask.scatter_(1, patches, True)
    return masks[..., :num_patches]


def groups_of_patches(done, batch_size, num_patches, device=None):
    """Which token each patch is part of after each stage of a model that merges: int (B, stages, num_patches).

    Args:
        done: the stages' `Reorganization`.
    """
    groups = [torch.arange(num_patches, device=device).expand(batch_size, -1)]
    for stage in done:
        group = groups[-1]
        if stage.idx is not None:
            own = torch.arange(stage.idx.shape[1], device=device).expand_as(stage.idx)
            order, target = torch.cat([stage.idx, stage.other_idx], dim=1), torch.cat([own, stage.nearest], dim=1)
            group = torch.empty_like(target).scatter(1, order, target).gather(1, group)
        groups.append(group)
    return torch.stack(groups[1:], dim=1)


class Observation(NamedTuple):
    """What a model did with a batch of images.

    Attributes:
        blocks: the stages, as block numbers from 0.
        kept: bool (B, stages, rows, cols), the patches that have their own token after the stage.
        attention: float32 (B, stages, rows, cols), the class token's attention to each patch in the stage, NaN where
            the patch no longer had a token of its own, or where there is no class token.
        logits: (B, classes).
        groups: int (B, stages, rows, cols), patches with the same number are one token after the stage; None unless the
            model merges tokens.
    """
    blocks: list
    kept: torch.Tensor
    attention: torch.Tensor
    logits: torch.Tensor
    groups: torch.Tensor = None


@torch.no_grad()
def observe(model, images, keep_rate=None):
    """Classify images and record what the model keeps and attends to; → Observation, on the images' device.

    The model runs in eval mode; its mode is restored.

    Args:
        model: an EViT, not wrapped.
        images: (B, 3, H, W), normalised, on the model's device.
        keep_rate: as in the model's `forward`.
    """
    settings = model.token_settings
    stage_blocks = () if settings.token_counts else settings.blocks(len(model.blocks))
    blocks = [i for i, rate in enumerate(model.block_keep_rates(keep_rate)) if rate < 1 or i in stage_blocks]
    with eval_mode(model):
        x, rope = model.embed(images)                                                  # (B, P + N, C)
        num_patches = x.shape[1] - model.num_prefix_tokens
        x, done = model.run_blocks(x, rope, keep_rate, observed=() if model.cls_token is None else blocks,
                                   prefix_only=model.reads_prefix_only())
        stages = [done[i] or Reorganization() for i in blocks]
        logits = model.classify(model.norm(x), done, num_patches)
    grid_size = model.patch_embed.dynamic_feat_size(images.shape[-2:])
    shape = len(images), num_patches
    kept = [stage.idx for stage in stages]
    attention = torch.full((shape[0], len(blocks), shape[1] + 1), math.nan, device=images.device)
    for row, patches, stage in zip(attention.unbind(1), patches_of_tokens(kept, *shape, images.device), stages):
        if stage.scores is not None:
            row.scatter_(1, patches[:, :stage.scores.shape[1]], stage.scores.float())
    groups = None
    if any(stage.nearest is not None for stage in stages):
        groups = groups_of_patches(stages, *shape, images.device).unflatten(-1, grid_size)
    return Observation(blocks, compose_positions(kept, *shape, images.device).unflatten(-1, grid_size),
                       attention[..., :-1].unflatten(-1, grid_size), logits, groups)


def kept_patches(model, images, keep_rate=None):
    """Which patches a model still has after each stage: bool (B, stages, rows, cols). Arguments as in `observe`."""
    return observe(model, images, keep_rate).kept
