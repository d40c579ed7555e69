"""The checkpoints of a run, from writing to loading."""
import argparse
import contextlib
import copy
import dataclasses
import io
import math
import os
import shutil
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import timm
import torch

from evit.settings import TOKEN_FLAGS, TokenSettings
from runtime.arguments import block_numbers
from runtime.distributed import all_reduce, log, rank
from runtime.foreign_formats import classifiers, convert_weights, under_prefix
from runtime.model_factory import MODEL_FLAGS
from runtime.reading import NEWEST, PREVIOUS, DamagedCheckpoint, load_checkpoint
from runtime.utils import InputError, atomic_write, one_line, open_durably

BEST = 'best_checkpoint.pth'


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

def checkpoints_of(folder):
    """The checkpoints of the run in a folder, the newest first, as Paths."""
    return [path for name in (NEWEST, PREVIOUS, BEST) if (path := Path(folder) / name).is_file()]


def refuse_checkpoints(folder):
    """Raise InputError if a new run would overwrite the checkpoints of another one."""
    if found := checkpoints_of(folder):
        raise InputError(f'{found[0]} exists: --resume auto goes on with its run, --overwrite begins anew and removes '
                         'it; or give another --output-dir')


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


# --- Resume -----------------------------------------------------------------------------------------------------------

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
        blocks = block_numbers(trained['drop_loc'])
        trained['drop_loc'] = None if blocks == (3, 6, 9) else blocks      # its default; merging has another one
    return trained


def token_fields(flags):
    """The fields of the `TokenSettings` of a dict of flags; keep rate 1 if it has none, {} if it has no token flags."""
    if not TOKEN_FLAGS & flags.keys():
        return {}
    settings = TokenSettings.of_flags(flags)
    return dataclasses.asdict(settings) if settings else {'base_keep_rate': 1.}


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
    for name in (*MODEL_FLAGS, 'data_set', *fields, *(() if evaluates_only else schedule)):
        if name in trained.keys() & settings.keys() and str(trained[name] or '') != str(settings[name] or ''):
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


def load_evaluated(model, checkpoint, source, with_average):
    """Load the weights of a run; → a copy of the model with their moving average, None if it is not wanted or saved."""
    load_weights(model, checkpoint['model'], source)
    if not (with_average and checkpoint.get('model_ema')):
        return None
    average = copy.deepcopy(model)
    load_weights(average, checkpoint['model_ema'], f'model_ema of {source}')
    return average


def load_finetune(model, source, dataset=None):
    """Start from a checkpoint that may have another head or resolution, or be in the format of its own code.

    What is dropped, left out or resized is reported; and, given the data set, a head of other classes that is kept.
    """
    load_adapted(model, load_checkpoint(source), source, dataset)


def load_adapted(model, checkpoint, source, dataset=None):
    """As `load_finetune`, from a checkpoint that was read. --knn loads so, too, since it does not use the head."""
    original, own = under_prefix(checkpoint['model'], model, source), model.state_dict()
    weights = convert_weights(original, model, source)
    head = {f'{name}.{part}' for name in classifiers(model) for part in ('weight', 'bias')}
    for key in sorted(head & weights.keys() & own.keys()):
        if weights[key].shape != own[key].shape:
            log(f'{source}: dropped {key} {list(weights[key].shape)}, the model has {list(own[key].shape)}')
            del weights[key]
    differences = dataset and class_differences(checkpoint, dataset)
    if differences and head & weights.keys():
        log(f'note: {source}: the head is taken over, although it was trained on other classes: {differences}')
    optional = head | ({'fc_norm.weight', 'fc_norm.bias'} if 'norm.weight' in original.keys() - own.keys() else set())
    for key in sorted(optional & own.keys() - weights.keys()):
        log(f'{source}: no {key} is taken, it starts anew')
    for key in sorted(original.keys() & weights.keys()):
        old, new = original[key].shape, weights[key].shape
        if key == 'pos_embed' and old != new:
            side = math.isqrt(old[1])                  # the others are prefix tokens, which some formats embed, too
            square = old[1] - side ** 2 <= model.num_prefix_tokens
            old = f'{side}×{side} patches' if square else f'{old[1]} tokens'
            new = '×'.join(map(str, model.patch_embed.grid_size)) + ' patches'
        if old != new:
            log(f'{source}: resized {key} from {old} to {new}')
    load_weights(model, weights, source, optional)


# --- The classes ----------------------------------------------------------------------------------------------------

def check_classes(checkpoint, dataset, source):
    """Raise InputError, naming the first differences, if the head of a checkpoint was trained on other classes.

    Args:
        checkpoint: of `load_checkpoint`; those without names of classes pass.
        dataset: whose `classes` are names in the order of the labels.
        source: name of the checkpoint.
    """
    differences = class_differences(checkpoint, dataset)
    if differences:
        raise InputError(f'{source} was trained on other classes than the data has: {differences}; the data must have '
                         'the same names in the same order')


def class_differences(checkpoint, dataset):
    """How the classes of a checkpoint differ from those of a data set, in words; '' if they do not, or are unknown."""
    trained = checkpoint.get('classes')
    named = isinstance(trained, (list, tuple)) and all(isinstance(name, str) for name in trained)
    if not named or not trained or not getattr(dataset, 'has_class_names', True):
        return ''
    if trained_flags(checkpoint).get('use_lmdb') and list(trained) == [str(i) for i in range(len(trained))]:
        return ''                                      # of a database of the original code, which stores no names
    # macOS writes an accent as a character of its own
    trained, classes = ([unicodedata.normalize('NFC', str(name)) for name in names]
                        for names in (trained, dataset.classes))
    known, found = set(trained), set(classes)
    differences = [*(f'{name} is in the checkpoint only' for name in trained if name not in found),
                   *(f'{name} is in the data only' for name in classes if name not in known)]
    if not differences:
        differences = [f'class {i} is {one} in the checkpoint, {other} in the data'
                       for i, (one, other) in enumerate(zip(trained, classes)) if one != other]
    more = f', and {len(differences) - 4} more' if len(differences) > 4 else ''
    return ', '.join(differences[:4]) + more


# --- The teacher ----------------------------------------------------------------------------------------------------

def load_teacher(name, path, num_classes, input_size, device, dataset=None):
    """A timm model in eval mode with the weights of a checkpoint.

    Raises InputError if it does not take such images, or was trained on other classes than `dataset` has.
    """
    teacher, checkpoint = timm.create_model(name, num_classes=num_classes).to(device).eval(), load_checkpoint(path)
    if dataset:
        check_classes(checkpoint, dataset, path)
    load_weights(teacher, checkpoint['model'], path)
    try:
        with torch.no_grad():
            teacher(torch.zeros(1, 3, input_size, input_size, device=device))
    except (AssertionError, RuntimeError) as error:
        raise InputError(f'--teacher-model {name} takes no images of {input_size} pixels: {one_line(error)}') from None
    return teacher
