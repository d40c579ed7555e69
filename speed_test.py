"""Comparison of backbones in one process: images/s, MACs, parameters, peak memory, a row for each model.

    python speed_test.py --models deit_small_patch16_shrink_base@0.7 deit_small_patch16_224

Without --models, it compares the backbones of the paper's Figure 4. Models are timed in turn, so that the ratios hold
on a machine whose speed varies. `measuring/benchmark.py` measures a model from Python.
"""
if __name__ == '__main__':                             # before the imports, which take seconds: see `start`
    from runtime.program import start
    start('speed_test')

import argparse
import csv
import dataclasses
import functools
import importlib.util
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from timm.layers import to_2tuple

from evit.plain import PlainEViT
from evit.reorganization import WAYS
from evit.settings import TokenSettings
from export import InRuntime
from measuring.benchmark import throughput             # noqa: F401, for code that imports it from here
from measuring.benchmark import (Protocol, add_protocol_arguments, largest_batch, macs, matrix_product, measured_pass,
                                 peak_memory, stopwatch, time_in_turn, zero_heads)
from measuring.plots import plot_throughput
from measuring.profile import profile_pass
from models_evit import VARIANTS, obstacle
from runtime.arguments import ArgumentParser, keep_rate, positive, timm_model
from runtime.attention_priority import flash_first
from runtime.failures import run_program
from runtime.model_factory import create_model
from runtime.utils import InputError, choose_kernels

RUNTIMES = {'torch': None, 'compile': None, 'onnxruntime': 'onnx', 'aoti': 'aoti'}         # and formats of export.py
# How torch and timm refuse a model or an input; out of memory is a RuntimeError
FAILURES = (AssertionError, InputError, RuntimeError, TypeError, ValueError)


# --- Candidates -----------------------------------------------------------------------------------------------------

class Candidate(NamedTuple):
    """A model by timm's name, with its base keep rate (EViTs only), input size in pixels; None for the model's own.

    `way` is one of WAYS, None for that of --fuse-token.
    """
    name: str
    keep_rate: float | None = None
    input_size: int | None = None
    way: str | None = None

    def __str__(self):
        rate = '' if self.keep_rate is None else f'@{self.keep_rate:g}'
        return self.name + rate + (f'-{self.way}' if self.way else '')

    def way_or(self, fuse_token):
        """The way, or that of --fuse-token."""
        return self.way or ('fuse' if fuse_token else 'drop')


EVIT_SMALL = 'deit_small_patch16_shrink_base'
# The backbones of the paper's Figure 4, with the weights of which we have an accuracy. Ratios are to the last one.
FIGURE_4 = [
    Candidate(EVIT_SMALL, 0.8, 256), Candidate('deit_small_patch16_272_shrink'),
    Candidate('deit_small_patch16_288_shrink06'), Candidate('deit_small_patch16_304_shrink05'),
    *(Candidate(EVIT_SMALL, keep_rate) for keep_rate in (0.5, 0.6, 0.7, 0.8, 0.9)),
    Candidate('deit_base_patch16_224'), Candidate('swin_tiny_patch4_window7_224'),
    Candidate('swin_small_patch4_window7_224.ms_in1k'), Candidate('tnt_s_patch16_224'), Candidate('twins_pcpvt_small'),
    Candidate('twins_svt_small'), Candidate('visformer_small'), Candidate('cait_xxs24_224'),
    Candidate('coat_lite_small'), Candidate('convit_small'), Candidate('dm_nfnet_f0', None, 256),
    Candidate('efficientnet_b0'), Candidate('tf_efficientnet_b1.aa_in1k', None, 240),
    Candidate('tf_efficientnet_b2.aa_in1k', None, 260),
    Candidate('pvt_v2_b1'), Candidate('pvt_v2_b2'), Candidate('deit_small_patch16_224'),
]


def fixed_patch_size(name):
    """(height, width) of the patches of a model with a fixed input size, (1, 1) for other models."""
    if not timm.get_pretrained_cfg(name).fixed_input_size:
        return 1, 1
    with torch.device('meta'):                         # without weights
        patch_embed = getattr(timm.create_model(name), 'patch_embed', None)
    return to_2tuple(getattr(patch_embed, 'patch_size', 1))


def build_candidate(candidate, fuse_token):
    """Create a candidate with random weights in eval mode; `fuse_token` is for an EViT of no `way`."""
    name, keep_rate, input_size, _ = candidate
    if keep_rate is None and name in VARIANTS:
        keep_rate = VARIANTS[name].keep_rate
    tokens = None if keep_rate is None else TokenSettings(keep_rate, way=candidate.way_or(fuse_token))
    model = create_model(name, input_size=input_size, tokens=tokens).eval()
    for head in zero_heads(model):                     # the output would not show whether a runtime works
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter)
    return model


@functools.cache
def read_accuracies():
    """imagenet_top1.csv as {(weights, input size): (top-1 accuracy on the ImageNet-1k validation set in %, source)}.

    For the source timm, one program measured all models (results/results-imagenet.csv, August 2026). The figures of
    EViT are its authors'.
    """
    with open(Path(__file__).parent / 'measuring' / 'imagenet_top1.csv', newline='', encoding='utf-8') as file:
        return {(row['model'], int(row['img_size'])): (float(row['top1']), row['source'])
                for row in csv.DictReader(file)}


def published_accuracy(candidate, fuse_token):
    """(top-1 in %, source) of a candidate with timm's default weights at its input size, or (None, None)."""
    if candidate.name == EVIT_SMALL:
        weights = f'EViT-DeiT-S/{candidate.keep_rate} {WAYS[candidate.way_or(fuse_token)].participle}'
    elif candidate.keep_rate is not None:
        return None, None
    else:
        cfg = timm.get_pretrained_cfg(candidate.name)
        weights = f'{cfg.architecture}.{cfg.tag}'
    return read_accuracies().get((weights, candidate.input_size), (None, None))


# --- Measurement ----------------------------------------------------------------------------------------------------

class PlannedRow(NamedTuple):
    """What to measure for a row of the table: a candidate with its input size, or the PlainEViT made from it."""
    candidate: Candidate
    label: str
    protocol: Protocol
    plain: bool
    runtime: str = 'torch'


def planned_rows(candidates, protocol, reference, runtimes=None):
    """The PlannedRows of a comparison: the candidates in each runtime, then with `reference` the plain EViTs.

    A plain EViT is measured eagerly, by the same protocol otherwise; then, if that differs, as the original code was
    measured, in float32 with gradients.
    """
    rows = [(candidate, str(candidate), protocol, False) for candidate in candidates if not runtimes]
    rows += [(candidate, f'{candidate}, {runtime}', dataclasses.replace(protocol, compiled=runtime == 'compile'), False,
              runtime) for candidate in candidates for runtime in runtimes or ()]
    eager = dataclasses.replace(protocol, compiled=False)
    original = dataclasses.replace(eager, amp_dtype=torch.float32, gradients=not protocol.train)
    for candidate in candidates if reference else ():
        if candidate.name in VARIANTS:                 # which a PlainEViT can
            label = str(candidate).replace(candidate.name, 'plain')
            rows.append((candidate, f'{label}, {eager.precision}', eager, True))
            if original != eager:
                mode = '' if protocol.train else ', gradients on'
                rows.append((candidate, f'{label}, float32{mode}', original, True))
    for candidate, label, settings, *rest in rows:
        size = candidate.input_size or protocol.input_size or timm.get_pretrained_cfg(candidate.name).input_size[-1]
        settings = dataclasses.replace(settings, input_size=size)
        yield PlannedRow(candidate._replace(input_size=size), label, settings, *rest)


def prepare(planned, fuse_token, batches, profile=None):
    """Build and warm up a model; return its stopwatch, and what does not depend on time as a dict.

    `batches` holds the images of the models before, {(input size, batch size): (B, 3, S, S)}, for this one to share.
    The kernels of a pass are appended to the file `profile`.
    """
    protocol = planned.protocol
    model = build_candidate(planned.candidate, fuse_token).to(protocol.device, memory_format=protocol.memory_format)
    if planned.plain:
        model = PlainEViT(model).eval()
    if protocol.batch_size is None:
        protocol = dataclasses.replace(protocol, batch_size=largest_batch(model, protocol))
    facts = {'protocol': protocol, 'gmacs': macs(model, protocol.input_size),
             'mparams': sum(p.numel() for p in model.parameters()) / 1e6, 'memory_mib': peak_memory(model, protocol)}
    shape = protocol.input_size, protocol.batch_size
    if shape not in batches:
        batches[shape] = protocol.images()
    if RUNTIMES[planned.runtime]:
        model = InRuntime(model, RUNTIMES[planned.runtime], batches[shape], protocol.amp_dtype)
    run = measured_pass(model, batches[shape], protocol)
    if profile:
        with open(profile, 'a') as file:
            file.write(f'{planned.label}: {profile_pass(run, protocol)}\n')
    return stopwatch(run, protocol), facts


def failure_line(error):
    """Type and message of an exception, as one line."""
    return ' '.join(f'{type(error).__name__}: {error}'.split())


def window_or_failure(watch, row):
    """Images/s of a window. If it fails, NaN; the row then gets a `failure`, and the other models go on."""
    try:
        return watch()
    except FAILURES as error:
        row['failure'] = failure_line(error)
        return math.nan


def compare(candidates, protocol, fuse_token, reference=False, runtimes=None, profile=None):
    """Measure models in turn.

    Args:
        candidates: a list of Candidate.
        protocol: an `input_size` of None means each model's own; a `batch_size` of None means the largest that fits.
        fuse_token: whether EViTs of no `way` fuse the tokens that they do not keep.
        reference: also measure a PlainEViT for each EViT.
        runtimes: names of RUNTIMES, each of which runs all models; None for that of the protocol.
        profile: file to which the kernels of each model are written.
    Returns:
        a list of rows, dicts with `model`, `input_size`, `protocol`, `top1` (percent or None), `source`, and either
        `failure` or `speed` (Throughput), `gmacs` per image, `mparams` (10⁶), `memory_mib` (None on a CPU), `ratio` and
        `share` as in `add_ratios`.
    """
    rows, stopwatches, batches = [], [], {}
    product, product_gmacs = matrix_product(protocol)  # first, while there is memory for it
    one_product = dataclasses.replace(protocol, batch_size=1)
    product_watch = functools.partial(window_or_failure, stopwatch(product, one_product), {})
    for planned in planned_rows(candidates, protocol, reference, runtimes):
        top1, source = published_accuracy(planned.candidate, fuse_token)
        row = {'model': planned.label, 'protocol': planned.protocol, 'input_size': planned.candidate.input_size,
               'top1': top1, 'source': source}
        rows.append(row)
        try:
            watch, facts = prepare(planned, fuse_token, batches, profile)
        except FAILURES as error:
            row['failure'] = failure_line(error)
        else:
            row.update(facts)
            stopwatches.append(functools.partial(window_or_failure, watch, row))
    timed = [row for row in rows if 'failure' not in row]
    *speeds, product_speed = time_in_turn([*stopwatches, product_watch],
                                          [*(row['protocol'] for row in timed), one_product])
    for row, speed in zip(timed, speeds, strict=True):
        if 'failure' not in row:
            row['speed'] = speed
    add_ratios(rows, product_speed, product_gmacs)
    return rows


def add_ratios(rows, product_speed, product_gmacs):
    """Add `ratio` and `share` to the rows that have a `speed`.

    `ratio` is the speed relative to that of the last row, if that did not fail. `share` is the rate of
    multiply–accumulates relative to that of a large matrix product, for rows of its precision; a training step counts
    as three passes.
    """
    last = rows[-1].get('speed')
    for row in [row for row in rows if 'speed' in row]:
        if last:
            row['ratio'] = row['speed'].ratio_to(last)
        if row['protocol'].amp_dtype == product_speed.protocol.amp_dtype:
            passes = 3 if row['protocol'].train else 1
            row['share'] = row['speed'].ratio_to(product_speed) * row['gmacs'] * passes / product_gmacs


# --- Output ---------------------------------------------------------------------------------------------------------

def format_table(rows):
    """The rows of `compare` → lines of text."""
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
        top1 = f'{row["top1"]:.1f}' if row['top1'] else '–'
        yield (f'{row["model"]:{width}} {row["input_size"]:5} {row["protocol"].batch_size:5} {row["speed"].span:>28} '
               f'{ratio:>6} {row["gmacs"]:7.3f} {row["mparams"]:8.2f} {memory:>10} {share:>11} {top1:>5}')


def write_csv(path, rows):
    """Write the rows of `compare`, each with its protocol, under a header line."""
    columns = ['model', 'input_size', 'median', 'min', 'max', 'ratio', 'gmacs', 'mparams', 'memory_mib', 'share',
               'top1', 'source', 'failure', 'protocol']
    with open(path, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, columns, extrasaction='ignore')
        writer.writeheader()
        for row in rows:
            speed = row.get('speed')
            figures = {'median': speed.median, 'min': speed.min, 'max': speed.max} if speed else {}
            writer.writerow({**row, **figures})


# --- Command line ---------------------------------------------------------------------------------------------------

def parse_candidate(text):
    """An argparse type: 'NAME[@RATE[-WAY]][:SIZE]' → Candidate."""
    base, colon, size = text.partition(':')
    name, at, rate = base.partition('@')
    rate, way = re.fullmatch('(.*?)(?:-([a-z_]+))?', rate).groups()
    name = timm_model(name)
    if at and name not in VARIANTS:
        with torch.device('meta'):                     # without weights
            reason = obstacle(timm.create_model(name))
        if reason:
            raise argparse.ArgumentTypeError(f'{name} has no keep rate: {reason}')
    try:
        if way not in (None, *WAYS):
            raise ValueError
        return Candidate(name, keep_rate(rate) if at else None, positive(int)(size) if colon else None, way)
    except (argparse.ArgumentTypeError, ValueError):
        raise argparse.ArgumentTypeError(f'{text}: RATE must be in (0, 1], WAY one of {", ".join(WAYS)}, SIZE a number '
                                         'of pixels') from None


def number_or_auto(text):
    """An argparse type: a positive integer, or None for 'auto'."""
    return None if text == 'auto' else positive(int)(text)


def parse_args(argv=None):
    parser = ArgumentParser(description='Compare throughput, MACs, parameters and peak memory of models.',
                            epilog='With --loader, all other flags go to loader_benchmark.py.')
    parser.add_argument('--models', nargs='+', type=parse_candidate, metavar='NAME[@RATE[-WAY]][:SIZE]',
                        default=FIGURE_4,
                        help='timm models, or those of models_evit.py; RATE: base keep rate, which makes an EViT of '
                             'the model; WAY: drop, fuse or merge the other tokens (default: by --fuse-token); SIZE: '
                             "input size in pixels (default: the models of the paper's Figure 4)")
    parser.add_argument('--input-size', type=positive(int),
                        help='height and width of the images in pixels, for all models (default: each its own)')
    parser.add_argument('--batch-size', type=number_or_auto, default=16,
                        help="images per batch, or auto: the largest power of two that fits a quarter of the GPU's "
                             'memory (default: %(default)s)')
    add_protocol_arguments(parser)
    parser.add_argument('--amp-dtype', choices=['float32', 'bfloat16', 'float16'], default='float32',
                        help='precision of autocast; float32 disables it (default: %(default)s)')
    parser.add_argument('--fuse-token', action=argparse.BooleanOptionalAction, default=True,
                        help='fuse the tokens that an EViT does not keep (default), or drop them')
    parser.add_argument('--compile', action='store_true', help='compile the models')
    parser.add_argument('--runtimes', nargs='+', choices=RUNTIMES, help='run each model in all of these; onnxruntime '
                        'and aoti run files as export.py writes them, with weights of --amp-dtype')
    parser.add_argument('--channels-last', action='store_true', help='channels-last memory format')
    parser.add_argument('--train', action='store_true', help='measure whole training steps')
    parser.add_argument('--reference', action='store_true', help='also measure an EViT written the plain way')
    parser.add_argument('--profile', type=Path, metavar='FILE', help='write the kernels of a pass of each model')
    parser.add_argument('--csv', type=Path, metavar='FILE', help='write the table as CSV')
    parser.add_argument('--plot', type=Path, metavar='FILE.png', help='plot images/s against published accuracy')
    args = parser.parse_args(argv)
    for model in args.models:
        size = args.input_size or model.input_size
        if size and any(size % side for side in fixed_patch_size(model.name)):
            parser.error(f'{size} is not a multiple of the patch size {fixed_patch_size(model.name)} of {model.name}')
    if args.device.type == 'cpu' and args.batch_size is None:
        parser.error('--batch-size auto fills the memory of a GPU; on a CPU, give a number')
    if args.runtimes and (args.train or args.compile or args.device.type != 'cpu'):
        parser.error('--runtimes compares inference on a CPU; leave out --train and --compile')
    for file in (args.csv, args.plot, args.profile):
        if file and not file.parent.is_dir():
            parser.error(f'there is no folder {file.parent}')
    if args.plot and not importlib.util.find_spec('matplotlib'):
        parser.error('--plot needs matplotlib: pip install matplotlib')
    return args


def main(argv=None):
    """Run the program; return its exit status, 1 if a model failed."""
    argv = sys.argv[1:] if argv is None else argv
    if '--loader' in argv:
        import loader_benchmark  # its libraries are not needed otherwise
        loader_benchmark.main([argument for argument in argv if argument != '--loader'])
        return 0
    args = parse_args(argv)
    choose_kernels(args.device)
    candidates = [model._replace(input_size=args.input_size or model.input_size) for model in args.models]
    protocol = Protocol(args.input_size, args.batch_size, args.device, getattr(torch, args.amp_dtype), None,
                        args.windows, args.window_seconds, args.compile, train=args.train,
                        channels_last=args.channels_last)
    title = f'{protocol}; EViT with other tokens {"fused" if args.fuse_token else "dropped"}'
    print(title, flush=True)
    if args.profile:
        args.profile.unlink(missing_ok=True)
    with flash_first(args.device):
        rows = compare(candidates, protocol, args.fuse_token, args.reference, args.runtimes, args.profile)
    print(*format_table(rows), sep='\n')
    if args.csv:
        write_csv(args.csv, rows)
    if args.plot:
        plot_throughput(args.plot, rows, title)
    return int(any('failure' in row for row in rows))


def run(argv=None):
    """The program, on a command line, by default that of the process."""
    run_program('speed_test.py', main, argv)
