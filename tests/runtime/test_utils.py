import os
import platform
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT
from runtime.utils import atomic_write, choose_kernels, one_line, seed_all


def draws():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_seed_all():
    def drawn(*key):
        seed_all(*key)
        return draws()

    assert drawn(0, 1, 2) == drawn(0, 1, 2)
    different = [drawn(*key) for key in ((0, 1, 2), (0, 2, 1), (1, 1, 2), (0, 1, 2, 1))]
    for values in zip(*different, strict=True):
        assert len(set(values)) == 4                 # in each of the three generators


@pytest.mark.parametrize('deterministic', [False, True])
def test_deterministic_kernels(deterministic, monkeypatch):
    monkeypatch.delenv('CUBLAS_WORKSPACE_CONFIG', raising=False)
    before = torch.backends.cudnn.benchmark
    try:
        choose_kernels(torch.device('cpu'), deterministic)
        assert torch.are_deterministic_algorithms_enabled() == deterministic != torch.backends.cudnn.benchmark
        assert ('CUBLAS_WORKSPACE_CONFIG' in os.environ) == deterministic
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = before


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='other C libraries have no such thresholds')
def test_freed_memory_is_kept():
    """Tensors after the first ones get pages that the process has already."""
    code = """
import resource, sys, torch
from runtime.utils import choose_kernels
if sys.argv[1:]:
    choose_kernels(torch.device('cpu'))
for _ in range(13):
    faults = faults if _ > 3 else resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(1 << 20) for _ in range(12)]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
"""
    thresholds = dict(MALLOC_MMAP_THRESHOLD_='131072', MALLOC_TRIM_THRESHOLD_='131072')    # glibc's before it adapts
    given_back, kept = (int(subprocess.run([sys.executable, '-c', code, *flags], cwd=ROOT, env=os.environ | thresholds,
                                           check=True, text=True, capture_output=True).stdout)
                        for flags in ([], ['keep']))
    assert kept < 100 < 1000 < given_back


@pytest.mark.parametrize('message, line', [
    ('first\n  second  part', 'second part'), ('', 'ValueError'),
    ('Caught InputError in DataLoader worker process 0.\nTraceback …\nruntime.utils.InputError: a.jpg is bad',
     'a.jpg is bad')])
def test_one_line(message, line):
    assert one_line(ValueError(message)) == line


def test_atomic_write(tmp_path):
    path = tmp_path / 'file.txt'
    for content in ('first', 'second'):
        with atomic_write(path) as temporary:
            temporary.write_text(content)
            assert temporary.parent == tmp_path and path.exists() == (content == 'second')
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as temporary:
        temporary.write_text('broken')
        raise KeyboardInterrupt
    assert path.read_text() == 'second' and list(tmp_path.iterdir()) == [path]
