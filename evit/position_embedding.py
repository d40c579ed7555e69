"""Position embeddings of another image size, resized as the model's family does."""
import torch
import torch.nn as nn
from timm.layers import resample_abs_pos_embed


def antialiases(model):
    """Whether the model's family resizes a position embedding with antialiasing: timm does, DeiT and LV-ViT do not."""
    return not ((getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or '').startswith(('deit', 'lvvit'))


def resize_pos_embed(pos_embed, model, new_size=None, old_size=None):
    """Resize a position embedding to a grid, bicubic, as the model's family does (`antialiases`).

    Args:
        pos_embed: (1, P + N, C), or (1, N, C) if the model's prefix tokens have none.
        model: a model with `patch_embed`.
        new_size: (rows, columns); the model's if None.
        old_size: its present size; a square if None.
    """
    num_prefix_tokens = 0 if model.no_embed_class else model.num_prefix_tokens
    return resample_abs_pos_embed(pos_embed, new_size or model.patch_embed.grid_size, old_size, num_prefix_tokens,
                                  antialias=antialiases(model))


class ResizedPositions:
    """Mixin for a vision transformer of timm, whose position embedding is then resized as `resize_pos_embed` does."""

    def set_input_size(self, img_size=None, patch_size=None):
        """timm's, but the position embedding is resized as on loading a checkpoint (`resize_pos_embed`)."""
        pos_embed, grid_size = self.pos_embed, self.patch_embed.grid_size
        super().set_input_size(img_size, patch_size)
        if pos_embed is not None and self.patch_embed.grid_size != grid_size:
            resized = resize_pos_embed(pos_embed.detach(), self, self.patch_embed.grid_size, grid_size)
            self.pos_embed = nn.Parameter(resized, requires_grad=pos_embed.requires_grad)

    def _pos_embed(self, x):
        if not self.dynamic_img_size or self.pos_embed is None or antialiases(self):
            return super()._pos_embed(x)
        pos_embed = resize_pos_embed(self.pos_embed, self, x.shape[1:3], self.patch_embed.grid_size)
        prefix = [token.expand(len(x), -1, -1) for token in (self.cls_token, getattr(self, 'dist_token', None),
                                                             self.reg_token) if token is not None]
        x = x.flatten(1, 2)                                                            # (B, H, W, C) → (B, N, C)
        if self.no_embed_class:
            return self.pos_drop(torch.cat([*prefix, x + pos_embed], dim=1))
        return self.pos_drop(torch.cat([*prefix, x], dim=1) + pos_embed)
