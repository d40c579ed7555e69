"""What a model kept, as pictures: from kept positions back to image patches, and from those to files.

In a notebook, with normalised `images` (B, 3, H, W) and a `model` of `models_evit` in evaluation mode::

    masks = kept_patches(model, images)                                    # (B, stages, rows, cols)
    pictures = mask_images(images, masks, model.patch_embed.patch_size)    # (B, stages, 3, H, W)
    plt.imshow(pictures[0, -1].permute(1, 2, 0))                           # the first image after the last stage

A stage is a reorganising block that dropped something.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import repeat
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms.functional import to_pil_image


def compose_positions(kept, batch_size, num_patches, device=None):
    """Which patches of the image still have their own token after each stage.

    A stage numbers the tokens that the stage before it left: the kept ones in the order of their positions, then the
    fused one where there is one. A fused token is given the number after the last patch, so that it stands for none
    wherever it goes; without fusing no position refers to it.

    Args:
        kept: [(B, k) of each stage], the positions kept among the stage's input without the protected tokens.
        batch_size, num_patches, device: of the masks, known even if there is no stage.
    Returns:
        bool (B, stages, num_patches).
    """
    masks = torch.zeros(batch_size, len(kept), num_patches + 1, dtype=torch.bool, device=device)
    patches = torch.arange(num_patches, device=device).expand(batch_size, -1)          # (B, N), the patch of each token
    for mask, idx in zip(masks.unbind(1), kept):
        patches = patches.gather(1, idx)                                               # (B, k)
        mask.scatter_(1, patches, True)
        patches = F.pad(patches, (0, 1), value=num_patches)                            # (B, k + 1)
    return masks[..., :num_patches]


@torch.no_grad()
def kept_patches(model, images, keep_rate=None):
    """Which patches a model still has after each stage: bool (B, stages, rows, cols), on the images' device.

    Args:
        model: an EViT, not wrapped, in evaluation mode.
        images: (B, 3, H, W), normalised, on the model's device.
        keep_rate: as in the model's `forward`; at rate 1 there are 0 stages.
    """
    grid_size = model.patch_embed.dynamic_feat_size(images.shape[-2:])
    kept = model(images, keep_rate, get_idx=True)[1]
    masks = compose_positions(kept, len(images), grid_size[0] * grid_size[1], images.device)
    return masks.unflatten(-1, grid_size)


def denormalize(images, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD):
    """Images (B, 3, H, W) normalised with `mean` and `std` → float32 in [0, 1]."""
    mean, std = (torch.tensor(value, device=images.device).view(-1, 1, 1) for value in (mean, std))    # (3, 1, 1)
    return (images * std + mean).clamp(0, 1)


def mask_images(images, masks, patch_size, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD):
    """The images after each stage, black where the patch has no token of its own any more.

    Pixels at the right and the bottom that make no whole patch are black too, because the model does not see them.

    Args:
        images: (B, 3, H, W), normalised with `mean` and `std`.
        masks: bool (B, stages, rows, cols).
        patch_size: (height, width) in pixels.
    Returns:
        float32 (B, stages, 3, H, W) in [0, 1], not normalised.
    """
    height, width = patch_size
    masks = repeat(masks, 'b stages rows cols -> b stages (rows height) (cols width)', height=height, width=width)
    # Pads where patches end before the image does, and crops where the model padded the image to whole patches.
    masks = F.pad(masks, (0, images.shape[-1] - masks.shape[-1], 0, images.shape[-2] - masks.shape[-2]))
    return denormalize(images, mean, std).unsqueeze(1) * masks.unsqueeze(2)


def save_masked(model, images, indices, output_dir, keep_rate=None,
                mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD):
    """Write each image as `img_{index}_a.jpg` and, after each stage, as `img_{index}_l0.jpg`, `img_{index}_l1.jpg`, …

    Args:
        model, images, keep_rate: as in `kept_patches`.
        indices: the number of each image, for its file names; processes that share a folder share no number.
        output_dir: made if missing.
        mean, std: what the images were normalised with.
    Raises:
        ValueError: there are not as many indices as images.
    """
    if len(indices) != len(images):
        raise ValueError(f'{len(indices)} indices for {len(images)} images')
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    inputs = denormalize(images, mean, std)
    masked = mask_images(images, kept_patches(model, images, keep_rate), model.patch_embed.patch_size, mean, std)
    for index, picture, stages in zip(indices, inputs, masked):
        save_jpeg(picture, output_dir / f'img_{index}_a.jpg')
        for stage, picture in enumerate(stages):
            save_jpeg(picture, output_dir / f'img_{index}_l{stage}.jpg')


def save_jpeg(picture, path):
    """Write a picture (3, H, W) in [0, 1]; colour at full resolution, so that none bleeds into black patches."""
    to_pil_image((picture * 255).round().byte().cpu()).save(path, quality=95, subsampling=0)
