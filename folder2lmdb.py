"""One LMDB file in place of a tree of image files: the record format both ways, the converter and the reader.

    python folder2lmdb.py --dir /path/to/imagenet            # train/ and val/ → train.lmdb and val.lmdb beside them
    python folder2lmdb.py --dir /path/to/imagenet --verify   # decode every image, list those that do not decode

A database is one file with the images of one split, in the order of torchvision's ImageFolder. Its entries are:

`0000000000`, `0000000001`, …   one image each; the key is the index in ten decimal digits, so that keys sort as indices
    image: binary             the bytes of the image file as they were
`header`
    class: binary             the names of the classes, in ImageFolder's order
`labels`
    label: int32              of each image its class, an index into `header`
`names`
    name: binary              of each image the path of its file relative to the folder of the split

Each value is an Arrow IPC message, a record batch of the one column that is named here. The schema is not repeated in
it, but for `header`: that is an Arrow IPC stream, a schema followed by its batch, and the metadata of the schema are
`format`, which is `folder2lmdb`, `version`, which is 1, and `images`, their number. Names are in the encoding of the
file system. The three last entries are written last.

Databases of the original EViT code are read too. Each of their values is 16 zero bytes and an Arrow IPC stream of one
row and one column `list`, a dense union. Under `0`, `1`, … it holds the list [bytes of the image file, label], under
`__len__` the number of images, under `__keys__` the list of their keys. They name neither classes nor files.
"""
import collections
import contextlib
import fcntl
import functools
import io
import itertools
import os
import shutil
import stat
import struct
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import lmdb
import numpy as np
import pyarrow as pa
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from utils import ArgumentParser, DataError, InputError

FORMAT, VERSION = b'folder2lmdb', 1
HEADER_KEY, LABELS_KEY, NAMES_KEY = b'header', b'labels', b'names'      # they sort after the digits: all is appended
CLASSES, IMAGE, LABELS, NAMES = (pa.schema([column]) for column in (
    ('class', pa.binary()), ('image', pa.binary()), ('label', pa.int32()), ('name', pa.binary())))

ADVICE = 'convert again with folder2lmdb.py --force'
CHUNK = 16                                          # files read by a thread at a time, and records per transaction
PAGE = os.sysconf('SC_PAGE_SIZE')                   # of LMDB too
MAP_STEP = 2 ** 28                                  # bytes that the map grows by
MAX_SIZE = 2 ** 30                                  # bytes of an image; its offset in the record has 32 bits


# --- The records ----------------------------------------------------------------------------------------------------

def image_key(index):
    return b'%010d' % index


def encode_image(data):
    """Bytes of an image file → the value of its entry."""
    before, after = image_frame(len(data))
    return before + data + after


def decode_image(value):
    """Value of an entry → bytes of the image file, a buffer inside `value`."""
    return decode_column(value, IMAGE)[0].as_buffer()


def encode_column(column, schema):
    return pa.record_batch([column], schema=schema).serialize()


def _find_image_frame(length=12345):
    """What pyarrow writes before an image, and where in it the lengths of the body and of the image stand."""
    record = bytes(encode_column(pa.array([bytes(length)]), IMAGE))
    frame = record[:record.rindex(struct.pack('<i', length)) + 4]          # ends with the offsets, 0 and length
    body_length = 8 + len(record) - len(frame)
    return frame, frame.index(struct.pack('<q', body_length)), frame.index(struct.pack('<q', length))


FRAME, BODY_LENGTH, IMAGE_LENGTH = _find_image_frame()


def image_frame(size):
    """The bytes before and after an image of so many bytes in its record.

    Together they are what `encode_column` makes of it; so an image need not be copied to become a record.
    """
    before, after = bytearray(FRAME), bytes(-size % 8)
    struct.pack_into('<q', before, BODY_LENGTH, 8 + size + len(after))
    struct.pack_into('<q', before, IMAGE_LENGTH, size)
    struct.pack_into('<i', before, len(before) - 4, size)
    return before, after


def decode_column(value, schema):
    return _valid(pa.ipc.read_record_batch(pa.py_buffer(value), schema)).column(0)


def _valid(batch):
    batch.validate(full=True)                       # or a wrong offset would be read outside of the batch
    return batch


def encode_names(names):
    return pa.array([os.fsencode(name) for name in names], pa.binary())


def decode_names(column):
    return [os.fsdecode(name) for name in column.to_pylist()]


def encode_header(num_images, classes):
    """Number of images and names of the classes (list of str) → the value under `header`."""
    schema = CLASSES.with_metadata({'format': FORMAT, 'version': str(VERSION), 'images': str(num_images)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as stream:
        stream.write_batch(pa.record_batch([encode_names(classes)], schema=schema))
    return sink.getvalue()


def decode_header(value, path):
    """The value under `header` → number of images and names of the classes (list of str).

    Raises InputError about `path` where it is of another format or of a newer version.
    """
    stream = pa.ipc.open_stream(pa.py_buffer(value))
    metadata = stream.schema.metadata or {}
    if metadata.get(b'format') != FORMAT:
        raise InputError(f'{path} is an LMDB database of another format; {ADVICE}')
    version = int(metadata[b'version'])
    if version > VERSION:
        raise InputError(f'{path} has version {version} of the format, newer than the {VERSION} known here; '
                         'update this code, or convert again with it')
    return int(metadata[b'images']), decode_names(_valid(stream.read_next_batch()).column(0))


def legacy_key(index):
    return b'%d' % index


def decode_legacy(value):
    """A value of the original code → Arrow scalar: the number under `__len__`, or the list [image, label]."""
    return _valid(pa.ipc.open_stream(pa.py_buffer(value)[16:]).read_next_batch()).column(0)[0].value


def read_file(path):
    """Bytes of a file; DataError, naming it, where it cannot be read."""
    try:
        with open(path, 'rb', buffering=0) as file:
            return file.read()
    except OSError as error:
        raise DataError(f'{path} cannot be read: {error.strerror}') from error


def decode_picture(data, where):
    """Bytes of an image file of any mode and format that Pillow reads → RGB picture.

    Raises DataError that begins with `where()` where they do not decode.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return image if image.mode == 'RGB' else image.convert('RGB')              # which copies at any rate
    except Exception as error:                      # on broken data Pillow's decoders raise nearly anything
        raise _undecodable(where(), error) from error


def _undecodable(where, error):
    # Pillow's text of this one names an object in memory
    unknown = isinstance(error, UnidentifiedImageError)
    return DataError(f'{where} does not decode: {"no image format of Pillow" if unknown else _one_line(error)}')


def _damaged(path, error):
    return InputError(f'{path} is damaged, or of another format ({_one_line(error)}); {ADVICE}')


def _one_line(error):
    return ' '.join(str(error).split()) or type(error).__name__


# --- The reader -----------------------------------------------------------------------------------------------------

class _Database:
    """What one process holds of an open database; the file is closed when nothing refers to it any more."""
    header_key = HEADER_KEY
    num_others = 3                                  # entries that are no image
    key = staticmethod(image_key)

    def __init__(self, path, env):
        self.path, self.env, self.pid = path, env, os.getpid()
        with env.begin() as txn:
            self.num_images, self.classes = self._decode_header(txn.get(self.header_key))

    def _decode_header(self, value):
        return decode_header(value, self.path)

    @functools.cached_property
    def labels(self):
        """(number of images,) int32"""
        with self._column(LABELS_KEY, LABELS) as labels:
            return labels.to_numpy().copy()

    def names(self, indices=slice(None)):
        with self._column(NAMES_KEY, NAMES) as names:
            return decode_names(names[indices])

    @contextlib.contextmanager
    def _column(self, key, schema):
        """What stands under `key`, one for each image; InputError about the database where it does not."""
        try:
            with self.env.begin(buffers=True) as txn:
                column = decode_column(txn.get(key), schema)
                if len(column) != self.num_images:
                    raise ValueError(f'{len(column):,} {key.decode()} for {self.num_images:,} images')
                yield column
        except Exception as error:
            raise _damaged(self.path, error) from error

    def where(self, index):
        name, = self.names(slice(index, index + 1))
        return f'{self.path}, index {index}, key {self.key(index).decode()} ({name})'

    def read(self, index):
        """(bytes of the image file, label)"""
        with self.env.begin(buffers=True) as txn:
            try:
                value = txn.get(self.key(index))
                if value is None:
                    raise LookupError('there is no such record')
                return self._decode_record(value, index)
            except Exception as error:              # lmdb's, pyarrow's, and Python's own, according to the damage
                raise _undecodable(self.where(index), error) from error

    def _decode_record(self, value, index):
        return decode_image(value).to_pybytes(), int(self.labels[index])

    def load(self, index, decode=decode_picture):
        """(what `decode` makes of the bytes of the image file, label)"""
        data, label = self.read(index)
        return decode(data, lambda: self.where(index)), label


class _LegacyDatabase(_Database):
    """The same of a database of the original code, in which labels stand with the images and nothing has a name."""
    header_key = b'__len__'
    num_others = 2
    key = staticmethod(legacy_key)

    def _decode_header(self, value):
        return decode_legacy(value).as_py(), None

    @functools.cached_property
    def labels(self):
        return np.array([self.read(index)[1] for index in range(self.num_images)], np.int32)

    def names(self, indices=slice(None)):
        return [str(index) for index in range(self.num_images)[indices]]

    def _decode_record(self, value, index):
        image, label = decode_legacy(value).values
        return image.value.as_buffer().to_pybytes(), label.as_py()


_OPEN = weakref.WeakValueDictionary()               # (process, device, inode) → _Database


def _open_database(path):
    """The `_Database` that this process has of the file, opened if there is none.

    One serves all data sets of a process, because LMDB does not let a process open a file twice; those inherited by
    fork are closed, because it does not let a child use them either.
    """
    file = os.path.join(path, 'data.mdb') if os.path.isdir(path) else path      # LMDB's other layout
    if not os.path.exists(file):
        raise InputError(f'{file} does not exist; folder2lmdb.py --dir makes a database from the folder of its name')
    status, pid = os.stat(file), os.getpid()
    database = _OPEN.get((pid, status.st_dev, status.st_ino))
    if database is None:
        for (owner, *_), inherited in list(_OPEN.items()):
            if owner != pid:
                inherited.env.close()
        _OPEN[pid, status.st_dev, status.st_ino] = database = _open_checked(path, file)
    return database


def _open_checked(path, file):
    size = os.path.getsize(file)
    if not size:
        raise InputError(f'{path} is empty, 0 bytes; {ADVICE}')
    with contextlib.ExitStack() as on_error:
        try:
            env = on_error.enter_context(lmdb.open(file, subdir=False, readonly=True, lock=False))
        except lmdb.Error as error:
            raise InputError(f'{path} does not open: it is no LMDB database, or cut off at its start '
                             f'({_one_line(error)})') from error
        whole = (env.info()['last_pgno'] + 1) * env.stat()['psize']
        if size < whole:                            # reading past the end would kill the process by a bus error
            raise InputError(f'{path} is truncated, {size:,} of {whole:,} bytes; copy it again, or {ADVICE}')
        entries = env.stat()['entries']
        if not entries:
            raise InputError(f'{path} is empty, an LMDB database without entries; {ADVICE}')
        try:
            with env.begin() as txn:
                kinds = [kind for kind in (_Database, _LegacyDatabase) if txn.get(kind.header_key) is not None]
            if not kinds:
                raise InputError(f'{path} is an LMDB database of another format; {ADVICE}')
            database = kinds[0](path, env)
        except InputError:
            raise
        except Exception as error:                  # lmdb's, pyarrow's, and Python's own, according to the damage
            raise _damaged(path, error) from error
        images = entries - database.num_others
        if database.num_images != images:
            raise InputError(f'{path} lists {database.num_images:,} images but holds {images:,}; {ADVICE}')
        on_error.pop_all()
        return database


class ImageFolderLMDB(Dataset):
    """The images of a database as (RGB picture, label), just as ImageFolder gives those of the tree it was made from.

    The file is opened by each process for itself, when first needed, and closed by `close` or with the last data set
    that reads it. Opening costs the same whatever the number of images; `targets` and `samples` are made when first
    asked for, without reading an image (but from a database of the original code by reading all its records).

    Args:
        path: the file, `<split>.lmdb`.
        transform, target_transform: applied to picture and label.
        num_classes: of a database of the original code, which does not tell them; 1000 if None. Not used otherwise.
        decode: called as `decode_picture` is, in place of it.
    Attributes:
        classes (list of str), class_to_idx (dict), targets (list of int), samples (list of (name, label), the name
        being the path of the file relative to the folder of the split, or the key where names are not known).
    Raises:
        InputError: one line, where the database or one of its records cannot be read.
    """

    def __init__(self, path, transform=None, target_transform=None, num_classes=None,
                 decode=decode_picture):
        self.path = os.fspath(path)
        self.transform, self.target_transform, self.decode = transform, target_transform, decode
        self._held = None
        self._length = self._database.num_images
        self.classes = self._database.classes or [str(label) for label in range(num_classes or 1000)]
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}

    @property
    def _database(self):
        if self._held is None or self._held.pid != os.getpid():
            self._held = _open_database(self.path)
        return self._held

    def close(self):
        """Let go of the file; the next access opens it again."""
        self._held = None

    def __getstate__(self):
        state = dict(self.__dict__, _held=None)     # which stays with the process
        for name in ('targets', 'samples'):         # made again faster than sent
            state.pop(name, None)
        return state

    def __len__(self):
        return self._length

    @functools.cached_property
    def targets(self):
        return self._database.labels.tolist()

    @functools.cached_property
    def samples(self):
        return list(zip(self._database.names(), self.targets))

    def __getitem__(self, index):
        index = range(len(self))[index]             # as a list takes it: negative ones too, IndexError past the end
        image, label = self._database.load(index, self.decode)
        if not 0 <= label < len(self.classes):
            raise InputError(f'{self._database.where(index)} has label {label}, but there are {len(self.classes)} '
                             'classes; --nb-classes gives their number')
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            label = self.target_transform(label)
        return image, label


# --- The converter --------------------------------------------------------------------------------------------------

def convert(folder, path, workers=1):
    """Write the images of the tree `folder` to the database `path`; → (number of images, number of classes).

    The file is left to the system to write to the disk, as `cp` leaves its own. A reader takes 16 files at a time into
    memory.
    """
    tree = _image_folder(folder)
    files = [file for file, _ in tree.samples]
    names = [file[len(os.path.join(tree.root, '')):] for file in files]
    others = {HEADER_KEY: encode_header(len(files), tree.classes),
              LABELS_KEY: encode_column(pa.array(tree.targets, pa.int32()), LABELS),
              NAMES_KEY: encode_column(encode_names(names), NAMES)}

    chunks = (range(start, min(start + CHUNK, len(files))) for start in range(0, len(files), CHUNK))
    with (_whole_or_not_at_all(path) as partial, ThreadPoolExecutor(workers) as pool,
          lmdb.open(partial, subdir=False, lock=False, sync=False, metasync=False, map_size=MAP_STEP) as env,
          tqdm(total=len(files), unit=' images', desc=os.path.basename(path)) as bar):
        size = 0
        pending = collections.deque(pool.submit(_read_records, files, chunk, bytearray())
                                    for chunk in itertools.islice(chunks, workers))
        while pending:
            buffer, records = pending.popleft().result()
            with _transaction(env, records) as txn:
                _put(txn, records)
                # Now the buffer is free, and files are read while the transaction is written. Sooner, reading would
                # be in the way of the many short calls that put the records.
                pending.extend(pool.submit(_read_records, files, chunk, buffer)
                               for chunk in itertools.islice(chunks, 1))
            size += sum(len(value) for _, value in records)
            bar.set_postfix_str(f'{size / 2 ** 20:,.0f} MiB', refresh=False)
            bar.update(len(records))
        with _transaction(env, others.items()) as txn:
            _put(txn, others.items())
    return len(files), len(tree.classes)


def _read_records(files, indices, buffer):
    """Read files into a buffer, or a larger one, around each the frame of its record; → buffer, [(key, record)]."""
    start, records = 0, []
    for index in indices:
        file = os.open(files[index], os.O_RDONLY | os.O_NONBLOCK)          # or opening a pipe would wait for a writer
        try:
            size = _image_size(file, files[index])
            before, after = image_frame(size)
            length = len(before) + size + len(after)
            if start + length > len(buffer):        # the records before stay in the old one
                start, buffer = 0, bytearray(max(length, 2 * len(buffer)))
            record = memoryview(buffer)[start:start + length]
            record[:len(before)], record[len(before) + size:] = before, after
            # To a byte more than there should be, so as to notice a file that grows
            if os.readv(file, [record[len(before):len(before) + size], bytearray(1)]) != size:
                raise DataError(f'{files[index]} changed while it was read; convert again')
        finally:
            os.close(file)
        records.append((image_key(index), record))
        start += length
    return buffer, records


def _image_size(file, path):
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode) or status.st_size >= MAX_SIZE:
        raise DataError(f'{path} is no image: it is no regular file, or has 1 GiB and more')
    return status.st_size


def _transaction(env, items):
    """One to write (key, value) pairs, for which the map grows if it must."""
    # A value lies on pages of its own, and a few more are enough for the tree
    info, pages = env.info(), sum(len(value) // PAGE + 4 for _, value in items) + 16
    needed = (info['last_pgno'] + 1 + pages) * PAGE
    if needed > info['map_size']:
        env.set_mapsize(needed + MAP_STEP)
    return env.begin(write=True)


def _put(txn, items):
    for key, value in items:
        txn.put(key, value, append=True)


def _image_folder(folder):
    try:
        return ImageFolder(folder)
    except FileNotFoundError as error:              # of classes, or of images in one
        raise InputError(_one_line(error)) from error


@contextlib.contextmanager
def _whole_or_not_at_all(path):
    """A name to write under; the file takes the name `path` if the block ends well, and is removed otherwise.

    What a killed process left under it is overwritten; one that is still alive holds a lock on it.
    """
    partial = f'{path}.partial'
    with open(partial, 'ab') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f'{partial} is being written by another process') from None
        except OSError:
            pass                                    # a file system without locks
        os.truncate(partial, 0)
        try:
            yield partial
            os.close(os.dup(file.fileno()))         # tells of what a network file system could not write
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise


def _in_order(pool, function, number, ahead):
    """`function` of each range of CHUNK indices below `number`, run in the pool at most `ahead` ranges in advance."""
    pending = collections.deque()
    for start in range(0, number, CHUNK):
        pending.append(pool.submit(function, range(start, min(start + CHUNK, number))))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def verify(path, workers=4):
    """Decode every image of a tree or of a database, print a line for each that does not, and return their number."""
    if path.endswith('.lmdb'):
        database = _open_database(path)
        number, check = database.num_images, database.load
    else:
        files = [file for file, _ in _image_folder(path).samples]
        number, check = len(files), lambda index: decode_picture(read_file(files[index]), lambda: files[index])

    def faults(indices):
        lines = []
        for index in indices:
            try:
                check(index)
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

def parse_args():
    parser = ArgumentParser(
        description='Pack trees <dir>/<split>/<class>/<image> into one LMDB file each, <dir>/<split>.lmdb.')
    parser.add_argument('--dir', required=True, help='folder of the splits')
    parser.add_argument('--splits', default='train,val', help='names, with commas between (default: %(default)s)')
    parser.add_argument('--workers', type=int,
                        help='threads that read files, more for a disk that is slow to answer (default: 1; to verify, '
                             'one for each core)')
    parser.add_argument('--force', action='store_true', help='replace a database that exists, once the new is complete')
    parser.add_argument('--verify', action='store_true',
                        help='write nothing; decode every image of the trees and databases there are, and list those '
                             'that do not decode (exit status 1 if any)')
    args = parser.parse_args()
    splits = args.splits.split(',')
    if '' in splits or len(set(splits)) < len(splits) or any(os.path.basename(split) != split for split in splits):
        parser.error(f'--splits takes names of folders in --dir with commas between, not {args.splits!r}')
    if args.workers is not None and args.workers < 1:
        parser.error(f'--workers must be at least 1, not {args.workers}')
    return args


def run(args):
    """Do what the command line asks for; → exit status."""
    folders = [os.path.join(args.dir, split) for split in args.splits.split(',')]
    if args.verify:
        for folder in folders:
            if not os.path.exists(folder) and not os.path.exists(f'{folder}.lmdb'):
                raise InputError(f'neither {folder} nor {folder}.lmdb exists')
        present = [path for folder in folders for path in (folder, f'{folder}.lmdb') if os.path.exists(path)]
        return 1 if sum(verify(path, args.workers or os.cpu_count()) for path in present) else 0
    for folder in folders:                          # all before the first, which may take an hour
        if not os.path.isdir(folder):
            raise InputError(f'{folder} is not a folder; {folder}/<class>/<image> is expected')
        if os.path.isdir(f'{folder}.lmdb'):
            raise InputError(f'{folder}.lmdb is a folder; remove it first')
        if os.path.exists(f'{folder}.lmdb') and not args.force:
            raise InputError(f'{folder}.lmdb exists; --force replaces it, --splits leaves it out')
    for folder in folders:
        path = f'{folder}.lmdb'
        num_images, num_classes = convert(folder, path, args.workers or 1)
        print(f'{path}: {num_images:,} images of {num_classes:,} classes, {os.path.getsize(path):,} bytes')
    return 0


def main():
    args = parse_args()
    sys.stdout.reconfigure(errors='backslashreplace')          # names of files may be in no encoding
    try:
        return run(args)
    except (InputError, OSError, lmdb.Error) as error:
        free = ''
        if isinstance(error, lmdb.Error):           # to which a full disk is an "Input/output error"
            free = f' ({shutil.disk_usage(args.dir).free / 2 ** 20:,.0f} MiB are free in {args.dir})'
        print(f'folder2lmdb.py: error: {_one_line(error)}{free}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('folder2lmdb.py: interrupted', file=sys.stderr)
        return 130


if __name__ == '__main__':
    sys.exit(main())
