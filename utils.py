"""What every entry point shares: user errors, random seeds, the process group, models, log lines, checkpoints."""
import argparse
import contextlib
import datetime
import functools
import math
import os
import random
import re
import time

import numpy as np
import torch
import torch._dynamo.config
import torch.distributed as dist
import torch.nn as nn


class InputError(Exception):
    """Wrong input: the message tells the user in one line what is wrong and what to do; the exit status is 2."""


class DataError(InputError):
    """Wrong input that one process alone may have met, such as a picture that does not decode."""


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
    return int(os.environ.get('LOCAL_RANK', 0))


def init_process_group(device, dist_url='env://', world_size=1):
    """Join the group that torchrun's RANK, WORLD_SIZE and LOCAL_RANK describe; without them, stay alone.

    Args:
        device: type of device, 'cuda' (nccl) or 'cpu' (gloo); a process on 'cuda' gets the one of its local rank.
        dist_url: where the processes meet.
        world_size: their number where WORLD_SIZE does not tell it.
    Returns:
        This process's torch.device.
    """
    if device.split(':')[0] not in ('cpu', 'cuda'):
        raise InputError(f'--device {device} is neither cpu nor cuda')
    device = torch.device(device)
    world_size = int(os.environ.get('WORLD_SIZE', world_size))
    if world_size > 1 and 'RANK' not in os.environ:
        raise InputError(f'a world of {world_size} processes needs RANK in the environment; start with '
                         f'torchrun --nproc_per_node={world_size} main.py …')
    if device.type == 'cuda':
        if not torch.cuda.is_available():
            raise InputError('--device cuda, but torch sees no CUDA device here; use --device cpu')
        if 'RANK' in os.environ or device.index is None:
            device = torch.device('cuda', local_rank())
        torch.cuda.set_device(device)
    if 'RANK' in os.environ:
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo', init_method=dist_url,
                                world_size=world_size, rank=int(os.environ['RANK']),
                                device_id=device if device.type == 'cuda' else None)
    return device


def leave_process_group():
    """Wait for the other processes, so that none finds its peers gone, and leave."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def all_reduce_sum(tensor):
    """Sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


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


class CompiledModel(nn.Module):
    """A model by torch.compile, always as one graph.

    Each shape of input has a graph of its own, which a GPU replays as a CUDA graph where it needs no gradients. (Those
    must outlive the next pass where they are accumulated, and a training step is long beside its launches.)

    While the keep rate of an EViT falls, from step to step, the numbers of tokens are variables of one more graph. They
    are not rounded to a few that would each have a graph, so that training keeps as many tokens as it does without.

    Args:
        model: any model of timm; shared, not copied.
        device: torch.device of the model.
    """

    def __init__(self, model, device):
        super().__init__()
        self.model, self.training = model, model.training
        replay = 'reduce-overhead' if device.type == 'cuda' else None
        compile_whole = functools.partial(torch.compile, model.forward, fullgraph=True)
        self.train_graph = compile_whole(dynamic=False)
        self.eval_graph = compile_whole(dynamic=False, mode=replay)
        self.shrinking_graph = compile_whole()

    def forward(self, images, keep_rate=None):
        """As the model's; `keep_rate` is for an EViT."""
        # A few graphs more than torch's 8 are needed where blocks begin to drop one after another. And DDP must not
        # cut the model into several, whose numbers of tokens would be variables between them.
        with torch._dynamo.config.patch(recompile_limit=64, optimize_ddp=False):
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
        num_steps: number of batches to come.
        print_freq: steps from one line to the next.
        device: where the losses are.
        lockstep: all processes take the same steps, as in training: the figures are over all of them, and a loss
            that is not finite raises FloatingPointError in all of them.
    """

    def __init__(self, title, num_steps, print_freq, device, lockstep=False):
        self.title, self.num_steps, self.print_freq = title, num_steps, print_freq
        self.device, self.lockstep = device, lockstep
        self.world_size = world_size() if lockstep else 1
        self.step = self.images = 0
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.values = {}
        self.start = self.last_time = time.perf_counter()
        self.last_images = 0

    def update(self, loss, num_images, **values):
        """Count a batch: its mean loss (a 0-d tensor), its size, and numbers to show as they are."""
        self.step += 1
        self.images += num_images * self.world_size
        self.loss_sum += loss * num_images
        self.values = values
        if self.step % self.print_freq == 0 or self.step == self.num_steps:
            self._print_line(loss)

    def _print_line(self, loss):
        losses = torch.stack([loss.double() / self.world_size, self.loss_sum / self.images])
        loss, mean_loss = (all_reduce_sum(losses) if self.lockstep else losses).tolist()
        now = time.perf_counter()
        eta = datetime.timedelta(seconds=round((now - self.start) / self.step * (self.num_steps - self.step)))
        speed = (self.images - self.last_images) / (now - self.last_time)
        self.last_time, self.last_images, self.mean_loss = now, self.images, mean_loss
        parts = [f'{self.title} [{self.step:{len(str(self.num_steps))}}/{self.num_steps}]', f'eta: {eta}',
                 f'loss: {loss:.4f} ({mean_loss:.4f})', *(f'{key}: {value:.4g}' for key, value in self.values.items()),
                 f'images/s: {speed:.0f}']
        if self.device.type == 'cuda':
            parts.append(f'memory: {torch.cuda.max_memory_allocated(self.device) / 2 ** 20:.0f} MiB')
        log('  '.join(parts))
        if self.lockstep and not math.isfinite(mean_loss):
            raise FloatingPointError(f'{self.title} the loss became {mean_loss} by step {self.step}; '
                                     'try a lower --lr, --clip-grad, or --amp-dtype float32')

    def summary(self):
        """The whole pass, after its last step: mean loss, images/s, and the last of the numbers shown."""
        return {'loss': self.mean_loss, 'images_per_second': self.images / (self.last_time - self.start), **self.values}


# --- Checkpoints ----------------------------------------------------------------------------------------------------

def save_checkpoint(checkpoint, *paths):
    """Write a checkpoint to each path, whole or not at all."""
    for path in paths:
        temporary = path.with_name(path.name + '.tmp')
        torch.save(checkpoint, temporary)
        os.replace(temporary, path)


def load_checkpoint(source):
    """Read a checkpoint, a file or an https address, on the CPU, and without running code that it may hold.

    Checkpoints of the original code hold an argparse.Namespace, the only class allowed beside tensors and containers.

    Returns:
        The checkpoint, a dict with the key 'model'; a bare state dict is put under it.
    """
    if not source.startswith('https://') and not os.path.isfile(source):
        raise InputError(f'checkpoint {source} does not exist')
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            if source.startswith('https://'):
                checkpoint = torch.hub.load_state_dict_from_url(source, map_location='cpu', check_hash=True,
                                                                weights_only=True)
            else:
                checkpoint = torch.load(source, map_location='cpu', weights_only=True)
    except OSError as error:
        raise InputError(f'checkpoint {source} cannot be read: {error}') from None
    except Exception:
        # Bytes that are no checkpoint fail in any way; torch's own message recommends to drop the protection
        raise InputError(f'{source} is not a checkpoint: it is no file of torch.save, is cut short, or holds more '
                         'than tensors and plain values, which is not loaded because it could run code') from None
    if isinstance(checkpoint, dict) and 'model' not in checkpoint:
        checkpoint = {'model': checkpoint}
    if not (isinstance(checkpoint, dict) and isinstance(checkpoint['model'], dict)
            and all(isinstance(value, torch.Tensor) for value in checkpoint['model'].values()) and checkpoint['model']):
        raise InputError(f'{source} is not a checkpoint: it holds no state dict of a model')
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
