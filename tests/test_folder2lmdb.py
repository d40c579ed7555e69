import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import lmdb
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

import folder2lmdb
from conftest import TINY, run_main
from folder2lmdb import ImageFolderLMDB
from utils import InputError

DATA = Path(__file__).parent / 'data'
SCRIPT = Path(folder2lmdb.__file__)

# Name → (mode, format): the names do not always tell the format, as in ImageNet
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
def command(monkeypatch, capsys):
    """The command line within this process: arguments → (status, standard output, standard error)."""
    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['folder2lmdb.py', *map(str, arguments)])
        capsys.readouterr()
        try:
            status = folder2lmdb.main()
        except SystemExit as leaving:
            status = leaving.code
        return status, *capsys.readouterr()
    return run


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / 'train')


@pytest.fixture
def database(tree):
    """Path of the database of `tree`."""
    folder2lmdb.convert(str(tree), f'{tree}.lmdb')
    return Path(f'{tree}.lmdb')


@pytest.fixture
def legacy(tmp_path):
    """Path of a copy of a database written by the original code."""
    return Path(shutil.copy(DATA / 'legacy_digits.lmdb', tmp_path / 'legacy.lmdb'))


# --- Records --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('size', [0, 1, 7, 8, 9, 4096, 12345, 100_001])
def test_image_record_there_and_back(size):
    data = os.urandom(size)
    value = folder2lmdb.encode_image(data)
    assert value == folder2lmdb.encode_column(pa.array([data], pa.binary()), folder2lmdb.IMAGE).to_pybytes()
    assert folder2lmdb.decode_image(value).to_pybytes() == data


def test_names_there_and_back():
    names = ['a/1.png', 'a/ü.png', 'b/' + os.fsdecode(b'\xff\xfe.png')]
    value = folder2lmdb.encode_column(folder2lmdb.encode_names(names), folder2lmdb.NAMES)
    assert folder2lmdb.decode_names(folder2lmdb.decode_column(value, folder2lmdb.NAMES)) == names
    assert folder2lmdb.decode_header(folder2lmdb.encode_header(7, names), 'path') == (7, names)


def test_format_is_the_one_described(tree, database):
    """Read by nothing but lmdb and pyarrow, as the module's docstring describes it."""
    def column(key, name, kind):
        return pa.ipc.read_record_batch(entries[key], pa.schema([(name, kind)])).to_pydict()[name]

    files = [Path(file) for file, _ in ImageFolder(tree).samples]
    with lmdb.open(str(database), subdir=False, readonly=True, lock=False) as env, env.begin() as txn:
        entries = dict(txn.cursor())
    assert list(entries) == [f'{i:010d}'.encode() for i in range(len(files))] + [b'header', b'labels', b'names']
    for i, file in enumerate(files):
        assert column(f'{i:010d}'.encode(), 'image', pa.binary()) == [file.read_bytes()]
    header = pa.ipc.open_stream(entries[b'header']).read_all()
    assert header.schema.metadata == {b'format': b'folder2lmdb', b'version': b'1', b'images': b'%d' % len(files)}
    assert header.to_pydict() == {'class': [b'bird', b'fish', 'snake – ü'.encode()]}
    assert column(b'names', 'name', pa.binary()) == [str(file.relative_to(tree)).encode() for file in files]
    assert column(b'labels', 'label', pa.int32()) == [0] * 4 + [1] * 5 + [2] * 2


# --- Reading what was written ---------------------------------------------------------------------------------------

def test_process_converts_and_gives_what_image_folder_gives(tmp_path):
    trees = [make_tree(tmp_path / split) for split in ('train', 'val')]
    done = subprocess.run([sys.executable, SCRIPT, '--dir', tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for tree in trees:
        path = tree.with_name(f'{tree.name}.lmdb')
        expected, dataset = ImageFolder(tree), ImageFolderLMDB(path)
        assert dataset.classes == expected.classes == ['bird', 'fish', 'snake – ü']
        assert dataset.class_to_idx == expected.class_to_idx
        assert dataset.targets == expected.targets
        assert dataset.samples == [(os.path.relpath(file, tree), label) for file, label in expected.samples]
        assert len(dataset) == len(PICTURES)
        assert all(picture.mode == 'RGB' for picture, _ in dataset)
        assert pixels(dataset) == pixels(expected)
        assert f'{path}: {len(PICTURES)} images of 3 classes, {path.stat().st_size:,} bytes' in done.stdout
        assert re.search(rf'{path.name}: 100%.*{len(PICTURES)}/{len(PICTURES)}.* images/s, \d+ MiB', done.stderr)
    assert sorted(os.listdir(tmp_path)) == ['train', 'train.lmdb', 'val', 'val.lmdb']


def test_processes_convert_verify_train_and_evaluate(tmp_path):
    """README's commands, on pictures of every mode and format."""
    def run_folder2lmdb(*flags):
        return subprocess.run([sys.executable, SCRIPT, '--dir', data, *flags], capture_output=True, text=True,
                              timeout=120)

    data = tmp_path / 'data'
    trees = [make_tree(data / split) for split in ('train', 'val')]
    assert run_folder2lmdb().returncode == 0
    done = run_folder2lmdb('--verify')
    assert done.returncode == 0 and done.stdout.count(': 0 of 11 images do not decode') == 4
    flags, printed, logged = [*TINY, '--data-path', data, '--batch-size', '4', '--num-workers', '1'], [], []
    for use_lmdb in ([], ['--use-lmdb']):
        folder = tmp_path / f'run{len(use_lmdb)}'
        run_main(*flags, *use_lmdb, '--epochs', '1', '--output-dir', folder)
        stats = json.loads((folder / 'log.txt').read_text())
        logged.append({name: value for name, value in stats.items() if 'second' not in name})
        done = run_main(*flags, *use_lmdb, '--eval', '--resume', folder / 'checkpoint.pth')
        printed.append([line for line in done.stdout.splitlines() if line.startswith(('Accuracy', '* Acc@1'))])
    assert printed[0] == printed[1] and len(printed[0]) == 4 and logged[0] == logged[1]
    (trees[1] / 'bird' / 'rgb.JPEG').write_bytes(b'no picture')
    done = run_folder2lmdb('--verify')
    assert done.returncode == 1 and f'{trees[1]}/bird/rgb.JPEG does not decode' in done.stdout


def test_transforms_and_indices(database):
    dataset = ImageFolderLMDB(database, transform=lambda picture: picture.size, target_transform=lambda label: -label)
    assert dataset[-1] == dataset[len(PICTURES) - 1] == ((35, 30), -2)
    assert dataset[np.int64(0)] == ((35, 30), 0)
    for index in (len(PICTURES), -len(PICTURES) - 1):
        with pytest.raises(IndexError):
            dataset[index]


def test_what_stands_apart_needs_no_image(database, monkeypatch):
    expected = ImageFolderLMDB(database).samples
    write_lmdb(database, {folder2lmdb.image_key(i): b'broken' for i in range(len(PICTURES))})
    dataset = ImageFolderLMDB(database)
    assert dataset.samples == expected and dataset.targets == [label for _, label in expected]


def resident():
    return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def test_opening_costs_the_same_for_any_number_of_images(tmp_path):
    costs = {}
    for number in (1_000, 1_300_000):
        path = tmp_path / f'{number}.lmdb'
        labels = pa.array(np.arange(number) % 1000, pa.int32())
        names = folder2lmdb.encode_names(f'n00000000/n00000000_{i}.JPEG' for i in range(number))
        with (lmdb.open(str(path), subdir=False, lock=False, sync=False, map_size=2 ** 30) as env,
              env.begin(write=True) as txn):
            txn.cursor().putmulti(((folder2lmdb.image_key(i), b'') for i in range(number)), append=True)
            txn.put(b'header', folder2lmdb.encode_header(number, [f'n{i:08d}' for i in range(1000)]))
            txn.put(b'labels', folder2lmdb.encode_column(labels, folder2lmdb.LABELS))
            txn.put(b'names', folder2lmdb.encode_column(names, folder2lmdb.NAMES))
        seconds = []
        for _ in range(5):
            memory, start = resident(), time.perf_counter()
            dataset = ImageFolderLMDB(path)
            seconds.append(time.perf_counter() - start)
            memory = resident() - memory
            assert len(dataset) == number
            dataset.close()
        costs[number] = min(seconds), memory
    (_, memory_few), (seconds_many, memory_many) = costs.values()
    assert seconds_many < 0.05
    assert memory_many < memory_few + 2 ** 20       # the labels alone would take 5 MiB


def test_close_lets_go_of_the_file_and_reading_opens_it_again(database):
    def mapped():
        return str(database) in Path('/proc/self/maps').read_text()

    one, other = ImageFolderLMDB(database), ImageFolderLMDB(database)
    expected = pixels(one)
    one.close()
    assert mapped() and pixels(other) == expected
    other.close()
    assert not mapped()
    assert pixels(one) == expected and mapped()
    del one
    assert not mapped()


def test_pickling_leaves_the_live_object_as_it_is(database):
    dataset = ImageFolderLMDB(database, transform=np.asarray)
    expected = [dataset[i][0].tolist() for i in range(3)]
    assert dataset.targets and dataset.samples
    held = dataset._held
    sent = pickle.dumps(dataset)
    assert b'grey.JPEG' not in sent                 # neither the samples nor anything that is open
    copy = pickle.loads(sent)
    assert dataset._held is held
    for either in (copy, dataset):
        assert [either[i][0].tolist() for i in range(3)] == expected
        assert either.targets == dataset.targets


@pytest.mark.parametrize('start', ['fork', 'spawn'])
def test_worker_processes_read_what_image_folder_gives(tree, database, start):
    expected = [(pil_to_tensor(picture), label) for picture, label in ImageFolder(tree)]
    # Two sets of one file, one of which the parent has open and in use when the workers start
    datasets = [ImageFolderLMDB(database, transform=pil_to_tensor) for _ in range(2)]
    datasets[0].close()
    assert datasets[1][0][0].equal(expected[0][0])
    together = datasets[0] + datasets[1]
    loader = DataLoader(together, batch_size=None, num_workers=2, multiprocessing_context=start)
    for (picture, label), (expected_picture, expected_label) in zip(loader, expected * 2, strict=True):
        assert picture.equal(expected_picture) and label == expected_label
    assert datasets[1][0][0].equal(expected[0][0])  # the parent's own is none the worse


# --- Databases of the original code ---------------------------------------------------------------------------------

@pytest.mark.parametrize('layout', ['file', 'folder'])
def test_legacy_database(legacy, layout):
    if layout == 'folder':
        file = legacy.rename(legacy.with_name('data.mdb'))
        legacy.mkdir()
        file.rename(legacy / 'data.mdb')
    expected = json.loads((DATA / 'legacy_digits.json').read_text())
    dataset = ImageFolderLMDB(legacy, num_classes=10)
    assert len(dataset) == 10
    assert dataset.classes == [str(label) for label in range(10)]
    assert dataset.targets == [record['label'] for record in expected]
    assert dataset.samples == [(str(i), record['label']) for i, record in enumerate(expected)]
    for i, record in enumerate(expected):
        data, label = dataset._database.read(i)
        assert hashlib.sha256(data).hexdigest() == record['sha256'] and label == record['label']
        picture, label = dataset[i]
        assert picture.mode == 'RGB' and picture.size == (8, 8) and label == record['label']


def test_number_of_classes_of_a_legacy_database(legacy):
    assert len(ImageFolderLMDB(legacy).classes) == 1000
    dataset = ImageFolderLMDB(legacy, num_classes=9)
    assert dataset[8][1] == 8
    with pytest.raises(InputError, match=r'legacy.lmdb, index 9, key 9 .* label 9, but there are 9 classes'):
        dataset[9]


def test_opening_a_legacy_database_decodes_no_record(legacy, monkeypatch):
    decoded = []
    decode = folder2lmdb.decode_legacy
    monkeypatch.setattr(folder2lmdb, 'decode_legacy', lambda value: decoded.append(value) or decode(value))
    dataset = ImageFolderLMDB(legacy)
    assert len(dataset) == 10 and len(decoded) == 1
    dataset[3]
    assert len(decoded) == 2


# --- Databases and records that cannot be read ----------------------------------------------------------------------

def newer_version(path):
    schema = pa.schema([('unheard_of', pa.int8())], {'format': 'folder2lmdb', 'version': '2'})
    write_lmdb(path, {b'header': schema.serialize()})


def header(**metadata):
    return pa.schema([('class', pa.binary())], {'format': 'folder2lmdb', **metadata}).serialize()


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize('spoil, message', [
    (lambda path: path.unlink(), 'does not exist; folder2lmdb.py --dir makes'),
    (lambda path: cut(path, 0), 'is empty, 0 bytes'),
    (lambda path: cut(path, 100), 'cut off at its start'),
    (lambda path: cut(path, -4096), r'is truncated, [\d,]+ of [\d,]+ bytes'),
    (lambda path: path.write_bytes(b'PK' * 9999), 'is no LMDB database'),
    (lambda path: path.unlink() or write_lmdb(path, {}), 'is empty, an LMDB database without entries'),
    (lambda path: path.unlink() or write_lmdb(path, {b'00000': b'data'}), 'is an LMDB database of another format'),
    (lambda path: write_lmdb(path, {b'header': pa.schema([]).serialize()}), 'is an LMDB database of another format'),
    (lambda path: write_lmdb(path, {b'header': b'data'}), 'is damaged, or of another format'),
    (lambda path: path.unlink() or write_lmdb(path, {b'__len__': b'\x80\x04K\x0a.', b'0': b'pickled'}),
     'is damaged, or of another format'),
    (lambda path: write_lmdb(path, {b'header': header(images='11')}), "is damaged, or .*version"),
    (lambda path: write_lmdb(path, {b'header': header(version='x', images='11')}), 'is damaged, or .*x'),
    (lambda path: write_lmdb(path, {b'header': header(version='1', images='11')}), 'is damaged, or of another format'),
    (lambda path: path.unlink() or write_lmdb(path, {b'__len__': bytes(16) + bytes(folder2lmdb.encode_header(1, []))}),
     'is damaged, or of another format'),
    (newer_version, 'has version 2 of the format, newer than the 1 known here; update'),
    (lambda path: write_lmdb(path, {folder2lmdb.image_key(4): None}), 'lists 11 images but holds 10'),
    (lambda path: write_lmdb(path, {folder2lmdb.image_key(11): b''}), 'lists 11 images but holds 12'),
])
def test_database_that_cannot_be_read_says_why(database, spoil, message):
    spoil(database)
    errors = []
    for _ in range(2):                              # the second time too: the first leaves nothing open
        with pytest.raises(InputError) as caught:
            ImageFolderLMDB(database)
        assert re.match(f'{re.escape(str(database))} .*{message}', str(caught.value)), caught.value
        assert '\n' not in str(caught.value)
        errors.append(caught.value)


def test_legacy_length_that_disagrees_with_the_records(legacy):
    write_lmdb(legacy, {b'7': None})
    with pytest.raises(InputError, match='lists 10 images but holds 9'):
        ImageFolderLMDB(legacy)


def with_length(value, length, wrong):
    """The value of a record with a wrong length of its image, beyond its end."""
    before, after = value.rsplit(struct.pack('2i', 0, length), 1)
    return before + struct.pack('2i', 0, wrong) + after


def test_record_that_does_not_decode_is_named(database):
    index = 3                                       # of bird/rgb.JPEG
    key = folder2lmdb.image_key(index)
    with lmdb.open(str(database), subdir=False, readonly=True, lock=False) as env, env.begin() as txn:
        value = txn.get(key)
    whole = folder2lmdb.decode_image(value).to_pybytes()
    for spoiled, reason in [
            (folder2lmdb.encode_image(b'no image'), 'no image format of Pillow'),
            (folder2lmdb.encode_image(whole[:len(whole) // 2]), '.*[Tt]runcated'),
            (with_length(value, len(whole), 2 ** 30), '.+'),
            (value[:100], '.+'),
            (value[8:], '.+')]:
        write_lmdb(database, {key: spoiled})
        dataset = ImageFolderLMDB(database)
        with pytest.raises(InputError) as caught:
            dataset[index]
        assert re.fullmatch(rf'{database}, index 3, key 0000000003 \(bird/rgb.JPEG\) does not decode: {reason}.*',
                            str(caught.value)), caught.value
        assert dataset[index + 1]
        del dataset, caught                         # or the file stays open, and LMDB does not open one twice
    write_lmdb(database, {key: None, b'zzz': b''})
    with pytest.raises(InputError, match=r'index 3, .*\) does not decode: there is no such record'):
        ImageFolderLMDB(database)[index]


@pytest.mark.parametrize('key, schema, attribute', [(b'labels', folder2lmdb.LABELS, 'targets'),
                                                    (b'names', folder2lmdb.NAMES, 'samples')])
def test_what_stands_apart_is_checked(database, key, schema, attribute):
    short = folder2lmdb.encode_column(pa.array([0] if key == b'labels' else [b'a'], schema.field(0).type), schema)
    for value, reason in ((short, f'1 {key.decode()} for 11 images'), (b'data', '.*'), (None, '.*')):
        write_lmdb(database, {key: value} if value else {key: value, b'zzz': b''})
        dataset = ImageFolderLMDB(database)
        with pytest.raises(InputError, match=rf'train.lmdb is damaged, or of another format \({reason}'):
            getattr(dataset, attribute)
        dataset.close()


def test_labels_out_of_range_are_named(database):
    labels = pa.array([-3, 3] + [0] * 9, pa.int32())
    write_lmdb(database, {b'labels': folder2lmdb.encode_column(labels, folder2lmdb.LABELS)})
    dataset = ImageFolderLMDB(database)
    for index in (0, 1):
        with pytest.raises(InputError, match=f'index {index}, .* has label -?3, but there are 3 classes'):
            dataset[index]


def test_every_kind_of_error_names_the_record(database, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)                 # a DecompressionBombError, which is no OSError
    with pytest.raises(InputError, match='index 0, .* does not decode: .*decompression bomb'):
        ImageFolderLMDB(database)[0]


def test_legacy_record_that_does_not_decode_is_named(legacy):
    with lmdb.open(str(legacy), subdir=False, readonly=True, lock=False) as env, env.begin() as txn:
        value = txn.get(b'5')
    length = json.loads((DATA / 'legacy_digits.json').read_text())[5]['bytes']
    write_lmdb(legacy, {b'4': with_length(value, length, 2 ** 30), b'5': value.replace(b'\x89PNG', b'\x89PMG'),
                        b'6': value[:200]})
    dataset = ImageFolderLMDB(legacy)
    for index, reason in ((4, '.+'), (5, 'no image format'), (6, '.+')):
        with pytest.raises(InputError, match=f'legacy.lmdb, index {index}, key {index} .*does not decode: {reason}'):
            dataset[index]
    with pytest.raises(InputError, match='index 4, key 4'):
        list(dataset.targets)


# --- The command line -----------------------------------------------------------------------------------------------

def test_wrong_input_is_one_line_and_status_2(tmp_path, command):
    make_tree(tmp_path / 'train')
    (tmp_path / 'val').mkdir()
    (tmp_path / 'test' / 'hollow').mkdir(parents=True)
    (tmp_path / 'full.lmdb').mkdir()
    (tmp_path / 'full').mkdir()
    for arguments, message in [
            ([], '--dir'),
            (['--dir', tmp_path / 'nowhere'], 'nowhere/train is not a folder'),
            (['--dir', tmp_path, '--splits', 'train,no'], f'{tmp_path}/no is not a folder'),
            (['--dir', tmp_path, '--splits', 'val'], 'val'),
            (['--dir', tmp_path, '--splits', 'test'], 'hollow'),
            (['--dir', tmp_path, '--splits', 'train/'], "--splits takes names of folders in --dir .*, not 'train/'"),
            (['--dir', tmp_path, '--splits', 'train,'], "not 'train,'"),
            (['--dir', tmp_path, '--splits', 'train,train'], "not 'train,train'"),
            (['--dir', tmp_path, '--splits', 'full', '--force'], 'full.lmdb is a folder; remove it first'),
            (['--dir', tmp_path, '--workers', '0'], '--workers must be at least 1, not 0'),
            (['--dir', tmp_path, '--verify', '--splits', 'no'], f'neither {tmp_path}/no nor {tmp_path}/no.lmdb')]:
        status, out, err = command(*arguments)
        assert status == 2 and not out
        assert re.fullmatch(rf'folder2lmdb.py: error: .*{message}.*\n', err), err
    assert not list(tmp_path.glob('*.lmdb*/*')) and not list(tmp_path.glob('*.partial'))


@pytest.mark.parametrize('change', [-1, 1])
def test_a_file_that_changes_meanwhile_is_not_stored(change, tree, command, monkeypatch):
    def wrong_size(file, path):
        return size(file, path) + change * path.endswith('bit.png')

    size = folder2lmdb._image_size
    monkeypatch.setattr(folder2lmdb, '_image_size', wrong_size)
    status, _, err = command('--dir', tree.parent, '--splits', 'train')
    assert status == 2 and 'fish/bit.png changed while it was read' in err and os.listdir(tree.parent) == ['train']


def test_what_is_no_file_or_too_large_is_named(tree, command, monkeypatch):
    os.mkfifo(tree / 'bird' / 'pipe.jpg')
    status, _, err = command('--dir', tree.parent, '--splits', 'train')
    assert status == 2 and 'bird/pipe.jpg is no image' in err
    (tree / 'bird' / 'pipe.jpg').unlink()
    with open(tree / 'fish' / 'huge.png', 'wb') as file:
        file.truncate(2 ** 30)
    status, _, err = command('--dir', tree.parent, '--splits', 'train')
    assert status == 2 and 'fish/huge.png is no image' in err and os.listdir(tree.parent) == ['train']


@pytest.mark.parametrize('step', [2 ** 15, 2 ** 17])
def test_the_map_grows_with_what_is_written(step, tmp_path, monkeypatch):
    """From one page and from many, for records much smaller than a page, and larger than the map."""
    folder = tmp_path / 'train' / 'a'
    folder.mkdir(parents=True)
    sizes = [10] * 100 + [5000] * 100 + [300_000, 1, 2_000_000]
    for i, size in enumerate(sizes):
        (folder / f'{i:03}.jpg').write_bytes(bytes([i]) * size)
    monkeypatch.setattr(folder2lmdb, 'MAP_STEP', step)
    folder2lmdb.convert(str(tmp_path / 'train'), str(tmp_path / 'train.lmdb'))
    database = folder2lmdb._open_database(str(tmp_path / 'train.lmdb'))
    assert [database.read(i)[0] for i in range(len(sizes))] == [bytes([i]) * size for i, size in enumerate(sizes)]


def test_existing_database_is_replaced_by_force_only_and_only_by_a_whole_one(tree, database, command, monkeypatch):
    before = database.read_bytes()
    status, _, err = command('--dir', tree.parent, '--splits', 'train')
    assert status == 2 and err.count('\n') == 1
    assert 'train.lmdb exists; --force replaces it, --splits leaves it out' in err
    assert database.read_bytes() == before
    (tree / 'bird' / 'grey.JPEG').rename(tree / 'bird' / 'black.JPEG')
    with monkeypatch.context() as too_small:
        too_small.setattr(folder2lmdb, 'MAP_STEP', 2 ** 15)
        too_small.setattr(folder2lmdb, 'PAGE', 1)                                    # so that the map does not grow
        status, _, err = command('--dir', tree.parent, '--splits', 'train', '--force')
    assert status == 2 and 'MAP_FULL' in err
    assert database.read_bytes() == before and len(os.listdir(tree.parent)) == 2
    assert command('--dir', tree.parent, '--splits', 'train', '--force')[0] == 0
    assert ('bird/black.JPEG', 0) in ImageFolderLMDB(database).samples and len(os.listdir(tree.parent)) == 2


def test_two_conversions_to_one_file_do_not_mix(tree):
    path = f'{tree}.lmdb'
    with (folder2lmdb._whole_or_not_at_all(path) as partial,
          pytest.raises(InputError, match='is being written by another process')):
        Path(partial).write_bytes(b'of the first')
        folder2lmdb.convert(str(tree), path)
    assert Path(path).read_bytes() == b'of the first'


def test_what_a_killed_process_left_is_overwritten(tree, legacy):
    legacy.rename(f'{tree}.lmdb.partial')
    folder2lmdb.convert(str(tree), f'{tree}.lmdb')
    assert pixels(ImageFolderLMDB(f'{tree}.lmdb')) == pixels(ImageFolder(tree))
    assert sorted(os.listdir(tree.parent)) == ['train', 'train.lmdb']


def test_file_system_without_locks(tree, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOSYS, 'Function not implemented')

    monkeypatch.setattr(fcntl, 'flock', refuse)
    assert folder2lmdb.convert(str(tree), f'{tree}.lmdb') == (len(PICTURES), 3)


@pytest.mark.parametrize('split', ['train', 'legacy'])
def test_verify_lists_every_image_that_does_not_decode(tree, legacy, command, split):
    arguments = '--dir', tree.parent, '--splits', split, '--verify'
    status, out, _ = command(*arguments)
    assert status == 0 and '0 of 1' in out
    if split == 'train':
        whole = (tree / 'bird' / 'rgb.JPEG').read_bytes()
        (tree / 'bird' / 'rgb.JPEG').write_bytes(whole[:len(whole) // 2])
        (tree / 'fish' / 'alpha.PNG').write_bytes(b'')
        (tree / 'snake – ü' / 'gone.png').symlink_to('nowhere')
        expected = [f'{tree}/bird/rgb.JPEG does not decode: .*[Tt]runcated.*',
                    f'{tree}/fish/alpha.PNG does not decode: no image format of Pillow',
                    f'{tree}/snake – ü/gone.png cannot be read: No such file or directory',
                    f'{tree}: 3 of 12 images do not decode']
    else:
        write_lmdb(legacy, {b'2': b'broken', b'9': b'broken'})
        expected = [*(f'{legacy}, index {i}, key {i} .*does not decode: .+' for i in (2, 9)),
                    f'{legacy}: 2 of 10 images do not decode']
    status, out, _ = command(*arguments)
    assert status == 1
    for line, pattern in zip(out.splitlines(), expected, strict=True):
        assert re.fullmatch(pattern, line), line


def test_verify_looks_at_tree_and_database(tree, database, command):
    broken = 'snake – ü/lossy.webp'
    (tree / broken).write_bytes(b'')
    assert command('--dir', tree.parent, '--splits', 'train', '--verify')[1].splitlines()[-1] == (
        f'{database}: 0 of 11 images do not decode')
    folder2lmdb.convert(str(tree), str(database))
    (tree / broken).unlink()
    status, out, _ = command('--dir', tree.parent, '--splits', 'train', '--verify')
    assert status == 1 and re.search(rf'{database}, index \d+, key \d+ \({broken}\) does not decode', out)


# --- Interrupted conversions ----------------------------------------------------------------------------------------

def convert_within(folder, limit=None, interrupt_at=None):
    """What a child process does: convert, where asked on a disk that takes `limit` bytes of a file.

    With `interrupt_at`, Ctrl-C is hit when the image of that name is opened.
    """
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if interrupt_at:
        signal.signal(signal.SIGINT, signal.default_int_handler)           # which a shell's background jobs ignore
        sys.addaudithook(lambda event, arguments: event == 'open' and str(arguments[0]).endswith(interrupt_at)
                         and os.kill(os.getpid(), signal.SIGINT))
    sys.argv = ['folder2lmdb.py', '--dir', folder, '--splits', 'train']
    runpy.run_path(str(SCRIPT), run_name='__main__')


@pytest.fixture
def child(tmp_path, monkeypatch):
    """A starter of processes that convert 3,000 images of 25 kB, and that need not first import torch."""
    folder = tmp_path / 'train' / 'noise'
    folder.mkdir(parents=True)
    noise = np.random.RandomState(0).randint(0, 256, (96, 96, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / '0000.png')
    for i in range(1, 3000):
        os.link(folder / '0000.png', folder / f'{i:04d}.png')
    monkeypatch.setenv('PYTHONPATH', str(SCRIPT.parent))
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['folder2lmdb'])

    def start(**fault):
        process = context.Process(target=convert_within, args=(str(tmp_path),), kwargs=fault)
        process.start()
        return process
    return start


def wait_for(condition, process):
    while process.is_alive() and not condition():
        time.sleep(0.001)


def test_kill_leaves_nothing_under_the_final_name(tmp_path, child):
    final, partial = tmp_path / 'train.lmdb', tmp_path / 'train.lmdb.partial'
    duration, mid_way = 0, 0
    for moment in [None] + [random.random() for _ in range(10)]:
        process = child()
        wait_for(partial.exists, process)
        start = time.perf_counter()
        if moment is not None:
            time.sleep(moment * duration)
            process.kill()
        process.join()
        assert process.exitcode in ((0,) if moment is None else (0, -signal.SIGKILL))
        duration = duration or time.perf_counter() - start
        if final.exists():                          # left alone, or quicker than the kill, and then whole
            assert len(ImageFolderLMDB(final)) == 3000
            final.unlink()
        else:
            assert process.exitcode == -signal.SIGKILL
            mid_way += partial.exists()
    assert mid_way >= 1
    process = child()
    process.join()
    assert process.exitcode == 0 and sorted(os.listdir(tmp_path)) == ['train', 'train.lmdb']
    dataset = ImageFolderLMDB(final)
    assert len(dataset) == 3000 and pixels([dataset[i] for i in (0, 1500, 2999)]) == pixels([dataset[7]] * 3)


@pytest.mark.parametrize('fault, status', [({'interrupt_at': '1500.png'}, 130), ({'limit': 20 * 2 ** 20}, 2)],
                         ids=['interrupt', 'full disk'])
def test_interrupt_and_full_disk_leave_nothing(fault, status, tmp_path, child):
    process = child(**fault)
    process.join()
    assert process.exitcode == status and os.listdir(tmp_path) == ['train']
