"""timm's `forward_intermediates` for an EViT: maps of the whole grid from the tokens that remain."""
import torch
import torch.nn.functional as F
from timm.models._features import feature_take_indices

from evit.gather import take as rows
from evit.reorganization import patches_after


class PatchTracks:
    """What becomes of each patch: the token that stands for it, and what the patch differs from this token by.

    A patch whose token was merged belongs to the token that it joined, a patch whose token was dropped or fused to the
    kept token that was most similar to it. It differs from that token as when they met, and changes as the token does.

    Attributes:
        owner: (B, N), the position of each patch's token, without the prefix tokens; None before the first stage.
        delta: (B, N, C), patch minus token.
    """

    def __init__(self):
        self.owner = self.delta = None

    def follow(self, done):
        """Go on after a stage, by its `Reorganization` with tokens."""
        k = done.idx.shape[1]
        kept = torch.arange(k, device=done.idx.device).expand_as(done.idx)
        if done.nearest is None:
            cosines = F.normalize(done.tokens, dim=-1) @ F.normalize(done.remaining[:, :k], dim=-1).transpose(1, 2)
            target = cosines.argmax(dim=-1)                                            # (B, n), of all tokens
        else:
            target = torch.zeros(done.tokens.shape[:2], dtype=torch.int64, device=done.idx.device)
            target = target.scatter(1, done.other_idx, done.nearest)
        target = target.scatter(1, done.idx, kept)
        delta = done.tokens - rows(done.remaining, target)                             # (B, n, C)
        if self.owner is None:
            self.owner, self.delta = target, delta
        else:
            self.owner, self.delta = target.gather(1, self.owner), self.delta + rows(delta, self.owner)

    def grid(self, tokens):
        """Tokens (B, n, C) → patches (B, N, C)."""
        return tokens if self.owner is None else rows(tokens, self.owner) + self.delta


class FeatureMaps:
    """Mixin for an EViT with `embed` and `run_block`, as `models_evit.TokenReorganization` has them."""

    def forward_intermediates(self, x, indices=None, return_prefix_tokens=False, norm=False, stop_early=False,
                              output_fmt='NCHW', intermediates_only=False, output_dict=False, attn_mask=None,
                              is_causal=False):
        """timm's, with each block at its own rate.

        'NCHW' gives the whole grid: a patch without a token of its own is followed by `PatchTracks`. 'NLC' gives the
        tokens that remain.

        Raises:
            ValueError: another output_fmt, or an attention mask, which would not fit the tokens that remain.
        """
        if output_fmt not in ('NCHW', 'NLC') or attn_mask is not None or is_causal:
            raise ValueError("output_fmt must be 'NCHW' or 'NLC', and an EViT takes no attention mask")
        take, last = feature_take_indices(len(self.blocks), indices)
        image_size, num_prefix_tokens = x.shape[-2:], self.num_prefix_tokens
        x, rope = self.embed(x)
        outputs, tracks, patches, sizes, num_patches = [], PatchTracks(), None, None, x.shape[1] - num_prefix_tokens
        for i in range(last + 1 if stop_early else len(self.blocks)):
            x, done = self.run_block(i, x, rope, patches, sizes=sizes, get_tokens=output_fmt == 'NCHW')
            if done is not None:
                if output_fmt == 'NCHW':
                    tracks.follow(done)
                patches, sizes = patches_after(patches, done.idx, num_patches), done.sizes
            if i in take:
                prefix, tokens = x.tensor_split([num_prefix_tokens], dim=1)
                if output_fmt == 'NCHW':
                    tokens = tracks.grid(tokens)                                       # (B, N, C)
                if norm:
                    normed = self.norm(torch.cat([prefix, tokens], dim=1))
                    prefix, tokens = normed.tensor_split([num_prefix_tokens], dim=1)
                if output_fmt == 'NCHW':
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
