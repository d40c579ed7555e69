"""Pooling in which a token counts for all patches that it stands for."""
import torch

from evit.merging import size_bias
from evit.reorganization import WAYS


class WeighedPooling:
    """Mixin for an EViT that classifies its remaining tokens."""

    def classify(self, x, stages, num_patches):
        """Normalised tokens (B, P + n, C) → logits (B, num_classes).

        Where the head pools by average or by attention, a token counts for all patches that it stands for.

        Args:
            stages: as `run_blocks` returns them.
            num_patches: N.
        """
        stages, prefix = [stage for stage in stages if stage and stage.idx is not None], self.num_prefix_tokens
        sizes = stages[-1].sizes if stages else None
        if getattr(self, 'attn_pool', None) is not None:
            if sizes is None:
                return self.forward_head(x)
            first = 0 if getattr(self, 'pool_include_prefix', True) else prefix
            bias = size_bias(sizes, prefix, x.dtype)[..., first:]
            return self.head(self.head_drop(self.fc_norm(self.attn_pool(x[:, first:], attn_mask=bias))))
        if sizes is None and stages and WAYS[self.token_settings.way].extra_tokens:
            sizes = patches_per_token([stage.idx for stage in stages], num_patches)
        if sizes is not None and self.global_pool == 'avg':
            x = weigh_by_size(x, sizes, num_patches, getattr(self, 'pool_include_prefix', False))
        return self.forward_head(x)


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
