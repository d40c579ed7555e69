import hashlib
import json
import os
import pickle
import re
import struct
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

from databases import DATA, PICTURES, database, legacy, make_tree, pixels, tree, write_lmdb  # noqa: F401 (fixtures)
from formats import lmdb_dataset
from formats.lmdb_dataset import ImageFolderLMDB
from runtime.utils import InputError

# --- Records --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('size', [0, 1, 7, 8, 9, 4096, 12345, 100_001])
def test_image_record_round_trip(size):
    data = os.urandom(size)
    value = lmdb_dataset.encode_image(data)
    assert value == lmdb_dataset.encode_column(pa.array([data], pa.binary()), lmdb_dataset.IMAGE).to_pybytes()
    assert lmdb_dataset.decode_image(value).to_pybytes() == data


def test_names_round_trip():
    names = ['a/1.png', 'a/ü.png', 'b/' + os.fsdecode(b'\xff\xfe.png')]
    value = lmdb_dataset.encode_column(lmdb_dataset.encode_names(names), lmdb_dataset.NAMES)
    assert lmdb_dataset.decode_names(lmdb_dataset.decode_column(value, lmdb_dataset.NAMES)) == names
    assert lmdb_dataset.decode_header(lmdb_dataset.encode_header(7, names), 'path') == (7, names, None)


def test_format_as_documented(tree, database):
    """Read the database with lmdb and pyarrow only, as described in the docstring of lmdb_dataset.py."""
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


# --- Reading --------------------------------------------------------------------------------------------------------

def test_transforms_and_indices(database):
    dataset = ImageFolderLMDB(database, transform=lambda picture: picture.size, target_transform=lambda label: -label)
    assert dataset[-1] == dataset[len(PICTURES) - 1] == ((35, 30), -2)
    assert dataset[np.int64(0)] == ((35, 30), 0)
    for index in (len(PICTURES), -len(PICTURES) - 1):
        with pytest.raises(IndexError):
            dataset[index]


def test_names_and_labels_without_reading_images(database):
    expected = ImageFolderLMDB(database).samples
    write_lmdb(database, {lmdb_dataset.image_key(i): b'broken' for i in range(len(PICTURES))})
    dataset = ImageFolderLMDB(database)
    assert dataset.samples == expected and dataset.targets == [label for _, label in expected]


def resident():
    return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def test_cost_of_opening_for_different_numbers_of_images(tmp_path):
    costs = {}
    for number in (1_000, 300_000):
        path = tmp_path / f'{number}.lmdb'
        tables = lmdb_dataset.encode_tables([f'n{i:08d}' for i in range(1000)], np.arange(number) % 1000,
                                            [f'n00000000/n00000000_{i}.JPEG' for i in range(number)])
        with (lmdb.open(str(path), subdir=False, lock=False, sync=False, map_size=2 ** 28) as env,
              env.begin(write=True) as txn):
            txn.cursor().putmulti(((lmdb_dataset.image_key(i), b'') for i in range(number)), append=True)
            txn.cursor().putmulti(tables.items(), append=True)
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
    assert seconds_many < 0.01                         # reading 300,000 keys takes longer
    assert memory_many < memory_few + 2 ** 20          # the labels alone would take 1.2 MB


def test_close_and_reopen(database):
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


def test_pickled_dataset_and_unchanged_original(database):
    dataset = ImageFolderLMDB(database, transform=np.asarray)
    expected = [dataset[i][0].tolist() for i in range(3)]
    assert dataset.targets and dataset.samples
    opened = dataset._opened
    sent = pickle.dumps(dataset)
    assert b'grey.JPEG' not in sent                    # neither samples nor the open database are sent
    copy = pickle.loads(sent)
    assert dataset._opened is opened
    for either in (copy, dataset):
        assert [either[i][0].tolist() for i in range(3)] == expected
        assert either.targets == dataset.targets


@pytest.mark.parametrize('start, workers', [('fork', 2), ('spawn', 1)])
def test_worker_processes(tree, database, start, workers):
    expected = [(pil_to_tensor(picture), label) for picture, label in ImageFolder(tree)]
    # Two data sets use one file. The parent has already read from one of them when the workers start
    datasets = [ImageFolderLMDB(database, transform=pil_to_tensor) for _ in range(2)]
    datasets[0].close()
    assert datasets[1][0][0].equal(expected[0][0])
    together = datasets[0] + datasets[1]
    loader = DataLoader(together, batch_size=None, num_workers=workers, multiprocessing_context=start)
    for (picture, label), (expected_picture, expected_label) in zip(loader, expected * 2, strict=True):
        assert picture.equal(expected_picture) and label == expected_label
    assert datasets[1][0][0].equal(expected[0][0])     # the parent's data set still works


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


def test_legacy_number_of_classes(legacy):
    assert len(ImageFolderLMDB(legacy).classes) == 1000
    dataset = ImageFolderLMDB(legacy, num_classes=9)
    assert dataset[8][1] == 8
    with pytest.raises(InputError, match=r'legacy.lmdb, index 9, key 9 .* label 9, but there are 9 classes'):
        dataset[9]


def test_legacy_records_decoded_on_access_only(legacy, monkeypatch):
    decoded = []
    decode = lmdb_dataset.decode_legacy
    monkeypatch.setattr(lmdb_dataset, 'decode_legacy', lambda value: decoded.append(value) or decode(value))
    dataset = ImageFolderLMDB(legacy)
    assert len(dataset) == 10 and len(decoded) == 1
    dataset[3]
    assert len(decoded) == 2


# --- Damaged databases and records ----------------------------------------------------------------------------------

def newer_version(path):
    schema = pa.schema([('unknown', pa.int8())], {'format': 'folder2lmdb', 'version': '2'})
    write_lmdb(path, {b'header': schema.serialize()})


def header(**metadata):
    return pa.schema([('class', pa.binary())], {'format': 'folder2lmdb', **metadata}).serialize()


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize('damage, message', [
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
    (lambda path: path.unlink() or write_lmdb(path, {b'__len__': bytes(16) + bytes(lmdb_dataset.encode_header(1, []))}),
     'is damaged, or of another format'),
    (newer_version, 'has version 2 of the format, newer than the 1 known here; update'),
    (lambda path: write_lmdb(path, {lmdb_dataset.image_key(4): None}), 'lists 11 images but holds 10'),
    (lambda path: write_lmdb(path, {lmdb_dataset.image_key(11): b''}), 'lists 11 images but holds 12'),
])
def test_unreadable_database(database, damage, message):
    damage(database)
    for _ in range(2):                                 # twice: the first failure leaves nothing open
        with pytest.raises(InputError) as caught:
            ImageFolderLMDB(database)
        assert re.match(f'{re.escape(str(database))} .*{message}', str(caught.value)), caught.value
        assert '\n' not in str(caught.value)


def test_legacy_number_of_records_other_than_stored(legacy):
    write_lmdb(legacy, {b'7': None})
    with pytest.raises(InputError, match='lists 10 images but holds 9'):
        ImageFolderLMDB(legacy)


def with_length(value, length, wrong):
    """The value of a record, with the length of its image replaced by a wrong one."""
    before, after = value.rsplit(struct.pack('2i', 0, length), 1)
    return before + struct.pack('2i', 0, wrong) + after


def test_damaged_record(database):
    index = 3                                          # bird/rgb.JPEG
    key = lmdb_dataset.image_key(index)
    with lmdb.open(str(database), subdir=False, readonly=True, lock=False) as env, env.begin() as txn:
        value = txn.get(key)
    whole = lmdb_dataset.decode_image(value).to_pybytes()
    for damaged, reason in [
            (lmdb_dataset.encode_image(b'no image'), 'no image format of Pillow'),
            (lmdb_dataset.encode_image(whole[:len(whole) // 2]), '.*[Tt]runcated'),
            (with_length(value, len(whole), 2 ** 30), '.+'),
            (value[:100], '.+'),
            (value[8:], '.+')]:
        write_lmdb(database, {key: damaged})
        dataset = ImageFolderLMDB(database)
        with pytest.raises(InputError) as caught:
            dataset[index]
        assert re.fullmatch(rf'{database}, index 3, key 0000000003 \(bird/rgb.JPEG\) does not decode: {reason}.*',
                            str(caught.value)), caught.value
        assert dataset[index + 1]
        del dataset, caught                            # closes the file, which LMDB cannot open twice
    write_lmdb(database, {key: None, b'zzz': b''})
    with pytest.raises(InputError, match=r'index 3, .*\) does not decode: there is no such record'):
        ImageFolderLMDB(database)[index]


@pytest.mark.parametrize('key, schema, attribute', [(b'labels', lmdb_dataset.LABELS, 'targets'),
                                                    (b'names', lmdb_dataset.NAMES, 'samples')])
def test_damaged_table(database, key, schema, attribute):
    short = lmdb_dataset.encode_column(pa.array([0] if key == b'labels' else [b'a'], schema.field(0).type), schema)
    for value, reason in ((short, f'1 {key.decode()} for 11 images'), (b'data', '.*'), (None, '.*')):
        write_lmdb(database, {key: value} if value else {key: value, b'zzz': b''})
        dataset = ImageFolderLMDB(database)
        with pytest.raises(InputError, match=rf'train.lmdb is damaged, or of another format \({reason}'):
            getattr(dataset, attribute)
        dataset.close()


def test_label_out_of_range(database):
    labels = pa.array([-3, 3] + [0] * 9, pa.int32())
    write_lmdb(database, {b'labels': lmdb_dataset.encode_column(labels, lmdb_dataset.LABELS)})
    dataset = ImageFolderLMDB(database)
    for index in (0, 1):
        with pytest.raises(InputError, match=f'index {index}, .* has label -?3, but there are 3 classes'):
            dataset[index]


def test_error_of_pillow_other_than_oserror(database, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)                 # raises DecompressionBombError
    with pytest.raises(InputError, match='index 0, .* does not decode: .*decompression bomb'):
        ImageFolderLMDB(database)[0]


def test_damaged_legacy_record(legacy):
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
