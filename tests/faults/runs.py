"""Runs of main.py on the digits as real processes, and the comparison of what two of them leave."""
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent

# 3 epochs of 22 steps, or of 11 in 2 processes, with everything that draws random numbers
FLAGS = ['--model', 'deit_tiny_patch16_shrink_base', '--fuse_token', '--input-size', '32', '--batch-size', '64',
         '--device', 'cpu', '--num_workers', '1', '--warmup-epochs', '1', '--shrink_start_epoch', '0',
         '--shrink_epochs', '2', '--epochs', '3', '--lr', '2.4e-3', '--clip-grad', '1', '--dist-eval',
         '--resume', 'auto', '--checkpoint-interval', '4']


def start(folder, *flags, processes=1, main=ROOT / 'main.py', **options):
    """Start the processes of a run, without torchrun, so that each can be signalled → list of Popen."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    group = [{}] if processes == 1 else [
        {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(processes),
         'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)} for rank in range(processes)]
    return [subprocess.Popen(
        [sys.executable, str(main), *FLAGS, *map(str, flags), '--output_dir', str(folder)],
        env={**os.environ, 'OMP_NUM_THREADS': '1', **member}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, **options) for member in group]


def finish(run, timeout=300):
    """Wait for the processes of a run → list of (exit status, stdout, stderr)."""
    outputs = [process.communicate(timeout=timeout) for process in run]
    return [(process.returncode, *output) for process, output in zip(run, outputs)]


def train(folder, *flags, processes=1):
    """A run to its end; fails where it does not end well."""
    for status, out, err in finish(start(folder, *flags, processes=processes)):
        assert status == 0, out + err


def result(folder):
    """What must not depend on what happened on the way: the last and the best checkpoint, log.txt but for times."""
    checkpoints = [torch.load(Path(folder) / name, weights_only=True)
                   for name in ('checkpoint.pth', 'best_checkpoint.pth')]
    for checkpoint in checkpoints:
        del checkpoint['args']                                             # name the folder
    log = [json.loads(line) for line in (Path(folder) / 'log.txt').read_text().splitlines()]
    return [*checkpoints, [{k: v for k, v in line.items() if not k.endswith('per_second')} for line in log]]


def same(a, b):
    """Bit for bit, through dicts and sequences."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
