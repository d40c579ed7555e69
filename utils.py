"""What every entry point shares: user errors, random seeds, the process group, models, log lines, checkpoints."""
import argparse
import contextlib
import datetime
import functools
import io
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch._dynamo.config
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.rendezvous import rendezvous


class InputError(Exception):
    """Wrong input: the message tells the user in one line what is wrong and what to do; the exit status is 2."""


class DataError(InputError):
    """Wrong input that one process alone may meet, such as a picture that does not decode."""


class DamagedCheckpoint(InputError):
    """A file that is no checkpoint, or is one no more."""


class Stopped(Exception):
    """A run has ended because a signal asked for it, its state saved; `signum` is the signal."""

    def __init__(self, signum):
        super().__init__(f'stopped by {signal.Signals(signum).name}')
        self.signum = signum


def one_line(error):
    """The message of an error; one that a process of a DataLoader met comes with its traceback, and ends with it."""
    lines = str(error).splitlines() or [type(error).__name__]
    return re.sub(r'^utils\.\w+: ', '', lines[-1])


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, but an error is one line, without the usage before it."""

    def error(self, message):
        self.exit(2, f'{self.prog}: error: {message}\n')


# --- Random numbers -------------------------------------------------------------------------------------------------

def seed_all(*key):
    """Make every generator (random, numpy, torch on all devices) a function of `key`, non-negative integers.

    Each draw of a run follows from such a key of seed, epoch and position. So nothing random needs to be stored for
    a run to be resumed, and neither the number of worker processes nor which of them did the work matters.
    """
    python, numpy, low, high = (int(word) for word in np.random.SeedSequence(key).generate_state(4))
    random.seed(python)
    np.random.seed(numpy)
    # Not torch.manual_seed: where CUDA is not in use, it takes a stack trace for later, 0.4 ms for each sample
    torch.default_generator.manual_seed(low << 32 | high)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(low << 32 | high)


# --- Process group --------------------------------------------------------------------------------------------------

def world_size():
    """Number of processes that train together, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank():
    """Number of this process on its machine, from 0."""
    return environment_number('LOCAL_RANK', 0)


def init_process_group(device, dist_url='env://', world_size=1, timeout=600):
    """Join the group that torchrun's RANK, WORLD_SIZE and LOCAL_RANK describe, or srun's variables; else stay alone.

    Args:
        device: type of device, 'cuda' (nccl) or 'cpu' (gloo); a process on 'cuda' gets the one of its local rank.
        dist_url: where the processes meet.
        world_size: their number where WORLD_SIZE does not tell it.
        timeout: seconds after which a process that others wait for counts as lost.
    Returns:
        This process's torch.device.
    """
    if device.split(':')[0] not in ('cpu', 'cuda'):
        raise InputError(f'--device {device} is neither cpu nor cuda')
    try:
        device = torch.device(device)
    except RuntimeError:
        raise InputError(f'--device {device} is none; take cpu, cuda or the number of a GPU, as cuda:1') from None
    adopt_slurm()
    rank, world_size = environment_number('RANK', None), environment_number('WORLD_SIZE', world_size)
    if world_size > 1 and rank is None:
        raise InputError(f'a world of {world_size} processes needs RANK in the environment; start with '
                         f'torchrun --nproc_per_node={world_size} main.py …')
    if device.type == 'cuda':
        device = cuda_device(device, rank is not None)
    if rank is not None:
        if rank >= world_size:
            raise InputError(f'RANK={rank} in a world of {world_size} process(es); set WORLD_SIZE to their number')
        lacking = [name for name in ('MASTER_ADDR', 'MASTER_PORT') if not os.environ.get(name)]
        if lacking and dist_url == 'env://':
            raise InputError(f'RANK is set and {" and ".join(lacking)} not; start with torchrun or srun, or set where '
                             'process 0 is to be met')
        environment_number('MASTER_PORT', 0)
        limit = datetime.timedelta(seconds=timeout)
        try:
            store, rank, world_size = next(rendezvous(dist_url, rank, world_size, timeout=limit))
            dist.init_process_group(
                'nccl' if device.type == 'cuda' else 'gloo', store=dist.PrefixStore('group', store), rank=rank,
                world_size=world_size, timeout=limit, device_id=device if device.type == 'cuda' else None)
            Failures.store = dist.PrefixStore('failures', store)
        except (RuntimeError, ValueError) as error:
            where = dist_url if dist_url != 'env://' else ':'.join(
                os.environ[name] for name in ('MASTER_ADDR', 'MASTER_PORT'))
            raise DataError(f'process {rank} of {world_size} did not meet the others at {where} within {timeout:g} s: '
                            f'{str(error).splitlines()[0]}') from None
    return device


def adopt_slurm():
    """Give a process that srun started the variables that torchrun would have given it."""
    environment = os.environ
    if 'RANK' in environment:
        return
    if environment.get('SLURM_STEP_NUM_TASKS', '1') == '1':
        if environment.get('SLURM_NTASKS', '1') != '1':
            log(f'note: the job has {environment["SLURM_NTASKS"]} tasks, but this process is alone; start with srun')
        return
    for name, origin in (('RANK', 'SLURM_PROCID'), ('LOCAL_RANK', 'SLURM_LOCALID'),
                         ('WORLD_SIZE', 'SLURM_STEP_NUM_TASKS')):
        if origin not in environment:
            raise InputError(f'SLURM_STEP_NUM_TASKS is set and {origin} not; start with srun, or unset SLURM_*')
        environment[name] = environment[origin]
    if 'MASTER_ADDR' not in environment:
        nodes = environment.get('SLURM_STEP_NODELIST') or environment.get('SLURM_JOB_NODELIST', '')
        try:
            hosts = subprocess.run(['scontrol', 'show', 'hostnames', nodes], capture_output=True, text=True, check=True)
            environment['MASTER_ADDR'] = hosts.stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            raise InputError(f'scontrol does not tell the first of the nodes {nodes!r}; set MASTER_ADDR') from None
    job = environment_number('SLURM_JOB_ID', 0) + environment_number('SLURM_STEP_ID', 0)
    environment.setdefault('MASTER_PORT', str(15000 + job % 15000))        # below those that systems hand out


def environment_number(name, default):
    """A variable of the environment that holds a number, 0 or more."""
    text = os.environ.get(name, '')
    if text and not text.isdecimal():
        raise InputError(f'{name}={text} in the environment is not a number; start with torchrun or srun')
    return int(text) if text else default


def cuda_device(device, in_group):
    """This process's GPU: of its local rank, unless it is alone and one was named, or sees one only."""
    if not torch.cuda.is_available():
        raise InputError('--device cuda, but torch sees no CUDA device here; use --device cpu')
    count = torch.cuda.device_count()
    if in_group or device.index is None:
        device = torch.device('cuda', local_rank() if count > 1 else 0)
    if device.index >= count:
        raise InputError(f'{device} is asked for, but torch sees {count} GPU(s) here; start one process for each')
    torch.cuda.set_device(device)
    return device


def leave_process_group():
    """Wait for the other processes, so that none finds its peers gone, and leave."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def all_reduce(tensor, operation=dist.ReduceOp.SUM):
    """Sum, or another operation, of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, operation)
    return tensor


def broadcast(tensor):
    """Give all processes the first's values of a tensor, in place."""
    if dist.is_initialized():
        dist.broadcast(tensor, 0)
    return tensor


def share_buffers(model):
    """Give all processes the first's running statistics; DDP does so in training, but not after the last step."""
    for buffer in model.buffers():
        broadcast(buffer)


class Failures:
    """What processes tell one another when they fail, beside the group, whose collectives then wait in vain."""
    store = None

    @classmethod
    def tell(cls, message):
        """Let the others know why this process fails."""
        if cls.store:
            with contextlib.suppress(RuntimeError):                        # process 0, which keeps the store, is gone
                cls.store.set('cause', f'process {rank()}: {message}')

    @classmethod
    def cause(cls, error):
        """Why a collective failed with `error`, in a line; None if the error is of another kind.

        Either a process has told it, or those are named that do not say within seconds that they wait, too.
        """
        if not (cls.store and (isinstance(error, dist.DistError) or re.search('gloo|NCCL', str(error)))):
            return None
        try:
            cls.store.set(f'waits {rank()}', '')
            silent = list(range(world_size()))
            for _ in range(50):
                if cls.store.check(['cause']):
                    return cls.store.get('cause').decode()
                silent = [process for process in silent if not cls.store.check([f'waits {process}'])]
                if not silent:
                    break
                time.sleep(0.1)
        except RuntimeError:
            silent = [0]
        if not silent:
            return f'the processes lost contact: {one_line(error)}'
        return (f'process {", ".join(map(str, silent))} of {world_size()} ended or no longer answers '
                f'(waited for as long as --dist-timeout says): {one_line(error)}')


class StopSignal:
    """SIGTERM, SIGUSR1 or SIGUSR2, by which schedulers announce the end, as a request that all processes agree on.

    Used as a context. A second signal ends the process at once; but half a second counts as one, because a launcher
    may pass on what the process got already. A thread sees to it: Python runs no handler while the main thread waits
    within torch for processes that may never come.
    """
    SIGNALS = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2

    def __init__(self, device):
        self.device = device
        self.signum = 0
        self.latest = None

    def __enter__(self):
        self.handlers = {signum: signal.signal(signum, self._note) for signum in self.SIGNALS}
        arrivals, self.pipe = os.pipe()
        os.set_blocking(self.pipe, False)
        signal.set_wakeup_fd(self.pipe)
        threading.Thread(target=self._end_at_second, args=(arrivals,), daemon=True).start()
        return self

    def __exit__(self, *_):
        signal.set_wakeup_fd(-1)
        os.close(self.pipe)
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)

    def _note(self, signum, frame):
        self.signum = self.signum or signum

    def _end_at_second(self, arrivals):
        first = None
        with open(arrivals, 'rb', buffering=0) as pipe:
            while number := pipe.read(1):                                  # of each signal that Python handles
                if number[0] in self.SIGNALS:
                    first = first or time.monotonic()
                    if time.monotonic() - first > 0.5:
                        os._exit(128 + number[0])

    def agreed(self):
        """The signal that any process has got, 0 without one: the same in all processes, which all call this.

        On a GPU it is that of the call before, for which no process needs to wait.
        """
        if not dist.is_initialized():
            return self.signum
        signum = all_reduce(torch.full((), self.signum, device=self.device), dist.ReduceOp.MAX)
        if self.device.type != 'cuda':
            return int(signum)
        latest, arrived = torch.empty_like(signum, device='cpu', pin_memory=True), torch.cuda.Event()
        latest.copy_(signum, non_blocking=True)
        arrived.record()
        earlier, self.latest = self.latest, (latest, arrived)
        if earlier is None:
            return 0
        earlier[1].synchronize()
        return int(earlier[0])


# --- Models ---------------------------------------------------------------------------------------------------------

def allow_fast_kernels(device):
    """Let convolutions be tried out, and on a GPU, products of float32 matrices be of TF32, as when EViT was made."""
    torch.backends.cudnn.benchmark = True
    if device.type == 'cuda':
        torch.set_float32_matmul_precision('high')


def autocast(device, dtype):
    """torch.autocast on a torch.device; float32 stands for none."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@contextlib.contextmanager
def eval_mode(*models):
    """Put models into eval mode, and afterwards each of their modules back into the mode it had."""
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def check_compiler(device):
    """InputError where torch.compile has no C++ compiler, which it needs on a CPU."""
    compiler, *_ = shlex.split(os.environ.get('CXX', '')) or ['g++']
    if device.type == 'cpu' and not shutil.which(compiler):
        raise InputError('--compile needs a C++ compiler on a CPU; install g++, or name another in CXX')


class CompiledModel(nn.Module):
    """A model by torch.compile, always as one graph.

    Each shape of input has a graph of its own, which a GPU replays as a CUDA graph where it needs no gradients. (Those
    must outlive the next pass where they are accumulated, and a training step is long beside its launches.)

    While the keep rate of an EViT falls, from step to step, the numbers of tokens are variables of one more graph. They
    are not rounded to a few that would each have a graph, so that training keeps as many tokens as it does without.

    Args:
        model: any model of timm; shared, not copied.
        device: torch.device of the model.
    Raises:
        InputError: on a CPU, where there is no compiler.
    """

    def __init__(self, model, device):
        super().__init__()
        check_compiler(device)
        self.model, self.training = model, model.training
        replay = 'reduce-overhead' if device.type == 'cuda' else None
        compile_whole = functools.partial(torch.compile, model.forward, fullgraph=True)
        self.train_graph = compile_whole(dynamic=False)
        self.eval_graph = compile_whole(dynamic=False, mode=replay)
        self.shrinking_graph = compile_whole()
        # A few graphs more than torch's 8 are needed where blocks begin to drop one after another. And DDP must not
        # cut the model into several, whose numbers of tokens would be variables between them.
        self.settings = torch._dynamo.config.patch(recompile_limit=64, optimize_ddp=False)

    def forward(self, images, keep_rate=None):
        """As the model's; `keep_rate` is for an EViT."""
        with self.settings:
            return self.choose_graph(images, keep_rate)

    def choose_graph(self, images, keep_rate):
        static = self.train_graph if torch.is_grad_enabled() else self.eval_graph
        if keep_rate is None:
            return static(images)
        tokens = self.model.token_counts(keep_rate)
        if tokens == self.model.token_counts():
            return static(images)
        return (self.shrinking_graph if any(tokens) else static)(images, tokens=tokens)


# --- Log lines ------------------------------------------------------------------------------------------------------

def log(message):
    """Print on the first process only."""
    if rank() == 0:
        print(message, flush=True)


class Progress:
    """A console line every `print_freq` steps of a pass over batches, and the figures of the whole pass.

    The loss stays on the device between the lines, so that no step waits for it.

    Args:
        title: what the lines begin with.
        num_steps: number of batches of the pass.
        print_freq: steps from one line to the next.
        device: where the losses are.
        lockstep: all processes take the same steps, as in training: the figures are over all of them, and a loss
            that is not finite raises FloatingPointError in all of them.
        state: `state_dict` of a pass that goes on.
    """

    def __init__(self, title, num_steps, print_freq, device, lockstep=False, state=None):
        self.title, self.num_steps, self.print_freq = title, num_steps, print_freq
        self.device, self.lockstep = device, lockstep
        self.world_size = world_size() if lockstep else 1
        self.step = self.images = self.skipped = self.skipped_in_a_row = 0
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.first_broken = torch.full((), math.inf, device=device)        # step whose loss was the first not finite
        self.values = {}
        if state:
            self.step, self.images = state['step'], state['images']
            self.skipped, self.skipped_in_a_row = state['skipped'], state['skipped_in_a_row']
            loss_sums = state['loss_sums']
            mine = loss_sums[rank()] if len(loss_sums) == self.world_size else loss_sums.sum() / self.world_size
            self.loss_sum += mine.to(device)
            self.values = state['values']
        self.first_images = self.last_images = self.images
        self.start_step = self.step
        self.start = self.last_time = time.perf_counter()

    def state_dict(self):
        """The pass up to here, of all processes; raises FloatingPointError as a line would."""
        self.mean_loss()
        loss_sums = torch.zeros(self.world_size, dtype=torch.float64, device=self.device)
        loss_sums[rank()] = self.loss_sum
        return {'step': self.step, 'num_steps': self.num_steps, 'images': self.images, 'skipped': self.skipped,
                'skipped_in_a_row': self.skipped_in_a_row, 'loss_sums': all_reduce(loss_sums).cpu(),
                'values': self.values}

    def update(self, loss, num_images, counts=True, **values):
        """Take in a batch: its mean loss (a 0-d tensor), its size, whether the figures count it, numbers to show."""
        self.step += 1
        if counts:
            self.images += num_images * self.world_size
            self.loss_sum += loss * num_images
            self.first_broken = self.first_broken.where(loss.isfinite() | (self.first_broken < self.step), self.step)
        self.values = values
        if self.step % self.print_freq == 0 or self.step == self.num_steps:
            self._print_line(loss)

    def skip(self, limit):
        """Count an update that was left out because its loss was not finite; FloatingPointError beyond the limit."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        log(f'{self.title} step {self.step} is left out: its loss is not finite')
        if self.skipped_in_a_row > limit:
            raise FloatingPointError(f'{self.title} at step {self.step} the loss is not finite {self.skipped_in_a_row} '
                                     'times in a row; try a lower --lr, --clip-grad, or --amp-dtype float32')

    def mean_loss(self):
        """The mean loss up to here, of all processes if in lockstep; then it is finite, or FloatingPointError."""
        loss_sum = self.loss_sum.clone()
        mean = (all_reduce(loss_sum) if self.lockstep else loss_sum).item() / max(self.images, 1)
        if self.lockstep and not math.isfinite(mean):
            step = int(all_reduce(self.first_broken, dist.ReduceOp.MIN).item())
            raise FloatingPointError(f'{self.title} the loss of step {step} is not finite; '
                                     'try a lower --lr, --clip-grad, --amp-dtype float32, or --skip-nonfinite')
        return mean

    def _print_line(self, loss):
        loss = loss.double() / self.world_size
        loss = (all_reduce(loss) if self.lockstep else loss).item()
        now = time.perf_counter()
        seconds = (now - self.start) / (self.step - self.start_step) * (self.num_steps - self.step)
        speed = (self.images - self.last_images) / (now - self.last_time)
        self.last_time, self.last_images = now, self.images
        parts = [f'{self.title} [{self.step:{len(str(self.num_steps))}}/{self.num_steps}]',
                 f'eta: {datetime.timedelta(seconds=round(seconds))}', f'loss: {loss:.4f} ({self.mean_loss():.4f})',
                 *(f'{key}: {value:.4g}' for key, value in self.values.items()), f'images/s: {speed:.0f}']
        if self.device.type == 'cuda':
            parts.append(f'memory: {torch.cuda.max_memory_allocated(self.device) / 2 ** 20:.0f} MiB')
        log('  '.join(parts))

    def summary(self):
        """The whole pass: mean loss, images/s of the part that this process saw, and the last of the numbers shown."""
        seconds = time.perf_counter() - self.start
        skipped = {'skipped_steps': self.skipped} if self.skipped else {}
        return {'loss': self.mean_loss(), 'images_per_second': (self.images - self.first_images) / seconds,
                **self.values, **skipped}


# --- Checkpoints ----------------------------------------------------------------------------------------------------

NEWEST, PREVIOUS, BEST = 'checkpoint.pth', 'previous_checkpoint.pth', 'best_checkpoint.pth'
CHECKSUM_SIZE = 8


def checksum(data):
    """CRC-32 as 8 hexadecimal digits; each damage of up to 32 bits in a row changes it."""
    return b'%08x' % zlib.crc32(data)


def save_checkpoint(checkpoint, folder, best=False):
    """Write a checkpoint of a run, whole or not at all, and keep the one before it.

    The file is one of torch.save, a zip archive, whose comment is the CRC-32 of all before it.

    Args:
        checkpoint: what torch.save takes.
        folder: Path of NEWEST and PREVIOUS.
        best: whether it is BEST, too.
    Raises:
        OSError: the disk is full, or the like; the files are as they were.
    """
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    data = buffer.getbuffer()
    data[-2:] = CHECKSUM_SIZE.to_bytes(2, 'little')
    temporary = folder / (NEWEST + '.tmp')
    try:
        with open_durably(temporary, 'wb') as file:
            file.write(data)
            file.write(checksum(data))
        if best:
            _link(temporary, folder / BEST)
        with contextlib.suppress(FileNotFoundError):
            (folder / NEWEST).replace(folder / PREVIOUS)
        temporary.replace(folder / NEWEST)
        _flush_folder(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, f'the checkpoint cannot be saved, the last one is kept: {error.strerror}',
                      str(folder)) from None


def copy_to_cpu(value):
    """A copy of tensors in dicts and sequences, in main memory, that does not change when they do."""
    if isinstance(value, torch.Tensor):
        return value.detach().to('cpu', copy=True)
    if isinstance(value, dict):
        return {key: copy_to_cpu(item) for key, item in value.items()}
    return type(value)(map(copy_to_cpu, value)) if isinstance(value, (list, tuple)) else value


def _link(path, target):
    """Make `target` the same file as `path`, in one go; a copy where the file system has no links."""
    temporary = target.with_name(target.name + '.tmp')
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        try:
            shutil.copyfile(path, temporary)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    temporary.replace(target)


@contextlib.contextmanager
def open_durably(path, mode):
    """An open file, whose content outlasts a power cut once the context is left."""
    with open(path, mode) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder):
    """Let the names in a folder outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def newest_checkpoint(folder, device):
    """The newest checkpoint of a run's folder that is whole, as a str; '' where there is none. All processes call this.

    A damaged one is said and renamed, so that it takes no whole one's place.

    Raises InputError where there are damaged ones only, for the run is not to begin anew unasked.
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
            log(f'note: {message}; the one before it is taken')
            path.replace(path.with_name(f'damaged_{path.name}'))
    choice = int(all_reduce(choice))
    return str(Path(folder) / names[choice - 1]) if choice else ''


def check_checksum(data, source):
    """DamagedCheckpoint if a file is cut or changed since `save_checkpoint` wrote it; others have no checksum."""
    # A zip archive ends with these 4 bytes, 16 more, the length of the comment in 2, and the comment
    _, found, end = data[-22 - CHECKSUM_SIZE:].partition(b'PK\5\6')
    others = len(end) == 18 and end.endswith(bytes(2))
    if found and not others and data[-CHECKSUM_SIZE:] != checksum(data[:-CHECKSUM_SIZE]):
        raise DamagedCheckpoint(f'checkpoint {source} is damaged: its checksum is not that of its content')


def load_checkpoint(source):
    """Read a checkpoint, a file or an https address, on the CPU, and without running code that it may hold.

    Checkpoints of the original code hold an argparse.Namespace, the only class allowed beside tensors and containers.

    Returns:
        The checkpoint, a dict with the key 'model'; a bare state dict is put under it.
    Raises:
        InputError, and DamagedCheckpoint where it was read but is none.
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
                check_checksum(data, source)
                checkpoint = torch.load(io.BytesIO(data), map_location='cpu', weights_only=True)
    except (OSError, MemoryError) as error:
        raise InputError(f'checkpoint {source} cannot be read: {error or "out of memory"}') from None
    except DamagedCheckpoint:
        raise
    except Exception:
        # Bytes that are no checkpoint fail in any way; torch's own message recommends to drop the protection
        raise DamagedCheckpoint(
            f'{source} is not a checkpoint: it is no file of torch.save, is cut short or damaged, or holds more '
            'than tensors and plain values, which is not loaded because it could run code') from None
    if isinstance(checkpoint, dict) and 'model' not in checkpoint:
        checkpoint = {'model': checkpoint}
    if not (isinstance(checkpoint, dict) and isinstance(checkpoint['model'], dict)
            and all(isinstance(value, torch.Tensor) for value in checkpoint['model'].values()) and checkpoint['model']):
        raise DamagedCheckpoint(f'{source} is not a checkpoint: it holds no state dict of a model')
    return checkpoint


def load_weights(model, weights, source, optional=()):
    """Load a state dict whose keys and shapes are the model's, but for `optional` keys, which it may lack.

    Raises InputError, naming the first keys that differ, and then the model is as it was.
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
