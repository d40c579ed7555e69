"""Checkpoints: write, find, read and load them, for resuming, finetuning and evaluating."""
import argparse
import contextlib
import dataclasses
import inspect
import io
import math
import os
import shutil
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import safetensors.torch
import timm
import torch
from timm.models import clean_state_dict

from evit.position_embedding import antialiases
from evit.settings import TOKEN_FLAGS, TokenSettings
from runtime.distributed import all_reduce, log, rank
from runtime.arguments import block_numbers
from runtime.model_factory import MODEL_FLAGS
from runtime.utils import InputError, atomic_write, one_line, open_durably

NEWEST, PREVIOUS, BEST = 'checkpoint.pth', 'previous_checkpoint.pth', 'best_checkpoint.pth'


class DamagedCheckpoint(InputError):
    """A file that is not, or no longer, a checkpoint."""


# --- Write ----------------------------------------------------------------------------------------------------------

class CheckpointWriter:
    """Writes checkpoints of a run in a thread, from a copy, while training goes on.

    On a GPU, the copy is made there, and the thread fetches it on a stream of its own, so that training does not wait.

    Args:
        folder: Path of the output folder; None to write nothing.
    """

    def __init__(self, folder):
        self.folder = folder
        self.pool, self.pending = ThreadPoolExecutor(1), None
        self.stream = torch.cuda.Stream() if folder and torch.cuda.is_initialized() else None

    def write(self, checkpoint, best=False):
        """Start to write a checkpoint, as `write_checkpoint`; raises OSError if the previous one failed."""
        if self.folder:
            self.wait()
            copies = [of_tensors(torch.Tensor.clone, checkpoint)]
            if self.stream:
                self.stream.wait_stream(torch.cuda.current_stream())
            self.pending = self.pool.submit(self._write, copies, best)

    def _write(self, copies, best):
        with torch.cuda.stream(self.stream):           # None: no effect
            checkpoint = of_tensors(torch.Tensor.cpu, copies.pop())        # nothing else holds the copy on the GPU
        write_checkpoint(checkpoint, self.folder, best)

    def wait(self, timeout=None):
        """Wait until the last checkpoint is written, or for `timeout` seconds; raises OSError if that failed."""
        pending = self.pending
        if pending:
            try:
                pending.result(timeout)
            finally:
                self.pending = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self.pool:
            self.wait()


def of_tensors(function, value):
    """The same dicts and sequences with `function` of the detached tensors in them."""
    if isinstance(value, torch.Tensor):
        return function(value.detach())
    if isinstance(value, dict):
        return {key: of_tensors(function, item) for key, item in value.items()}
    return type(value)(of_tensors(function, item) for item in value) if isinstance(value, (list, tuple)) else value


def write_checkpoint(checkpoint, folder, best=False):
    """Write a checkpoint completely or not at all, and keep the previous one.

    Args:
        checkpoint: what torch.save takes.
        folder: Path; it receives NEWEST, and what was NEWEST becomes PREVIOUS.
        best: whether to make it BEST, too.
    Raises:
        OSError: for instance, the disk is full. The files are as they were.
    """
    buffer = io.BytesIO()                              # torch.save itself would not raise OSError on a full disk
    torch.save(checkpoint, buffer)
    newest = folder / NEWEST
    try:
        with atomic_write(newest) as temporary:
            with open_durably(temporary, 'wb') as file:
                file.write(buffer.getbuffer())
            if best:
                with atomic_write(folder / BEST) as link:
                    link_or_copy(temporary, link)
            with contextlib.suppress(FileNotFoundError):
                newest.replace(folder / PREVIOUS)
        flush_folder(folder)
    except OSError as error:
        raise OSError(error.errno, f'the checkpoint cannot be saved, the last one is kept: {error.strerror}',
                      str(folder)) from None


def link_or_copy(path, target):
    """Make `target` a hard link to `path`, or a copy if the file system has no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)


def flush_folder(folder):
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- Find -----------------------------------------------------------------------------------------------------------

def find_checkpoint(resume, folder, device, required=False):
    """The file or address that --resume stands for, '' if a new run begins. All processes call this.

    Args:
        resume: a file, an address, or 'auto': the newest undamaged checkpoint of `folder`.
        folder: output folder.
        device: torch.device of this process.
        required: raise InputError if there is no checkpoint.
    """
    if resume != 'auto':
        return resume
    source = newest_checkpoint(folder, device)
    if required and not source:
        raise InputError(f'--resume auto: {folder} has no {NEWEST}')
    log(f'Going on from {source}' if source else f'{folder} has no {NEWEST}: the run begins')
    return source


def newest_checkpoint(folder, device):
    """The newest undamaged checkpoint of a folder as a str, '' if the folder has none. All processes call this.

    A damaged one is reported and renamed, so that it is not kept as PREVIOUS. If all are damaged, InputError is raised:
    a run does not start over unasked.
    """
    names = NEWEST, PREVIOUS
    choice = torch.zeros((), dtype=torch.int64, device=device)
    if rank() == 0:
        damaged = []
        for i, name in enumerate(names, start=1):
            path = Path(folder) / name
            try:
                if path.exists():
                    load_checkpoint(str(path))
                    choice += i
                    break
            except DamagedCheckpoint as error:
                damaged.append((path, str(error)))
        if damaged and not choice:
            raise InputError(f'{damaged[0][1]}; {folder} has no other to go on from; remove it to begin anew')
        for path, message in damaged:
            log(f'note: {message}; the previous one is used')
            path.replace(path.with_name(f'damaged_{path.name}'))
    choice = int(all_reduce(choice))
    return str(Path(folder) / names[choice - 1]) if choice else ''


# --- Read -----------------------------------------------------------------------------------------------------------

WEIGHTS = 'model', 'state_dict', 'model_ema', 'state_dict_ema'             # our names and those of timm's scripts


def load_checkpoint(source):
    """Read a checkpoint from a file or an https address to the CPU, without running code that it may contain.

    Checkpoints of the original code contain an argparse.Namespace, the only class allowed beside tensors and
    containers.

    Returns:
        The checkpoint, a dict with the key 'model'; a state dict, bare or under a usual name, is put under that key.
    Raises:
        InputError: the file does not exist or cannot be read; DamagedCheckpoint: it is no checkpoint.
    """
    if not source.startswith('https://') and not os.path.isfile(source):
        raise InputError(f'checkpoint {source} does not exist')
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            if source.startswith('https://'):
                checkpoint = torch.hub.load_state_dict_from_url(source, map_location='cpu', check_hash=True,
                                                                weights_only=True)
            else:
                data = Path(source).read_bytes()
                if source.endswith('.safetensors'):
                    checkpoint = safetensors.torch.load(data)
                else:
                    file = io.BytesIO(data)
                    check_records(file, source)
                    checkpoint = torch.load(file, map_location='cpu', weights_only=True)
    except (OSError, MemoryError) as error:
        raise InputError(f'checkpoint {source} cannot be read: {error or "out of memory"}') from None
    except DamagedCheckpoint:
        raise
    except Exception:
        # Bytes that are no checkpoint raise anything. torch's own message recommends to switch the protection off
        raise DamagedCheckpoint(
            f'{source} is not a checkpoint: it is no file of torch.save, is cut short or damaged, or holds more '
            'than tensors and plain values, which is not loaded because it could run code') from None
    checkpoint = checkpoint if isinstance(checkpoint, dict) else {}
    found = {name: checkpoint[name] for name in WEIGHTS if is_state_dict(checkpoint.get(name))}
    others = {name: value for name, value in checkpoint.items() if name not in WEIGHTS}
    if not found and is_state_dict(checkpoint):        # a bare one
        found, others = {'model': checkpoint}, {}
    if not found:
        raise DamagedCheckpoint(f'{source} is not a checkpoint: it holds no state dict of a model')
    average = found.get('model_ema') or found.get('state_dict_ema')
    weights = {'model': found.get('model') or found.get('state_dict') or average, 'model_ema': average}
    # Without the prefixes of DDP and torch.compile
    return others | {name: clean_state_dict(state) for name, state in weights.items() if state}


def is_state_dict(value):
    return isinstance(value, dict) and bool(value) and all(
        isinstance(key, str) and isinstance(part, torch.Tensor) for key, part in value.items())


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
    file.seek(0)


def read_flags(resume, folder):
    """The flags of the checkpoint that --resume stands for, {} if there is none; as `find_checkpoint` otherwise."""
    sources = [resume] if resume != 'auto' else [
        str(Path(folder) / name) for name in (NEWEST, PREVIOUS) if (Path(folder) / name).is_file()]
    for source in sources:
        try:
            return trained_flags(load_checkpoint(source))
        except DamagedCheckpoint:
            if source == sources[-1]:
                raise
    return {}


def trained_flags(checkpoint):
    """The flags in a checkpoint as a dict; those of the original code are a Namespace with texts in it."""
    trained = checkpoint.get('args') or {}
    trained = dict(vars(trained) if isinstance(trained, argparse.Namespace) else trained)
    if isinstance(trained.get('drop_loc'), str):
        trained['drop_loc'] = block_numbers(trained['drop_loc'])
    return trained


def token_fields(flags):
    """The fields of the `TokenSettings` of a dict of flags, None each if it has no settings; {} if it says nothing."""
    if not TOKEN_FLAGS & flags.keys():
        return {}
    settings = TokenSettings.of_flags(flags)
    return {field.name: getattr(settings, field.name, None) for field in dataclasses.fields(TokenSettings)}


def load_run(source, settings, evaluates_only):
    """Read a checkpoint to resume or evaluate; report settings that differ from those it was trained with.

    Args:
        source: file or address.
        settings: dict, the flags of this run. They apply, but the optimizer and the scheduler must be of one kind.
        evaluates_only: whether the checkpoint is only evaluated.
    Raises:
        InputError: as `load_checkpoint`, or training cannot go on with another optimizer or scheduler.
    """
    checkpoint = load_checkpoint(source)
    trained = trained_flags(checkpoint)
    if isinstance(checkpoint.get('args'), argparse.Namespace):             # of the original code, whose lr is scaled
        trained.pop('lr', None)
    schedule = ('finetune', 'epochs', 'batch_size', 'accum_steps', 'lr', 'warmup_lr', 'min_lr', 'warmup_epochs',
                'weight_decay', 'dense_weight', 'token_label_path')
    for name in () if evaluates_only else ('opt', 'sched'):
        if name in trained and trained[name] != settings[name]:
            raise InputError(f'{source} was trained with --{name} {trained[name]} and cannot go on with '
                             f'{settings[name]}')
    trained, settings = ({**flags, **token_fields(flags)} for flags in (trained, settings))
    fields = token_fields(settings)
    if trained.get('token_counts') or settings.get('token_counts'):       # which take their place
        fields = [name for name in fields if name not in ('base_keep_rate', 'drop_loc', 'uniform')]
    for name in (*MODEL_FLAGS, *fields, *(() if evaluates_only else schedule)):
        if name in trained and str(trained[name] or '') != str(settings[name] or ''):
            log(f'note: {source} was trained with {name} {trained[name]}, this run has {settings[name]}')
    return checkpoint


# --- Load -----------------------------------------------------------------------------------------------------------

def load_weights(model, weights, source, optional=()):
    """Load a state dict whose keys and shapes are those of the model, except that it may lack `optional` keys.

    Raises InputError, naming the first differences; the model is unchanged then.
    """
    own = model.state_dict()
    differences = [
        *(f'{key} is missing' for key in own if key not in weights and key not in optional),
        *(f'{key} is not in the model' for key in weights if key not in own),
        *(f'{key} is {list(weights[key].shape)}, the model has {list(own[key].shape)}'
          for key in own if key in weights and weights[key].shape != own[key].shape)]
    if differences:
        more = f'; and {len(differences) - 3} more' if len(differences) > 3 else ''
        raise InputError(f'{source} is a checkpoint of another model: {"; ".join(differences[:3])}{more}')
    model.load_state_dict(weights, strict=False)


def load_finetune(model, source):
    """Start from a checkpoint that may have another head or resolution, or be in the format of its own code.

    What is dropped or resized is reported.
    """
    original = load_checkpoint(source)['model']
    weights, own = convert_weights(original, model, source), model.state_dict()
    classifiers = model.pretrained_cfg['classifier']
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    head = {f'{name}.{part}' for name in classifiers for part in ('weight', 'bias')}
    for key in sorted(head & weights.keys() & own.keys()):
        if weights[key].shape != own[key].shape:
            log(f'{source}: dropped {key} {list(weights[key].shape)}, the model has {list(own[key].shape)}')
            del weights[key]
    for key in sorted(head & own.keys() - weights.keys()):
        log(f'{source}: no {key} is taken, it starts anew')
    for key in sorted(original.keys() & weights.keys()):
        old, new = original[key].shape, weights[key].shape
        if key == 'pos_embed' and old != new:
            side = math.isqrt(old[1])                  # the others are prefix tokens, which some formats embed, too
            square = old[1] - side ** 2 <= model.num_prefix_tokens
            old = f'{side}×{side} patches' if square else f'{old[1]} tokens'
            new = '×'.join(map(str, model.patch_embed.grid_size))
        if old != new:
            log(f'{source}: resized {key} from {old} to {new}')
    load_weights(model, weights, source, optional=head)


def convert_weights(weights, model, source):
    """A state dict in the format of its own code → in that of `model`, by timm's conversion for it.

    Position embeddings are resized as `resize_pos_embed` does. Raises InputError if the conversion fails.
    """
    module = timm.model_entrypoint(model.pretrained_cfg['architecture']).__module__
    convert = getattr(sys.modules[module], 'checkpoint_filter_fn', None)
    if convert is None:
        return weights
    options = {'antialias': antialiases(model), 'adapt_layer_scale': True}
    options = {name: options[name] for name in options if name in inspect.signature(convert).parameters}
    try:
        with contextlib.redirect_stdout(io.StringIO()):                    # timm prints parameters that are missing
            return dict(convert(dict(weights), model, **options))          # which may change its argument
    except Exception as error:
        raise InputError(f'{source} is a checkpoint of another model: {one_line(error)}') from None


def load_teacher(name, path, num_classes, input_size, device):
    """A timm model in eval mode with the weights of a checkpoint; InputError if it does not take such images."""
    teacher = timm.create_model(name, num_classes=num_classes).to(device).eval()
    load_weights(teacher, load_checkpoint(path)['model'], path)
    try:
        with torch.no_grad():
            teacher(torch.zeros(1, 3, input_size, input_size, device=device))
    except (AssertionError, RuntimeError) as error:
        raise InputError(f'--teacher-model {name} takes no images of {input_size} pixels: {one_line(error)}') from None
    return teacher
