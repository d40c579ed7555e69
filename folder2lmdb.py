"""Convert trees of image files to LMDB files for `lmdb_dataset.ImageFolderLMDB`.

    python folder2lmdb.py --dir /path/to/imagenet            # train/ and val/ → train.lmdb and val.lmdb beside them
    python folder2lmdb.py --dir /path/to/imagenet --verify   # decode every image, list those that do not decode
    python folder2lmdb.py --dir /path/to/imagenet --short-side 256     # training images re-encoded at this size
"""
if __name__ == '__main__':                             # before the imports, which take seconds: see `start`
    from runtime.program import start
    start('folder2lmdb')

import argparse
import collections
import contextlib
import fcntl
import os
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor

import lmdb
from tqdm import tqdm

from formats.decoding import load_image
from formats.image_folder import ImageFolder
from formats.lmdb_dataset import (ImageFolderLMDB, empty_record, encode_image, encode_tables, image_key,
                                  open_database)
from formats.reencoding import Reencoding
from runtime.arguments import ArgumentParser, positive, within
from runtime.failures import run_program
from runtime.utils import DataError, InputError, atomic_write, missing_split, one_line

__all__ = ['ImageFolderLMDB', 'convert', 'verify']     # ImageFolderLMDB: imported from here by older code

CHUNK = 16                                             # files that a thread reads at a time, records per transaction
PAGE = os.sysconf('SC_PAGE_SIZE')                      # of LMDB too
MAP_STEP = 2 ** 28                                     # bytes by which the map grows
MAX_SIZE = 2 ** 30                                     # bytes of an image; Arrow's offsets have 32 bits


# --- Converting -----------------------------------------------------------------------------------------------------

def convert(folder, path, workers=1, reencoding=None):
    """Write the images of the tree `folder` to the database `path`, larger ones by a `Reencoding` if it is given.

    The file gets its name when it is complete. As with `cp`, the system writes it to the disk later. At most
    16 * (workers + 2) images are in memory.

    Returns:
        (number of images, number of classes)
    """
    tree = ImageFolder(folder)
    files = [file for file, _ in tree.samples]
    names = [file[len(os.path.join(tree.root, '')):] for file in files]
    tables = encode_tables(tree.classes, tree.targets, names, reencoding)
    with _locked(f'{path}.tmp') as file, atomic_write(path) as temporary:
        with tqdm(total=len(files), unit=' images', desc=os.path.basename(path)) as bar:
            _write_database(temporary, files, tables, workers, bar, reencoding)
        os.close(os.dup(file.fileno()))                # reports what a network file system could not write
    return len(files), len(tree.classes)


@contextlib.contextmanager
def _locked(path):
    """Empty the file `path`, created if missing, and lock it against other processes that convert to it."""
    with open(path, 'ab') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f'{path} is being written by another process') from None
        except OSError:
            pass                                       # a file system without locks
        os.truncate(path, 0)                           # by name: the file may have been renamed before it was locked
        yield file


def _write_database(path, files, tables, workers, bar, reencoding=None):
    """Write the entries to a new LMDB file: the records of the image `files`, then the `tables`."""
    def read_records(indices):
        return [(image_key(index), _read_record(files[index], reencoding)) for index in indices]

    size = 0
    with (ThreadPoolExecutor(workers) as pool,
          lmdb.open(str(path), subdir=False, lock=False, sync=False, metasync=False, map_size=MAP_STEP) as env):
        for records in _in_order(pool, read_records, len(files), workers):
            _put(env, records)
            size += sum(len(value) for _, value in records)
            bar.set_postfix_str(f'{size / 2 ** 20:,.0f} MiB', refresh=False)
            bar.update(len(records))
        _put(env, tables.items())


def _read_record(path, reencoding=None):
    """The record of an image file, read without a copy. With `read_file`, converting takes a tenth longer."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # without O_NONBLOCK, opening a pipe waits for a writer
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_size >= MAX_SIZE:
            raise DataError(f'{path} is no image: it is not a regular file, or has 1 GiB or more')
        record, image = empty_record(status.st_size)
        if os.readv(file, [image, bytearray(1)]) != status.st_size:            # one byte more, to detect growth
            raise DataError(f'{path} changed while it was read; convert again')
        return encode_image(reencoding(bytes(image), lambda: path)) if reencoding else record
    finally:
        os.close(file)


def _put(env, items):
    """Append (key, value) pairs in one transaction. The map grows first if it has to."""
    # Each value has pages of its own; a few more are enough for the tree
    info, pages = env.info(), sum(len(value) // PAGE + 4 for _, value in items) + 16
    needed = (info['last_pgno'] + 1 + pages) * PAGE
    if needed > info['map_size']:
        env.set_mapsize(needed + MAP_STEP)
    with env.begin(write=True) as txn:
        for key, value in items:
            txn.put(key, value, append=True)


def _in_order(pool, function, number, ahead):
    """Yield `function(range)` of CHUNK indices each below `number`, computed by the pool up to `ahead` in advance."""
    pending = collections.deque()
    for start in range(0, number, CHUNK):
        pending.append(pool.submit(function, range(start, min(start + CHUNK, number))))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


# --- Verifying ------------------------------------------------------------------------------------------------------

def verify(path, workers=4):
    """Decode every image of a tree or database, print a line for each that does not decode, return their number."""
    if path.endswith('.lmdb'):
        database = open_database(path)
        number, load = database.num_images, database.load
    else:
        files = [file for file, _ in ImageFolder(path).samples]
        number, load = len(files), lambda index: load_image(files[index])

    def faults(indices):
        lines = []
        for index in indices:
            try:
                load(index)
            except InputError as error:
                lines.append(str(error))
        return len(indices), lines

    num_faults = 0
    with ThreadPoolExecutor(workers) as pool, tqdm(total=number, unit=' images', desc=os.path.basename(path)) as bar:
        for checked, lines in _in_order(pool, faults, number, 2 * workers):
            for line in lines:
                bar.write(line)
            num_faults += len(lines)
            bar.update(checked)
    print(f'{path}: {num_faults:,} of {number:,} images do not decode')
    return num_faults


# --- Command line ---------------------------------------------------------------------------------------------------

def split_names(text):
    """An argparse type: names of folders, separated by commas → list of str."""
    splits = text.split(',')
    if '' in splits or len(set(splits)) < len(splits) or any(os.path.basename(split) != split for split in splits):
        raise argparse.ArgumentTypeError(f'takes names of folders in --dir, separated by commas, not {text!r}')
    return splits


def parse_args(argv=None):
    parser = ArgumentParser(
        description='Convert trees <dir>/<split>/<class>/<image> to one LMDB file each, <dir>/<split>.lmdb.')
    add = parser.add_argument
    add('--dir', required=True, help='folder of the splits')
    add('--splits', type=split_names, help='names, separated by commas (default: train,val)')
    add('--workers', type=positive(int),
        help='threads that read files; more help if the disk responds slowly (default: 1; for --short-side and '
             '--verify, one per core)')
    add('--short-side', type=positive(int), metavar='PIXELS',
        help='store training images whose shorter side is longer as JPEGs of this size, for faster training; '
             'validation images only if --splits names val')
    add('--quality', type=within(1, 100, int), default=92,
        help='with --short-side: of these JPEGs (default: %(default)s)')
    add('--force', action='store_true', help='replace an existing database, once the new one is complete')
    add('--verify', action='store_true',
        help='write nothing; decode every image of the existing trees and databases, and list those that do not '
             'decode (exit status 1 if any)')
    return parser.parse_args(argv)


def convert_all(folders, workers=1, force=False):
    """Convert trees to databases `folder`.lmdb; all are checked before the first, which may take an hour.

    Args:
        folders: dict, folder of a tree → its `Reencoding`, or None to store the files unchanged.
    """
    for folder in folders:
        if not os.path.isdir(folder):
            raise missing_split('--dir', *os.path.split(folder))
        if os.path.isdir(f'{folder}.lmdb'):
            raise InputError(f'{folder}.lmdb is a folder; remove it first')
        if os.path.exists(f'{folder}.lmdb') and not force:
            raise InputError(f'{folder}.lmdb exists; --force replaces it, --splits leaves it out')
    for folder, reencoding in folders.items():
        path = f'{folder}.lmdb'
        num_images, num_classes = convert(folder, path, workers, reencoding)
        print(f'{path}: {num_images:,} images of {num_classes:,} classes, {os.path.getsize(path):,} bytes'
              + (f'; {reencoding}' if reencoding else ''))


def verify_all(folders, workers):
    """Verify each tree `folder` and database `folder`.lmdb that exists; return the number of faults."""
    paths = []
    for folder in folders:
        present = [path for path in (folder, f'{folder}.lmdb') if os.path.exists(path)]
        if not present:
            raise missing_split('--dir', *os.path.split(folder), f' and no {os.path.basename(folder)}.lmdb')
        paths += present
    return sum(verify(path, workers) for path in paths)


def main(argv=None):
    """Convert or verify; → exit status, 1 if an image does not decode."""
    args = parse_args(argv)
    reencoding = Reencoding(args.short_side, args.quality) if args.short_side else None
    # A validation image that is not the original would change every figure, so it must be asked for
    folders = {os.path.join(args.dir, split): reencoding if args.splits or split != 'val' else None
               for split in args.splits or ('train', 'val')}
    try:
        if args.verify:
            return int(verify_all(folders, args.workers or os.cpu_count()) > 0)
        convert_all(folders, args.workers or (os.cpu_count() if reencoding else 1), args.force)
    except OSError as error:
        raise InputError(one_line(error)) from error
    except lmdb.Error as error:                        # a full disk is "Input/output error" for LMDB
        free = shutil.disk_usage(args.dir).free / 2 ** 20
        raise InputError(f'{one_line(error)} ({free:,.0f} MiB are free in {args.dir})') from error


def run(argv=None):
    """The program, on a command line, by default that of the process."""
    run_program('folder2lmdb.py', main, argv)
