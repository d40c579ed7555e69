"""Labels of the patch tokens of an LV-ViT: label maps as TokenLabeling publishes them, and MixToken.

Method: "All Tokens Matter: Token Labeling for Training Better Vision Transformers" (NeurIPS 2021).
"""
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from torchvision.transforms import RandomHorizontalFlip

from runtime.utils import DataError


class LabelledTokens(Dataset):
    """An ImageFolder with the label map of each image: (uint8 (3, S, S), label, map (2, 5, H, W), box (4,)).

    A map has, for each cell of a grid over the whole image, the scores (logits) of the five best classes, then their
    numbers; it is mirrored if the image is. The box is the part of it that the image shows: left, top, right, bottom,
    from 0 to 1. The images are those of the ImageFolder, bit for bit. Operations of --aa that shift, turn or shear an
    image are not followed, as in the original.

    Args:
        dataset: an ImageFolder with a transform of `build_transform` whose first draws are a random crop and a flip.
        folder: it has `<class>/<image>.pt` for each image, a tensor of torch.save.
    Raises:
        DataError: a map is missing, or is not of this kind, or not of the size of the first one.
    """

    def __init__(self, dataset, folder):
        self.dataset, self.folder = dataset, Path(folder)
        self.classes, self.shape = dataset.classes, None
        self.shape = tuple(self.read_map(0).shape)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        path, label = self.dataset.samples[index]
        image, label_map = self.dataset.loader(path), self.read_map(index)
        crop = self.dataset.transform.transforms[0]
        flip, = (step for step in self.dataset.transform.transforms if isinstance(step, RandomHorizontalFlip))
        width, height = image.size
        states = random.getstate(), torch.get_rng_state()
        top, left, rows, columns = crop.get_params(image, crop.scale, crop.ratio)
        flips = torch.rand(1) < flip.p
        random.setstate(states[0]), torch.set_rng_state(states[1])         # for the transform to draw the same
        box = torch.tensor([left / width, top / height, (left + columns) / width, (top + rows) / height])
        if flips:
            label_map = label_map.flip(-1)
            box[[0, 2]] = 1 - box[[2, 0]]
        return self.dataset.transform(image), label, label_map, box

    def read_map(self, index):
        """The label map (2, 5, H, W) of an image."""
        path = Path(self.dataset.samples[index][0])
        file = self.folder / path.relative_to(self.dataset.root).with_suffix('.pt')
        try:
            label_map = torch.load(file, map_location='cpu', weights_only=True)
        except FileNotFoundError:
            raise DataError(f'--token-label-path: {file} is missing; each training image needs a label map') from None
        except Exception:                              # bytes that are no tensor raise anything
            raise DataError(f'--token-label-path: {file} cannot be read as a tensor') from None
        is_numbers = isinstance(label_map, torch.Tensor) and label_map.is_floating_point() and not label_map.is_sparse
        shape = tuple(label_map.shape) if is_numbers else 'not of a tensor of numbers'
        if not is_numbers or len(shape) != 4 or shape[0] != 2 or 0 in shape or self.shape not in (None, shape):
            raise DataError(f'--token-label-path: {file} has the shape {shape}; {self.shape or (2, 5, 18, 18)} is '
                            'expected')
        scores, classes = label_map = label_map.detach()
        if not (scores.isfinite().all() and (classes >= 0).all() and (classes < len(self.classes)).all()):
            raise DataError(f'--token-label-path: {file} has a score that is not finite, or names a class outside 0 to '
                            f'{len(self.classes) - 1}')
        return label_map


class Targets(NamedTuple):
    """Soft labels of a batch: of the images (B, K), and of their patches (B, N, K)."""
    images: torch.Tensor
    patches: torch.Tensor


class TokenLabeling:
    """Makes the targets of batches, and mixes their images with MixToken (§3.3).

    MixToken takes a random rectangle of an image's embedded patches from another image, with their labels; the label
    of the image is mixed by area.

    Args:
        num_classes: K.
        grid_size: rows and columns of the patches, N in all.
        smoothing: of labels that are class numbers, and of label maps.
        mix: whether to mix.
    """

    def __init__(self, num_classes, grid_size, smoothing=0., mix=True):
        self.num_classes, self.grid_size, self.smoothing, self.mix = num_classes, tuple(grid_size), smoothing, mix

    def __call__(self, labels, label_maps=None, boxes=None):
        """→ `Targets`, and which patches (N,) are those of the image in the same place of the reversed batch.

        Args:
            labels: class numbers (B,), or soft labels (B, K), which mixup made.
            label_maps, boxes: as `LabelledTokens` has them, (B, 2, 5, H, W) and (B, 4); without, each patch has the
                label of its image.
        """
        mixed, share = torch.zeros(self.grid_size, dtype=torch.bool, device=labels.device), 0.
        if self.mix:
            (top, bottom), (left, right) = random_rectangle(self.grid_size)
            mixed[top:bottom, left:right] = True
            share = (bottom - top) * (right - left) / mixed.numel()
        mixed = mixed.flatten()                                                        # (N,)
        images = labels if labels.ndim == 2 else self.smooth(F.one_hot(labels, self.num_classes).float())
        patches = images.unsqueeze(1).expand(-1, len(mixed), -1)                       # (B, N, K)
        if label_maps is not None:
            patches = self.smooth(labels_of_patches(label_maps, boxes, self.num_classes, self.grid_size))
        patches = torch.where(mixed.unsqueeze(-1), patches.flip(0), patches)
        return Targets(images.lerp(images.flip(0), share), patches), mixed

    def smooth(self, labels):
        return labels * (1 - self.smoothing) + self.smoothing / self.num_classes


def random_rectangle(grid_size):
    """First row and last + 1, then the columns, of a rectangle of random area and centre, cut at the edges of the grid.

    As in CutMix (ICCV 2019), §3.1, for a uniform share of the area.
    """
    share = np.random.uniform()
    for length in grid_size:
        side = int(length * share ** 0.5)
        start = np.random.randint(length) - side // 2
        yield max(start, 0), min(start + side, length)


def labels_of_patches(label_maps, boxes, num_classes, grid_size):
    """Soft labels (B, N, K) of the patches of the images that show `boxes` of `label_maps`.

    The scores are averaged over each patch (RoIAlign), 0 for a class that is not among the five best, then normalised.
    """
    scores, classes = label_maps.unbind(1)                                             # (B, 5, H, W) each
    B, _, H, W = scores.shape
    dense = torch.zeros(B, num_classes, H, W, device=scores.device).scatter_(1, classes.long(), scores.float())
    left, top, right, bottom = boxes.unbind(1)
    numbers = torch.arange(B, device=boxes.device)
    rois = torch.stack([numbers, left * W, top * H, right * W, bottom * H], dim=1)     # (B, 5)
    # The operator itself, as roi_align of torchvision.ops compiles another for deterministic gradients, if asked to
    means = torch.ops.torchvision.roi_align(dense, rois, 1., *grid_size, -1, True)
    return means.softmax(dim=1).flatten(2).transpose(1, 2)
