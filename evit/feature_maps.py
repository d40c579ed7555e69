"""timm's `forward_intermediates` for an EViT: maps of the whole grid from the tokens that remain."""
import torch.nn.functional as F
from timm.models._features import feature_take_indices

from evit.reorganization import patches_after


def place_tokens(tokens, patches, grid):
    """Put tokens (B, n, C) in their places on a grid (B, N, C), given the patch of each (B, n or more).

    A fused token, of patch N, has no place.
    """
    idx = patches[:, :tokens.shape[1], None].expand_as(tokens)                         # (B, n, C)
    return F.pad(grid, (0, 0, 0, 1)).scatter(1, idx, tokens)[:, :-1]


class FeatureMaps:
    """Mixin for an EViT with `embed` and `run_block`, as `models_evit.TokenReorganization` has them."""

    def forward_intermediates(self, x, indices=None, return_prefix_tokens=False, norm=False, stop_early=False,
                              output_fmt='NCHW', intermediates_only=False, output_dict=False, attn_mask=None,
                              is_causal=False):
        """timm's, with each block at its own rate.

        'NCHW' gives the whole grid: the tokens that remain in their places, and every other patch as it was when it
        left, after the attention of the block that did not keep it. 'NLC' gives the tokens that remain.

        Raises:
            ValueError: another output_fmt, or an attention mask, which would not fit the tokens that remain.
        """
        if output_fmt not in ('NCHW', 'NLC') or attn_mask is not None or is_causal:
            raise ValueError("output_fmt must be 'NCHW' or 'NLC', and an EViT takes no attention mask")
        take, last = feature_take_indices(len(self.blocks), indices)
        image_size, num_prefix_tokens = x.shape[-2:], self.num_prefix_tokens
        x, rope = self.embed(x)
        outputs, grid, patches, sizes, num_patches = [], None, None, None, x.shape[1] - num_prefix_tokens
        for i in range(last + 1 if stop_early else len(self.blocks)):
            x, done = self.run_block(i, x, rope, patches, sizes=sizes, get_tokens=output_fmt == 'NCHW')
            if done is not None:
                if output_fmt == 'NCHW':
                    grid = done.tokens if grid is None else place_tokens(done.tokens, patches, grid)       # (B, N, C)
                patches, sizes = patches_after(patches, done.idx, num_patches), done.sizes
            if i in take:
                prefix, tokens = (self.norm(x) if norm else x).tensor_split([num_prefix_tokens], dim=1)
                if output_fmt == 'NCHW':
                    if grid is not None:
                        tokens = place_tokens(tokens, patches, self.norm(grid) if norm else grid)
                    grid_size = self.patch_embed.dynamic_feat_size(image_size)
                    tokens = tokens.transpose(1, 2).unflatten(2, grid_size).contiguous()             # (B, C, H, W)
                outputs.append((tokens, prefix))
        features = None if intermediates_only else self.norm(x)
        if output_dict:
            named = {'image_intermediates': [tokens for tokens, _ in outputs],
                     'image_intermediates_prefix': [prefix for _, prefix in outputs] if return_prefix_tokens else None,
                     'image_features': features}
            return {name: value for name, value in named.items() if value is not None}
        outputs = outputs if return_prefix_tokens else [tokens for tokens, _ in outputs]
        return outputs if intermediates_only else (features, outputs)
