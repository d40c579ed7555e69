"""A model compiled by torch.compile into a bounded number of graphs."""
import functools
import os
import shlex
import shutil
import sysconfig
from pathlib import Path

import torch
import torch.nn as nn

from runtime.utils import InputError


def check_compiler(device):
    """Raise InputError if torch.compile lacks a compiler: of C++ on a CPU, of C with Python's headers for Triton."""
    on_cpu = device.type == 'cpu'
    language, variable, names = ('C++', 'CXX', ['g++']) if on_cpu else ('C', 'CC', ['gcc', 'clang'])
    if not any(map(shutil.which, shlex.split(os.environ.get(variable, ''))[:1] or names)):
        raise InputError(f'torch.compile needs a {language} compiler on a {"CPU" if on_cpu else "GPU"}; install '
                         f'{names[0]}, or name another in {variable}')
    scheme = sysconfig.get_default_scheme().replace('posix_local', 'posix_prefix')     # Debian's, as in Triton
    header = Path(sysconfig.get_path('include', scheme)) / 'Python.h'
    if not on_cpu and not header.is_file():
        raise InputError(f'torch.compile needs {header} on a GPU; install the headers of Python, such as python3-dev')


class CompiledModel(nn.Module):
    """A model compiled by torch.compile, always as one graph without breaks.

    Each input shape gets its own static graph. On a GPU, graphs without gradients are replayed as CUDA graphs. Training
    graphs are not: with gradient accumulation their outputs would have to outlive the next replay, and a training step
    is long compared to its kernel launches.

    One dynamic-shape graph serves all token counts while the keep rate of an EViT is annealed. The counts are exact,
    not rounded to a few sizes, so that a compiled run trains on the same tokens as an eager one.

    Args:
        model: any timm model; shared, not copied.
        device: torch.device of the model.
    Raises:
        InputError: as `check_compiler`.
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
        # torch's default limit of 8 graphs is too low where blocks begin to drop tokens one after another. DDP must not
        # split the model into several graphs: the token counts would be variables between them.
        self.settings = torch._dynamo.config.patch(recompile_limit=64, optimize_ddp=False)

    def forward(self, images, keep_rate=None, **options):
        """Like the model's forward; `keep_rate` is for an EViT."""
        with self.settings:
            return self.choose_graph(images, keep_rate, options)

    def choose_graph(self, images, keep_rate, options):
        static = self.train_graph if torch.is_grad_enabled() else self.eval_graph
        if keep_rate is None:
            return static(images, **options)
        kept_counts = self.model.kept_counts(keep_rate)
        if kept_counts == self.model.kept_counts():
            return static(images, **options)
        return (self.shrinking_graph if any(kept_counts) else static)(images, kept_counts=kept_counts, **options)
