"""fast_transforms.py: each operation against Pillow's, the draws, the decoder, every data set."""
import io
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import auto_augment
from torchvision.transforms import InterpolationMode

import folder2lmdb
from datasets import build_dataset, build_transform
from formats import fast_transforms
from formats.decoding import decode_picture, load_image
from formats.fast_transforms import EncodedImage
from runtime.utils import DataError, seed_all

PHOTO = load_sample_image('china.jpg')[:375, :500]
SMALL = np.array(Image.fromarray(PHOTO).resize((224, 180), Image.BICUBIC))

# Bounds of the mean of absolute differences from Pillow, as docs/data.md has them
EXACT, ROUNDED, BLURRED = 0, 0.1, 1.5
MOVED = {Image.Resampling.BILINEAR: 1, Image.Resampling.BICUBIC: 3.5}                  # by Pillow's interpolation
BOUNDS = {'contrast': ROUNDED, 'color': ROUNDED, 'desaturate': ROUNDED, 'sharpness': ROUNDED,
          'gaussian_blur': BLURRED, 'gaussian_blur_rand': BLURRED}
GEOMETRY = ['Rotate', 'ShearX', 'ShearY', 'TranslateX', 'TranslateY', 'TranslateXRel', 'TranslateYRel']


def states():
    """The states of the three generators."""
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def apply(name, pixels, seed, fast, interpolation=Image.Resampling.BICUBIC):
    """timm's operation at a magnitude for the seed → pixels."""
    operation = auto_augment.AugmentOp(name, 1., seed % 11, dict(
        magnitude_std=0.5, translate_const=100, img_mean=(124, 116, 104), interpolation=interpolation))
    seed_all(seed)
    if fast:
        operation.aug_fn = fast_transforms.OPERATIONS[operation.aug_fn.__name__]
        return operation(pixels)
    return np.array(operation(Image.fromarray(pixels)))


def mean_difference(a, b):
    return np.abs(a.astype(int) - b).mean()


# --- Operations -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, interpolation', [
    *((name, Image.Resampling.BICUBIC) for name in auto_augment.NAME_TO_OP),
    *((name, Image.Resampling.BILINEAR) for name in GEOMETRY)])
def test_operation(name, interpolation):
    bound = MOVED[interpolation] if name in GEOMETRY else BOUNDS.get(auto_augment.NAME_TO_OP[name].__name__, EXACT)
    changed = False
    for seed in range(22):
        before = SMALL.copy()
        exact = apply(name, SMALL, seed, False, interpolation)
        state = states()
        fast = apply(name, SMALL, seed, True, interpolation)
        assert states() == state and np.array_equal(before, SMALL)                     # which is no copy
        assert fast.dtype == np.uint8 and fast.shape == SMALL.shape
        assert mean_difference(exact, fast) <= bound
        changed |= not np.array_equal(exact, SMALL)
    assert changed or name == 'AutoContrast'


@pytest.mark.parametrize('name', ['AutoContrast', 'Equalize', 'Contrast', 'Sharpness'])
@pytest.mark.parametrize('low, high', [(7, 8), (40, 200), (0, 256), (9, 10)])
def test_levels(name, low, high):
    """Few grey levels, one, or all; and a channel with one level."""
    pixels = np.random.RandomState(0).randint(low, high, (9, 11, 3), dtype=np.uint8)
    pixels[..., 1] = low
    assert mean_difference(apply(name, pixels, 5, False), apply(name, pixels, 5, True)) <= (
        ROUNDED if name in ('Contrast', 'Sharpness') else EXACT)


@pytest.mark.parametrize('interpolation', [Image.Resampling.BILINEAR, (Image.Resampling.BILINEAR,
                                                                       Image.Resampling.BICUBIC)])
@pytest.mark.parametrize('name', GEOMETRY)
def test_position(name, interpolation):
    """Red is the column and green the row in pixels: equal to half a pixel, except at the edge of the picture."""
    ramp = np.zeros((180, 224, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(224), np.arange(180)[:, None]
    for seed in range(11):
        exact, fast = (apply(name, ramp, seed, fast, interpolation) for fast in (False, True))
        difference = np.abs(exact.astype(int) - fast)[..., :2].max(2)
        assert np.quantile(difference, 0.97) <= 1 and mean_difference(exact, fast) < 0.6         # 0.5, rounded


# --- The whole transform --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('options', [
    {}, {'aa': 'rand-m7-n3-p0.9'}, {'aa': 'rand-mstd101-tweights'}, {'aa': 'rand-m9-t3a'}, {'aa': 'rand-t3aw'},
    {'aa': 'v0'}, {'aa': 'v0r'}, {'aa': 'original-mstd0.5'}, {'aa': 'originalr'}, {'aa': '3a'}, {'aa': 'augmix-m3'},
    {'aa': ''}, {'aa': '', 'color_jitter': 0}, {'train_interpolation': 'random'}, {'train_interpolation': 'bilinear'},
    {'data_set': 'DIGITS'}, {'data_set': 'CIFAR', 'input_size': 32}], ids=str)
def test_draws_are_those_of_timm(options):
    options = {'data_set': 'IMNET', 'input_size': 96} | options
    exact, fast = (build_transform(True, fast_transforms=fast, **options) for fast in (False, True))
    differences = []
    for seed in range(24):
        seed_all(seed)
        expected = exact(Image.fromarray(PHOTO))
        state = states()
        seed_all(seed)
        image = fast(Image.fromarray(PHOTO))
        assert states() == state
        assert image.dtype == torch.uint8 and image.shape == expected.shape and image.is_contiguous()
        differences.append((image.float() - expected.float()).abs().mean().item())
    assert max(differences) < 8 and sum(differences) / 24 < 3
    pickle.loads(pickle.dumps(fast))                                                   # for workers that are spawned


@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
def test_resize_within_2_of_255(interpolation, monkeypatch):
    """Without augmentation, of a JPEG that is decoded at its size."""
    monkeypatch.setattr(fast_transforms, 'SCALES', ())
    data = encoded()
    exact, fast = (build_transform(True, 'IMNET', 96, fast, aa='', color_jitter=0, train_interpolation=interpolation)
                   for fast in (False, True))
    differences = []
    for seed in range(24):
        seed_all(seed)
        expected = exact(decode_picture(data, None)).int()
        seed_all(seed)
        differences.append((fast(EncodedImage(data, None)) - expected).abs())
    differences = torch.stack(differences)
    assert 0 < differences.max() <= 2 and (differences > 0).float().mean() < 0.02


# --- The decoder ----------------------------------------------------------------------------------------------------

def encoded(mode='RGB', kind='JPEG', pixels=PHOTO, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **{'quality': 92} | options)
    return file.getvalue()


IMAGES = {
    'JPEG 4:2:0': encoded(), 'JPEG 4:4:4': encoded(subsampling=0), 'JPEG 4:2:2': encoded(quality=75, subsampling=1),
    'progressive': encoded(progressive=True), 'grey JPEG': encoded('L'), 'CMYK JPEG': encoded('CMYK'),
    'PNG': encoded(kind='PNG'), 'palette PNG': encoded('P', 'PNG'), 'alpha PNG': encoded('RGBA', 'PNG'),
    '1-bit PNG': encoded('1', 'PNG'), 'GIF': encoded('P', 'GIF'), 'WEBP': encoded(kind='WEBP')}


@pytest.mark.parametrize('name', IMAGES)
def test_decoded_pixels_equal_pillow(name):
    image = EncodedImage(IMAGES[name], lambda: name)
    assert image.size == (500, 375)
    assert image.is_jpeg == (name in ('JPEG 4:2:0', 'JPEG 4:4:4', 'JPEG 4:2:2', 'progressive', 'grey JPEG'))
    pixels = image.crop(30, 20, 200, 301, (224, 224))
    assert np.array_equal(pixels, np.asarray(decode_picture(IMAGES[name], lambda: name))[30:230, 20:321])


@pytest.mark.parametrize('data', [b'', b'text', IMAGES['JPEG 4:2:0'][:9000], IMAGES['progressive'][:100],
                                  b'\xff\xd8\xff' + bytes(99)])
def test_broken_images(data, tmp_path):
    """The same line as without the flag."""
    path = tmp_path / 'a.jpg'
    path.write_bytes(data)
    with pytest.raises(DataError, match=r'a\.jpg does not decode') as expected:
        load_image(path)
    transform = build_transform(True, 'IMNET', 32, fast_transforms=True)
    with pytest.raises(DataError) as found:
        transform(load_image(path, EncodedImage))
    assert str(found.value) == str(expected.value)


def test_header_with_too_large_a_size(monkeypatch):
    """As without the flag, Pillow refuses it before memory is taken."""
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100 * 100)
    with pytest.raises(DataError, match='here does not decode: .*decompression bomb'):
        EncodedImage(IMAGES['JPEG 4:2:0'], lambda: 'here')


def test_warning_of_libjpeg_that_pillow_ignores():
    data = IMAGES['JPEG 4:2:0']
    odd = data[:-2] + b'\0\0\0\0' + data[-2:]                                          # bytes before the end marker
    image = EncodedImage(odd, None)
    assert np.array_equal(image.crop(0, 0, 375, 500, (500, 500)), decode_picture(odd, None))


@pytest.mark.parametrize('crop, scale', [
    ((0, 0, 375, 500), 2), ((10, 31, 224, 224), 1), ((33, 7, 320, 340), 2), ((1, 1, 149, 349), 1),
    ((5, 0, 370, 490), 4), ((0, 3, 375, 497), 8)])
def test_scaled_decoding(crop, scale):
    """A ramp: the position of each output pixel to half a pixel; no more is decoded than the output needs."""
    top, left, height, width = crop
    side = {1: 150, 2: 150, 4: 92, 8: 46}[scale]
    ramp = np.zeros((375, 500, 3), np.uint8)
    ramp[..., 0] = ramp[..., 1] = ramp[..., 2] = np.linspace(0, 250, 500)
    image = EncodedImage(encoded(pixels=ramp, quality=100, subsampling=0), None)
    pixels = image.crop(*crop, (side, side))
    assert abs(pixels.shape[0] - height / scale) <= 1 and abs(pixels.shape[1] - width / scale) <= 1
    resized = fast_transforms.Resize((side, side), InterpolationMode.BILINEAR)(pixels)
    columns = 2. * resized[side // 2, :, 0]                                            # of the ramp
    expected = left + (np.arange(side) + 0.5) * width / side - 0.5
    assert np.abs(columns - expected)[2:-2].max() <= 0.5 * width / side + 1            # and a level is 2 pixels
    upright = np.ascontiguousarray(ramp.transpose(1, 0, 2))
    image = EncodedImage(encoded(pixels=upright, quality=100, subsampling=0), None)
    rows = image.crop(left, top, width, height, (side, side)).transpose(1, 0, 2)
    assert np.abs(rows.astype(int) - pixels).max() < 3


# --- Data sets ------------------------------------------------------------------------------------------------------

def test_every_storage_gives_the_same_images(tmp_path):
    """Files and a database: the same file, the same draws; the digits need no file."""
    (tmp_path / 'train' / 'a').mkdir(parents=True)
    (tmp_path / 'train' / 'a' / '0.jpg').write_bytes(IMAGES['JPEG 4:2:0'])
    (tmp_path / 'train' / 'a' / '1.png').write_bytes(IMAGES['PNG'])
    folder2lmdb.convert(str(tmp_path / 'train'), str(tmp_path / 'train.lmdb'))
    files, database = (build_dataset(True, data_set='IMNET', data_path=tmp_path, use_lmdb=use_lmdb,
                                     fast_transforms=True) for use_lmdb in (False, True))
    for index in (0, 1):
        images = []
        for dataset in (files, database):
            seed_all(index)
            images.append(dataset[index][0])
        assert torch.equal(*images) and images[0].shape == (3, 224, 224)
    digit, _ = build_dataset(True, input_size=32, fast_transforms=True)[3]
    assert digit.shape == (3, 32, 32)


def test_validation_stays_pillows(tmp_path):
    (tmp_path / 'val' / 'a').mkdir(parents=True)
    (tmp_path / 'val' / 'a' / '0.jpg').write_bytes(IMAGES['JPEG 4:2:0'])
    plain, fast = (build_dataset(False, data_set='IMNET', data_path=tmp_path, fast_transforms=fast)
                   for fast in (False, True))
    assert torch.equal(plain[0][0], fast[0][0])
