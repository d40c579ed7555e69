"""Read a checkpoint from a file or an https address, without running code that it may contain."""
import argparse
import datetime
import hashlib
import http.client
import io
import os
import pathlib
import pickle
import re
import types
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import safetensors.torch
import torch
from timm.models import clean_state_dict

from runtime.distributed import log, rank
from runtime.utils import InputError, one_line

NEWEST, PREVIOUS = 'checkpoint.pth', 'previous_checkpoint.pth'             # in the output folder of a run
CHECKSUM = re.compile(r'-([0-9a-f]{8,})\.[^.]+$')      # in the names of torch's own files: the start of their SHA-256


class DamagedCheckpoint(InputError):
    """A file that is not, or no longer, a checkpoint."""


def load_checkpoint(source):
    """Read a checkpoint from a file, the newest of a folder, or an https address, to the CPU.

    Returns:
        The checkpoint, a dict with the key 'model'; a state dict, bare or under a usual name, is put under that key.
    Raises:
        InputError: the file does not exist or cannot be read; DamagedCheckpoint: it is no checkpoint.
    """
    if os.path.isdir(source):
        source = next((str(path) for name in (NEWEST, PREVIOUS) if (path := Path(source) / name).is_file()),
                      str(Path(source) / NEWEST))
    if not source.startswith('https://'):
        return read_checkpoint(source, source)
    path = download(source)
    try:
        return read_checkpoint(path, source)
    except DamagedCheckpoint:
        path.unlink(missing_ok=True)                   # the next run downloads it anew
        raise


def download(address):
    """Download a file, unless it is in the cache; → its Path there, which depends on the whole address."""
    name = os.path.basename(urlsplit(address).path)
    digest = hashlib.sha256(address.encode(errors='surrogateescape')).hexdigest()
    path = Path(torch.hub.get_dir(), 'checkpoints', f'{digest[:16]}-{name[-100:]}')
    if path.exists():
        return path
    checksum = CHECKSUM.search(name)
    log(f'Downloading {address} to {path}')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # It has another name until it is complete, and leaves nothing if it fails
        torch.hub.download_url_to_file(address, str(path), checksum and checksum[1], progress=rank() == 0)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise InputError(f'checkpoint {address} cannot be downloaded: {one_line(error)}') from None
    except RuntimeError:
        raise DamagedCheckpoint(
            f'checkpoint {address} does not match the checksum in its name, {checksum[1]}: it is damaged; or, if '
            'these digits are no SHA-256, download the file and name its path') from None
    return path


def read_checkpoint(path, source):
    """As `load_checkpoint`, from a file; `source` is its name in messages."""
    if not os.path.isfile(path):
        what = 'is neither a file nor an https address' if '://' in source else 'does not exist'
        raise InputError(f'checkpoint {source} {what}')
    try:
        checkpoint = parse(Path(path).read_bytes(), source)
    except (OSError, MemoryError) as error:
        raise InputError(f'checkpoint {source} cannot be read: {error or "out of memory"}') from None
    return find_weights(checkpoint, source)


# --- From bytes -----------------------------------------------------------------------------------------------------

def parse(data, source):
    """What safetensors or torch.save wrote; only the classes of `harmless_classes` are allowed beside tensors."""
    try:
        if data[8:9] == b'{':                          # after the length of the header, which is JSON
            return safetensors.torch.load(data)
        file = io.BytesIO(data)
        check_records(file, source)
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if len(archive.infolist()) == 1:       # one file zipped by hand, as in older model zoos
                    file = io.BytesIO(archive.read(archive.infolist()[0]))
        file.seek(0)
        with torch.serialization.safe_globals(harmless_classes()):
            return torch.load(file, map_location='cpu', weights_only=True)
    except (OSError, MemoryError, DamagedCheckpoint):
        raise
    except Exception as error:
        # Bytes that are no checkpoint raise anything. torch's own message recommends to switch the protection off
        refused = isinstance(error, pickle.UnpicklingError) and re.search(r'GLOBAL (\S+)', str(error))
        if refused or 'TorchScript' in str(error):
            raise DamagedCheckpoint(
                f'{source} is not loaded: it holds {refused[1] if refused else "a program of TorchScript"}, which '
                'could run code. In a program that you trust with the file, save the weights alone: '
                "torch.save({'model': model.state_dict()}, FILE)") from None
        if data.lstrip()[:1] == b'<':
            raise DamagedCheckpoint(f'{source} is not a checkpoint but a web page, perhaps one to sign in') from None
        raise DamagedCheckpoint(f'{source} is not a checkpoint: it is no file of torch.save or safetensors, or is cut '
                                'short or damaged') from None


def check_records(file, source):
    """Raise DamagedCheckpoint if a record of a torch.save archive does not match its CRC-32.

    torch.load does not check them. A record that is marked as a directory, by one bit, would be read as uninitialised
    memory.
    """
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if archive.testzip() or any(record.external_attr & 0x10 and not record.is_dir()
                                        for record in archive.infolist()):
                raise DamagedCheckpoint(f'checkpoint {source} is damaged: a record does not match its checksum')


class NumpyType:
    """Stands for numpy.dtype, whose own pickled state may describe memory that is not there; numbers and text only."""

    def __init__(self, name, *_):
        self.dtype = np.dtype(name)
        if self.dtype.kind not in 'biufcSU':
            raise pickle.UnpicklingError(f'GLOBAL numpy.{self.dtype.name} is not allowed')

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


class NumpyArray(np.ndarray):
    """Stands for numpy.ndarray."""

    def __setstate__(self, state):
        version, shape, kind, is_fortran, data = state
        super().__setstate__((version, shape, kind.dtype, is_fortran, data))


def harmless_classes():
    """Pairs (class or function, name in the file) for torch.serialization.safe_globals.

    Of the original code's checkpoints, the Namespace of the flags; of other programs', numpy's scalars and arrays,
    Python's collections (those that torch cannot fill become dict and list), paths (on Windows, too) and dates.
    """
    classes = [(one, f'{one.__module__}.{one.__qualname__}') for one in (
        argparse.Namespace, types.SimpleNamespace, datetime.date, datetime.datetime, datetime.timedelta,
        datetime.timezone, list, dict, tuple, frozenset, range, slice, int, float, bool, str, bytes)]
    classes += [(lambda *_: {}, 'collections.defaultdict'), (lambda *_: [], 'collections.deque')]
    for module in 'pathlib', 'pathlib._local':
        classes += [(pathlib.PurePosixPath, f'{module}.{name}') for name in ('PosixPath', 'PurePosixPath')]
        classes += [(pathlib.PureWindowsPath, f'{module}.{name}') for name in ('WindowsPath', 'PureWindowsPath')]
    for module in 'numpy.core.multiarray', 'numpy._core.multiarray':
        classes += [(lambda kind, data: np.frombuffer(data, kind.dtype)[0], f'{module}.scalar'),
                    (lambda *_: NumpyArray(0, np.int8), f'{module}._reconstruct')]
    return [*classes, (NumpyType, 'numpy.dtype'), (NumpyArray, 'numpy.ndarray')]


# --- From a checkpoint ----------------------------------------------------------------------------------------------

WEIGHTS = 'model', 'state_dict', 'model_ema', 'state_dict_ema'             # our names and those of timm's scripts
OTHER_WEIGHTS = 'module', 'teacher'                                        # of DeepSpeed (EVA-02), and of DINO


def find_weights(checkpoint, source):
    """What `load_checkpoint` returns, of what was read from a file."""
    checkpoint = checkpoint if isinstance(checkpoint, dict) else {}
    states = {name: value for name, value in checkpoint.items() if is_state_dict(value)}
    found = {name: states[name] for name in WEIGHTS if name in states}
    others = {name: value for name, value in checkpoint.items() if name not in (WEIGHTS if found else states)}
    if not found and is_state_dict(checkpoint):        # a bare one
        found, others = {'model': checkpoint}, {}
    elif not found and states:
        name = next((name for name in OTHER_WEIGHTS if name in states), next(iter(states)))
        if name not in OTHER_WEIGHTS and len(states) > 1:
            raise DamagedCheckpoint(f'{source} holds several state dicts, {", ".join(map(str, states))}; save the one '
                                    "to take as {'model': …}")
        log(f'{source}: the weights under {name} are taken' + ''.join(
            f', those under {other} left out' for other in states if other != name))
        found = {'model': states[name]}
    if not found:
        raise DamagedCheckpoint(f'{source} is not a checkpoint: it holds no state dict of a model')
    average = found.get('model_ema') or found.get('state_dict_ema')
    weights = {'model': found.get('model') or found.get('state_dict') or average, 'model_ema': average}
    # Without the prefixes of DDP and torch.compile
    return others | {name: clean_state_dict(state) for name, state in weights.items() if state}


def is_state_dict(value):
    return isinstance(value, dict) and bool(value) and all(
        isinstance(key, str) and isinstance(part, torch.Tensor) for key, part in value.items())
