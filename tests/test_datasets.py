import io
import json
import os
import random
import struct
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image
from timm.data import create_transform
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

import folder2lmdb
from conftest import ROOT
from datasets import (DeviceLoader, Digits, INaturalist, SeededDataset, build_dataset, build_loader, build_transform,
                      check_same_classes, spread)
from formats.decoding import decode_picture, load_image
from formats.fast_transforms import EncodedImage
from loader_benchmark import plain_transform
from runtime.utils import DataError, InputError
from samplers import EvalSampler, TrainSampler

CPU = torch.device('cpu')
PHOTO = load_sample_image('china.jpg')[:375, :500]


def test_digits():
    train, val = Digits(train=True), Digits(train=False)
    assert (len(train), len(val)) == (1437, 360)
    pixels = sorted(image.tobytes() for image in (*train.images, *val.images))
    assert pixels == sorted((image * (255 / 16)).astype(np.uint8).tobytes() for image in load_digits().images)
    assert Digits(train=True).targets == train.targets and set(val.targets) == set(range(10))
    board, _ = Digits(train=False, on_board=True)[3]
    assert board.size == (12, 12) and (np.delete(np.asarray(board), np.s_[2:-2], 0) == 64).all()
    expected = 64 + np.asarray(val[3][0]) * (191 / 255)
    assert np.abs(np.asarray(board)[2:-2, 2:-2] - expected).max() < 1
    image, label = val[3]
    assert image.mode == 'RGB' and image.size == (8, 8) and label == val.targets[3]


@pytest.fixture
def inat(tmp_path):
    """Three species of two genera. Species 7 comes first in the training annotations."""
    categories = [{'id': 7, 'name': 'b b', 'genus': 'b'}, {'id': 3, 'name': 'a a', 'genus': 'a'},
                  {'id': 5, 'name': 'b c', 'genus': 'b'}]
    (tmp_path / 'categories.json').write_text(json.dumps(categories))
    for split, ids in (('train', [7, 3, 5, 7]), ('val', [3, 5])):
        images = [{'id': i, 'file_name': f'{split}_val2018/Birds/{category}/{i}.jpg'} for i, category in enumerate(ids)]
        annotations = [{'image_id': i, 'category_id': category} for i, category in enumerate(ids)]
        (tmp_path / f'{split}2018.json').write_text(json.dumps({'images': images, 'annotations': annotations}))
        for i, category in enumerate(ids):
            path = tmp_path / f'{split}_val2018' / str(category) / f'{i}.jpg'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (4, 4), (category * 10, 0, 0)).save(path)
    return tmp_path


def test_inaturalist(inat):
    train, val = INaturalist(inat, True, 2018), INaturalist(inat, False, 2018)
    assert train.classes == val.classes == ['b b', 'a a', 'b c']
    assert (train.targets, val.targets) == ([0, 1, 2, 0], [1, 2])
    assert INaturalist(inat, True, 2018, 'genus').targets == [0, 1, 0, 0]
    for dataset, ids in ((train, [7, 3, 5, 7]), (val, [3, 5])):
        assert [round(dataset[i][0].getpixel((0, 0))[0] / 10) for i in range(len(dataset))] == ids
    with pytest.raises(InputError, match='train2019.json is missing'):
        INaturalist(inat, True, 2019)


def test_inaturalist_as_its_archive_unpacks(inat):
    """Images are in a folder of their supercategory. The first image decides, and is looked for once."""
    flattened = INaturalist(inat, True, 2018).samples
    (inat / 'train_val2018' / 'Birds').mkdir()
    for folder in '3', '5', '7':
        (inat / 'train_val2018' / folder).rename(inat / 'train_val2018' / 'Birds' / folder)
    train = INaturalist(inat, True, 2018)
    assert [path.relative_to(inat / 'train_val2018').parts for path, _ in train.samples] == [
        ('Birds', '7', '0.jpg'), ('Birds', '3', '1.jpg'), ('Birds', '5', '2.jpg'), ('Birds', '7', '3.jpg')]
    assert [label for _, label in flattened] == train.targets == [0, 1, 2, 0]
    assert [round(train[i][0].getpixel((0, 0))[0] / 10) for i in range(4)] == [7, 3, 5, 7]
    (inat / 'train_val2018' / 'Birds').rename(inat / 'train_val2018' / 'Bees')
    with pytest.raises(InputError, match='neither train_val2018/Birds/7/0.jpg nor train_val2018/7/0.jpg'):
        INaturalist(inat, True, 2018)


def test_image_folder(image_folder):
    train, val = (build_dataset(is_train, data_set='IMNET', data_path=image_folder, input_size=32)
                  for is_train in (True, False))
    assert train.classes == val.classes == ['blue', 'green', 'red'] and (len(train), len(val)) == (24, 9)
    image, label = val[0]
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8 and label == 0
    assert image.float().mean(dim=(1, 2)).argmax() == 2
    check_same_classes(train, val)
    val.classes = ['blue', 'yellow', 'red']
    with pytest.raises(InputError, match='green is in train only, yellow is in val only'):
        check_same_classes(train, val)


def test_names_of_inaturalist_in_another_locale(inat):
    path = inat / 'categories.json'
    path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes().replace(b'b b', 'bé b'.encode()))
    code = f'from datasets import INaturalist; print(ascii(INaturalist({str(inat)!r}, True, 2018).classes))'
    environment = {**os.environ, 'LC_ALL': 'en_US.ISO-8859-1', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == ascii(['bé b', 'a a', 'b c']), done.stderr


@pytest.mark.parametrize('wrong', [{'genus': None}, {'annotations': 3}, {'images': [{'file_name': 'a/b.jpg'}]},
                                   {'images': [{'file_name': 'a/b/77/c.jpg'}]}])
def test_wrong_annotations_of_inaturalist(wrong, inat):
    path = inat / ('categories.json' if 'genus' in wrong else 'train2018.json')
    content = json.loads(path.read_text())
    path.write_text(json.dumps([{'id': 7, 'name': 'b b'}] if 'genus' in wrong else content | wrong))
    with pytest.raises(InputError, match='iNaturalist 2018'):
        INaturalist(inat, True, 2018, 'genus')
    path.write_text('{')
    with pytest.raises(InputError, match=f'{path.name} is not JSON'):
        INaturalist(inat, True, 2018)


def test_cifar_at_its_own_size():
    transform = partial(build_transform, data_set='CIFAR', aa='', color_jitter=0)
    picture = Image.fromarray(np.random.RandomState(0).randint(0, 256, (32, 32, 3), dtype=np.uint8))
    assert np.array_equal(transform(False, input_size=32)(picture).permute(1, 2, 0), picture)
    shifted = {transform(True, input_size=32)(picture)[:, :, -1].sum().item() for _ in range(8)}
    assert len(shifted) > 1 and transform(True, input_size=32)(picture).shape == (3, 32, 32)
    assert transform(False, input_size=64)(picture).shape == (3, 64, 64)


def normalized(images):
    """A batch of uint8 images as the model receives it."""
    loader = DataLoader([(image, 0) for image in images], len(images))
    (batch, _), = DeviceLoader(loader, CPU)
    return batch


def test_validation_transform():
    pixels = np.random.RandomState(0).randint(0, 256, (60, 90, 3), dtype=np.uint8)
    image = build_transform(False, 'IMNET', 56)(Image.fromarray(pixels))
    resized = Image.fromarray(pixels).resize((96, 64), Image.BICUBIC)            # 64 = 256 / 224 · 56
    crop = np.asarray(resized)[4:60, 20:76] / 255
    expected = (crop - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(normalized([image])[0].permute(1, 2, 0), expected, atol=1e-6)


def test_normalization_divides_on_a_gpu_too():
    """CUDA multiplies with the reciprocal where the divisor is a number, which rounds otherwise."""
    class Divisors(TorchDispatchMode):
        seen = []

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if 'div' in str(operation):
                self.seen.append(args[1])
            return operation(*args, **kwargs or {})

    with Divisors() as divisors:
        normalized([torch.zeros(3, 2, 2, dtype=torch.uint8)])
    assert len(divisors.seen) == 2 and all(isinstance(divisor, torch.Tensor) for divisor in divisors.seen)


class Counted(Dataset):
    """Four samples; counts in all processes how many were read."""
    reads = torch.zeros(1, dtype=torch.int64).share_memory_()

    def __len__(self):
        return 4

    def __getitem__(self, index):
        self.reads += 1
        return torch.full((3, 1, 1), index, dtype=torch.uint8), index


@pytest.mark.parametrize('workers', [0, 1])
def test_prefetch(workers):
    """The workers begin before the pass, which has every batch once; so has the next."""
    loader = build_loader(Counted(), None, 1, CPU, workers)
    for _ in range(2):
        before = int(Counted.reads)
        loader.prefetch()
        limit = time.monotonic() + 60
        while workers and int(Counted.reads) < before + 2:
            assert time.monotonic() < limit
            time.sleep(0.01)
        assert [int(labels) for _, labels in loader] == [0, 1, 2, 3] and int(Counted.reads) == before + 4
    assert [int(labels) for _, labels in loader] == [0, 1, 2, 3]


# --- The input pipeline ---------------------------------------------------------------------------------------------

def encoded(mode='RGB', kind='JPEG', **options):
    file = io.BytesIO()
    Image.fromarray(PHOTO).convert(mode).save(file, kind, **options)
    return file.getvalue()


IMAGES = {'JPEG 4:2:0': encoded(quality=92), 'progressive': encoded(quality=92, progressive=True)}


GREY16 = np.tile(np.arange(64, dtype=np.uint16) * 1000, (64, 1))


def file_of(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def pixels_of(image):
    """What a decoder returned as a tensor (3, H, W)."""
    return image if isinstance(image, torch.Tensor) else pil_to_tensor(image)


def decode_fast(data, where):
    """The whole image as --fast-transforms decodes it."""
    image = EncodedImage(data, where)
    width, height = image.size
    return torch.from_numpy(np.ascontiguousarray(image.crop(0, 0, height, width, (height, width)))).permute(2, 0, 1)


@pytest.mark.parametrize('kind', ['PNG', 'TIFF', 'PPM', 'JPEG2000', 'big-endian TIFF'])
def test_16_bit_grey_images(kind, tmp_path):
    picture = Image.fromarray(GREY16)
    if kind == 'big-endian TIFF':
        kind, picture = 'TIFF', Image.frombytes('I;16B', (64, 64), GREY16.astype('>u2').tobytes())
    (tmp_path / 'val' / 'a').mkdir(parents=True)
    path = tmp_path / 'val' / 'a' / '0.png'
    path.write_bytes(file_of(picture, kind))
    for decode in decode_picture, decode_fast:
        pixels = pixels_of(load_image(path, decode))
        assert pixels[0, 0, :6].tolist() == [0, 3, 7, 11, 15, 19] and (pixels == pixels[:1]).all()
        assert np.array_equal(pixels[0], GREY16 // 257)
    assert folder2lmdb.verify(str(tmp_path / 'val')) == 0


@pytest.mark.parametrize('picture, kind', [
    (Image.fromarray(GREY16.astype(np.int32)), 'TIFF'), (Image.fromarray(GREY16.astype(np.float32)), 'TIFF'),
    (Image.fromarray(GREY16.astype(np.float32)), 'PPM')], ids=['I', 'F', 'PFM'])
def test_images_of_unknown_range(picture, kind, tmp_path, capsys):
    (tmp_path / 'val' / 'a').mkdir(parents=True)
    path = tmp_path / 'val' / 'a' / '0.tif'
    path.write_bytes(file_of(picture, kind))
    for decode in decode_picture, decode_fast:
        with pytest.raises(DataError, match=r'0\.tif does not decode: the range of its values is unknown .*mode [IF]'):
            load_image(path, decode)
    assert folder2lmdb.verify(str(tmp_path / 'val')) == 1


def test_12_bit_tiff(tmp_path):
    """Pillow reads it as 16 bits, but does not scale it."""
    data = bytearray(file_of(Image.fromarray(GREY16), 'TIFF'))
    entry = data.index(struct.pack('<HHL', 258, 3, 1))                           # BitsPerSample
    data[entry + 8:entry + 10] = struct.pack('<H', 12)
    with pytest.raises(DataError, match='the range of its values is unknown .*I;16'):
        decode_picture(bytes(data), lambda: 'a.tif')


RED = (200, 30, 30)
TRANSPARENT = Image.new('RGBA', (8, 8), (*RED, 0))


@pytest.mark.parametrize('data, colour', [
    (file_of(TRANSPARENT, 'PNG'), RED), (file_of(TRANSPARENT, 'WEBP', lossless=True, exact=True), RED),
    (file_of(TRANSPARENT.convert('LA'), 'PNG'), 3 * (81,)), (file_of(TRANSPARENT.convert('PA'), 'TIFF'), RED),
    (file_of(TRANSPARENT.convert('P'), 'PNG', transparency=0), RED),
    (file_of(TRANSPARENT.convert('P'), 'PNG', transparency=bytes(9)), RED),
    (file_of(Image.new('RGB', (8, 8), RED), 'PNG', transparency=RED), RED),
    (file_of(Image.new('L', (8, 8), 81), 'PNG', transparency=81), 3 * (81,)),
    (file_of(Image.new('CMYK', (8, 8), (55, 225, 225, 0)), 'JPEG', quality=95), RED),      # stored inverted, by Adobe
    (file_of(Image.new('CMYK', (8, 8), (55, 225, 225, 0)), 'TIFF'), RED),
    (file_of(Image.new('1', (8, 8), 1), 'PNG'), 3 * (255,))],
    ids=['RGBA PNG', 'RGBA WEBP', 'LA', 'PA', 'P with an index', 'P with alphas', 'RGB with a colour', 'L with a grey',
         'CMYK JPEG', 'CMYK TIFF', '1'])
@pytest.mark.filterwarnings('error::UserWarning')
def test_modes_of_images(data, colour):
    """Transparency is dropped, the colour stays; CMYK, inverted as Adobe stores it, becomes RGB."""
    for decode in decode_picture, decode_fast:
        difference = pixels_of(decode(data, lambda: 'a')).int() - torch.tensor(colour).view(3, 1, 1)
        assert difference.abs().max() <= 1


@pytest.mark.parametrize('data', [b'', b'text', IMAGES['JPEG 4:2:0'][:9000], IMAGES['progressive'][:100],
                                  b'\xff\xd8\xff' + bytes(99)])
def test_broken_images(data, tmp_path):
    path = tmp_path / 'a.jpg'
    path.write_bytes(data)
    with pytest.raises(DataError, match=r'a\.jpg does not decode'):
        load_image(path)
    with pytest.raises(DataError, match=r'b\.jpg cannot be read: No such file'):
        load_image(tmp_path / 'b.jpg')


@pytest.mark.parametrize('options', [{}, {'train_interpolation': 'random'}, {'aa': ''}],
                         ids=['DeiT', 'random interpolation', 'colour jitter'])
def test_training_images_equal_the_plain_transform(options):
    """With the same random draws, the images are equal bit for bit."""
    recipe = dict(color_jitter=0.4, aa='rand-m9-mstd0.5-inc1', train_interpolation='bicubic') | options
    plain = create_transform(96, is_training=True, color_jitter=recipe['color_jitter'], auto_augment=recipe['aa'],
                             interpolation=recipe['train_interpolation'])

    def drawn(transform, seed):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        return transform(decode_picture(IMAGES['JPEG 4:2:0'], None))

    ours = build_transform(True, 'IMNET', 96, **options)
    for seed in range(40):
        assert torch.equal(normalized([drawn(ours, seed)])[0], drawn(plain, seed))


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """An image folder with 30 JPEG files in each split."""
    folder = tmp_path_factory.mktemp('photos')
    for split in ('train', 'val'):
        (folder / split / 'a').mkdir(parents=True)
        for i in range(30):
            Image.fromarray(PHOTO[i:i + 200, 3 * i:3 * i + 250]).save(folder / split / 'a' / f'{i:02}.jpg')
    return folder


def batches(dataset, num_workers, epoch):
    sampler = TrainSampler(range(30), 1, 0, seed=3, repeated_aug=True)
    sampler.set_epoch(epoch)
    torch.manual_seed(np.random.randint(1000))                                   # global random state has no effect
    return [images for images, _ in build_loader(SeededDataset(dataset), sampler, 10, CPU, num_workers)]


@pytest.mark.parametrize('fast_transforms', [False, True], ids=['exact', 'fast'])
def test_augmentation_is_a_function_of_seed_epoch_and_position(fast_transforms, photos):
    dataset = build_dataset(True, data_set='IMNET', data_path=photos, input_size=32, fast_transforms=fast_transforms)
    alone, two, four, next_epoch = (batches(dataset, *run) for run in ((0, 0), (2, 0), (4, 0), (0, 1)))
    assert len(alone) == 3
    for a, b, c, d in zip(alone, two, four, next_epoch, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c) and not torch.equal(a, d)
    first, copy = alone[0][:2]                                                   # repeated augmentation of one picture
    assert not torch.equal(first, copy)


@pytest.mark.parametrize('num_workers', [0, 2])
def test_validation_batches_equal_the_plain_pipeline(num_workers, photos):
    dataset = build_dataset(False, data_set='IMNET', data_path=photos, input_size=96)
    plain = torch.stack([image for image, _ in ImageFolder(photos / 'val', plain_transform(False, 96))])
    loader = build_loader(dataset, EvalSampler(dataset, 1, 0), 8, CPU, num_workers)
    for _ in range(2):                                                           # workers persist in the second epoch
        ours = list(loader)
        assert [len(images) for images, _ in ours] == [8, 8, 8, 6] and ours[0][0].dtype == torch.float32
        assert torch.equal(torch.cat([images for images, _ in ours]), plain)


def test_loader_settings(monkeypatch):
    monkeypatch.setattr('datasets.DeviceLoader', lambda loader, *_: loader)
    dataset, cuda = Digits(False), torch.device('cuda')
    assert build_loader(dataset, None, 8, CPU, num_workers=1).persistent_workers
    assert [build_loader(dataset, None, 8, *options).pin_memory
            for options in ((cuda,), (cuda, 0, False), (CPU,))] == [True, False, False]


def test_decoder_of_each_data_set(photos):
    folder2lmdb.convert(str(photos / 'train'), str(photos / 'train.lmdb'))
    for is_train, fast_transforms, expected in ((True, True, EncodedImage), (True, False, decode_picture),
                                            (False, True, decode_picture)):
        build = partial(build_dataset, is_train, data_set='IMNET', data_path=photos, fast_transforms=fast_transforms)
        assert build().loader.keywords == {'decode': expected}
        if is_train:
            assert build(use_lmdb=True).decode is expected


def test_channels_last_batches():
    loaders = [build_loader(Digits(False, build_transform(False, 'DIGITS', 32)), None, 8, CPU,
                            channels_last=channels_last) for channels_last in (False, True)]
    for (plain, _), (images, _) in zip(*loaders, strict=True):
        assert torch.equal(images, plain)
        assert plain.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)


def test_spread_over_the_whole_data_set():
    assert [spread(range(9), number).indices for number in (1, 3, 8, 9, 20)] == [
        [0], [0, 3, 6], [0, 1, 2, 3, 4, 5, 6, 7], list(range(9)), list(range(9))]


def test_empty_share():
    dataset = Digits(False)
    assert list(build_loader(dataset, EvalSampler(range(1), 2, 1), 8, CPU)) == []


@pytest.mark.gpu
def test_batches_on_a_gpu(photos):
    dataset = build_dataset(False, data_set='IMNET', data_path=photos, input_size=96)
    load = partial(build_loader, dataset, EvalSampler(dataset, 1, 0), 4)
    on_gpu = []
    for images, labels in load(device=torch.device('cuda')):
        assert images.device.type == labels.device.type == 'cuda'
        torch.cuda._sleep(50_000_000)                                            # the next copy overlaps this work
        on_gpu.append(images.clone())
    for ours, (images, _) in zip(on_gpu, load(device=CPU), strict=True):
        torch.testing.assert_close(ours.cpu(), images, rtol=0, atol=1e-6)
