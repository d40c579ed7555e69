"""Files with pictures of what an EViT keeps of images.

Notebooks may import `kept_patches`, `mask_images` and so on from here; they are those of `evit/observation.py` and
`evit/pictures.py`.
"""
from functools import partial
from pathlib import Path

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import Subset
from torchvision.transforms.functional import to_pil_image

from evit.observation import Observation, kept_patches, observe                        # noqa: F401, for notebooks
from evit.pictures import attention_images, mask_images, merge_images                  # noqa: F401, for notebooks
from evit.pictures import denormalize, draw_sheets, pixels_per_patch, stage_images, to_bytes
from runtime.distributed import ignore_stop_signals, log, rank, world_size
from runtime.logger import make_output_folder
from runtime.utils import autocast

SHEET_IMAGES = 128     # images at most, to keep a sheet readable


def save_masked(model, images, indices, output_dir, keep_rate=None,
                mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD):
    """Write each image as `img_{index}_a.jpg` and after each stage as `img_{index}_block{number}.jpg`, blocks from 0.

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
    seen = observe(model, images, keep_rate)
    masked = stage_images(images, seen, pixels_per_patch(model), mean, std)
    for index, picture, stages in zip(indices, inputs, masked):
        save_jpeg(picture, output_dir / f'img_{index}_a.jpg')
        for block, picture in zip(seen.blocks, stages):
            save_jpeg(picture, output_dir / f'img_{index}_block{block}.jpg')


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
    # Not at the top: in a notebook, Hugging Face's package of this name may be imported already
    from datasets import build_loader, spread
    from samplers import EvalSampler
    dataset, preprocessing = loader.dataset, loader.preprocessing
    images = spread(dataset, count)
    sampler = EvalSampler(images, world_size(), rank())
    load = partial(build_loader, batch_size=batch_size, device=device, preprocessing=preprocessing)
    share = load(images, sampler, num_workers=num_workers, pin_memory=pin_memory,
                 worker_init_fn=ignore_stop_signals)
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
