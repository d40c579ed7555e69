"""Pictures of what an EViT does with images.

`mask_images`, `merge_images` and `attention_images` draw an `Observation`, `draw_sheets` arranges pictures on two
sheets. In a notebook, `kept_patches` and `mask_images` are enough::

    masks = kept_patches(model, images)                                    # (B, stages, rows, cols)
    pictures = mask_images(images, masks, model.patch_embed.patch_size)    # (B, stages, 3, H, W)
"""
import bisect
import math
import unicodedata

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms.functional import rgb_to_grayscale, to_pil_image

from evit.observation import observe

SHEET_WIDTH = 1680     # pixels at most, unless the headers of very many stages need more
HEAT = (68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)       # viridis, lowest to highest
ABSENT = 0.9           # light grey


# --- One picture ----------------------------------------------------------------------------------------------------

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
    grid = grid.repeat_interleave(height, dim=-2).repeat_interleave(width, dim=-1)
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
        Two PIL images as `contact_sheet` draws them, with a column for the input and one per stage: "block" and its
        number from 0.
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
            lines = [[f'true: {classes[label]}' for label in labels.tolist()]]
            if model.num_classes:                      # a backbone without a head predicts nothing
                lines.append([f'predicted: {classes[guess]}' for guess in seen.logits.argmax(1).tolist()])
            captions += zip(*lines)
    headers = ['input image', *(f'block {block}' for block in seen.blocks)]
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
