"""A disk that fills up, a checkpoint that is damaged, and one that would run code."""
import os
import pickle
import shutil
import signal
import subprocess
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from checkpoint import load_checkpoint, write_checkpoint
from outputs import assert_same, result
from runs import Run, at_file_operation, fork
from utils import InputError

MIB = 2 ** 20
CHECKPOINT = 86 * MIB                                  # roughly


# --- A disk that fills up -------------------------------------------------------------------------------------------

@pytest.fixture
def disk(tmp_path):
    """A folder on a disk of its own, as small as `resize` makes it."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', folder], check=True)     # for root
    yield folder
    subprocess.run(['umount', '--lazy', folder], check=True)


def resize(folder, size):
    subprocess.run(['mount', '-o', f'remount,size={int(size)}', folder], check=True)


def fill(folder):
    """Take all the space that is left."""
    with (folder / 'filler').open('ab', buffering=0) as file:
        try:
            while file.write(bytes(MIB)):
                pass
            while file.write(bytes(1)):
                pass
        except OSError:
            pass


def opens(start):
    """Whether a file operation opens a file whose name begins so."""
    return lambda event, name: event == 'open' and name.startswith(start)


FULL = [                                               # size of the disk in checkpoints, what it is filled up before
    (0.5, None), (1.5, None),                          # the first checkpoint does not fit, the second does not
    (6, opens('log.txt')),                             # at the end of the first epoch
    (2.5, None), (3.2, None),                          # the third does not; nor do four, of which one is the best
    (6, opens('events.out.tfevents'))]


def ends_for_lack_of_space(run, folder):
    """All processes end with status 1 and a line; the remaining checkpoints are undamaged."""
    assert run.finish() == [1] * len(run.processes), str(run)
    assert 'No space left' in run.error(), str(run)
    for path in folder.glob('*checkpoint.pth'):
        load_checkpoint(str(path))


def test_full_disk(disk, undisturbed, table):
    often = '--checkpoint-interval', 4
    for size, is_it in FULL:
        resize(disk, size * CHECKPOINT)

        def before(rank):
            if is_it:
                at_file_operation(disk, lambda: fill(disk), is_it)

        with Run(disk, *often, processes=2, before=before) as run:
            ends_for_lack_of_space(run, disk)
        assert (disk / 'checkpoint.pth').exists() == (size > 1)
        (disk / 'filler').unlink(missing_ok=True)
    with Run(disk, *often, processes=2) as run:        # a picture for TensorBoard comes before the next checkpoint
        run.wait_for_line('Epoch: [1] [10/10]')
        fill(disk)
        ends_for_lack_of_space(run, disk)
    (disk / 'filler').unlink()
    with Run(disk, *often, processes=2) as run:
        run.ends_well()
    assert_same(result(disk), result(undisturbed(2)))
    table(len(FULL) + 1, 'the disk is full at a checkpoint, log.txt or TensorBoard\'s file: both processes end with 1, '
                         'a line says why; with space again, resumed')


# --- Damaged checkpoints --------------------------------------------------------------------------------------------

CUTS = 0, 1, 1000, 0.3, 0.6, 0.99, -1000, -8, -2, -1                   # bytes, from the end if negative, or a share
OFTEN = '--checkpoint-interval', 3                    # so that little is left to train, each time
FLIPS = ('first', 'pickle', 'middle of the pickle', 0.2, 0.4, 0.6, 0.8, 'directory', 'end record', 'last')


def cut(data, place):
    return data[:int(place * len(data)) if isinstance(place, float) else place]


def flip(data, place):
    """The bytes of a zip archive with one bit that is another."""
    pickle_start, pickle_end = data.index(b'data.pkl') + 8, data.index(b'PK\x03\x04', 4)
    offset = {'first': 0, 'pickle': pickle_start + 100, 'middle of the pickle': (pickle_start + pickle_end) // 2,
              'directory': data.rindex(b'PK\x01\x02') + 20, 'end record': data.rindex(b'PK\x05\x06') + 16,
              'last': len(data) - 1}.get(place) if isinstance(place, str) else int(place * len(data))
    damaged = bytearray(data)
    damaged[offset] ^= 1 << offset % 8
    return bytes(damaged)


@pytest.fixture(scope='module')
def killed_before_its_last_save(tmp_path_factory):
    """The folder of a run whose newest checkpoint is of step 18 of the last epoch, the one before it of step 15."""
    folder, saves = tmp_path_factory.mktemp('killed') / 'run', []

    def last_save(event, name):
        saves.extend([name] * (event == 'open' and name == 'checkpoint.pth.tmp'))
        return len(saves) == 2 * (6 + 1)

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    with Run(folder, *OFTEN, before=lambda rank: at_file_operation(folder, kill, last_save)) as run:
        assert run.finish() == [-signal.SIGKILL], str(run)
    return folder


def damaged_and_resumed(damage, place, source, folder):
    """A copy of the folder with a damaged newest checkpoint is resumed to its end. → (what it leaves, its console)"""
    shutil.copytree(source, folder, copy_function=os.link)                 # no file is changed in its place
    newest = folder / 'checkpoint.pth'
    data = newest.read_bytes()
    newest.unlink()
    newest.write_bytes(damage(data, place))
    with Run(folder, *OFTEN) as run:
        run.ends_well()
        console = run.read('out') + run.read('err')
    assert (folder / 'damaged_checkpoint.pth').exists()
    left = result(folder)
    shutil.rmtree(folder)
    return left, console


@pytest.mark.parametrize('damage, places', [(cut, CUTS), (flip, FLIPS)])
def test_damaged_checkpoint(
        damage, places, killed_before_its_last_save, undisturbed, tmp_path, table):
    reference, source = result(undisturbed(1)), killed_before_its_last_save
    data = (source / 'checkpoint.pth').read_bytes()
    for place in places:
        (tmp_path / 'damaged.pth').write_bytes(damage(data, place))
        with pytest.raises(InputError, match='damaged.pth'):
            load_checkpoint(str(tmp_path / 'damaged.pth'))
    folders = [tmp_path / str(i) for i in range(len(places))]
    with ProcessPoolExecutor(2, fork) as pool:
        resumed = pool.map(damaged_and_resumed, [damage] * 10, places, [source] * 10, folders)
        for place, (left, console) in zip(places, resumed):
            assert 'damaged' in console, (place, console)
            epochs = [line for line in console.splitlines() if line.startswith('Epoch')]
            assert epochs[0].startswith('Epoch: [1] [16/20]'), (place, console)
            assert_same(left, reference, f'{place}: {console}')
    table(len(places), {cut: 'a checkpoint cut short', flip: 'a bit of a checkpoint flipped'}[damage]
          + ': said, and the one before taken, whose loss is one interval')


# --- Checkpoints that would run code --------------------------------------------------------------------------------

class Malicious:
    """What creates a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def write_pickle(checkpoint, folder):
    (folder / 'checkpoint.pth').write_bytes(pickle.dumps(checkpoint))


def write_old_format(checkpoint, folder):
    torch.save(checkpoint, folder / 'checkpoint.pth', _use_new_zipfile_serialization=False)


def write_zip(checkpoint, folder):
    torch.save(checkpoint, folder / 'checkpoint.pth')


WAYS = ['--resume', 'checkpoint.pth'], ['--resume', 'auto'], ['--finetune', 'checkpoint.pth'], ['--resume', 'auto', '--eval']


def refuses_malicious_checkpoint(write, ways, folder):
    """Each of these flags, in which checkpoint.pth stands for the file, is refused with one line; no code runs."""
    made, folder = folder / 'made', folder / 'run'
    folder.mkdir()
    write({'model': {'weight': torch.zeros(1)}, 'epoch': Malicious(made)}, folder)
    file = folder / 'checkpoint.pth'
    if write != write_pickle:
        torch.load(file, weights_only=False)
        made.unlink()                                  # so it is malicious
    for flags in ways:
        flags = [file if flag == file.name else flag for flag in flags]
        with Run(folder, '--resume', '', *flags, '--epochs', '1') as run:
            assert run.finish() == [2], str(run)
            assert 'checkpoint.pth' in run.error()
        assert not made.exists() and file.exists()


@pytest.mark.parametrize('write', [write_pickle, write_old_format, write_zip, write_checkpoint])
def test_malicious_checkpoint(write, tmp_path, table):
    refuses_malicious_checkpoint(write, WAYS, tmp_path)
    table(len(WAYS), f'a checkpoint that would create a file, by {write.__name__}: refused, no file')
