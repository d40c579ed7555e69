"""Command lines whose errors are one line."""
import argparse
import ast
import json
import math
import os
from pathlib import Path

import timm
import torch


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """argparse's that adds defaults to the help, except empty ones."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, '', []) else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, but an error is one line, without the usage."""

    def error(self, message):
        self.exit(2, f'{self.prog}: error: {message}\n')


def number(kind, is_valid, expected):
    """An argparse type: a finite number of `kind` for which `is_valid(value)`, described by `expected`."""
    def parse(text):
        value = kind(text)
        if not (is_valid(value) and -math.inf < value < math.inf):
            raise argparse.ArgumentTypeError(f'must be {expected}, not {text}')
        return value

    parse.__name__ = kind.__name__                     # argparse names it in its message
    return parse


def within(low, high=math.inf, kind=float):
    """An argparse type: a number of `kind` from `low` to `high`."""
    expected = f'from {low} to {high}' if high < math.inf else f'{low} or more'
    return number(kind, lambda value: low <= value <= high, expected)


def positive(kind):
    """An argparse type: a number of `kind` above 0."""
    return number(kind, lambda value: value > 0, 'above 0')


natural = within(0, 2 ** 31, int)
non_negative, fraction = within(0), within(0, 1)
keep_rate = number(float, lambda value: 0 < value <= 1, 'a keep rate in (0, 1]')


def block_numbers(text):
    """An argparse type: 3,6,9 or (3, 6, 9) → tuple of int."""
    try:
        inside = text[1:-1] if text[:1] + text[-1:] in ('()', '[]') else text
        return tuple(int(item) for item in inside.rstrip(', ').split(','))
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is not a list of block numbers such as 3,6,9') from None


def token_counts(text):
    """An argparse type: 197,197,150,… or the path of a JSON file with a list → tuple of int."""
    try:
        if not text.endswith('.json'):
            return block_numbers(text)
        counts = json.loads(Path(text).read_text(encoding='utf-8'))
        if isinstance(counts, list) and all(type(item) is int for item in counts):
            return tuple(counts)
        reason = 'it holds no list of integers'
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error)
    except argparse.ArgumentTypeError:
        reason = 'it is neither a list of numbers such as 197,197,150 nor the path of a .json file'
    raise argparse.ArgumentTypeError(f'{text!r}: {reason}')


def key_value(text):
    """An argparse type: KEY=VALUE → (key, value). The value is a number or another literal, or else text."""
    key, equals, value = text.partition('=')
    if not (key.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f'{text!r} is not KEY=VALUE, such as patch_size=8')
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return key, value


def timm_model(text):
    """An argparse type: the name of a model that timm knows, with a tag of pretrained weights or without.

    A name of older versions of timm becomes the one that timm maps it to.
    """
    renamed = timm.models.get_deprecated_models()
    try:
        if text in renamed:
            if not renamed[text]:
                raise RuntimeError('it has been removed')
            if os.environ.get('RANK', '0') == '0':
                print(f'note: {text} is an old name of {renamed[text]}', flush=True)
            return timm_model(renamed[text])
        if timm.is_model(text) and timm.get_pretrained_cfg(text):
            return text
        reason = 'has no configuration in timm' if timm.is_model(text) else 'is neither in models_evit.py nor in timm'
    except RuntimeError as error:                      # the tag, too
        reason = f'is not in timm: {error}'
    raise argparse.ArgumentTypeError(f'{text} {reason}')


def with_dashes(flag):
    """--base_keep_rate=0.5 → --base-keep-rate=0.5"""
    name, equals, value = flag.partition('=')
    return name.replace('_', '-') + equals + value


def add_run_arguments(parser):
    """Add the flags that every run over a data set has; → their group."""
    group = parser.add_argument_group('run')
    add, on_off = group.add_argument, argparse.BooleanOptionalAction
    add('--output-dir', default='', help="output folder; '' to save nothing")
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='cpu, cuda or one GPU such as cuda:1')
    add('--amp-dtype', default='auto', choices=['auto', 'bfloat16', 'float16', 'float32'],
        help='auto: bfloat16 on a GPU that supports it, else float16; float32 on a CPU')
    add('--channels-last', action='store_true', help='channels-last memory format')
    add('--deterministic', action='store_true', help='on a GPU, only kernels that repeat their results to the last bit')
    add('--pin-mem', action=on_off, default=True, help='copy batches to a GPU from pinned memory')
    add('--print-freq', type=positive(int), default=50, help='steps between lines on the console')
    add('--dist-eval', action='store_true', help='share the evaluation among the processes')
    add('--world-size', type=positive(int), default=1, help='number of processes, unless the environment has it')
    add('--dist-url', default='env://', help='where the processes meet')
    add('--dist-timeout', type=within(1, 10 ** 6), default=600,
        help='seconds to wait for a process before giving it up')
    return group
