"""What every program shares: errors, random seeds, precision, files that are written completely or not at all."""
import contextlib
import ctypes
import os
import random
import re
from pathlib import Path

import numpy as np
import torch

# --- Errors ---------------------------------------------------------------------------------------------------------

class InputError(Exception):
    """Wrong input. The message says in one line what is wrong and what to do; the exit status is 2."""


class DataError(InputError):
    """Wrong input that a single process may meet, such as an image that does not decode."""


def one_line(error):
    """The message of an exception as one line: its last, since that of a DataLoader worker follows a traceback."""
    lines = str(error).splitlines() or [type(error).__name__]
    return ' '.join(re.sub(r'^runtime\.utils\.\w+: ', '', lines[-1]).split())


def missing_split(flag, root, split, or_else=''):
    """An InputError: the folder `root`, which a flag names, lacks a split, or is itself one, or no folder at all."""
    root = Path(root)
    if not root.is_dir():
        return InputError(f'{flag} {root} is not a folder')
    hint = f'; give {root.absolute().parent}?' if (root.absolute().parent / split).exists() else ''
    return InputError(f'{flag} {root} has no {split}/ folder{or_else}; {split}/<class>/<image> is expected{hint}')


# --- Random numbers and precision -----------------------------------------------------------------------------------

def seed_all(*key):
    """Seed every generator (random, numpy, torch on all devices) with `key`, a tuple of non-negative integers.

    All random numbers of a run are drawn after seeding with (seed, epoch, position). A resumed run therefore needs
    no stored generator state, and the number of worker processes does not change the results.
    """
    python, numpy, low, high = (int(word) for word in np.random.SeedSequence(key).generate_state(4))
    random.seed(python)
    np.random.seed(numpy)
    # torch.manual_seed would, while CUDA is unused, record a stack trace: 0.4 ms per sample
    torch.default_generator.manual_seed(low << 32 | high)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(low << 32 | high)


def choose_kernels(device, deterministic=False):
    """Enable cuDNN autotuning and, on a GPU, TF32 matrix products; or only kernels that repeat their results.

    Freed memory is kept, also by processes that are forked then, as those that load images are.
    """
    keep_freed_memory()
    if device.type == 'cuda':
        torch.set_float32_matmul_precision('high')
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')        # cuBLAS reads it at its first product
        torch.use_deterministic_algorithms(True)


def keep_freed_memory():
    """Let glibc keep up to 64 MiB that is freed, instead of giving it back and clearing pages for the next tensors.

    It adapts its thresholds itself, up to these, but only as large tensors are freed.
    """
    trim_threshold, mmap_threshold = -1, -3            # as <malloc.h> numbers them
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt:
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 64 << 20)


def choose_amp_dtype(name, device):
    """The torch.dtype for the value `name` of --amp-dtype on a device."""
    if name != 'auto':
        return getattr(torch, name)
    if device.type == 'cpu':
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def autocast(device, dtype):
    """torch.autocast on a torch.device, disabled for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


# --- Files ----------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path; the file written there replaces `path` on success and is removed on an error."""
    temporary = Path(f'{path}.tmp')
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def open_durably(path, mode):
    """Open a file; on exit its content is on the disk and survives a power cut."""
    with open(path, mode) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
