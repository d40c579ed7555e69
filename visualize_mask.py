"""From kept positions back to image patches, then to pictures.

`observe` records what a model does with images, `mask_images`, `merge_images` and `attention_images` draw it,
`draw_sheets` arranges it on two sheets. In a notebook, `kept_patches` and `mask_images` are enough::

    masks = kept_patches(model, images)                                    # (B, stages, rows, cols)
    pictures = mask_images(images, masks, model.patch_embed.patch_size)    # (B, stages, 3, H, W)

A stage is a reorganising block, even if it keeps all of its tokens at rate 1.
"""
import bisect
import contextlib
import math
import unicodedata
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import repeat
from PIL import Image, ImageDraw, ImageFont
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import Subset
from torchvision.transforms.functional import rgb_to_grayscale, to_pil_image

from datasets import build_loader, spread
from distributed import log, rank, world_size
from logger import make_output_folder
from samplers import EvalSampler
from token_reorganization import patches_after
from utils import autocast, eval_mode

SHEET_WIDTH = 1680     # pixels at most, unless the headers of very many stages need more
SHEET_IMAGES = 128     # images at most, to keep a sheet readable
HEAT = (68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)       # viridis, lowest to highest
ABSENT = 0.9           # light grey


# --- What the model does --------------------------------------------------------------------------------------------

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
        done: the stages' `Reorganization`; None for a stage that kept all.
    """
    groups = [torch.arange(num_patches, device=device).expand(batch_size, -1)]
    for stage in done:
        group = groups[-1]
        if stage is not None:
            own = torch.arange(stage.kept.shape[1], device=device).expand_as(stage.kept)
            order, target = torch.cat([stage.kept, stage.others], dim=1), torch.cat([own, stage.nearest], dim=1)
            group = torch.empty_like(target).scatter(1, order, target).gather(1, group)
        groups.append(group)
    return torch.stack(groups[1:], dim=1)


class Observation(NamedTuple):
    """What a model did with a batch of images.

    Attributes:
        blocks: the stages, as block numbers from 0.
        kept: bool (B, stages, rows, cols), the patches that have their own token after the stage.
        attention: float32 (B, stages, rows, cols), the class token's attention to each patch in the stage, NaN where
            the patch no longer had a token of its own.
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
    blocks = [i for i, rate in enumerate(model.block_keep_rates(keep_rate)) if rate < 1 or i in model.drop_loc]
    done, scores = [], []
    with eval_mode(model), contextlib.ExitStack() as hooks:
        for block in (model.blocks[i] for i in blocks):
            # Computed once more, because a block that keeps all of its tokens computes no scores
            hooks.enter_context(block.attn.register_forward_hook(
                lambda attn, args, options, _: scores.append(
                    attn.forward(*args, **{name: options[name] for name in ('rope', 'attn_mask') if name in options},
                                 return_scores=True)[1]), with_kwargs=True))
            hooks.enter_context(block.register_forward_hook(lambda _, args, output: done.append(output[1])))
        logits = model(images, keep_rate)
    grid_size = model.patch_embed.dynamic_feat_size(images.shape[-2:])
    shape = len(images), grid_size[0] * grid_size[1]
    kept = [stage and stage.kept for stage in done]
    attention = torch.full((shape[0], len(blocks), shape[1] + 1), math.nan, device=images.device)
    for stage, patches, row in zip(attention.unbind(1), patches_of_tokens(kept, *shape, images.device), scores):
        row = row[:, model.num_prefix_tokens:].float()                                 # (B, n)
        stage.scatter_(1, patches[:, :row.shape[1]], row)
    groups = None
    if model.merge_token and blocks:
        groups = groups_of_patches(done, *shape, images.device).unflatten(-1, grid_size)
    return Observation(blocks, compose_positions(kept, *shape, images.device).unflatten(-1, grid_size),
                       attention[..., :-1].unflatten(-1, grid_size), logits, groups)


def kept_patches(model, images, keep_rate=None):
    """Which patches a model still has after each stage: bool (B, stages, rows, cols). Arguments as in `observe`."""
    return observe(model, images, keep_rate).kept


# --- From there to pictures -----------------------------------------------------------------------------------------

def denormalize(images, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD):
    """Images (B, 3, H, W) normalised with `mean` and `std` → float32 in [0, 1]."""
    mean, std = (torch.tensor(value, device=images.device).view(-1, 1, 1) for value in (mean, std))    # (3, 1, 1)
    return (images * std + mean).clamp(0, 1)


def pixels_per_patch(model):
    """(height, width) of a patch; in a hybrid, of the part of the image that becomes a token."""
    return model.patch_embed.feat_ratio(as_scalar=False)


def to_pixels(grid, patch_size, size):
    """Expand (…, rows, cols) to the pixels of the patches, in images of `size`: (…, H, W).

    Pixels at the right and the bottom that fill no whole patch get 0, as the model does not see them.
    """
    height, width = patch_size
    grid = repeat(grid, '... rows cols -> ... (rows height) (cols width)', height=height, width=width)
    # Pad if the patches end before the image; crop if the model padded the image to whole patches
    return F.pad(grid, (0, size[1] - grid.shape[-1], 0, size[0] - grid.shape[-2]))


def mask_images(images, masks, patch_size, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD):
    """The images after each stage, black where the patch has no token of its own any more.

    Args:
        images: (B, 3, H, W), normalised with `mean` and `std`.
        masks: bool (B, stages, rows, cols).
        patch_size: (height, width) in pixels.
    Returns:
        float32 (B, stages, 3, H, W) in [0, 1], not normalised.
    """
    masks = to_pixels(masks.unsqueeze(2), patch_size, images.shape[-2:])               # (B, stages, 1, H, W)
    return denormalize(images, mean, std).unsqueeze(1) * masks


def merge_images(images, groups, patch_size, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD):
    """The images after each stage; patches that were merged into one token have their mean colour.

    Args:
        groups: int (B, stages, rows, cols), as in `Observation`.
        images, patch_size, mean, std: as in `mask_images`.
    Returns:
        float32 (B, stages, 3, H, W) in [0, 1].
    """
    inputs = denormalize(images, mean, std).unsqueeze(1)                               # (B, 1, 3, H, W)
    grid_size = groups.shape[-2:]
    margin = 0, grid_size[1] * patch_size[1] - images.shape[-1], 0, grid_size[0] * patch_size[0] - images.shape[-2]
    colors, pixels = (F.avg_pool2d(F.pad(pictures, margin), patch_size).flatten(2).transpose(1, 2).unsqueeze(1)
                      for pictures in (inputs.flatten(0, 1), torch.ones_like(images[:, :1])))     # (B, 1, N, 3 or 1)
    groups = groups.flatten(2)                                                         # (B, stages, N)
    same = (groups.unsqueeze(-1) == groups.unsqueeze(-2)).float()                      # (B, stages, N, N)
    sizes = same.sum(-1, keepdim=True)                                                 # (B, stages, N, 1)
    colors = same @ colors / (same @ pixels)                                           # (B, stages, N, 3)
    colors = colors.transpose(2, 3).unflatten(-1, grid_size)                           # (B, stages, 3, rows, cols)
    merged = (sizes > 1).transpose(2, 3).unflatten(-1, grid_size)
    size = images.shape[-2:]
    return torch.where(to_pixels(merged, patch_size, size), to_pixels(colors, patch_size, size), inputs)


def stage_images(images, seen, *settings):
    """`merge_images` of an `Observation` if the model merges tokens, else `mask_images`."""
    if seen.groups is None:
        return mask_images(images, seen.kept, *settings)
    return merge_images(images, seen.groups, *settings)


def attention_images(images, attention, patch_size, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD):
    """Heat maps of the class token's attention over the grey images, from violet over green to yellow.

    Each map is scaled from its lowest to its highest value. Patches that the stage did not see are plain grey.

    Args:
        attention: (B, stages, rows, cols), NaN where a patch was not seen.
        images, patch_size, mean, std: as in `mask_images`.
    Returns:
        float32 (B, stages, 3, H, W) in [0, 1].
    """
    seen = ~attention.isnan()
    least = attention.masked_fill(~seen, math.inf).amin((-1, -2), keepdim=True)
    largest = attention.masked_fill(~seen, -math.inf).amax((-1, -2), keepdim=True)
    heat = ((attention - least) / (largest - least)).nan_to_num(0) * (len(HEAT) - 1)   # 0 where all are alike
    below = heat.long().clamp(max=len(HEAT) - 2)
    stops = torch.tensor(HEAT, device=images.device) / 255
    colors = torch.lerp(stops[below], stops[below + 1], (heat - below).unsqueeze(-1)).movedim(-1, 2)
    colors = to_pixels(colors, patch_size, images.shape[-2:])                          # (B, stages, 3, H, W)
    seen = to_pixels(seen.unsqueeze(2), patch_size, images.shape[-2:])                 # (B, stages, 1, H, W)
    grey = rgb_to_grayscale(denormalize(images, mean, std)).unsqueeze(1)               # (B, 1, 1, H, W)
    return torch.where(seen, torch.lerp(grey, colors, 0.6), ABSENT)


def to_bytes(pictures):
    """Pictures in [0, 1] → the nearest uint8, on the CPU."""
    return (pictures * 255).round().byte().cpu()


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
    masked = stage_images(images, observe(model, images, keep_rate), pixels_per_patch(model), mean, std)
    for index, picture, stages in zip(indices, inputs, masked):
        save_jpeg(picture, output_dir / f'img_{index}_a.jpg')
        for stage, picture in enumerate(stages):
            save_jpeg(picture, output_dir / f'img_{index}_l{stage}.jpg')


def save_jpeg(picture, path):
    """Write a picture (3, H, W) in [0, 1]; without chroma subsampling, which would bleed into black patches."""
    to_pil_image(to_bytes(picture)).save(path, quality=95, subsampling=0)


def visualize(model, loader, count, output_dir, batch_size, device, amp_dtype, num_workers=0, pin_memory=True):
    """Write pictures of `count` images of a loader's data set, each process its share of them, and the two sheets.

    Args:
        model: as in `observe`.
        output_dir: for the pictures of `save_masked`, `grid.png` and `attention.png`; made if missing.
    Returns:
        the loader of this process's share.
    """
    dataset, preprocessing = loader.dataset, loader.preprocessing
    images = spread(dataset, count)
    sampler = EvalSampler(images, world_size(), rank())
    load = partial(build_loader, batch_size=batch_size, device=device, preprocessing=preprocessing)
    share = load(images, sampler, num_workers=num_workers, pin_memory=pin_memory)
    statistics = dict(mean=preprocessing.mean, std=preprocessing.std)
    folder, numbers = make_output_folder(output_dir), iter(sampler)
    for batch, _ in share:
        with autocast(device, amp_dtype):
            save_masked(model, batch, [next(numbers) for _ in batch], folder, **statistics)
    if rank() == 0:
        with autocast(device, amp_dtype):
            first = load(Subset(images, range(min(SHEET_IMAGES, len(images)))), None)
            sheets = draw_sheets(model, first, dataset.classes, **statistics)
        for name, sheet in zip(('grid.png', 'attention.png'), sheets):
            sheet.save(folder / name)
    log(f'Wrote pictures of {len(images)} images to {folder}')
    return share


# --- Sheets ---------------------------------------------------------------------------------------------------------

def draw_sheets(model, batches, classes, keep_rate=None, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD):
    """Two sheets, the kept patches and the class token's attention, with the true and the predicted classes.

    The state of torch's CPU generator does not change.

    Args:
        model, keep_rate: as in `observe`.
        batches: iterable of (images, labels), (B, 3, H, W) as in `observe` and (B,).
        classes: names by label.
        mean, std: normalisation of the images.
    Returns:
        Two PIL images as `contact_sheet` draws them, with a column for the input and one per stage ("layer", from 1).
    """
    grid, attention, captions = [], [], []
    with torch.random.fork_rng(devices=[]):                                # a DataLoader draws a seed for its workers
        for images, labels in batches:
            seen = observe(model, images, keep_rate)
            settings = pixels_per_patch(model), mean, std
            inputs = denormalize(images, mean, std).unsqueeze(1)
            for rows, stages in ((grid, stage_images(images, seen, *settings)),
                                 (attention, attention_images(images, seen.attention, *settings))):
                rows += to_bytes(torch.cat([inputs, stages], dim=1))
            captions += [(f'true: {classes[label]}', f'predicted: {classes[guess]}')
                         for label, guess in zip(labels.tolist(), seen.logits.argmax(1).tolist())]
    headers = ['input image', *(f'layer {block + 1}' for block in seen.blocks)]
    return contact_sheet(grid, headers, captions), contact_sheet(attention, headers, captions)


def contact_sheet(rows, headers, captions):
    """Rows of pictures under column headers, each with a caption below; from 5 rows on, several side by side.

    Small pictures are enlarged by an integer factor, large ones reduced, to fit the sheet into SHEET_WIDTH.

    Args:
        rows: [uint8 (columns, 3, H, W)], one per image, at least one.
        headers: a text per column.
        captions: for each row its lines, shortened if they are wider than the row.
    Returns:
        RGB PIL image.
    """
    columns, gap = len(headers), 4
    across = min(math.ceil(len(rows) / 4), max(1, 16 // columns))                      # rows side by side
    cell = min(224, (SHEET_WIDTH // across - 3 * gap) // columns - gap)                # pixels, of a picture's square
    font = ImageFont.load_default(min(24, max(13, cell // 8)))
    line = math.ceil(1.3 * font.size)
    width, height = fit(rows[0].shape[-1], rows[0].shape[-2], cell)
    step = math.ceil(max(width + gap, *(font.getlength(f'{text}  ') for text in headers)))     # of columns
    row_width, row_height = columns * step, height + line * len(captions[0]) + 3 * gap
    down = math.ceil(len(rows) / across)
    sheet = Image.new('RGB', (across * (row_width + 3 * gap) - 2 * gap, line + down * row_height + gap), 'white')
    draw = ImageDraw.Draw(sheet)
    for i, (pictures, lines) in enumerate(zip(rows, captions)):
        left, top = gap + i % across * (row_width + 3 * gap), line + i // across * row_height + gap
        for column, picture in enumerate(pictures):
            x = left + column * step
            if i < across:
                draw.text((x, gap // 2), headers[column], 'black', font)
            resample = Image.Resampling.NEAREST if width > picture.shape[-1] else Image.Resampling.LANCZOS
            sheet.paste(to_pil_image(picture).resize((width, height), resample), (x, top))
        for number, text in enumerate(lines):
            draw.text((left, top + height + number * line), shorten(text, font, row_width - gap), 'black', font)
    return sheet


def fit(width, height, cell):
    """The size of a picture in a square of `cell` pixels: enlarged by an integer factor, or reduced."""
    larger = max(width, height)
    factor = cell // larger if larger <= cell else cell / larger
    return max(1, round(width * factor)), max(1, round(height * factor))


def shorten(text, font, width):
    """The text in ASCII, the letters of Pillow's font, with an ellipsis if it is wider than `width` pixels."""
    letters = (letter for letter in unicodedata.normalize('NFKD', text) if not unicodedata.combining(letter))
    text = ''.join(letter if letter.isascii() else '?' for letter in letters)
    if font.getlength(text) > width:
        fitting = bisect.bisect_right(range(len(text)), width, key=lambda end: font.getlength(text[:end] + '…'))
        text = text[:max(0, fitting - 1)] + '…'
    return text
