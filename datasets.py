"""From the names of a data set to normalised batches of it on the device."""
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms
from torchvision.datasets import CIFAR100

from formats.decoding import decode_picture, load_image
from formats.image_folder import ImageFolder
from formats.lmdb_dataset import ImageFolderLMDB
from runtime.arguments import natural, positive
from runtime.distributed import cores_per_process
from runtime.preprocessing import Preprocessing
from runtime.utils import InputError, missing_split, seed_all

DIGITS = 'DIGITS', 'BOARD_DIGITS'
INAT_CATEGORIES = ['kingdom', 'phylum', 'class', 'order', 'supercategory', 'family', 'genus', 'name']


DATA_FLAGS = 'data_set', 'data_path', 'use_lmdb', 'nb_classes', 'inat_category'


def add_data_arguments(parser):
    """Add the flags that name the data set; → their group."""
    group = parser.add_argument_group('data')
    add = group.add_argument
    add('--data-path', help='folder of the data set')
    add('--data-set', choices=[*DIGITS, 'IMNET', 'CIFAR', 'INAT', 'INAT19'],
        help='default: IMNET (train/<class>/<image>, val/…) with --data-path, else DIGITS')
    add('--use-lmdb', action='store_true', help='read train.lmdb and val.lmdb instead of folders')
    add('--nb-classes', type=positive(int), default=1000,
        help='number of classes of an LMDB database of the original code, which does not store it')
    add('--inat-category', default='name', choices=INAT_CATEGORIES, help='rank that makes a class')
    add('--num-workers', type=natural, default=cores_per_process(), help='processes that load data, for each process')
    return group


def fill_data_arguments(args, parser, needs_path=True):
    """Complete the flags of `add_data_arguments`, and end the program with an error if they do not go together."""
    if args.data_set is None:
        args.data_set = 'DIGITS' if args.data_path is None else 'IMNET'
    if args.data_set in DIGITS and args.data_path is not None:
        parser.error(f'--data-set {args.data_set} takes no --data-path')
    if needs_path and args.data_set not in DIGITS and not args.data_path:
        parser.error(f'--data-set {args.data_set} needs --data-path')
    if args.use_lmdb and args.data_set != 'IMNET':
        parser.error('--use-lmdb goes with --data-set IMNET and --data-path')


# --- Data sets ------------------------------------------------------------------------------------------------------

class Digits(Dataset):
    """scikit-learn's 1,797 scanned handwritten digits, 8×8 pixels in 17 grey levels: (RGB picture, label).

    The package contains them, so nothing is downloaded. 1,437 to train, 360 to validate, always the same.

    Args:
        train: which of the two.
        transform: applied to the picture.
        on_board: on a dark grey board with a margin of 2 pixels, so 12×12: a demo of which tokens are kept.
    """
    classes = [str(digit) for digit in range(10)]

    def __init__(self, train, transform=None, on_board=False):
        from sklearn.datasets import \
            load_digits  # a second or more, which other data sets need not wait
        digits = load_digits()
        order = np.random.RandomState(0).permutation(len(digits.target))    # the scans are ordered by writer
        indices = order[:1437] if train else order[1437:]
        self.images = (digits.images[indices] * (255 / 16)).astype(np.uint8)
        if on_board:
            margin = np.pad(self.images, ((0, 0), (2, 2), (2, 2)))
            self.images = (64 + margin * ((255 - 64) / 255)).astype(np.uint8)
        self.targets = digits.target[indices].tolist()
        self.transform = transform

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        image = Image.fromarray(self.images[index]).convert('RGB')
        return self.transform(image) if self.transform else image, self.targets[index]


class INaturalist(Dataset):
    """iNaturalist 2018 or 2019: (RGB picture, label).

    `{train,val}{year}.json` lists the images, `categories.json` the categories. Images are where their file name says,
    `<dir>/<supercategory>/<category id>/<file>`, as the archive unpacks, or all without the folder of the
    supercategory. A class is a value of `category` (name, genus, …); classes are numbered by their first appearance in
    the training annotations.
    """

    def __init__(self, root, train, year, category='name', transform=None, loader=load_image):
        root, split = Path(root), 'train' if train else 'val'
        categories, training, listed = (
            _read_json(root / name) for name in ('categories.json', f'train{year}.json', f'{split}{year}.json'))
        try:
            taxa = {taxon.get('id', i): taxon[category] for i, taxon in enumerate(categories)}
            self.classes = list(dict.fromkeys(taxa[entry['category_id']] for entry in training['annotations']))
            number = {name: i for i, name in enumerate(self.classes)}
            names = [entry['file_name'] for entry in listed['images']]
            places = [name.split('/') for name in names]
            flattened = [f'{folder}/{category_id}/{file}' for folder, _, category_id, file in places]
            labels = [number[taxa[int(place[2])]] for place in places]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f'the annotations of iNaturalist {year} in {root}, with --inat-category {category}, '
                             f'are not as expected: {error!r}') from None
        if names and not (root / names[0]).exists():   # the first image decides for all
            if not (root / flattened[0]).exists():
                raise InputError(f'{root} has neither {names[0]} nor {flattened[0]}; unpack the archive of the images '
                                 'there')
            names = flattened
        self.samples, self.targets = [(root / name, label) for name, label in zip(names, labels)], labels
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
        return json.loads(path.read_bytes())           # UTF-8, whatever the locale
    except ValueError as error:
        raise InputError(f'{path} is not JSON: {error}') from None


class SeededDataset(Dataset):
    """A data set indexed by (index, key); `seed_all(*key)` seeds the augmentation of the sample.

    The generators of the process stay seeded so: whatever else draws from them seeds them first.
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, item):
        index, key = item
        seed_all(*key)
        return self.dataset[index]


def build_dataset(is_train, *, data_set='DIGITS', data_path=None, use_lmdb=False, nb_classes=None, inat_category='name',
                  input_size=224, fast_transforms=False, augment=None, **augmentation):
    """The training or the validation set; its `classes` are names, its samples (uint8 (3, S, S), label).

    Args:
        is_train: which of the two.
        augment: whether to augment the images; None for the training set's only.
        data_set: 'DIGITS', 'BOARD_DIGITS', 'IMNET', 'CIFAR', 'INAT' or 'INAT19'.
        data_path: folder of the data set, which the digits do not need.
        use_lmdb: read `train.lmdb` or `val.lmdb` instead of a tree of image files.
        nb_classes: number of classes of an LMDB database of the original code, which does not store it.
        inat_category: the rank of iNaturalist's taxonomy that makes a class.
        input_size, fast_transforms, augmentation: as in `build_transform`.
    Raises:
        InputError: the folder lacks something, or a policy does not exist.
    """
    augment = is_train if augment is None else augment
    fast_transforms = fast_transforms and augment
    transform = build_transform(augment, data_set, input_size, fast_transforms, **augmentation)
    decode = decode_picture
    if fast_transforms:
        from formats.fast_transforms import EncodedImage as decode         # OpenCV, which other runs need not load
    load = partial(load_image, decode=decode)
    if data_set in DIGITS:
        return Digits(is_train, transform, on_board=data_set == 'BOARD_DIGITS')
    root, split = Path(data_path), 'train' if is_train else 'val'
    if not root.is_dir():
        raise InputError(f'--data-path {root} is not a folder')
    if data_set == 'CIFAR':
        try:
            return CIFAR100(root, train=is_train, transform=transform)
        except RuntimeError:
            raise InputError(f'{root} has no cifar-100-python folder; unpack cifar-100-python.tar.gz there') from None
    if data_set in ('INAT', 'INAT19'):
        return INaturalist(root, is_train, 2018 if data_set == 'INAT' else 2019, inat_category, transform, load)
    if use_lmdb:
        return ImageFolderLMDB(root / f'{split}.lmdb', transform, num_classes=nb_classes, decode=decode)
    if not (root / split).is_dir():
        raise missing_split('--data-path', root, split)
    return ImageFolder(root / split, transform, loader=load)


def check_same_classes(dataset_train, dataset_val):
    """Raise InputError, naming the first differences, unless both sets have the same classes."""
    train, val = set(dataset_train.classes), set(dataset_val.classes)
    differences = [*(f'{name} is in train only' for name in sorted(train - val)),
                   *(f'{name} is in val only' for name in sorted(val - train))]
    if differences:
        more = f', and {len(differences) - 3} more' if len(differences) > 3 else ''
        raise InputError(f'train and val differ in their classes: {", ".join(differences[:3])}{more}')


def spread(dataset, number):
    """A Subset of `number` samples from all over a data set, which may be ordered by class; all if it has fewer."""
    number = min(number, len(dataset))
    return Subset(dataset, [i * len(dataset) // number for i in range(number)])


# --- Transforms -----------------------------------------------------------------------------------------------------

def build_transform(is_train, data_set='DIGITS', input_size=224, fast_transforms=False, *, color_jitter=0.4,
                    aa='rand-m9-mstd0.5-inc1', train_interpolation='bicubic', preprocessing=Preprocessing()):
    """Picture → uint8 (3, S, S), by the DeiT recipe or, for digits, a gentle version of it.

    Normalisation (`DeviceLoader`) and random erasing (`train_one_epoch`) follow on the device.

    Args:
        is_train: whether to augment.
        data_set: as in `build_dataset`.
        input_size: S, in pixels.
        fast_transforms: on arrays in training, see `formats/fast_transforms.py`; not bit for bit Pillow's pixels.
        color_jitter, aa, train_interpolation: as in timm's `create_transform`.
        preprocessing: for evaluation, its resize and crop, except that digits are never cropped.
    """
    digits = data_set in DIGITS
    unchanged = data_set == 'CIFAR' and input_size == 32                   # not resized: a shift replaces the crop
    if not is_train:
        _, _, interpolation, crop_pct, crop_mode = preprocessing
        return create_transform(input_size, is_training=False, use_prefetcher=True, interpolation=interpolation,
                                crop_pct=1. if digits or unchanged else crop_pct, crop_mode=crop_mode)
    # A digit is upright and fills its picture: no mirroring, and crops that leave it whole
    gentle = dict(scale=(0.85, 1.), ratio=(0.95, 1.05), hflip=0.) if digits else {}
    try:
        transform = create_transform(
            input_size, is_training=True, use_prefetcher=True, color_jitter=color_jitter or None, auto_augment=aa,
            interpolation=train_interpolation, **gentle)
    except (AssertionError, ValueError) as error:
        raise InputError(f'--aa {aa} is no policy of timm: {error}') from None
    if unchanged:
        transform.transforms[0] = transforms.RandomCrop(input_size, padding=4)
    if fast_transforms:
        from formats.fast_transforms import on_arrays
        return on_arrays(transform)
    return transform


# --- Batches on the device ------------------------------------------------------------------------------------------

class DeviceLoader:
    """The batches of a DataLoader on the device: normalised float32 images (B, 3, H, W), labels (B,), and any more.

    Images are copied as bytes, a quarter of the size, and on a GPU in parallel with its work. (timm's PrefetchLoader
    does so too, but until recently it could overwrite a batch in use, and it fails on an empty data set.)

    Args:
        loader: yields (uint8 images, labels, …), in pinned memory for copies in parallel with other work.
        device: torch.device.
        channels_last: memory format of the images.
        preprocessing: whose mean and std normalise the images.
    """

    def __init__(self, loader, device, channels_last=False, preprocessing=Preprocessing()):
        self.loader, self.device, self.preprocessing = loader, device, preprocessing
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.dataset, self.sampler, self.batch_size = loader.dataset, loader.sampler, loader.batch_size
        self.stream = torch.cuda.Stream(device) if device.type == 'cuda' else None
        self.mean, self.std = (torch.tensor(statistic, device=device).view(1, 3, 1, 1)
                               for statistic in (preprocessing.mean, preprocessing.std))
        self.white = torch.tensor(255., device=device)
        self.batches = None                            # that `prefetch` has begun

    def __len__(self):
        return len(self.loader)

    def prefetch(self):
        """Begin the next pass: the workers load its first batches until it is iterated over."""
        self.batches = iter(self.loader)

    def __iter__(self):
        batches, self.batches = self.batches or iter(self.loader), None
        for batch in batches:
            images, *others = self._to_device(batch)
            # The operations of ToTensor and Normalize in their order, for the same values to the last bit. By a number,
            # CUDA would not divide, but multiply with its reciprocal.
            images = images.to(torch.float32, memory_format=self.memory_format)
            yield images.div_(self.white).sub_(self.mean).div_(self.std), *others

    def _to_device(self, batch):
        if self.stream is None:
            return batch
        with torch.cuda.stream(self.stream):
            tensors = [tensor.to(self.device, non_blocking=True) for tensor in batch]
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        for tensor in tensors:
            tensor.record_stream(current)              # or its memory could be reused while it is still read
        return tensors


def build_loader(dataset, sampler, batch_size, device, num_workers=0, pin_memory=True, drop_last=False,
                 channels_last=False, worker_init_fn=None, preprocessing=Preprocessing()):
    """The `DeviceLoader` of a data set of uint8 images; its workers stay alive between epochs."""
    return DeviceLoader(
        DataLoader(dataset, batch_size, sampler=sampler, drop_last=drop_last, num_workers=num_workers,
                   persistent_workers=num_workers > 0, pin_memory=pin_memory and device.type == 'cuda',
                   worker_init_fn=worker_init_fn),
        device, channels_last, preprocessing)
