"""How fast a model is, how much it computes and how much memory it takes; how fast images are loaded.

    speed = throughput(model, input_size=224, batch_size=256, device='cuda', amp_dtype=torch.bfloat16)
    print(speed)                                  # the figures, and on the same line how they were taken
    ours, theirs = paired_throughput([a, b])      # windows in turn, so that ours.ratio_to(theirs) holds
    macs(model), peak_memory(model, speed.protocol)

All of it is for any timm model. From the command line, models are compared in one process, a row each; without
--models those of the paper's Figure 4::

    python speed_test.py --models deit_small_patch16_shrink_base@0.7 deit_small_patch16_224

and so is the input pipeline, with the usual one beside it::

    python speed_test.py --loader --data-path /path/to/imagenet
"""
import argparse
import copy
import csv
import dataclasses
import functools
import importlib.util
import itertools
import math
import os
import platform
import statistics
import sys
import textwrap
import time
from collections import deque
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, NamedTuple

import PIL
import timm
import torch
import torch._dynamo.config
import torch._inductor.config
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.random_erasing import RandomErasing
from timm.layers import to_2tuple
from timm.utils import ModelEmaV3
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.datasets import ImageFolder

from datasets import SeededDataset, build_dataset, build_loader
from folder2lmdb import ImageFolderLMDB
from models_evit import VARIANTS
from samplers import EvalSampler, TrainSampler
from utils import (ArgumentParser, CompiledModel, InputError, allow_fast_kernels, autocast, check_compiler, eval_mode,
                   one_line)

# How torch and timm refuse a model or an input; out of memory is a RuntimeError.
FAILURES = (AssertionError, RuntimeError, TypeError, ValueError)


def device_name(device):
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)'


def synchronize(device):
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What is measured and how; its str() is the line that belongs beside every figure.

    Args:
        input_size: side of the square images, pixels; None for each model's own.
        batch_size: images in a batch; None for as many as fit.
        device: a torch.device, the one that the models are on.
        amp_dtype: precision of autocast; torch.float32 for none.
        keep_rate: passed to the model if not None.
        windows: number of windows timed.
        window_seconds: least duration of a window and of the warm-up before the first.
        compiled: by torch.compile, as one graph; a pass without gradients with constant weights on a CPU, and replayed
            as a CUDA graph on a GPU.
        gradients: record what a backward pass would need, instead of running in inference mode.
        train: measure a whole training step in train mode, forward, backward, AdamW and the weights' moving average.
        channels_last: memory format of images and weights.
    """
    input_size: int | None
    batch_size: int | None
    device: torch.device
    amp_dtype: torch.dtype
    keep_rate: float | None
    windows: int
    window_seconds: float
    compiled: bool = False
    gradients: bool = False
    train: bool = False
    channels_last: bool = False

    @property
    def memory_format(self):
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def dtype(self):
        name = str(self.amp_dtype).removeprefix('torch.')
        if self.amp_dtype != torch.float32:
            return f'{name} autocast'
        tf32 = self.device.type == 'cuda' and torch.get_float32_matmul_precision() != 'highest'
        return f'{name} (TF32 products)' if tf32 else name

    def __str__(self):
        rate = '' if self.keep_rate is None else f', keep rate {self.keep_rate}'
        mode = 'eval mode with gradients' if self.gradients else 'inference mode, eval mode'
        if self.train:
            mode = 'whole training steps (forward, backward, AdamW, EMA)'
        layout = ', channels last' if self.channels_last else ''
        size = "each model's own input size" if self.input_size is None else f'{self.input_size}×{self.input_size}'
        return (f'batch {self.batch_size or "as large as fits"} of {size}, {self.dtype}{rate}{layout}, '
                f'{"compiled" if self.compiled else "eager"}, {device_name(self.device)}, torch {torch.__version__}; '
                f'{mode}, after warm-up, synchronised, median [min–max] of {self.windows} windows of at least '
                f'{self.window_seconds:g} s')

    def images(self, seed=0):
        """A random batch (B, 3, S, S), drawn without touching the random state of the process."""
        generator = torch.Generator(self.device).manual_seed(seed)
        shape = self.batch_size, 3, self.input_size, self.input_size
        return torch.randn(shape, generator=generator, device=self.device).contiguous(memory_format=self.memory_format)


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Images/s of a model in each window, and the protocol they were measured by."""
    rates: tuple[float, ...]
    protocol: Protocol

    @property
    def median(self):
        return statistics.median(self.rates)

    @property
    def min(self):
        return min(self.rates)

    @property
    def max(self):
        return max(self.rates)

    def ratio_to(self, other):
        """How many times as fast as `other`, measured in turn with this one: median over pairs of windows."""
        return statistics.median(a / b for a, b in zip(self.rates, other.rates, strict=True))

    @property
    def span(self):
        return f'{self.median:.1f} [{self.min:.1f}–{self.max:.1f}]'

    def __str__(self):
        return f'{self.span} images/s; {self.protocol}'


def classify(model, images, keep_rate=None):
    """Images (B, 3, H, W) → logits (B, num_classes); only a model that knows keep rates is given one."""
    return model(images) if keep_rate is None else model(images, keep_rate=keep_rate)


def forward(model, images, protocol):
    """A pass in eval mode → logits; autocast as an evaluation enters it, anew for each batch."""
    with torch.inference_mode(not protocol.gradients), autocast(protocol.device, protocol.amp_dtype):
        return classify(model, images, protocol.keep_rate)


def compile_forward(model, protocol):
    """The model by torch.compile, as one graph, for `forward`; a CUDA graph where it needs no gradients."""
    check_compiler(protocol.device)
    if protocol.device.type == 'cpu':
        model = copy.deepcopy(model)                   # its weights become constants, of which later code must not hear
    replay = protocol.device.type == 'cuda' and not protocol.gradients
    return torch.compile(model, fullgraph=True, dynamic=False, mode='reduce-overhead' if replay else None)


def training_step(model, protocol):
    """A function that trains a model, put into train mode, on the same batch again."""
    model.zero_grad()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.05, fused=True)
    scaler = torch.amp.GradScaler(protocol.device.type, enabled=protocol.amp_dtype == torch.float16)
    model_ema = ModelEmaV3(model, decay=0.99996)
    images = protocol.images()
    with torch.no_grad(), eval_mode(model):
        num_classes = classify(model, images[:1], protocol.keep_rate).shape[1]
    labels = torch.arange(protocol.batch_size, device=protocol.device) % num_classes
    model.train()
    run = CompiledModel(model, protocol.device) if protocol.compiled else model

    def step():
        with autocast(protocol.device, protocol.amp_dtype):
            loss = F.cross_entropy(classify(run, images, protocol.keep_rate), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        model_ema.update(model)

    return step


def check_real(model, protocol):
    """ValueError unless the logits of a batch are finite and depend on the images."""
    with eval_mode(model):
        first, second = (forward(model, protocol.images(seed), protocol).clone().detach() for seed in (0, 1))
    if not first.isfinite().all():
        raise ValueError('the output is not finite')
    if torch.equal(first, second):
        raise ValueError('the output does not depend on the input')


def measured_pass(model, protocol):
    """The function that the protocol measures, ready to run: the model is checked, and compiled if it is to be."""
    # Models of one class share the graphs' table, in which each may need a place
    with (torch._dynamo.config.patch(recompile_limit=1000),
          torch._inductor.config.patch(freezing=protocol.device.type == 'cpu')):
        if protocol.train:
            check_real(model, protocol)
            step = training_step(model, protocol)
            step()
            return step
        model = compile_forward(model, protocol) if protocol.compiled else model
        check_real(model, protocol)
    return functools.partial(forward, model, protocol.images(), protocol)


def stopwatch(run, protocol):
    """Warm a pass up; returns a function that times one window of it, in images/s."""
    def window(burst):
        synchronize(protocol.device)
        start = time.perf_counter()
        for passes in itertools.count(burst, burst):
            for _ in range(burst):
                run()
            synchronize(protocol.device)
            seconds = time.perf_counter() - start
            if seconds >= protocol.window_seconds:
                return passes * protocol.batch_size / seconds

    # To read the clock, a GPU must first run out of work: about eight times a window, not after each pass.
    passes_per_second = window(burst=1) / protocol.batch_size
    return functools.partial(window, max(1, int(passes_per_second * protocol.window_seconds / 8)))


def matrix_product(protocol):
    """A product of square matrices in the protocol's precision, as fast as it gets: (a pass, its GMACs)."""
    size = 8192 if protocol.device.type == 'cuda' else 2048
    a = torch.randn(size, size, device=protocol.device, dtype=protocol.amp_dtype)
    out = torch.empty_like(a)
    return functools.partial(torch.mm, a, a.t(), out=out), size ** 3 / 1e9


def time_in_turn(stopwatches, protocols):
    """Time a window of each, then the next of each, and so on; returns a Throughput for each."""
    rounds = [[window() for window in stopwatches] for _ in range(max((p.windows for p in protocols), default=0))]
    return [Throughput(rates, protocol) for rates, protocol in zip(zip(*rounds), protocols)]


def paired_throughput(models, input_size=224, batch_size=16, device=None, amp_dtype=torch.float32, keep_rate=None,
                      windows=5, window_seconds=1., compiled=False, train=False, channels_last=False):
    """Images/s of several models, their windows in turn (A B A B …): what slows the machine down slows all of them.

    Args:
        models: on `device`, in any mode, which they have again afterwards; `train` trains them.
        device: the first model's if None.
        others: see Protocol.
    Returns:
        a Throughput for each model.
    Raises:
        ValueError: an output is not finite, or does not depend on the input.
    """
    device = torch.device(device or next(models[0].parameters()).device)
    protocol = Protocol(input_size, batch_size, device, amp_dtype, keep_rate, windows, window_seconds, compiled,
                        train=train, channels_last=channels_last)
    with eval_mode(*models):
        return time_in_turn([stopwatch(measured_pass(model, protocol), protocol) for model in models],
                            len(models) * [protocol])


def throughput(model, input_size=224, **settings):
    """Images/s of one model, a Throughput; settings as in `paired_throughput`."""
    return paired_throughput([model], input_size, **settings)[0]


def macs(model, input_size=224, keep_rate=None):
    """GMACs (10⁹ multiply–accumulates) of the matrix products and convolutions for one image, attention included."""
    image = torch.zeros(1, 3, input_size, input_size).to(next(model.parameters()))
    # The math kernel shows attention's two products to the counter, which does not know every fused kernel.
    # Gradients are on because the counter follows modules by autograd hooks and fails on parameters without.
    with eval_mode(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        classify(model, image, keep_rate)
    return counter.get_total_flops() / 2e9


def peak_memory(model, protocol):
    """Peak MiB of a measured pass: weights, images, activations, no other model on the GPU; None but on CUDA.

    Of a compiled model, which must not have run yet, compiling and recording are part of it. Resets torch's own peak
    statistics.
    """
    if protocol.device.type != 'cuda':
        return None
    before = torch.cuda.memory_allocated(protocol.device)
    torch.cuda.reset_peak_memory_stats(protocol.device)
    with eval_mode(model):
        measured_pass(model, protocol)()
    allocated = torch.cuda.max_memory_allocated(protocol.device) - before
    return (allocated + sum(t.nbytes for t in itertools.chain(model.parameters(), model.buffers()))) / 2**20


def has_fixed_input_size(name):
    """Whether timm builds the model for one input size, which it must then be told."""
    return timm.get_pretrained_cfg(name).fixed_input_size


class PlainEViT(nn.Module):
    """An EViT written the plain way, to measure it against and to test it by.

    Explicit attention with its (N, N) matrix in every block; where tokens are dropped, they are sorted and gathered.

    Args:
        model: an EViT, whose weights and settings it uses.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, keep_rate=None):
        """Images (B, 3, H, W) → logits (B, num_classes); `keep_rate` as in the model's own forward."""
        model, prefix = self.model, self.model.num_prefix_tokens
        x = model._pos_embed(model.patch_embed(x))                                     # (B, P + N, C)
        for block, rate in zip(model.blocks, model.block_keep_rates(keep_rate)):
            output, attention = self.attend(block.attn, block.norm1(x))
            x = x + block.ls1(output)
            num_tokens = x.shape[1] - prefix
            k = math.ceil(rate * num_tokens)
            if k < num_tokens:
                scores = attention[:, :, 0, prefix:].mean(dim=1)                       # (B, N)
                x = torch.cat([x[:, :prefix], self.reorganize(x[:, prefix:], scores, k, block.fuse_token)], dim=1)
            mlp = block.mlp
            x = x + block.ls2(mlp.fc2(F.gelu(mlp.fc1(block.norm2(x)))))
        return model.forward_head(model.norm(x))

    @staticmethod
    def attend(attn, x):
        """(B, N, C) → output (B, N, C) and attention (B, H, N, N)."""
        B, N, C = x.shape
        q, k, v = attn.qkv(x).reshape(B, N, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        attention = (attn.q_norm(q) @ attn.k_norm(k).transpose(-2, -1) * attn.scale).softmax(dim=-1)
        return attn.proj((attention @ v).transpose(1, 2).reshape(B, N, C)), attention

    @staticmethod
    def reorganize(tokens, scores, k, fuse):
        """(B, N, C) → (B, k [+ 1], C)."""
        order = scores.argsort(dim=1, descending=True)
        tokens = tokens.gather(1, order.unsqueeze(-1).expand_as(tokens))
        if not fuse:
            return tokens[:, :k]
        weights = scores.gather(1, order[:, k:]).unsqueeze(-1)
        return torch.cat([tokens[:, :k], (weights * tokens[:, k:]).sum(dim=1, keepdim=True)], dim=1)


# --- The comparison of models ---------------------------------------------------------------------------------------

class Candidate(NamedTuple):
    """A model to measure: timm's name, the base keep rate of an EViT, pixels a side; None for the model's own."""
    name: str
    keep_rate: float | None = None
    input_size: int | None = None

    def __str__(self):
        return self.name if self.keep_rate is None else f'{self.name}@{self.keep_rate:g}'


class Reported(NamedTuple):
    """Top-1 accuracy on ImageNet-1k, percent, at an input size, trained on ImageNet-1k alone, as the source reports."""
    top1: float
    source: str
    input_size: int = 224


EVIT_SMALL = 'deit_small_patch16_shrink_base'
REPORTED = {
    **{Candidate(EVIT_SMALL, rate): Reported(top1, 'EViT, arXiv:2202.07800') for rate, top1 in (
        (0.5, 78.5), (0.6, 78.9), (0.7, 79.5), (0.8, 79.8), (0.9, 79.8))},                     # fused
    Candidate('deit_base_patch16_224'): Reported(81.8, 'DeiT, arXiv:2012.12877'),
    Candidate('swin_tiny_patch4_window7_224'): Reported(81.3, 'Swin, arXiv:2103.14030'),
    Candidate('swin_small_patch4_window7_224'): Reported(83.0, 'Swin, arXiv:2103.14030'),
    Candidate('tnt_s_patch16_224'): Reported(81.5, 'TNT, arXiv:2103.00112'),
    Candidate('twins_pcpvt_small'): Reported(81.2, 'Twins, arXiv:2104.13840'),
    Candidate('twins_svt_small'): Reported(81.7, 'Twins, arXiv:2104.13840'),
    Candidate('visformer_small'): Reported(82.2, 'Visformer, arXiv:2104.12533'),
    Candidate('cait_xxs24_224'): Reported(77.6, 'CaiT, arXiv:2103.17239'),
    Candidate('coat_lite_small'): Reported(81.9, 'CoaT, arXiv:2104.06399'),
    Candidate('convit_small'): Reported(81.3, 'ConViT, arXiv:2103.10697'),
    Candidate('nfnet_f0'): Reported(83.6, 'NFNet, arXiv:2102.06171', 256),
    Candidate('efficientnet_b0'): Reported(77.1, 'EfficientNet, arXiv:1905.11946'),
    Candidate('efficientnet_b1'): Reported(79.1, 'EfficientNet, arXiv:1905.11946', 240),
    Candidate('efficientnet_b2'): Reported(80.1, 'EfficientNet, arXiv:1905.11946', 260),
    Candidate('pvt_v2_b1'): Reported(78.7, 'PVTv2, arXiv:2106.13797'),
    Candidate('pvt_v2_b2'): Reported(82.0, 'PVTv2, arXiv:2106.13797'),
    Candidate('deit_small_patch16_224'): Reported(79.8, 'DeiT, arXiv:2012.12877'),             # ratios are to the last
}
# The backbones of the paper's Figure 4. We have no reported accuracy of the EViTs at higher resolution.
FIGURE_4 = [Candidate(EVIT_SMALL, 0.8, 256), Candidate('deit_small_patch16_272_shrink'),
            Candidate('deit_small_patch16_288_shrink06'), Candidate('deit_small_patch16_304_shrink05'), *REPORTED]


def reported(candidate, fuse_token):
    """What was reported of a candidate at the size that it is measured at, or None."""
    found = REPORTED.get(candidate._replace(input_size=None))
    fits = found and candidate.input_size in (None, found.input_size) and (fuse_token or candidate.keep_rate is None)
    return found if fits else None


def own_input_size(candidate, fuse_token):
    """Pixels a side at which the accuracy of a candidate was reported, else those that timm gives for it."""
    found = reported(candidate, fuse_token)
    return found.input_size if found else timm.get_pretrained_cfg(candidate.name).input_size[-1]


def build_model(candidate, fuse_token):
    """Create a model with random weights in eval mode; `fuse_token` is for an EViT."""
    name, keep_rate, input_size = candidate
    return timm.create_model(                                                          # which ignores what is None
        name, img_size=input_size if has_fixed_input_size(name) else None, base_keep_rate=keep_rate,
        fuse_token=fuse_token if name in VARIANTS else None).eval()


def largest_batch(model, protocol):
    """The largest power of two of images, at most 4096, that take a quarter of the GPU's memory, found uncompiled.

    A quarter, because the models that are compared are there together, and a compiled one takes more.
    """
    quarter = torch.cuda.get_device_properties(protocol.device).total_memory / 2**20 / 4
    fits = 1
    for batch_size in (2 ** i for i in range(1, 13)):
        try:
            memory = peak_memory(model, dataclasses.replace(protocol, batch_size=batch_size, compiled=False))
        except RuntimeError:                                               # out of memory, or too much for a kernel
            break
        if memory > quarter:
            break
        fits = batch_size
    return fits


def prepare(candidate, protocol, fuse_token, plain=False):
    """Build and warm up a model; returns its stopwatch, and what is known of it without the clock, as a dict."""
    model = build_model(candidate, fuse_token).to(protocol.device, memory_format=protocol.memory_format)
    if plain:
        model = PlainEViT(model).eval()
    if protocol.batch_size is None:
        protocol = dataclasses.replace(protocol, batch_size=largest_batch(model, protocol))
    facts = {'protocol': protocol, 'gmacs': macs(model, protocol.input_size),
             'mparams': sum(p.numel() for p in model.parameters()) / 1e6, 'memory_mib': peak_memory(model, protocol)}
    return stopwatch(measured_pass(model, protocol), protocol), facts


def describe(failure):
    return ' '.join(f'{type(failure).__name__}: {failure}'.split())


def window_or_failure(watch, row):
    """Images/s of a window; NaN where it fails, which the row then tells, so that the others go on."""
    try:
        return watch()
    except FAILURES as failure:
        row['failure'] = describe(failure)
        return math.nan


def planned_rows(candidates, protocol, reference):
    """(candidate, label, protocol, plain) of each row: the models, and with `reference` the plain EViTs too.

    The plain one is measured as the original was, in float32 with gradients on; and if that is not ours, by our
    protocol, but eager.
    """
    for candidate in candidates:
        yield candidate, str(candidate), protocol, False
    alike = dataclasses.replace(protocol, compiled=False)
    original = dataclasses.replace(alike, amp_dtype=torch.float32, gradients=not protocol.train)
    for candidate in candidates if reference else ():
        if candidate.name in VARIANTS:
            label = str(candidate).replace(candidate.name, 'plain')
            yield candidate, f'{label}, {alike.dtype}', alike, True
            if original != alike:
                yield candidate, f'{label}, float32{"" if protocol.train else ", gradients on"}', original, True


def compare(candidates, protocol, fuse_token, reference=False):
    """Measure models in turn.

    Args:
        candidates: a Candidate for each model.
        protocol: where `input_size` is None, each model has its own; where `batch_size` is, the largest that fits.
        reference: measure the plain way of each EViT beside it.
    Returns:
        for each row a dict of what was measured, or without `speed`, but with `failure`. `share` is that of the rate
        of a large matrix product in the protocol's precision, for rows of that precision; a training step counts as
        three passes.
    """
    rows, stopwatches = [], []
    product, product_gmacs = matrix_product(protocol)                      # first, while there is memory for it
    one = dataclasses.replace(protocol, batch_size=1)
    product_watch = functools.partial(window_or_failure, stopwatch(product, one), {})
    for candidate, label, settings, plain in planned_rows(candidates, protocol, reference):
        size = candidate.input_size or settings.input_size or own_input_size(candidate, fuse_token)
        candidate = candidate._replace(input_size=size)
        settings = dataclasses.replace(settings, input_size=size)
        found = reported(candidate, fuse_token)
        rows.append({'model': label, 'protocol': settings, 'input_size': size, 'top1': found and found.top1,
                     'source': found and found.source})
        try:
            watch, facts = prepare(candidate, settings, fuse_token, plain)
        except FAILURES as failure:
            rows[-1]['failure'] = describe(failure)
        else:
            rows[-1].update(facts)
            stopwatches.append(functools.partial(window_or_failure, watch, rows[-1]))
    measured = [row for row in rows if 'failure' not in row]
    *speeds, products = time_in_turn([*stopwatches, product_watch],
                                     [*(row['protocol'] for row in measured), one])
    for row, speed in zip(measured, speeds, strict=True):
        if 'failure' in row:
            continue
        row['speed'] = speed
        if row['protocol'].amp_dtype == protocol.amp_dtype:
            row['share'] = speed.ratio_to(products) * row['gmacs'] * (3 if protocol.train else 1) / product_gmacs
        if 'failure' not in rows[-1]:
            row['ratio'] = speed.ratio_to(speeds[-1])
    return rows


def format_table(rows):
    """The rows of `compare` as lines of text; ratios are to the last model."""
    width = max(len(row['model']) for row in rows)
    yield (f'{"model":{width}} {"input":>5} {"batch":>5} {"images/s [min–max]":>28} {"ratio":>6} {"GMACs":>7} '
           f'{"params/M":>8} {"memory/MiB":>10} {"% of matmul":>11} {"top-1":>5}')
    for row in rows:
        if 'failure' in row:
            yield f'{row["model"]:{width}} failed: {row["failure"]}'
            continue
        ratio = f'{row["ratio"]:.3f}' if 'ratio' in row else '–'
        memory = '–' if row['memory_mib'] is None else f'{row["memory_mib"]:.0f}'
        share = f'{100 * row["share"]:.1f}' if 'share' in row else '–'
        yield (f'{row["model"]:{width}} {row["input_size"]:5} {row["protocol"].batch_size:5} {row["speed"].span:>28} '
               f'{ratio:>6} {row["gmacs"]:7.3f} {row["mparams"]:8.2f} {memory:>10} {share:>11} '
               f'{row["top1"] or "–":>5}')


def write_csv(path, rows):
    """Write the rows of `compare`, each with its protocol, under a header line."""
    columns = ['model', 'input_size', 'median', 'min', 'max', 'ratio', 'gmacs', 'mparams', 'memory_mib', 'share',
               'top1', 'source', 'failure', 'protocol']
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, columns, extrasaction='ignore')                  # of the Throughput, its figures
        writer.writeheader()
        for row in rows:
            speed = row.get('speed')
            figures = {'median': speed.median, 'min': speed.min, 'max': speed.max} if speed else {}
            writer.writerow({**row, **figures})


def label_points(axes, labels):
    """Write each (text, x, y) on the side of its point, above first, where it covers least of what is there already."""
    from matplotlib.transforms import Bbox
    axes.figure.canvas.draw()                                              # only now has everything its place
    taken = [Bbox([pixels - 5, pixels + 5]) for pixels in axes.transData.transform([point for _, *point in labels])]
    if axes.get_legend():
        taken.append(axes.get_legend().get_window_extent())
    for text, *point in labels:
        sides = [axes.annotate(text, point, (6 * x, 6 * y), textcoords='offset points', fontsize=8,
                               ha=('center', 'left', 'right')[x], va=('center', 'bottom', 'top')[y])
                 for x, y in ((0, 1), (1, 0), (-1, 0), (0, -1))]
        boxes = [side.get_window_extent() for side in sides]
        best = min(range(len(sides)), key=lambda i: sum(map(boxes[i].overlaps, taken)))
        taken.append(boxes[best])
        for side in sides[:best] + sides[best + 1:]:
            side.remove()


def plot(path, rows, title):
    """Draw images/s against the top-1 accuracy that was reported, of the rows that have both, as a PNG."""
    import matplotlib                                                                  # nothing else needs it
    matplotlib.use('Agg')
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(9, 7), layout='constrained')
    points = sorted((row['speed'].median, row['top1'], row['model']) for row in rows
                    if 'speed' in row and row['top1'] and not row['model'].startswith('plain'))
    evits = sorted((point for point in points if '@' in point[2]), key=lambda point: point[2])     # by keep rate
    others = [point for point in points if point not in evits]
    for group, line, name in ((evits, 'o-', 'EViT-DeiT-S at keep rates 0.5 to 0.9'), (others, 's', 'other models')):
        if group:
            axes.plot([x for x, _, _ in group], [y for _, y, _ in group], line, label=name)
    axes.set(xscale='log', xlabel='images/s', ylabel='ImageNet top-1, %, as reported by the papers')
    axes.xaxis.set_major_formatter('{x:g}')
    axes.xaxis.set_minor_formatter('{x:g}')
    axes.margins(x=0.15)
    axes.set_title(textwrap.fill(title, 110), fontsize=8)
    axes.grid(alpha=0.3)
    if points:
        axes.legend()
    label_points(axes, [(model.partition('@')[2], x, y) for x, y, model in evits]
                 + [(model.partition('_patch')[0], x, y) for x, y, model in others])
    figure.savefig(path, format='png', dpi=120)
    pyplot.close(figure)


# --- The input pipeline ---------------------------------------------------------------------------------------------

# The training transform of DeiT (Touvron et al., 2021, table 9)
AUGMENTATION = dict(color_jitter=0.4, aa='rand-m9-mstd0.5-inc1', train_interpolation='bicubic')
ERASING = dict(probability=0.25, mode='pixel')


@dataclasses.dataclass(frozen=True)
class LoadingProtocol:
    """How loading is measured; its str() is the line that belongs beside every figure.

    Args:
        input_size, batch_size, device: of the batches; images are square, of input_size pixels a side.
        num_workers: processes where all of them are measured.
        windows, window_seconds: as in Protocol.
    """
    input_size: int
    batch_size: int
    device: torch.device
    num_workers: int
    windows: int
    window_seconds: float

    def __str__(self):
        return (f'batches of {self.batch_size} of {self.input_size}×{self.input_size}, normalised float32 on '
                f"{device_name(self.device)}; DeiT's training transform; torch {torch.__version__}, "
                f'torchvision {torchvision.__version__}, Pillow {PIL.__version__}; median [min–max] of {self.windows} '
                f'windows of at least {self.window_seconds:g} s; a core: one process of one thread; all: '
                f'{self.num_workers} workers')


class Pipeline(NamedTuple):
    """A way from stored images to batches that a model takes.

    Args:
        name: where the images are, which transform they get, and which way they take.
        dataset: of (transformed image, label).
        batches: (dataset, number of workers) → iterator of an epoch's images, normalised float32 (B, 3, S, S), on the
            device.
    """
    name: str
    dataset: Dataset
    batches: Callable

    def endless(self, num_workers=0):
        """The batches of epoch after epoch."""
        while True:
            yield from self.batches(self.dataset, num_workers)


def plain_transform(is_train, input_size):
    """The usual transform, the baseline: every step on the CPU, image by image."""
    if is_train:
        return create_transform(
            input_size, is_training=True, color_jitter=AUGMENTATION['color_jitter'], auto_augment=AUGMENTATION['aa'],
            interpolation=AUGMENTATION['train_interpolation'], re_prob=ERASING['probability'], re_mode=ERASING['mode'])
    return transforms.Compose([
        transforms.Resize(int(256 / 224 * input_size), transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(input_size), transforms.ToTensor(),
        transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)])


def plain_batches(dataset, num_workers, is_train, batch_size, device):
    loader = DataLoader(dataset, batch_size, shuffle=is_train, num_workers=num_workers,
                        pin_memory=device.type == 'cuda')
    return (images.to(device, non_blocking=True) for images, _ in loader)


def our_batches(dataset, num_workers, is_train, batch_size, device):
    """As main.py loads them, and as train_one_epoch erases from them."""
    if not is_train:
        loader = build_loader(dataset, EvalSampler(dataset, 1, 0), batch_size, device, num_workers)
        return (images for images, _ in loader)
    sampler = TrainSampler(dataset, num_replicas=1, rank=0)
    loader = build_loader(SeededDataset(dataset), sampler, batch_size, device, num_workers)
    erase = RandomErasing(**ERASING, device=device)
    return (erase(images) for images, _ in loader)


def pipelines(data_path, is_train, protocol):
    """The pipelines of a split, the plain one first."""
    split = 'train' if is_train else 'val'
    folder, database = Path(data_path, split), Path(data_path, f'{split}.lmdb')
    settings = dict(is_train=is_train, batch_size=protocol.batch_size, device=protocol.device)
    transform = plain_transform(is_train, protocol.input_size)
    if not folder.is_dir() and not database.exists():
        raise InputError(f'--data-path {data_path} has neither {folder.name}/ nor {database.name}')
    if folder.is_dir():
        plain = ImageFolder(folder, transform)
    else:
        plain = ImageFolderLMDB(database, transform)
    yield Pipeline(f'{split}, {type(plain).__name__}, plain', plain, functools.partial(plain_batches, **settings))
    for use_lmdb, fast_resize in itertools.product((False, True), (False, True) if is_train else (False,)):
        if (database if use_lmdb else folder).exists():
            dataset = build_dataset(is_train, argparse.Namespace(
                **AUGMENTATION, data_set='IMNET', data_path=data_path, use_lmdb=use_lmdb, nb_classes=None,
                input_size=protocol.input_size, fast_resize=fast_resize))
            yield Pipeline(f'{split}, {type(dataset).__name__}{", --fast-resize" if fast_resize else ""}', dataset,
                           functools.partial(our_batches, **settings))


def loading_rate(batches, protocol):
    """Images/s of an endless iterator over one window."""
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < protocol.window_seconds:
        images += len(next(batches))
    synchronize(protocol.device)
    return images / (time.perf_counter() - start)


def rate_of_workers(pipeline, protocol):
    """Images/s of one window by the worker processes of this pipeline alone, after what they made in advance."""
    batches = pipeline.endless(protocol.num_workers)
    for _ in range(1 + 2 * protocol.num_workers):
        next(batches)
    rate = loading_rate(batches, protocol)
    batches.close()
    return rate


@contextmanager
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def compare_loading(candidates, protocol):
    """Measure pipelines in turn; → for each its Throughput by one core, and by all workers."""
    iterators = [pipeline.endless() for pipeline in candidates]
    with one_thread():
        for batches in iterators:
            next(batches)
        alone = time_in_turn([functools.partial(loading_rate, batches, protocol) for batches in iterators],
                             len(candidates) * [protocol])
    all_workers = time_in_turn([functools.partial(rate_of_workers, pipeline, protocol) for pipeline in candidates],
                               len(candidates) * [protocol])
    return list(zip(alone, all_workers))


def time_stages(pipeline, num_images=256):
    """Where the time goes: milliseconds an image, from reading to the batch, as a dict of medians of 3 rounds."""
    dataset = pipeline.dataset
    steps, dataset.transform = dataset.transform.transforms, None
    stages = [('read and decode', lambda index: dataset[index][0]), *((type(step).__name__, step) for step in steps)]
    stages.append(('batch', None))
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    times = {name: [] for name, _ in stages}
    for _ in range(3):
        items = order[:num_images]
        for name, stage in stages:
            start = time.perf_counter()
            if stage:
                items = [stage(item) for item in items]
            else:
                deque(pipeline.batches([(item, 0) for item in items], 0), maxlen=0)
            times[name].append(1e3 * (time.perf_counter() - start) / len(items))
    return {name: statistics.median(values) for name, values in times.items()}


def measure_loading(data_path, protocol):
    """Print images/s of the pipelines of both splits, and where the time goes."""
    candidates = [list(pipelines(data_path, is_train, protocol)) for is_train in (True, False)]
    print(protocol, flush=True)
    width = max(len(pipeline.name) for split in candidates for pipeline in split)
    columns = [f'{"images/s of " + part + " [min–max]":>28} {"ratio":>6}' for part in ('a core', 'all')]
    print(f'{"pipeline":{width}}', *columns)
    for split in candidates:
        results = compare_loading(split, protocol)
        for pipeline, speeds in zip(split, results):
            columns = [f'{speed.span:>28} {speed.ratio_to(plain):6.3f}' for speed, plain in zip(speeds, results[0])]
            print(f'{pipeline.name:{width}}', *columns, flush=True)
    print('Milliseconds an image on one core:')
    for pipeline in itertools.chain(*candidates):
        with one_thread():
            times = time_stages(pipeline)
        print(f'{pipeline.name:{width}} {", ".join(f"{name} {time:.2f}" for name, time in times.items())}')


def candidate(text):
    """'NAME', 'NAME@RATE', 'NAME:SIZE' or 'NAME@RATE:SIZE' → Candidate."""
    text, colon, size = text.partition(':')
    name, at, rate = text.partition('@')
    if name not in timm.list_models() + timm.list_pretrained():
        raise argparse.ArgumentTypeError(f'unknown model {name!r}')
    if at and name not in VARIANTS:
        raise argparse.ArgumentTypeError(f'{name} has no keep rate')
    if colon and not (size.isdecimal() and int(size)):
        raise argparse.ArgumentTypeError(f'the input size must be a number of pixels, not {size!r}')
    try:
        keep_rate = float(rate) if at else None
    except ValueError:
        keep_rate = math.nan
    if at and not 0 < keep_rate <= 1:
        raise argparse.ArgumentTypeError(f'the keep rate must be a number in (0, 1], not {rate!r}')
    return Candidate(name, keep_rate, int(size) if colon else None)


def positive(number):
    """An argparse type: a finite int or float above 0."""
    def parse(text):
        value = number(text)
        if not 0 < value < math.inf:
            raise ValueError(text)
        return value

    parse.__name__ = f'positive {number.__name__}'     # argparse's message names it
    return parse


def batch_size(text):
    """A positive number, or None for 'auto'."""
    return None if text == 'auto' else positive(int)(text)


def patch_size(name):
    """(height, width) of the patches that a model cuts a fixed input into, (1, 1) where timm does not tell."""
    if not has_fixed_input_size(name):
        return 1, 1
    with torch.device('meta'):                         # the structure alone
        patch_embed = getattr(timm.create_model(name), 'patch_embed', None)
    return to_2tuple(getattr(patch_embed, 'patch_size', 1))


def parse_args(argv=None):
    parser = ArgumentParser(description='Throughput, MACs, parameters and peak memory of models, in turn; or images/s '
                                        'of the input pipeline.')
    what = parser.add_mutually_exclusive_group()
    what.add_argument('--models', nargs='+', type=candidate, metavar='NAME[@RATE][:SIZE]', default=FIGURE_4,
                      help='timm names, those of models_evit.py included; @RATE sets the base keep rate of an EViT, '
                           ":SIZE the input size; without, the models of the paper's Figure 4")
    what.add_argument('--loader', action='store_true', help='measure the input pipeline on the images of --data-path')
    parser.add_argument('--data-path', help='folder of train/ and val/, or of train.lmdb and val.lmdb, or of both')
    parser.add_argument('--num-workers', type=positive(int), default=min(10, os.cpu_count()),
                        help='processes that load images (default: %(default)s)')
    parser.add_argument('--input-size', type=positive(int),
                        help="pixels, for all models; without, each model's own, and 224 for --loader")
    parser.add_argument('--batch-size', type=batch_size, default=16,
                        help='a number, or auto: the largest power of two that takes a quarter of the GPU\'s memory')
    parser.add_argument('--device', choices=['auto', 'cpu', 'cuda'], default='auto')
    parser.add_argument('--amp-dtype', choices=['float32', 'bfloat16', 'float16'], default='float32')
    parser.add_argument('--fuse-token', action=argparse.BooleanOptionalAction, default=True,
                        help='let an EViT fuse the tokens that it does not keep')
    parser.add_argument('--compile', action='store_true', help='measure compiled models')
    parser.add_argument('--channels-last', action='store_true', help='lay images and weights out pixel by pixel')
    parser.add_argument('--train', action='store_true', help='measure a whole training step')
    parser.add_argument('--reference', action='store_true',
                        help='measure beside each EViT one that is written the plain way')
    parser.add_argument('--windows', type=positive(int), default=5)
    parser.add_argument('--window-seconds', type=positive(float), default=1.)
    parser.add_argument('--csv', type=Path, metavar='FILE', help='write the table there')
    parser.add_argument('--plot', type=Path, metavar='FILE.png', help='draw images/s against reported accuracy there')
    args = parser.parse_args(argv)
    if args.loader != (args.data_path is not None):
        parser.error('--loader needs --data-path, and --data-path needs --loader')
    if args.loader and (args.csv or args.plot or args.batch_size is None or args.compile or args.train
                        or args.reference or args.channels_last or args.amp_dtype != 'float32'):
        parser.error('--csv, --plot, --batch-size auto, --compile, --train, --reference, --channels-last and '
                     '--amp-dtype go with --models')
    for model in () if args.loader else args.models:
        size = args.input_size or model.input_size
        if size and any(size % side for side in patch_size(model.name)):
            parser.error(f'the input size {size} is no multiple of the patch size {patch_size(model.name)} '
                         f'of {model.name}')
    if args.device == 'auto':
        args.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('no CUDA device is available')
    if args.device == 'cpu' and args.batch_size is None:
        parser.error('--batch-size auto fills the memory of a GPU; on a CPU, give a number')
    for file in (args.csv, args.plot):
        if file and not file.parent.is_dir():
            parser.error(f'there is no folder {file.parent}')
    if args.plot and not importlib.util.find_spec('matplotlib'):
        parser.error('--plot needs matplotlib: pip install matplotlib')
    return args


def main(argv=None):
    """The program → its exit status, 1 where a model failed."""
    args = parse_args(argv)
    device = torch.device(args.device)
    allow_fast_kernels(device)
    if args.loader:
        measure_loading(args.data_path, LoadingProtocol(args.input_size or 224, args.batch_size, device,
                                                        args.num_workers, args.windows, args.window_seconds))
        return 0
    candidates = [model._replace(input_size=args.input_size or model.input_size) for model in args.models]
    protocol = Protocol(args.input_size, args.batch_size, device, getattr(torch, args.amp_dtype), None, args.windows,
                        args.window_seconds, args.compile, train=args.train, channels_last=args.channels_last)
    title = f'{protocol}; EViT with other tokens {"fused" if args.fuse_token else "dropped"}'
    print(title, flush=True)
    rows = compare(candidates, protocol, args.fuse_token, args.reference)
    print(*format_table(rows), sep='\n')
    if args.csv:
        write_csv(args.csv, rows)
    if args.plot:
        plot(args.plot, rows, title)
    return int(any('failure' in row for row in rows))


if __name__ == '__main__':
    try:
        sys.exit(main())
    except (InputError, OSError) as error:
        ArgumentParser().error(one_line(error))
