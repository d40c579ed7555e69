"""Trees of image files and LMDB databases, for the tests of the format and of the converter."""
import shutil
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image

import folder2lmdb

DATA = Path(__file__).parent / 'data'

# Name → (mode, format). As in ImageNet, the extension does not always match the format
PICTURES = {
    'bird/grey.JPEG': ('L', 'JPEG'),
    'bird/cmyk.JPEG': ('CMYK', 'JPEG'),
    'bird/rgb.JPEG': ('RGB', 'JPEG'),
    'bird/png.JPEG': ('RGB', 'PNG'),
    'fish/deep/er/palette.png': ('P', 'PNG'),
    'fish/alpha.PNG': ('RGBA', 'PNG'),
    'fish/grey_alpha.png': ('LA', 'PNG'),
    'fish/bit.png': ('1', 'PNG'),
    'fish/bitmap.bmp': ('RGB', 'BMP'),
    'snake – ü/lossy.webp': ('RGB', 'WEBP'),
    'snake – ü/grün.tif': ('RGB', 'TIFF'),
}


def make_tree(folder):
    generator = np.random.RandomState(0)
    for name, (mode, form) in PICTURES.items():
        pixels = generator.randint(0, 256, (6, 7, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((35, 30)).convert('RGBA' if mode == 'RGBA' else 'RGB')
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture.convert(mode).save(folder / name, form)
    (folder / 'bird' / 'notes.txt').write_text('not an image')
    return folder


def write_lmdb(path, entries):
    with lmdb.open(str(path), subdir=False, lock=False, map_size=2 ** 24) as env, env.begin(write=True) as txn:
        for key, value in entries.items():
            txn.put(key, value) if value is not None else txn.delete(key)


def pixels(dataset):
    return [(np.asarray(picture).tolist(), label) for picture, label in (dataset[i] for i in range(len(dataset)))]


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / 'train')


@pytest.fixture
def database(tree):
    """Path of a database converted from `tree`."""
    folder2lmdb.convert(str(tree), f'{tree}.lmdb')
    return Path(f'{tree}.lmdb')


@pytest.fixture
def legacy(tmp_path):
    """Path of a copy of a database that the original code wrote."""
    return Path(shutil.copy(DATA / 'legacy_digits.lmdb', tmp_path / 'legacy.lmdb'))
