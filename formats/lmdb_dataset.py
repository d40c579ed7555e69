"""A data set of images in one LMDB file: the format and its reader.

`folder2lmdb.py` writes such a database from a tree of image files. A database holds the images of one split, in the
order of torchvision's ImageFolder. Its entries are:

`0000000000`, `0000000001`, …   one per image; the key is the index in ten decimal digits, so keys sort by index
    image: binary             the unchanged bytes of the image file
`header`
    class: binary             the names of the classes, in ImageFolder's order
`labels`
    label: int32              the label of each image, an index into `header`
`names`
    name: binary              the path of each image file, relative to the folder of the split

Each value is an Arrow IPC message, a record batch of the one column named above, without its schema. The exception is
`header`, an Arrow IPC stream: a schema followed by its batch. The metadata of the schema are `format` (`folder2lmdb`),
`version` (1) and `images`, the number of images; if larger images were re-encoded, also `short_side` and `quality`,
and `image` has the bytes of the new JPEG. Names are encoded as by the file system. The last three entries are
written last.

Databases of the original EViT code are read too. Each of their values is 16 zero bytes and an Arrow IPC stream with one
row and one column `list`, a dense union. `0`, `1`, … hold the list [bytes of the image file, label], `__len__` the
number of images, `__keys__` the list of their keys. These databases name neither classes nor files.
"""
import contextlib
import functools
import os
import struct
import weakref

import lmdb
import numpy as np
import pyarrow as pa
from torch.utils.data import Dataset

from formats.decoding import decode_picture, undecodable
from formats.reencoding import Reencoding
from runtime.utils import InputError, one_line

FORMAT, VERSION = b'folder2lmdb', 1
HEADER_KEY, LABELS_KEY, NAMES_KEY = b'header', b'labels', b'names'      # sorted after the digits: all puts append
CLASSES, IMAGE, LABELS, NAMES = (pa.schema([column]) for column in (
    ('class', pa.binary()), ('image', pa.binary()), ('label', pa.int32()), ('name', pa.binary())))

ADVICE = 'convert again with folder2lmdb.py --force'


# --- The records ----------------------------------------------------------------------------------------------------

def image_key(index):
    return b'%010d' % index


def encode_image(data):
    """Bytes of an image file → the value of its entry."""
    record, image = empty_record(len(data))
    image[:] = data
    return record


def empty_record(size):
    """A record for an image of `size` bytes.

    Once filled, it equals `encode_column(pa.array([data]), IMAGE)`. With a call of pyarrow per image, converting would
    take a third longer. Therefore pyarrow makes one record only, and others differ from it in their sizes and images.

    Returns:
        (record, image): views of the record, and of its part to be filled with the bytes of the image file.
    """
    head, middle, tail = _constant_parts()
    padding = bytes(-size % 8)
    frame = b''.join((head, struct.pack('<q', 8 + size + len(padding)), middle, struct.pack('<q', size),
                      tail, struct.pack('<i', size)))
    start, end = len(frame), len(frame) + size
    record = memoryview(np.empty(end + len(padding), np.uint8))
    record[:start], record[end:] = frame, padding
    return record, record[start:end]


@functools.cache
def _constant_parts(size=12345):
    """What a record holds before the sizes of the body and of the image, and before the offset of the image's end."""
    record = encode_column(pa.array([bytes(size)], pa.binary()), IMAGE).to_pybytes()
    head, _, rest = record.partition(struct.pack('<q', 8 + size + -size % 8))
    middle, _, rest = rest.partition(struct.pack('<q', size))
    tail, _, _ = rest.partition(struct.pack('<i', size))
    return head, middle, tail


def decode_image(value):
    """Value of an entry → bytes of the image file, a buffer inside `value`."""
    return decode_column(value, IMAGE)[0].as_buffer()


def encode_column(column, schema):
    return pa.record_batch([column], schema=schema).serialize()


def decode_column(value, schema):
    return _validated(pa.ipc.read_record_batch(pa.py_buffer(value), schema)).column(0)


def _validated(batch):
    batch.validate(full=True)                          # a wrong offset would be read outside of the batch
    return batch


def encode_names(names):
    return pa.array([os.fsencode(name) for name in names], pa.binary())


def decode_names(column):
    return [os.fsdecode(name) for name in column.to_pylist()]


def encode_tables(classes, labels, names, reencoding=None):
    """Names of the classes, labels and names of the images → {key: value} of the entries that are no images."""
    return {HEADER_KEY: encode_header(len(labels), classes, reencoding),
            LABELS_KEY: encode_column(pa.array(labels, pa.int32()), LABELS),
            NAMES_KEY: encode_column(encode_names(names), NAMES)}


def encode_header(num_images, classes, reencoding=None):
    """Number of images, names of the classes (list of str), `Reencoding` or None → the value of `header`."""
    settings = {name: str(value) for name, value in reencoding._asdict().items()} if reencoding else {}
    schema = CLASSES.with_metadata({'format': FORMAT, 'version': str(VERSION), 'images': str(num_images)} | settings)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as stream:
        stream.write_batch(pa.record_batch([encode_names(classes)], schema=schema))
    return sink.getvalue()


def decode_header(value, path):
    """The value of `header` → number of images, names of the classes (list of str), `Reencoding` or None.

    Raises:
        InputError: the database `path` has another format or a newer version.
    """
    stream = pa.ipc.open_stream(pa.py_buffer(value))
    metadata = stream.schema.metadata or {}
    if metadata.get(b'format') != FORMAT:
        raise InputError(f'{path} is an LMDB database of another format; {ADVICE}')
    version = int(metadata[b'version'])
    if version > VERSION:
        raise InputError(f'{path} has version {version} of the format, newer than the {VERSION} known here; '
                         'update this code, or convert again with it')
    reencoding = None
    if b'short_side' in metadata:
        reencoding = Reencoding(int(metadata[b'short_side']), int(metadata[b'quality']))
    return int(metadata[b'images']), decode_names(_validated(stream.read_next_batch()).column(0)), reencoding


def legacy_key(index):
    return b'%d' % index


def decode_legacy(value):
    """A value of the original code → Arrow scalar: the number of `__len__`, or the list [image, label]."""
    return _validated(pa.ipc.open_stream(pa.py_buffer(value)[16:]).read_next_batch()).column(0)[0].value


# --- Open databases -------------------------------------------------------------------------------------------------

class _Database:
    """An open database of one process. The file is closed with the last reference to the object."""
    header_key = HEADER_KEY
    num_tables = 3                                     # entries that are no images
    key = staticmethod(image_key)

    def __init__(self, path, env):
        self.path, self.env, self.pid = path, env, os.getpid()
        with env.begin() as txn:
            self.num_images, self.classes, self.reencoding = self._decode_header(txn.get(self.header_key))

    def _decode_header(self, value):
        return decode_header(value, self.path)

    @functools.cached_property
    def labels(self):
        """(number of images,) int32"""
        with self._table(LABELS_KEY, LABELS) as labels:
            return labels.to_numpy().copy()

    def names(self, indices=slice(None)):
        with self._table(NAMES_KEY, NAMES) as names:
            return decode_names(names[indices])

    @contextlib.contextmanager
    def _table(self, key, schema):
        """The column under `key`, with one row per image; InputError about the database if it is damaged."""
        try:
            with self.env.begin(buffers=True) as txn:
                column = decode_column(txn.get(key), schema)
                if len(column) != self.num_images:
                    raise ValueError(f'{len(column):,} {key.decode()} for {self.num_images:,} images')
                yield column
        except Exception as error:
            raise _damaged(self.path, error) from error

    def where(self, index):
        """The place of an image, for messages."""
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
            except Exception as error:                 # of lmdb, pyarrow or Python, depending on the damage
                raise undecodable(self.where(index), error) from error

    def _decode_record(self, value, index):
        return decode_image(value).to_pybytes(), int(self.labels[index])

    def load(self, index, decode=decode_picture):
        """(the image as decoded by `decode`, label)"""
        data, label = self.read(index)
        return decode(data, lambda: self.where(index)), label


class _LegacyDatabase(_Database):
    """An open database of the original code: each record holds image and label; classes and files have no names."""
    header_key = b'__len__'
    num_tables = 2
    key = staticmethod(legacy_key)

    def _decode_header(self, value):
        return decode_legacy(value).as_py(), None, None

    @functools.cached_property
    def labels(self):
        return np.array([self.read(index)[1] for index in range(self.num_images)], np.int32)

    def names(self, indices=slice(None)):
        return [str(index) for index in range(self.num_images)[indices]]

    def _decode_record(self, value, index):
        image, label = decode_legacy(value).values
        return image.value.as_buffer().to_pybytes(), label.as_py()


_OPEN = weakref.WeakValueDictionary()                  # (process, device, inode) → _Database


def open_database(path):
    """The `_Database` of a file, shared by all data sets of this process.

    LMDB permits a process to open a file only once, and does not support environments inherited by fork; these are
    closed here.
    """
    file = os.path.join(path, 'data.mdb') if os.path.isdir(path) else path     # LMDB's other layout
    if not os.path.exists(file):
        raise InputError(f'{file} does not exist; folder2lmdb.py --dir makes a database from the folder of its name')
    status, pid = os.stat(file), os.getpid()
    database = _OPEN.get((pid, status.st_dev, status.st_ino))
    if database is None:
        for (owner, *_), inherited in list(_OPEN.items()):
            if owner != pid:
                inherited.env.close()
        with contextlib.ExitStack() as on_error:
            env = on_error.enter_context(_open_environment(path, file))
            _OPEN[pid, status.st_dev, status.st_ino] = database = _identify(path, env)
            on_error.pop_all()
    return database


def _open_environment(path, file):
    """The LMDB environment of a complete file; InputError about `path` if the file is empty, truncated or no LMDB."""
    size = os.path.getsize(file)
    if not size:
        raise InputError(f'{path} is empty, 0 bytes; {ADVICE}')
    try:
        env = lmdb.open(os.fspath(file), subdir=False, readonly=True, lock=False)
    except lmdb.Error as error:
        raise InputError(f'{path} does not open: it is no LMDB database, or cut off at its start '
                         f'({one_line(error)})') from error
    expected = (env.info()['last_pgno'] + 1) * env.stat()['psize']
    if size < expected:                                # a read past the end would kill the process by SIGBUS
        env.close()
        raise InputError(f'{path} is truncated, {size:,} of {expected:,} bytes; copy it again, or {ADVICE}')
    return env


def _identify(path, env):
    """The `_Database` or `_LegacyDatabase` of an environment; InputError if it is neither, or damaged."""
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
    except Exception as error:                         # of lmdb, pyarrow or Python, depending on the damage
        raise _damaged(path, error) from error
    images = entries - database.num_tables
    if database.num_images != images:
        raise InputError(f'{path} lists {database.num_images:,} images but holds {images:,}; {ADVICE}')
    return database


def _damaged(path, error):
    return InputError(f'{path} is damaged, or of another format ({one_line(error)}); {ADVICE}')


# --- The data set ---------------------------------------------------------------------------------------------------

class ImageFolderLMDB(Dataset):
    """The images of a database as (RGB picture, label), equal to those of ImageFolder unless they were re-encoded.

    Each process opens the file when it first needs it. `close`, or the end of the last data set that reads the file,
    closes it. Opening takes the same time for any number of images. `targets` and `samples` are made on first access,
    without reading images (for a database of the original code, by reading all of them).

    Args:
        path: the file, `<split>.lmdb`.
        transform, target_transform: applied to picture and label.
        num_classes: for a database of the original code, which does not store it; default 1000. Otherwise ignored.
        decode: a function with the arguments of `decode_picture`, which is the default.
    Attributes:
        classes: list of str.
        has_class_names: whether they are names, and not numbers because the database does not store names.
        class_to_idx: dict, class → label.
        reencoding: the `Reencoding` of larger images, None if all are unchanged.
        targets: list of int.
        samples: list of (name, label). The name is the path of the image file relative to the folder of the split;
            for a database of the original code, the key.
    Raises:
        InputError: the database or one of its records cannot be read.
    """

    def __init__(self, path, transform=None, target_transform=None, num_classes=None, decode=decode_picture):
        self.path = os.fspath(path)
        self.transform, self.target_transform, self.decode = transform, target_transform, decode
        self._opened = None
        self._length, self.reencoding = self._database.num_images, self._database.reencoding
        self.has_class_names = bool(self._database.classes)
        self.classes = self._database.classes or [str(label) for label in range(num_classes or 1000)]
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}

    @property
    def _database(self):
        if self._opened is None or self._opened.pid != os.getpid():
            self._opened = open_database(self.path)
        return self._opened

    def close(self):
        """Release the file; the next access opens it again."""
        self._opened = None

    def __getstate__(self):
        state = dict(self.__dict__, _opened=None)      # belongs to the process
        for name in ('targets', 'samples'):            # faster to make again than to send
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
        index = range(len(self))[index]                # as in a list: negative indices, IndexError past the end
        image, label = self._database.load(index, self.decode)
        if not 0 <= label < len(self.classes):
            raise InputError(f'{self._database.where(index)} has label {label}, but there are {len(self.classes)} '
                             'classes; --nb-classes gives their number')
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            label = self.target_transform(label)
        return image, label
