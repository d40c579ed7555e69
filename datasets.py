"""Choice of data set and transform, and the way from there to normalised batches on the device."""
import atexit
import contextlib
import json
import multiprocessing
import random
import signal
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import CIFAR100, ImageFolder
from torchvision.transforms.v2 import functional as F

try:
    from torchvision.io import decode_jpeg
except ImportError:                                    # torchvision 0.29 announced its removal
    decode_jpeg = None

from folder2lmdb import ImageFolderLMDB, decode_picture, read_file
from utils import InputError, StopSignal, seed_all

INAT_CATEGORIES = ['kingdom', 'phylum', 'class', 'order', 'supercategory', 'family', 'genus', 'name']


def load_image(path, decode=decode_picture):
    """What `decode` makes of an image file; DataError, naming the file, where it makes nothing of it."""
    return decode(read_file(path), lambda: path)


def decode_pixels(data, where):
    """As `decode_picture`, which it falls back on, but → the pixels, uint8 (3, H, W).

    A JPEG in colour goes through torchvision, to the same pixels, in a tensor of which only a crop need be copied.
    """
    if decode_jpeg and data.startswith(b'\xff\xd8\xff'):
        with contextlib.suppress(RuntimeError):        # what torchvision refuses, Pillow may read, or say why not
            pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            if len(pixels) == 3:
                return pixels
    return F.pil_to_tensor(decode_picture(data, where))


class Digits(Dataset):
    """scikit-learn's 1,797 scanned handwritten digits, 8×8 pixels in 17 grey levels: (RGB picture, label).

    They come with the package, so nothing is downloaded. 1,437 to train, 360 to validate, always the same.
    """
    classes = [str(digit) for digit in range(10)]

    def __init__(self, train, transform=None):
        digits = load_digits()
        order = np.random.RandomState(0).permutation(len(digits.target))    # the scans stand ordered by writer
        indices = order[:1437] if train else order[1437:]
        self.images = (digits.images[indices] * (255 / 16)).astype(np.uint8)
        self.targets = digits.target[indices].tolist()
        self.transform = transform

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        image = Image.fromarray(self.images[index]).convert('RGB')
        return self.transform(image) if self.transform else image, self.targets[index]


class INaturalist(Dataset):
    """iNaturalist 2018 or 2019: (RGB picture, label).

    `{train,val}{year}.json` lists the images, `categories.json` the categories. An image named
    `<dir>/<supercategory>/<category id>/<file>` lies at `<dir>/<category id>/<file>`. A class is the category's
    `category` (its name, genus, …), numbered in order of first appearance in the training annotations.
    """

    def __init__(self, root, train, year, category='name', transform=None, loader=load_image):
        root, split = Path(root), 'train' if train else 'val'
        categories, training, listed = (
            _read_json(root / name) for name in ('categories.json', f'train{year}.json', f'{split}{year}.json'))
        self.samples = []
        try:
            taxa = {taxon.get('id', i): taxon[category] for i, taxon in enumerate(categories)}
            self.classes = list(dict.fromkeys(taxa[entry['category_id']] for entry in training['annotations']))
            number = {name: i for i, name in enumerate(self.classes)}
            for entry in listed['images']:
                folder, _, category_id, file = entry['file_name'].split('/')
                self.samples.append((root / folder / category_id / file, number[taxa[int(category_id)]]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f'the annotations of iNaturalist {year} in {root}, with --inat-category {category}, '
                             f'are not as they should be: {error!r}') from None
        self.targets = [label for _, label in self.samples]
        self.transform, self.loader = transform, loader

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        image = self.loader(path)
        return self.transform(image) if self.transform else image, label


def _read_json(path):
    if not path.is_file():
        raise InputError(f'{path} is missing; iNaturalist needs it beside the images')
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f'{path} is not JSON: {error}') from None


class SeededDataset(Dataset):
    """A data set asked for (index, key), whose augmentation is drawn from the key (see `utils.seed_all`).

    It leaves the process's generators seeded so: whatever else draws from them seeds them first.
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, item):
        index, key = item
        seed_all(*key)
        return self.dataset[index]


def build_dataset(is_train, args):
    """The training or the validation set of `args.data_set`; its `classes` are named, its samples transformed."""
    transform = build_transform(is_train, args)
    decode = decode_pixels if is_train and args.fast_resize else decode_picture
    load = partial(load_image, decode=decode)
    if args.data_set == 'DIGITS':
        return Digits(is_train, transform)
    root, split = Path(args.data_path), 'train' if is_train else 'val'
    if not root.is_dir():
        raise InputError(f'--data-path {root} is not a folder')
    if args.data_set == 'CIFAR':
        try:
            return CIFAR100(root, train=is_train, transform=transform)
        except RuntimeError:
            raise InputError(f'{root} has no cifar-100-python folder; unpack cifar-100-python.tar.gz there') from None
    if args.data_set in ('INAT', 'INAT19'):
        year = 2018 if args.data_set == 'INAT' else 2019
        return INaturalist(root, is_train, year, args.inat_category, transform, load)
    if args.use_lmdb:
        return ImageFolderLMDB(root / f'{split}.lmdb', transform, num_classes=args.nb_classes, decode=decode)
    if not (root / split).is_dir():
        raise InputError(f'--data-path {root} has no {split}/ folder; {split}/<class>/<image> is expected')
    try:
        return ImageFolder(root / split, transform, loader=load)
    except FileNotFoundError as error:
        raise InputError(str(error).splitlines()[0]) from None


def check_same_classes(dataset_train, dataset_val):
    """InputError, naming the first ones, where the two sets do not have the same classes."""
    train, val = set(dataset_train.classes), set(dataset_val.classes)
    lacking = [*(f'{name} is in train only' for name in sorted(train - val)),
               *(f'{name} is in val only' for name in sorted(val - train))]
    if lacking:
        more = f', and {len(lacking) - 3} more' if len(lacking) > 3 else ''
        raise InputError(f'train and val differ in their classes: {", ".join(lacking[:3])}{more}')


class FastRandomResizedCrop(RandomResizedCropAndInterpolation):
    """timm's, from the same draws, of a picture or its pixels, uint8 (3, H, W) → picture.

    Modifications: torch's kernels for bytes resize instead of Pillow, in less than half the time. Their weights have
    16 bits, Pillow's 22, so a value of the result may differ by 2.
    """

    def __call__(self, image):
        pixels = F.pil_to_tensor(image) if isinstance(image, Image.Image) else image
        crop = F.crop(pixels, *self.get_params(pixels, self.scale, self.ratio))
        interpolation = self.interpolation
        if isinstance(interpolation, (tuple, list)):
            interpolation = random.choice(interpolation)
        crop = crop.unsqueeze(0).contiguous(memory_format=torch.channels_last)         # as a picture lies in memory
        return F.to_pil_image(F.resize(crop, self.size, interpolation)[0])


def build_transform(is_train, args):
    """Picture → uint8 (3, S, S): the DeiT recipe, or what digits bear of it.

    Normalisation (`DeviceLoader`) and random erasing (engine.py) follow on the device.
    """
    size, digits = args.input_size, args.data_set == 'DIGITS'
    small = args.data_set == 'CIFAR' and size == 32                        # stays as it is: a shift replaces the crop
    if is_train:
        # A digit is upright and fills its picture: no mirroring, and crops that leave it whole
        gentle = dict(scale=(0.85, 1.), ratio=(0.95, 1.05), hflip=0.) if digits else {}
        try:
            transform = create_transform(
                size, is_training=True, use_prefetcher=True, color_jitter=args.color_jitter or None,
                auto_augment=args.aa, interpolation=args.train_interpolation, **gentle)
        except (AssertionError, ValueError) as error:
            raise InputError(f'--aa {args.aa} is no policy of timm: {error}') from None
        if small:
            transform.transforms[0] = transforms.RandomCrop(size, padding=4)
        elif args.fast_resize:
            crop = transform.transforms[0]
            transform.transforms[0] = FastRandomResizedCrop(size, crop.scale, crop.ratio, args.train_interpolation)
        return transform
    bicubic = transforms.InterpolationMode.BICUBIC
    resize = transforms.Resize((size, size) if digits or small else int(256 / 224 * size), bicubic)
    return transforms.Compose([resize, transforms.CenterCrop(size), transforms.PILToTensor()])


class DeviceLoader:
    """The batches of a DataLoader on the device: images normalised float32 (B, 3, H, W), labels (B,).

    They travel as bytes, a quarter of the size, and on a GPU beside the work that it still has to do.
    (timm's PrefetchLoader does so too, but until lately it could overwrite a batch that was still in use, and it
    fails on a share without samples.)

    Args:
        loader: of (uint8 images, labels), in pinned memory if the copy is to be beside other work.
        device: torch.device.
        channels_last: whether the images lie in memory pixel by pixel instead of channel by channel.
    """

    def __init__(self, loader, device, channels_last=False):
        self.loader, self.device = loader, device
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.dataset, self.sampler = loader.dataset, loader.sampler
        self.stream = torch.cuda.Stream(device) if device.type == 'cuda' else None
        self.mean, self.std = (torch.tensor(statistic, device=device).view(1, 3, 1, 1)
                               for statistic in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for batch in self.loader:
            images, labels = self._to_device(batch)
            # In the order of ToTensor and Normalize, so that the values are theirs to the last bit
            images = images.to(torch.float32, memory_format=self.memory_format)
            yield images.div_(255).sub_(self.mean).div_(self.std), labels

    def _to_device(self, batch):
        if self.stream is None:
            return batch
        with torch.cuda.stream(self.stream):
            tensors = [tensor.to(self.device, non_blocking=True) for tensor in batch]
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        for tensor in tensors:
            tensor.record_stream(current)              # or its memory could be taken again while it is still in use
        return tensors


def build_loader(dataset, sampler, batch_size, device, num_workers=0, pin_memory=True, drop_last=False,
                 channels_last=False):
    """The `DeviceLoader` of a data set whose images are uint8; workers stay alive from one epoch to the next."""
    return DeviceLoader(
        DataLoader(dataset, batch_size, sampler=sampler, drop_last=drop_last, num_workers=num_workers,
                   persistent_workers=num_workers > 0, pin_memory=pin_memory and device.type == 'cuda',
                   worker_init_fn=ignore_stop_signals),
        device, channels_last)


def ignore_stop_signals(worker):
    """Let a worker of a DataLoader go on when a scheduler signals all processes of a job: the run stops in its time."""
    for signum in StopSignal.SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


@atexit.register
def kill_workers():
    """End the workers that a failed run leaves; by SIGTERM, as multiprocessing would do it, they do not end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)                          # torch's handler would report their death
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
