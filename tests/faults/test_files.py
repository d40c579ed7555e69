"""Full disks, damaged checkpoints, and checkpoints that contain code."""
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from outputs import assert_same, result
from runs import FLAGS, ROOT, Run, at_file_operation, fork
from runtime.checkpoint import load_checkpoint, write_checkpoint
from runtime.utils import InputError

MIB = 2 ** 20
CHECKPOINT = 86 * MIB                                  # roughly


# --- Full disk ------------------------------------------------------------------------------------------------------

@pytest.fixture
def disk(tmp_path):
    """A folder on its own disk. `resize` sets the size of the disk."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', folder], check=True)     # needs root
    yield folder
    subprocess.run(['umount', '--lazy', folder], check=True)


def test_full_shared_memory(tmp_path, table):
    """One line that says what to do, whether images or semaphores do not fit."""
    command = f'{sys.executable} {ROOT}/main.py {shlex.join(FLAGS)} --input-size 96 --epochs 1 --output_dir {tmp_path}/run'
    for size, left in (('1m', ''), ('8k', '; head -c 9000 /dev/zero > /dev/shm/full')):
        inside = f'mount -t tmpfs -o size={size} tmpfs /dev/shm{left}; exec {command}'
        done = subprocess.run(['unshare', '--mount', 'sh', '-c', inside], capture_output=True, text=True, timeout=120)
        line = done.stderr.splitlines()[-1]
        assert done.returncode == 1 and 'Traceback' not in done.stderr, done.stderr
        assert line.startswith('main.py: error: /dev/shm, ') and '--shm-size' in line and '--num-workers 0' in line
    table(2, 'a /dev/shm that is too small, or full from the start')


def resize(folder, size):
    subprocess.run(['mount', '-o', f'remount,size={int(size)}', folder], check=True)


def fill(folder):
    """Fill all remaining space."""
    with (folder / 'filler').open('ab', buffering=0) as file:
        try:
            while file.write(bytes(MIB)):
                pass
            while file.write(bytes(1)):
                pass
        except OSError:
            pass


def opens(start):
    """A condition for `at_file_operation`: it opens a file whose name starts with `start`."""
    return lambda event, name: event == 'open' and name.startswith(start)


FULL = [                                               # disk size in checkpoints, operation before which it fills up
    (0.5, None), (1.5, None),                          # one checkpoint does not fit; two do not fit
    (6, opens('log.txt')),                             # at the end of the first epoch
    (2.5, None), (3.2, None),                          # three do not fit; four, including the best, do not fit
    (6, opens('events.out.tfevents'))]


def ends_for_lack_of_space(run, folder):
    """All processes exit with status 1 and an error line. The remaining checkpoints are undamaged."""
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
    with Run(disk, *often, processes=2) as run:        # an image for TensorBoard precedes the next checkpoint
        run.wait_for_line('Epoch: [1/2] [10/10]')
        fill(disk)
        ends_for_lack_of_space(run, disk)
    (disk / 'filler').unlink()
    with Run(disk, *often, processes=2) as run:
        run.ends_well()
    assert_same(result(disk), result(undisturbed(2)))
    table(len(FULL) + 1, 'full disk while writing a checkpoint, log.txt or TensorBoard\'s file: both processes exit '
                         'with 1, one line gives the cause; resumed when there is space again')


# --- Damaged checkpoints --------------------------------------------------------------------------------------------

CUTS = 0, 1, 1000, 0.3, 0.6, 0.99, -1000, -8, -2, -1                   # bytes (negative: from the end) or a fraction
OFTEN = '--checkpoint-interval', 3                    # so that few steps remain to train
FLIPS = ('first', 'pickle', 'middle of the pickle', 0.2, 0.4, 0.6, 0.8, 'directory', 'end record', 'last')
HARMLESS = 'end record', 'last'                        # fields that torch.load does not need: the same values load


def cut(data, place):
    return data[:int(place * len(data)) if isinstance(place, float) else place]


def flip(data, place):
    """The bytes of a zip archive with one flipped bit."""
    pickle_start, pickle_end = data.index(b'data.pkl') + 8, data.index(b'PK\x03\x04', 4)
    offset = {'first': 0, 'pickle': pickle_start + 100, 'middle of the pickle': (pickle_start + pickle_end) // 2,
              'directory': data.rindex(b'PK\x01\x02') + 20, 'end record': data.rindex(b'PK\x05\x06') + 16,
              'last': len(data) - 1}.get(place) if isinstance(place, str) else int(place * len(data))
    damaged = bytearray(data)
    damaged[offset] ^= 1 << offset % 8
    return bytes(damaged)


@pytest.fixture(scope='module')
def killed_before_its_last_save(tmp_path_factory):
    """The folder of a run whose newest checkpoint is of step 18 of the last epoch. The previous one is of step 15."""
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
    """Copy a folder, damage its newest checkpoint and resume the run to its end. Return (result, console output)."""
    shutil.copytree(source, folder, copy_function=os.link)                 # no file is modified in place
    newest = folder / 'checkpoint.pth'
    data = newest.read_bytes()
    newest.unlink()
    newest.write_bytes(damage(data, place))
    with Run(folder, *OFTEN) as run:
        run.ends_well()
        console = run.read('out') + run.read('err')
    assert (folder / 'damaged_checkpoint.pth').exists() == (place not in HARMLESS)
    left = result(folder)
    shutil.rmtree(folder)
    return left, console


@pytest.mark.parametrize('damage, places', [(cut, CUTS), (flip, FLIPS)])
def test_damaged_checkpoint(damage, places, killed_before_its_last_save, undisturbed, tmp_path, table):
    reference, source = result(undisturbed(1)), killed_before_its_last_save
    whole, damaged = source / 'checkpoint.pth', tmp_path / 'damaged.pth'
    for place in places:
        damaged.write_bytes(damage(whole.read_bytes(), place))
        if place in HARMLESS:
            assert_same(load_checkpoint(str(damaged)), load_checkpoint(str(whole)))
            continue
        with pytest.raises(InputError, match='damaged.pth'):
            load_checkpoint(str(damaged))
    folders = [tmp_path / str(i) for i in range(len(places))]
    with ProcessPoolExecutor(2, fork) as pool:
        resumed = pool.map(damaged_and_resumed, [damage] * 10, places, [source] * 10, folders)
        for place, (left, console) in zip(places, resumed):
            assert ('the previous one is used' in console) == (place not in HARMLESS), (place, console)
            epochs = [line for line in console.splitlines() if line.startswith('Epoch')]
            first = 19 if place in HARMLESS else 16
            assert epochs[0].startswith(f'Epoch: [1/2] [{first}/20]'), (place, console)
            assert_same(left, reference, f'{place}: {console}')
    table(len(places), {cut: 'a truncated checkpoint', flip: 'a flipped bit in a checkpoint'}[damage]
          + ': reported; the previous checkpoint is used, and one interval is repeated'
          + (f' ({len(HARMLESS)} flips are in unused fields and change nothing)' if damage is flip else ''))


# --- Checkpoints that contain code ----------------------------------------------------------------------------------

class Malicious:
    """An object that creates a file when it is unpickled."""

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


WAYS = (['--resume', 'checkpoint.pth'], ['--resume', 'auto'], ['--finetune', 'checkpoint.pth'],
        ['--resume', 'auto', '--eval'])


def refuses_malicious_checkpoint(write, ways, folder):
    """main.py refuses the checkpoint with one line, for each of `ways` (lists of flags). No code runs."""
    made, folder = folder / 'made', folder / 'run'
    folder.mkdir()
    write({'model': {'weight': torch.zeros(1)}, 'epoch': Malicious(made)}, folder)
    file = folder / 'checkpoint.pth'
    if write != write_pickle:
        torch.load(file, weights_only=False)
        made.unlink()                                  # torch.load ran its code
    for flags in ways:
        flags = [file if flag == file.name else flag for flag in flags]
        with Run(folder, '--resume', '', *flags, '--epochs', '1') as run:
            assert run.finish() == [2], str(run)
            assert 'checkpoint.pth' in run.error()
        assert not made.exists() and file.exists()


@pytest.mark.parametrize('write', [write_pickle, write_old_format, write_zip, write_checkpoint])
def test_malicious_checkpoint(write, tmp_path, table):
    refuses_malicious_checkpoint(write, WAYS, tmp_path)
    table(len(WAYS), f'a checkpoint that would create a file, by {write.__name__}: refused, no file is created')
