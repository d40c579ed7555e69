"""Images/s of the input pipeline, with the usual pipeline of torchvision measured beside it.

    python loader_benchmark.py --data-path /path/to/imagenet
"""
if __name__ == '__main__':                             # before the imports, which take seconds: see `start`
    from runtime.program import start
    start('loader_benchmark')

import atexit
import dataclasses
import functools
import itertools
import os
import statistics
import time
from collections import deque
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, NamedTuple

import PIL
import cv2
import simplejpeg
import torch
import torchvision
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader, Dataset

from datasets import SeededDataset, build_dataset, build_loader
from formats.image_folder import ImageFolder
from formats.lmdb_dataset import ImageFolderLMDB
from measuring.benchmark import add_protocol_arguments, device_name, synchronize, time_in_turn
from runtime.arguments import ArgumentParser, positive, timm_model
from runtime.distributed import ignore_stop_signals, kill_workers
from runtime.failures import run_program
from runtime.preprocessing import Preprocessing, pretrained_input
from runtime.utils import choose_kernels, missing_split
from samplers import EvalSampler, TrainSampler

# The training transform of DeiT (Touvron et al., 2021, table 9)
AUGMENTATION = dict(color_jitter=0.4, aa='rand-m9-mstd0.5-inc1')
ERASING = dict(probability=0.25, mode='pixel')


@dataclasses.dataclass(frozen=True)
class LoadingProtocol:
    """How loading is measured; its str() is the line to print beside every figure.

    Args:
        input_size: height and width of the images in pixels.
        batch_size: images per batch.
        device: torch.device that the batches are on.
        num_workers: number of worker processes where all are measured.
        windows: number of timed windows.
        window_seconds: minimum duration of a window.
        preprocessing: resize, crop and normalisation; its interpolation is that of the training crops, too.
    """
    input_size: int
    batch_size: int
    device: torch.device
    num_workers: int
    windows: int
    window_seconds: float
    preprocessing: Preprocessing = Preprocessing()

    def __str__(self):
        return (f'batches of {self.batch_size} of {self.input_size}×{self.input_size}, normalised float32 on '
                f"{device_name(self.device)}; DeiT's training transform; torch {torch.__version__}, "
                f'torchvision {torchvision.__version__}, Pillow {PIL.__version__}, OpenCV {cv2.__version__}, '
                f'simplejpeg {simplejpeg.__version__}; median [min–max] of {self.windows} '
                f'windows of at least {self.window_seconds:g} s; a core: one process of one thread; all: '
                f'{self.num_workers} workers')


# --- Pipelines ------------------------------------------------------------------------------------------------------

class Pipeline(NamedTuple):
    """A way from stored images to batches for a model.

    Args:
        name: split, class of the data set, shorter side of re-encoded images, variant.
        dataset: of (transformed image, label).
        batches: function (dataset, number of workers) → iterator over the images of an epoch, normalised float32
            (B, 3, S, S) on the device.
    """
    name: str
    dataset: Dataset
    batches: Callable

    def endless(self, num_workers=0):
        """An iterator over the batches of one epoch after the other."""
        while True:
            yield from self.batches(self.dataset, num_workers)


def plain_transform(is_train, input_size, preprocessing=Preprocessing()):
    """The baseline's transform: picture → normalised float32 (3, S, S), each step on the CPU, image by image."""
    augmentation = dict(color_jitter=AUGMENTATION['color_jitter'], auto_augment=AUGMENTATION['aa'],
                        re_prob=ERASING['probability'], re_mode=ERASING['mode']) if is_train else {}
    return create_transform(input_size, is_training=is_train, **preprocessing._asdict(), **augmentation)


def plain_batches(dataset, num_workers, is_train, batch_size, device):
    """The baseline's batches: torch's DataLoader without a sampler of ours."""
    loader = DataLoader(dataset, batch_size, shuffle=is_train, num_workers=num_workers,
                        pin_memory=device.type == 'cuda', worker_init_fn=ignore_stop_signals)
    return (images.to(device, non_blocking=True) for images, _ in loader)


def our_batches(dataset, num_workers, is_train, batch_size, device, preprocessing):
    """Batches as main.py loads them, with random erasing on the device as in `train_one_epoch`."""
    load = functools.partial(build_loader, batch_size=batch_size, device=device, num_workers=num_workers,
                             preprocessing=preprocessing, worker_init_fn=ignore_stop_signals)
    if not is_train:
        return (images for images, _ in load(dataset, EvalSampler(dataset, 1, 0)))
    loader = load(SeededDataset(dataset), TrainSampler(dataset, num_replicas=1, rank=0))
    erase = RandomErasing(**ERASING, device=device)
    return (erase(images) for images, _ in loader)


def pipelines(data_path, is_train, protocol):
    """Yield the pipelines of a split, the plain one first: one for each storage and each transform.

    Raises:
        InputError: there are neither image files nor a database.
    """
    split = 'train' if is_train else 'val'
    folder, database = Path(data_path, split), Path(data_path, f'{split}.lmdb')
    if not folder.is_dir() and not database.exists():
        raise missing_split('--data-path', data_path, split, f' and no {database.name}')
    settings = dict(is_train=is_train, batch_size=protocol.batch_size, device=protocol.device)
    transform = plain_transform(is_train, protocol.input_size, protocol.preprocessing)
    plain = ImageFolder(folder, transform) if folder.is_dir() else ImageFolderLMDB(database, transform)
    yield Pipeline(f'{split}, {type(plain).__name__}, plain', plain, functools.partial(plain_batches, **settings))
    for use_lmdb, fast_transforms in itertools.product((False, True), (False, True) if is_train else (False,)):
        if (database if use_lmdb else folder).exists():
            dataset = build_dataset(is_train, data_set='IMNET', data_path=data_path, use_lmdb=use_lmdb,
                                    input_size=protocol.input_size, fast_transforms=fast_transforms,
                                    train_interpolation=protocol.preprocessing.interpolation,
                                    preprocessing=protocol.preprocessing, **AUGMENTATION)
            reencoding = getattr(dataset, 'reencoding', None)
            name = f'{split}, {type(dataset).__name__}' + (f' of {reencoding.short_side}' if reencoding else '')
            name += ', --fast-transforms' if fast_transforms else ''
            yield Pipeline(name, dataset,
                           functools.partial(our_batches, preprocessing=protocol.preprocessing, **settings))


# --- Time -----------------------------------------------------------------------------------------------------------

def loading_rate(batches, protocol):
    """Images/s of an endless iterator in one window."""
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < protocol.window_seconds:
        images += len(next(batches))
    synchronize(protocol.device)
    return images / (time.perf_counter() - start)


def rate_of_workers(pipeline, protocol):
    """Images/s in one window of new worker processes, once the batches that they prefetched are used up."""
    batches = pipeline.endless(protocol.num_workers)
    for _ in range(1 + 2 * protocol.num_workers):
        next(batches)
    images_per_second = loading_rate(batches, protocol)
    batches.close()
    return images_per_second


@contextmanager
def one_thread():
    """Limit torch to one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def compare_loading(candidates, protocol):
    """Time pipelines in turn → for each a pair of Throughput: of one core, of all workers."""
    iterators = [pipeline.endless() for pipeline in candidates]
    with one_thread():
        for batches in iterators:
            next(batches)
        alone = time_in_turn([functools.partial(loading_rate, batches, protocol) for batches in iterators],
                             len(candidates) * [protocol])
    all_workers = time_in_turn([functools.partial(rate_of_workers, pipeline, protocol) for pipeline in candidates],
                               len(candidates) * [protocol])
    return list(zip(alone, all_workers))


def time_stages(pipeline, num_images=256):
    """Milliseconds per image of each step from reading to the batch, as a dict; medians of 3 rounds.

    Removes the transform of the pipeline's data set.
    """
    dataset = pipeline.dataset
    steps, dataset.transform = dataset.transform.transforms, None
    first = 'read' if type(steps[0]).__name__ == 'DecodedCrop' else 'read and decode'
    stages = [(first, lambda index: dataset[index][0]), *((type(step).__name__, step) for step in steps)]
    stages.append(('batch', None))
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    times = {name: [] for name, _ in stages}
    for _ in range(3):
        items = order[:num_images]
        for name, stage in stages:
            start = time.perf_counter()
            if stage:
                items = [stage(item) for item in items]
            else:
                deque(pipeline.batches([(item, 0) for item in items], 0), maxlen=0)
            times[name].append(1e3 * (time.perf_counter() - start) / len(items))
    return {name: statistics.median(values) for name, values in times.items()}


# --- Command line ---------------------------------------------------------------------------------------------------

def measure_loading(data_path, protocol):
    """Measure the pipelines of both splits; print images/s, then the time of each stage."""
    candidates = [list(pipelines(data_path, is_train, protocol)) for is_train in (True, False)]
    print(protocol, flush=True)
    width = max(len(pipeline.name) for split in candidates for pipeline in split)
    columns = [f'{"images/s of " + part + " [min–max]":>28} {"ratio":>6}' for part in ('a core', 'all')]
    print(f'{"pipeline":{width}}', *columns)
    for split in candidates:
        results = compare_loading(split, protocol)
        for pipeline, speeds in zip(split, results):
            columns = [f'{speed.span:>28} {speed.ratio_to(plain):6.3f}' for speed, plain in zip(speeds, results[0])]
            print(f'{pipeline.name:{width}}', *columns, flush=True)
    print('Milliseconds an image on one core:')
    for pipeline in itertools.chain(*candidates):
        with one_thread():
            times = time_stages(pipeline)
        print(f'{pipeline.name:{width}} {", ".join(f"{name} {time:.2f}" for name, time in times.items())}')


def parse_args(argv=None):
    parser = ArgumentParser(description='Measure images/s of the input pipeline.')
    parser.add_argument('--data-path', required=True,
                        help='folder with train/ and val/, or train.lmdb and val.lmdb, or both')
    parser.add_argument('--num-workers', type=positive(int), default=min(10, os.cpu_count()),
                        help='number of processes that load images (default: %(default)s)')
    parser.add_argument('--model', type=timm_model,
                        help='load images as the pretrained weights of this timm model take them (default: as DeiT)')
    parser.add_argument('--input-size', type=positive(int),
                        help="height and width of the images in pixels (default: the model's, 224 for DeiT)")
    parser.add_argument('--batch-size', type=positive(int), default=16,
                        help='images per batch (default: %(default)s)')
    add_protocol_arguments(parser)
    args = parser.parse_args(argv)
    input_size, args.preprocessing = pretrained_input(args.model) if args.model else (224, Preprocessing())
    args.input_size = args.input_size or input_size
    return args


def main(argv=None):
    """Run the program."""
    args = parse_args(argv)
    atexit.register(kill_workers)                      # they ignore SIGTERM, which would end them otherwise
    choose_kernels(args.device)
    protocol = LoadingProtocol(args.input_size, args.batch_size, args.device, args.num_workers, args.windows,
                               args.window_seconds, args.preprocessing)
    measure_loading(args.data_path, protocol)


def run(argv=None):
    """The program, on a command line, by default that of the process."""
    run_program('loader_benchmark.py', main, argv)
