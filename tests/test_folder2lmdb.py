import errno
import fcntl
import json
import multiprocessing
import os
import random
import re
import resource
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

import folder2lmdb
import main
from conftest import TINY
from databases import PICTURES, database, legacy, make_tree, pixels, tree, write_lmdb  # noqa: F401 (fixtures)
from folder2lmdb import ImageFolderLMDB
from formats import lmdb_dataset
from outputs import timeless
from runtime.utils import InputError, atomic_write

SCRIPT = Path(folder2lmdb.__file__)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command line in this process: arguments → (status, standard output, standard error)."""
    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['folder2lmdb.py', *map(str, arguments)])
        capsys.readouterr()
        try:
            folder2lmdb.run()
            status = 0
        except SystemExit as leaving:
            status = leaving.code
        return status, *capsys.readouterr()
    return run


# --- Converting -----------------------------------------------------------------------------------------------------

def test_import_of_the_reader_by_older_code():
    assert folder2lmdb.ImageFolderLMDB is lmdb_dataset.ImageFolderLMDB


def test_conversion_as_a_process(tmp_path):
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


def test_training_and_evaluation_from_tree_and_database(tmp_path, command, capsys):
    """The commands of the README, on images of every mode and format."""
    def figures(printed):
        return [line for line in printed.splitlines() if line.startswith(('Accuracy', '* Acc@1'))]

    data = tmp_path / 'data'
    trees = [make_tree(data / split) for split in ('train', 'val')]
    assert command('--dir', data)[0] == 0
    status, out, _ = command('--dir', data, '--verify')
    assert status == 0 and out.count(': 0 of 11 images do not decode') == 4
    flags, printed, logged = [*TINY, '--data-path', data, '--batch-size', '4', '--num-workers', '1'], [], []
    for use_lmdb in ([], ['--use-lmdb']):
        folder = tmp_path / f'run{len(use_lmdb)}'
        main.main(main.parse_args([*map(str, flags), *use_lmdb, '--epochs', '1', '--output-dir', str(folder)]))
        capsys.readouterr()
        stats = json.loads((folder / 'log.txt').read_text())
        logged.append(timeless(stats))
        main.main(main.parse_args([*map(str, flags), *use_lmdb, '--eval', '--resume', str(folder / 'checkpoint.pth')]))
        printed.append(figures(capsys.readouterr().out))
    assert printed[0] == printed[1] and len(printed[0]) == 4 and logged[0] == logged[1]
    (trees[1] / 'bird' / 'rgb.JPEG').write_bytes(b'no picture')
    status, out, _ = command('--dir', data, '--verify')
    assert status == 1 and f'{trees[1]}/bird/rgb.JPEG does not decode' in out


@pytest.mark.parametrize('workers', [1, 3])
def test_order_of_records_with_threads(workers, tmp_path):
    folder = tmp_path / 'train' / 'a'
    folder.mkdir(parents=True)
    for i in range(200):
        (folder / f'{i:03}.jpg').write_bytes(b'%d' % i * (1 + i % 3 * 5000))
    folder2lmdb.convert(str(tmp_path / 'train'), str(tmp_path / 'train.lmdb'), workers)
    records = lmdb_dataset.open_database(str(tmp_path / 'train.lmdb'))
    assert [records.read(i)[0] for i in range(200)] == [b'%d' % i * (1 + i % 3 * 5000) for i in range(200)]


@pytest.mark.parametrize('step', [2 ** 15, 2 ** 17])
def test_growth_of_the_map(step, tmp_path, monkeypatch):
    """Maps of few and of many pages grow, for records much smaller than a page and for records larger than the map."""
    folder = tmp_path / 'train' / 'a'
    folder.mkdir(parents=True)
    sizes = [10] * 100 + [5000] * 100 + [300_000, 1, 2_000_000]
    for i, size in enumerate(sizes):
        (folder / f'{i:03}.jpg').write_bytes(bytes([i]) * size)
    monkeypatch.setattr(folder2lmdb, 'MAP_STEP', step)
    folder2lmdb.convert(str(tmp_path / 'train'), str(tmp_path / 'train.lmdb'))
    records = lmdb_dataset.open_database(str(tmp_path / 'train.lmdb'))
    assert [records.read(i)[0] for i in range(len(sizes))] == [bytes([i]) * size for i, size in enumerate(sizes)]


# --- Wrong input ----------------------------------------------------------------------------------------------------

def test_wrong_input(tmp_path, command):
    make_tree(tmp_path / 'train')
    (tmp_path / 'val').mkdir()
    (tmp_path / 'test' / 'hollow').mkdir(parents=True)
    (tmp_path / 'full.lmdb').mkdir()
    (tmp_path / 'full').mkdir()
    for arguments, message in [
            ([], '--dir'),
            (['--dir', tmp_path / 'nowhere'], 'nowhere is not a folder'),
            (['--dir', tmp_path, '--splits', 'train,no'], f'{tmp_path} has no no/ folder; no/<class>/<image> is expected'),
            (['--dir', tmp_path, '--splits', 'val'], 'val'),
            (['--dir', tmp_path, '--splits', 'test'], 'hollow'),
            (['--dir', tmp_path, '--splits', 'train/'], "--splits: takes names of folders in --dir, .*, not 'train/'"),
            (['--dir', tmp_path, '--splits', 'train,'], "--splits: .*not 'train,'"),
            (['--dir', tmp_path, '--splits', 'train,train'], "--splits: .*not 'train,train'"),
            (['--dir', tmp_path, '--splits', 'full', '--force'], 'full.lmdb is a folder; remove it first'),
            (['--dir', tmp_path, '--workers', '0'], 'argument --workers: must be above 0, not 0'),
            (['--dir', tmp_path, '--verify', '--splits', 'no'], f'{tmp_path} has no no/ folder and no no.lmdb; no/<class>')]:
        status, out, err = command(*arguments)
        assert status == 2 and not out
        assert re.fullmatch(rf'folder2lmdb.py: error: .*{message}.*\n', err), err
    assert not list(tmp_path.glob('*.lmdb*/*')) and not list(tmp_path.glob('*.tmp'))


@pytest.mark.parametrize('change', [-1, 1])
def test_image_file_that_changes_during_conversion(change, tree, command, monkeypatch):
    def look_and_change(file):
        status, path = fstat(file), os.readlink(f'/proc/self/fd/{file}')
        if path.endswith('bit.png'):
            os.truncate(path, status.st_size + change)
        return status

    fstat = os.fstat
    monkeypatch.setattr(os, 'fstat', look_and_change)
    status, _, err = command('--dir', tree.parent, '--splits', 'train')
    assert status == 2 and 'fish/bit.png changed while it was read' in err and os.listdir(tree.parent) == ['train']


def test_pipe_and_too_large_file(tree, command):
    os.mkfifo(tree / 'bird' / 'pipe.jpg')
    status, _, err = command('--dir', tree.parent, '--splits', 'train')
    assert status == 2 and 'bird/pipe.jpg is no image' in err
    (tree / 'bird' / 'pipe.jpg').unlink()
    with open(tree / 'fish' / 'huge.png', 'wb') as file:
        file.truncate(2 ** 30)
    status, _, err = command('--dir', tree.parent, '--splits', 'train')
    assert status == 2 and 'fish/huge.png is no image' in err and os.listdir(tree.parent) == ['train']


# --- Existing and temporary files -----------------------------------------------------------------------------------

def test_existing_database_with_and_without_force(tree, database, command, monkeypatch):
    before = database.read_bytes()
    status, _, err = command('--dir', tree.parent, '--splits', 'train')
    assert status == 2 and err.count('\n') == 1
    assert 'train.lmdb exists; --force replaces it, --splits leaves it out' in err
    assert database.read_bytes() == before
    (tree / 'bird' / 'grey.JPEG').rename(tree / 'bird' / 'black.JPEG')
    with monkeypatch.context() as too_small:
        too_small.setattr(folder2lmdb, 'MAP_STEP', 2 ** 15)
        too_small.setattr(folder2lmdb, 'PAGE', 1)                                    # the map does not grow
        status, _, err = command('--dir', tree.parent, '--splits', 'train', '--force')
    assert status == 2 and 'MAP_FULL' in err
    assert database.read_bytes() == before and len(os.listdir(tree.parent)) == 2
    assert command('--dir', tree.parent, '--splits', 'train', '--force')[0] == 0
    assert ('bird/black.JPEG', 0) in ImageFolderLMDB(database).samples and len(os.listdir(tree.parent)) == 2


def test_two_conversions_to_one_file(tree):
    path = f'{tree}.lmdb'
    with folder2lmdb._locked(f'{path}.tmp'), atomic_write(path) as temporary:
        temporary.write_bytes(b'of the first')
        with pytest.raises(InputError, match='train.lmdb.tmp is being written by another process'):
            folder2lmdb.convert(str(tree), path)
    assert Path(path).read_bytes() == b'of the first'


def test_lock_during_conversion(tree, monkeypatch):
    def second_conversion(*arguments):
        with pytest.raises(InputError, match='train.lmdb.tmp is being written by another process'):
            folder2lmdb.convert(str(tree), f'{tree}.lmdb')
        write(*arguments)

    write = folder2lmdb._write_database
    monkeypatch.setattr(folder2lmdb, '_write_database', second_conversion)
    folder2lmdb.convert(str(tree), f'{tree}.lmdb')
    assert len(ImageFolderLMDB(f'{tree}.lmdb')) == len(PICTURES)


def test_temporary_file_of_a_killed_process(tree, legacy):
    legacy.rename(f'{tree}.lmdb.tmp')
    folder2lmdb.convert(str(tree), f'{tree}.lmdb')
    assert pixels(ImageFolderLMDB(f'{tree}.lmdb')) == pixels(ImageFolder(tree))
    assert sorted(os.listdir(tree.parent)) == ['train', 'train.lmdb']


def test_file_system_without_locks(tree, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOSYS, 'Function not implemented')

    monkeypatch.setattr(fcntl, 'flock', refuse)
    assert folder2lmdb.convert(str(tree), f'{tree}.lmdb') == (len(PICTURES), 3)


# --- Verifying ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('split', ['train', 'legacy'])
def test_verify_with_damaged_images(tree, legacy, command, split):
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


def test_verify_of_tree_and_database(tree, database, command):
    broken = 'snake – ü/lossy.webp'
    (tree / broken).write_bytes(b'')
    assert command('--dir', tree.parent, '--splits', 'train', '--verify')[1].splitlines()[-1] == (
        f'{database}: 0 of 11 images do not decode')
    folder2lmdb.convert(str(tree), str(database))
    (tree / broken).unlink()
    status, out, _ = command('--dir', tree.parent, '--splits', 'train', '--verify')
    assert status == 1 and re.search(rf'{database}, index \d+, key \d+ \({broken}\) does not decode', out)


# --- Interrupted conversions ----------------------------------------------------------------------------------------

NUMBER = 1500                                          # images of 25 kB in each conversion below


def convert_within(folder, limit=None, interrupt_at=None):
    """Convert the training images of a folder. The main function of a child process.

    Args:
        limit: maximum size of a file in bytes, to imitate a full disk.
        interrupt_at: name of an image; when it is opened, the process receives SIGINT.
    """
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if interrupt_at:
        signal.signal(signal.SIGINT, signal.default_int_handler)           # a shell's background jobs ignore SIGINT
        sys.addaudithook(lambda event, arguments: event == 'open' and str(arguments[0]).endswith(interrupt_at)
                         and os.kill(os.getpid(), signal.SIGINT))
    sys.argv = ['folder2lmdb.py', '--dir', folder, '--splits', 'train']
    runpy.run_path(str(SCRIPT), run_name='__main__')


@pytest.fixture
def child(tmp_path, monkeypatch):
    """A function that starts a conversion in a child process. Its fork server has already imported folder2lmdb."""
    folder = tmp_path / 'train' / 'noise'
    folder.mkdir(parents=True)
    noise = np.random.RandomState(0).randint(0, 256, (96, 96, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / '0000.png')
    for i in range(1, NUMBER):
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


def test_killed_conversions(tmp_path, child):
    final, temporary = tmp_path / 'train.lmdb', tmp_path / 'train.lmdb.tmp'
    duration, midway = 0, 0
    for moment in [None] + [random.random() for _ in range(10)]:
        process = child()
        wait_for(temporary.exists, process)
        start = time.perf_counter()
        if moment is not None:
            time.sleep(moment * duration)
            process.kill()
        process.join()
        assert process.exitcode in ((0,) if moment is None else (0, -signal.SIGKILL))
        duration = duration or time.perf_counter() - start
        if final.exists():                             # completed before the kill
            assert len(ImageFolderLMDB(final)) == NUMBER
            final.unlink()
        else:
            assert process.exitcode == -signal.SIGKILL
            midway += temporary.exists()
    assert midway >= 1
    process = child()
    process.join()
    assert process.exitcode == 0 and sorted(os.listdir(tmp_path)) == ['train', 'train.lmdb']
    dataset = ImageFolderLMDB(final)
    images = [dataset[i] for i in (0, NUMBER // 2, NUMBER - 1)]
    assert len(dataset) == NUMBER and pixels(images) == pixels([dataset[7]] * 3)


@pytest.mark.parametrize('fault, status', [({'interrupt_at': f'{NUMBER // 2:04}.png'}, 130),
                                           ({'limit': 20 * 2 ** 20}, 2)],
                         ids=['interrupt', 'full disk'])
def test_interrupted_conversion(fault, status, tmp_path, child):
    process = child(**fault)
    process.join()
    assert process.exitcode == status and os.listdir(tmp_path) == ['train']


# --- Smaller images -------------------------------------------------------------------------------------------------

@pytest.fixture
def sizes(tmp_path):
    """Splits train and val: pictures of 60×40, upright, of the short side itself, and smaller; one is a PNG."""
    for split in ('train', 'val'):
        folder = tmp_path / split / 'a'
        folder.mkdir(parents=True)
        for i, (size, kind) in enumerate([((60, 40), 'JPEG'), ((33, 90), 'PNG'), ((20, 50), 'JPEG'), ((9, 7), 'PNG')]):
            pixels = np.linspace(0, 255, size[0] * size[1] * 3).reshape(size[1], size[0], 3).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f'{i}.{kind.lower()}', kind)
    return tmp_path


def test_short_side(sizes, command, capsys):
    """Larger training images are JPEGs of the size, others and the validation images the files; the header says so."""
    status, out, err = command('--dir', sizes, '--short-side', '20', '--quality', '95')
    assert status == 0, err
    note = 're-encoded to a shorter side of 20 pixels at most, JPEG quality 95'
    assert [line.endswith(note) for line in out.splitlines()] == [True, False]
    assert re.search(r'train.lmdb: 100%.*4/4 \[.*<.*images/s', err)                            # with an ETA
    train, val = (lmdb_dataset.open_database(str(sizes / f'{split}.lmdb')) for split in ('train', 'val'))
    assert train.reencoding == (20, 95) and str(train.reencoding) == note and val.reencoding is None
    assert ImageFolderLMDB(sizes / 'train.lmdb').reencoding == (20, 95)
    files = [Path(file) for file, _ in ImageFolder(sizes / 'train').samples]
    assert [train.load(i)[0].size for i in range(4)] == [(30, 20), (20, 55), (20, 50), (9, 7)]
    assert [train.read(i)[0] == file.read_bytes() for i, file in enumerate(files)] == [False, False, True, True]
    assert [val.read(i)[0] for i in range(4)] == [file.read_bytes() for file in files]         # equal in both splits
    for i, size in ((0, (30, 20)), (1, (20, 55))):
        expected = Image.open(files[i]).convert('RGB').resize(size, Image.BICUBIC)
        difference = np.asarray(train.load(i)[0]).astype(int) - np.asarray(expected)
        assert train.read(i)[0].startswith(b'\xff\xd8\xff') and np.abs(difference).mean() < 8
    status, out, _ = command('--dir', sizes, '--verify')
    assert status == 0 and out.count(': 0 of 4 images do not decode') == 4
    flags = [*TINY, '--data-path', str(sizes), '--use-lmdb', '--batch-size', '2', '--epochs', '1', '--no-repeated-aug']
    main.main(main.parse_args(flags))
    printed = capsys.readouterr().out
    assert f'train.lmdb: images are {note}' in printed and 'val.lmdb: images' not in printed


def test_short_side_of_validation_images_by_name(sizes, command):
    assert command('--dir', sizes, '--short-side', '20', '--splits', 'val')[0] == 0
    database = lmdb_dataset.open_database(str(sizes / 'val.lmdb'))
    assert database.reencoding == (20, 92) and database.load(0)[0].size == (30, 20)


def test_database_without_short_side_as_before(sizes, tmp_path):
    """Byte for byte, and its header has no more than the three entries of old."""
    for name, options in (('a', {}), ('b', {'reencoding': None, 'workers': 3})):
        folder2lmdb.convert(str(sizes / 'train'), str(tmp_path / name), **options)
    assert (tmp_path / 'a').read_bytes() == (tmp_path / 'b').read_bytes()
    header = lmdb_dataset.encode_header(4, ['a'])
    assert pa.ipc.open_stream(header).schema.metadata == {b'format': b'folder2lmdb', b'version': b'1', b'images': b'4'}


def test_short_side_of_an_image_that_does_not_decode(sizes, command):
    (sizes / 'train' / 'a' / '1.png').write_bytes(b'no picture')
    status, _, err = command('--dir', sizes, '--short-side', '20')
    assert status == 2 and err.splitlines()[-1] == (
        f'folder2lmdb.py: error: {sizes}/train/a/1.png does not decode: no image format of Pillow')
    assert not list(sizes.glob('*.lmdb*'))
