"""LV-ViT: timm's vision transformer with a convolutional stem, whose patch tokens are classified, too.

Model: "All Tokens Matter: Token Labeling for Training Better Vision Transformers" (NeurIPS 2021).
`formats/token_labels.py` has the labels of the patch tokens.
"""
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import PatchEmbed, nchw_to
from timm.models.vision_transformer import VisionTransformer, init_weights_vit_timm


class ConvStem(PatchEmbed):
    """A patch embedding by three convolutions, which halve the resolution, and a projection of what is in a patch.

    Modifications: the convolutions (7×7 with stride 2, then 3×3 twice), each with batch norm and ReLU. The patch size
    is fixed and even, and images are not padded.
    """

    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=384, channels=64, device=None, dtype=None,
                 **kwargs):
        super().__init__(img_size, patch_size, channels, embed_dim, device=device, dtype=dtype, **kwargs)
        if any(side % 2 for side in self.patch_size) or self.dynamic_img_pad:
            raise ValueError(f'{type(self).__name__} needs an even patch size, and does not pad images')
        options = dict(device=device, dtype=dtype)
        for i, (inputs, kernel, stride) in enumerate([(in_chans, 7, 2), (channels, 3, 1), (channels, 3, 1)], start=1):
            convolution = nn.Conv2d(inputs, channels, kernel, stride, padding=kernel // 2, bias=False, **options)
            setattr(self, f'conv{i}', convolution)
            setattr(self, f'bn{i}', nn.BatchNorm2d(channels, **options))
        half = [side // 2 for side in self.patch_size]
        self.proj = nn.Conv2d(channels, embed_dim, half, half, **options)

    def set_input_size(self, img_size=None, patch_size=None):
        if patch_size is not None and patch_size not in (self.patch_size, self.patch_size[0]):
            raise ValueError(f'the patch size of {type(self).__name__} is fixed')
        super().set_input_size(img_size)

    def forward(self, x):
        """Images (B, 3, H, W) → tokens (B, N, C), or (B, H/p, W/p, C) for timm's `dynamic_img_size`."""
        size = tuple(x.shape[-2:])
        fits = (size == self.img_size if self.strict_img_size else
                all(side % patch == 0 for side, patch in zip(size, self.patch_size)))
        if not fits:
            raise AssertionError(f'input size {size} does not match the model: {self.img_size}')
        for convolution, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(convolution(x)), inplace=True)
        x = self.proj(x)                                                               # (B, C, H/p, W/p)
        return self.norm(x.flatten(2).transpose(1, 2) if self.flatten else nchw_to(x, self.output_fmt))


class Scale(nn.Module):
    """Multiplication by a constant, in the place of LayerScale."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


class LVViT(VisionTransformer):
    """A vision transformer whose patch tokens are classified, too.

    Modifications: `ConvStem`; both residual branches of a block are divided by `skip_lam` (before stochastic depth,
    which commutes with it); an auxiliary classifier of the patch tokens, of whose logits the largest of each class
    counts half.

    Args:
        skip_lam: divisor of the residual branches.
        others: timm's, except those of `UNSERVED`.
    Raises:
        ValueError: an argument is not served.
    """
    UNSERVED = {'embed_layer', 'init_values', 'global_pool', 'patch_drop_rate'}

    def __init__(self, *args, skip_lam=1., mlp_ratio=3., qkv_bias=False, norm_layer=nn.LayerNorm, **kwargs):
        if unserved := self.UNSERVED & kwargs.keys():
            raise ValueError(f'{type(self).__name__} takes no {min(unserved)}')
        super().__init__(*args, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, norm_layer=norm_layer, embed_layer=ConvStem,
                         **kwargs)
        self.reset_aux_head()
        init_weights_vit_timm(self.aux_head)
        for block in self.blocks if skip_lam != 1 else ():
            block.ls1, block.ls2 = Scale(1 / skip_lam), Scale(1 / skip_lam)

    def reset_classifier(self, num_classes, global_pool=None):
        """Reset both classifiers. ValueError for other pooling than by the class token, except '' without classes.

        0 classes leave the features of the class token, or of all tokens with '', as timm's `features_only` asks for.
        """
        if global_pool not in (None, 'token') and (global_pool or num_classes):
            raise ValueError(f'{type(self).__name__} classifies by the class token')
        super().reset_classifier(num_classes, 'token' if num_classes else global_pool)
        self.reset_aux_head()

    def reset_aux_head(self):
        like = self.cls_token
        self.aux_head = nn.Identity()
        if self.num_classes:
            self.aux_head = nn.Linear(self.embed_dim, self.num_classes, device=like.device, dtype=like.dtype)

    def forward_head(self, x, pre_logits=False):
        """Tokens (B, 1 + n, C) → logits (B, K): those of the class token + 0.5 · max over the others'."""
        if pre_logits or not self.num_classes:
            return super().forward_head(x, pre_logits)
        logits, token_logits = self.forward_heads(x)
        return logits + 0.5 * token_logits.amax(dim=1)

    def forward_heads(self, x):
        """Tokens (B, 1 + n, C) → logits of the class token (B, K) and of the others (B, n, K)."""
        return super().forward_head(x), self.aux_head(x[:, self.num_prefix_tokens:])
