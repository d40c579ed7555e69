"""Throughput, MACs, peak memory of a model, each measured by a stated protocol.

    speed = throughput(model, input_size=224, batch_size=256, device='cuda', amp_dtype=torch.bfloat16)
    print(speed)                                  # one line: the figures, then how they were measured
    ours, theirs = paired_throughput([a, b])      # windows in turn
    ours.ratio_to(theirs)                         # therefore valid on a machine whose speed varies
    macs(model), peak_memory(model, speed.protocol)

The model is any timm model. `speed_test.py` compares several from the command line.
"""
import argparse
import copy
import dataclasses
import functools
import itertools
import platform
import statistics
import time

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from evit.eval_mode import eval_mode
from runtime.arguments import positive
from runtime.compiled_model import CompiledModel, check_compiler
from runtime.distributed import log, rank
from runtime.logger import append_line, make_output_folder
from runtime.utils import autocast

# --- The protocol ---------------------------------------------------------------------------------------------------

def add_protocol_arguments(parser):
    """Add the flags that every measuring program has: --device, a torch.device, --windows, --window-seconds."""
    parser.add_argument('--device', type=available_device, metavar='{auto,cpu,cuda}', default='auto',
                        help='default: cuda if available')
    parser.add_argument('--windows', type=positive(int), default=5,
                        help='number of timed windows; the median is reported (default: %(default)s)')
    parser.add_argument('--window-seconds', type=positive(float), default=1.,
                        help='minimum duration of a window (default: %(default)s)')


def available_device(name):
    """An argparse type: 'auto', 'cpu' or 'cuda' → torch.device."""
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    if name not in ('cpu', 'cuda'):
        raise argparse.ArgumentTypeError(f'must be auto, cpu or cuda, not {name}')
    if name == 'cuda' and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError('no CUDA device is available')
    return torch.device(name)


def device_name(device):
    """Name of a torch.device for people: the GPU's, or the CPU's architecture with its number of threads."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)'


def synchronize(device):
    """Wait until a GPU has finished its work."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What is measured and how; its str() is the line to print beside every figure.

    Args:
        input_size: height and width of the images in pixels; None for each model's own.
        batch_size: images per batch; None for the largest that fits.
        device: torch.device of the models.
        amp_dtype: precision of autocast; torch.float32 for none.
        keep_rate: passed to the model unless None.
        windows: number of timed windows.
        window_seconds: minimum duration of a window, and of the warm-up before the first.
        compiled: use torch.compile, as one graph. In inference, the weights are constants on a CPU, and a GPU replays
            a CUDA graph.
        gradients: record what a backward pass needs instead of running in inference mode.
        train: measure a whole training step in train mode: forward, backward, AdamW, moving average of the weights.
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
    def precision(self):
        """The precision in words."""
        name = str(self.amp_dtype).removeprefix('torch.')
        if self.amp_dtype != torch.float32:
            return f'{name} autocast'
        tf32 = self.device.type == 'cuda' and torch.get_float32_matmul_precision() != 'highest'
        return f'{name} (TF32 products)' if tf32 else name

    def __str__(self):
        keep_rate = '' if self.keep_rate is None else f', keep rate {self.keep_rate}'
        mode = 'eval mode with gradients' if self.gradients else 'inference mode, eval mode'
        if self.train:
            mode = 'whole training steps (forward, backward, AdamW, EMA)'
        layout = ', channels last' if self.channels_last else ''
        size = "each model's own input size" if self.input_size is None else f'{self.input_size}×{self.input_size}'
        return (f'batch {self.batch_size or "as large as fits"} of {size}, {self.precision}{keep_rate}{layout}, '
                f'{"compiled" if self.compiled else "eager"}, {device_name(self.device)}, torch {torch.__version__}; '
                f'{mode}, after warm-up, synchronised, median [min–max] of {self.windows} windows of at least '
                f'{self.window_seconds:g} s')

    def images(self, seed=0):
        """A random batch (B, 3, S, S); the random state of the process does not change."""
        generator = torch.Generator(self.device).manual_seed(seed)
        shape = self.batch_size, 3, self.input_size, self.input_size
        return torch.randn(shape, generator=generator, device=self.device).contiguous(memory_format=self.memory_format)


# --- What is measured -----------------------------------------------------------------------------------------------

def classify(model, images, keep_rate=None):
    """Images (B, 3, H, W) → logits (B, num_classes); `keep_rate` is passed only if it is not None."""
    return model(images) if keep_rate is None else model(images, keep_rate=keep_rate)


def forward(model, images, protocol):
    """A pass of a model in eval mode → logits. It enters autocast once per batch, as an evaluation does."""
    with torch.inference_mode(not protocol.gradients), autocast(protocol.device, protocol.amp_dtype):
        return classify(model, images, protocol.keep_rate)


def compile_forward(model, images, protocol):
    """The model compiled as one graph, for `forward` of these images.

    Without gradients, a GPU replays it as a CUDA graph that reads the images where they are, as an eager model does,
    instead of copying them at each replay.
    """
    check_compiler(protocol.device)
    if protocol.device.type == 'cpu':
        model = copy.deepcopy(model)                   # freezing makes constants of its weights
    replay = protocol.device.type == 'cuda' and not protocol.gradients
    if replay:                                         # on a CPU, freezing would make a constant of the images, too
        torch._dynamo.mark_static_address(images)
    return torch.compile(model, fullgraph=True, dynamic=False, mode='reduce-overhead' if replay else None)


class TrainingStep:
    """A callable that trains a model by one step, always on the same batch.

    Args:
        model: put into train mode.
        images: the batch (B, 3, S, S).
        protocol: a Protocol.
    Attributes:
        model_ema: timm's moving average of the weights.
    """

    def __init__(self, model, images, protocol):
        model.zero_grad()
        self.model, self.images, self.protocol = model, images, protocol
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.05, fused=True)
        self.scaler = torch.amp.GradScaler(protocol.device.type, enabled=protocol.amp_dtype == torch.float16)
        self.model_ema = ModelEmaV3(model, decay=0.99996)
        with torch.no_grad(), eval_mode(model):
            num_classes = classify(model, images[:1], protocol.keep_rate).shape[1]
        self.labels = torch.arange(protocol.batch_size, device=protocol.device) % num_classes
        model.train()
        self.trained = CompiledModel(model, protocol.device) if protocol.compiled else model

    def __call__(self):
        with autocast(self.protocol.device, self.protocol.amp_dtype):
            loss = F.cross_entropy(classify(self.trained, self.images, self.protocol.keep_rate), self.labels)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.model_ema.update(self.model)


def check_real(model, images, protocol):
    """Raise ValueError unless the logits are finite and depend on the images, which hold `protocol.images()` then."""
    def logits(seed):
        images.copy_(protocol.images(seed))            # in place, because a CUDA graph reads one address
        return forward(model, images, protocol).clone().detach()

    with eval_mode(model):
        first, second = logits(1), logits(0)
    if not first.isfinite().all():
        raise ValueError('the output is not finite')
    if torch.equal(first, second):                     # a head that starts at zero hides the features
        with torch.inference_mode(), eval_mode(model):
            if not zero_heads(model) or torch.equal(*(model.forward_features(protocol.images(seed)) for seed in (1, 0))):
                raise ValueError('the output does not depend on the input')


def zero_heads(model):
    """The classifiers of a timm model, if all their weights are zero, as some models start."""
    heads = getattr(model, 'get_classifier', tuple)()
    heads = heads if isinstance(heads, tuple) else (heads,)
    return [] if any(value.any() for head in heads for value in head.parameters()) else [*heads]


def measured_pass(model, images, protocol):
    """A function without arguments that runs what the protocol measures once.

    The model is checked before, and compiled if the protocol says so.

    Args:
        model: any timm model.
        images: `protocol.images()`, which other measured models may share.
        protocol: a Protocol.
    Raises:
        ValueError: the output is not finite, or does not depend on the input.
        InputError: torch.compile lacks a C++ compiler.
    """
    # All models of a class share torch's table of graphs, and each needs its own entry
    with (torch._dynamo.config.patch(recompile_limit=1000),
          torch._inductor.config.patch(freezing=protocol.device.type == 'cpu')):
        if protocol.train:
            check_real(model, images, protocol)
            step = TrainingStep(model, images, protocol)
            step()                                     # compiles
            return step
        model = compile_forward(model, images, protocol) if protocol.compiled else model
        check_real(model, images, protocol)            # compiles
    return functools.partial(forward, model, images, protocol)


def matrix_product(protocol):
    """A product of large square matrices in the protocol's precision: (function that computes it, its GMACs)."""
    size = 8192 if protocol.device.type == 'cuda' else 2048
    a = torch.randn(size, size, device=protocol.device, dtype=protocol.amp_dtype)
    out = torch.empty_like(a)
    return functools.partial(torch.mm, a, a.t(), out=out), size ** 3 / 1e9


# --- Time -----------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Throughput:
    """Images/s of a model in each window, with the protocol of the measurement."""
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
        """Median over pairs of windows of this rate over that of `other`, which was measured in turn with this one."""
        return statistics.median(a / b for a, b in zip(self.rates, other.rates, strict=True))

    @property
    def span(self):
        return f'{self.median:.1f} [{self.min:.1f}–{self.max:.1f}]'

    def __str__(self):
        return f'{self.span} images/s; {self.protocol}'


def stopwatch(run, protocol):
    """Warm up `run`, a function that processes one batch; return a function that times one window, in images/s."""
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

    # Reading the clock idles a GPU, so do it about eight times per window, not after each pass
    passes_per_second = window(burst=1) / protocol.batch_size
    return functools.partial(window, max(1, int(passes_per_second * protocol.window_seconds / 8)))


def time_in_turn(stopwatches, protocols):
    """Time a window of each stopwatch, then the next of each (A B A B …); return a Throughput for each."""
    rounds = [[window() for window in stopwatches] for _ in range(max((p.windows for p in protocols), default=0))]
    return [Throughput(rates, protocol) for rates, protocol in zip(zip(*rounds), protocols)]


def paired_throughput(models, input_size=224, batch_size=16, device=None, amp_dtype=torch.float32, keep_rate=None,
                      windows=5, window_seconds=1., compiled=False, train=False, channels_last=False):
    """Images/s of several models, with windows in turn, so that a change of the machine's speed affects all alike.

    Args:
        models: on `device`. Their modes are restored afterwards; `train` changes their weights.
        device: the first model's if None.
        others: see Protocol.
    Returns:
        a list with a Throughput for each model.
    Raises:
        ValueError: an output is not finite, or does not depend on the input.
        InputError: torch.compile lacks a C++ compiler.
    """
    device = torch.device(device or next(models[0].parameters()).device)
    protocol = Protocol(input_size, batch_size, device, amp_dtype, keep_rate, windows, window_seconds, compiled,
                        train=train, channels_last=channels_last)
    images = protocol.images()
    with eval_mode(*models):
        return time_in_turn([stopwatch(measured_pass(model, images, protocol), protocol) for model in models],
                            len(models) * [protocol])


def throughput(model, input_size=224, **settings):
    """Images/s of one model, as a Throughput; settings, errors as in `paired_throughput`."""
    return paired_throughput([model], input_size, **settings)[0]


# --- Computation, memory --------------------------------------------------------------------------------------------

def macs(model, input_size=224, keep_rate=None):
    """GMACs (10⁹ multiply–accumulates) per image of all matrix products and convolutions, attention included.

    Args:
        model: any timm model. Its modes are restored afterwards.
        input_size: height and width of the image in pixels.
        keep_rate: passed to the model unless None.
    """
    image = torch.zeros(1, 3, input_size, input_size).to(next(model.parameters()))
    # The counter does not know every fused kernel of attention; the math kernel shows it two products.
    # It follows modules by autograd hooks and fails on parameters without gradients.
    with eval_mode(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        classify(model, image, keep_rate)
    return counter.get_total_flops() / 2e9


def report_speed(name, model, input_size, output_dir=None, **settings):
    """Print images/s and GMACs of a model, and write them to speed_macs.txt and log.txt in the output folder.

    The arguments are those of `throughput`, and the model's name.
    """
    speed, gmacs = throughput(model, input_size, **settings), macs(model, input_size)
    report = f'{name}: {speed}\n{name}: {gmacs:.3f} GMACs an image'
    log(report)
    if output_dir and rank() == 0:
        folder = make_output_folder(output_dir)
        (folder / 'speed_macs.txt').write_text(report + '\n', encoding='utf-8')
        append_line(folder / 'log.txt', {'speed_images_per_second': speed.median, 'speed_gmacs': gmacs})


def peak_memory(model, protocol):
    """Peak GPU memory of a measured pass in MiB: weights, images, activations, without other models; None on a CPU.

    For a compiled model, which must not have run before, it includes compilation and the recording of the CUDA graph.
    Resets torch's peak statistics.
    """
    if protocol.device.type != 'cuda':
        return None
    before = torch.cuda.memory_allocated(protocol.device)
    torch.cuda.reset_peak_memory_stats(protocol.device)
    with eval_mode(model):
        measured_pass(model, protocol.images(), protocol)()
    allocated = torch.cuda.max_memory_allocated(protocol.device) - before
    return (allocated + sum(t.nbytes for t in itertools.chain(model.parameters(), model.buffers()))) / 2**20


def largest_batch(model, protocol):
    """The largest power of two, at most 4096, of images that take a quarter of the GPU's memory in eager mode.

    It is a quarter because all compared models are in memory together, and compiled ones need more.
    """
    quarter = torch.cuda.get_device_properties(protocol.device).total_memory / 2**20 / 4
    fits = 1
    for batch_size in (2 ** i for i in range(1, 13)):
        try:
            memory = peak_memory(model, dataclasses.replace(protocol, batch_size=batch_size, compiled=False))
        except RuntimeError:                           # out of memory, or too large for a kernel
            break
        if memory > quarter:
            break
        fits = batch_size
    return fits
