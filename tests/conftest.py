"""Shared by the tests: import path, reference weights, small data sets, main.py and the recipes as processes."""
import json
import math
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# A DeiT-Ti for the digits; the same with 4 blocks, of which a training step takes milliseconds
DEIT_TINY = ['--model', 'deit_tiny_patch16_shrink_base', '--fuse_token', '--input-size', '32', '--batch-size', '64',
             '--warmup-epochs', '0', '--shrink_start_epoch', '0', '--lr', '2.4e-3', '--num_workers', '0',
             '--device', 'cpu']
TINY = [*DEIT_TINY, '--model-kwargs', 'depth=4', '--drop_loc', '1,2,3']
UNCHANGED = ['--mixup', '0', '--cutmix', '0', '--aa=', '--color-jitter', '0', '--reprob', '0', '--print-freq', '10']
PLAIN = [*TINY, *UNCHANGED]


def pytest_configure(config):
    config.addinivalue_line('markers', 'gpu: needs a CUDA device')
    workers = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1))
    if workers > 1:                                    # pytest -n: use no more threads than there are cores
        os.environ['OMP_NUM_THREADS'] = str(max(1, os.cpu_count() // workers))
        torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))


def pytest_collection_modifyitems(items):
    for item in items:
        on_gpu = item.get_closest_marker('gpu') and getattr(item.module, 'DEVICE', 'cuda') == 'cuda'
        if on_gpu and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason='no CUDA device'))


def reference(name):
    """Reference values that the original code computed in float64, from tests/data."""
    return json.loads((ROOT / 'tests' / 'data' / name).read_text())


def reference_weights(model):
    """The weights that produced the reference values. Each tensor is drawn from a generator seeded with its name."""
    return {key: torch.as_tensor(_reference_weight(key, tuple(value.shape)))
            for key, value in model.state_dict().items()}


def _reference_weight(key, shape):
    draw = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    if key.endswith('running_var'):
        return np.abs(draw) + 0.5
    if key.endswith('running_mean'):
        return 0.1 * draw
    if key.endswith('num_batches_tracked'):
        return np.zeros(shape, np.int64)
    if key.endswith(('norm1.weight', 'norm2.weight')) or key == 'norm.weight':
        return 1 + 0.1 * draw
    if key.endswith('.bias'):
        return 0.05 * draw
    if key in ('cls_token', 'pos_embed'):
        return 0.3 * draw
    if 'qkv' in key:
        return draw * (1.6 * shape[1] ** -0.5)
    return draw * math.prod(shape[1:]) ** -0.5


def reference_images(seed, batch, size):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal((batch, 3, size, size)).astype(np.float32))


def run_main(*arguments, processes=0, check=True, program='main.py'):
    """Run a program as users do, with torchrun if `processes` is above 0. Return the CompletedProcess."""
    python = [sys.executable]
    if processes:
        python += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'} if processes else os.environ
    done = subprocess.run([*python, str(ROOT / program), *map(str, arguments)], capture_output=True, text=True,
                          env=environment, timeout=300)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def run_recipe(script, *flags, **variables):
    """Run a recipe such as run_code.sh on the CPU, unless the flags name another device; → console output."""
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()},
                   'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}'}
    done = subprocess.run(['bash', str(ROOT / script), '--device', 'cpu', *flags], capture_output=True, text=True,
                          env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope='session')
def digits_run(tmp_path_factory):
    """One epoch of training on the digits: the CompletedProcess and the output folder."""
    folder = tmp_path_factory.mktemp('digits')
    return run_main(*PLAIN, '--epochs', '1', '--output_dir', folder), folder


def open_picture(path):
    """Load an image file as an int tensor (H, W, 3)."""
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture)).int()


@pytest.fixture(scope='module')
def one_thread():
    """Use one thread. Models this small are slower on several threads, much slower if the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def compiled_graphs(monkeypatch, request):
    """A list of the graphs that torch.compile captures. They run without code generation, which takes minutes.

    With the parameter 'captured', AOTAutograd does not trace their derivatives either.
    """
    from torch._dynamo.backends.debugging import aot_eager
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph if getattr(request, 'param', None) == 'captured' else aot_eager(graph, inputs)

    def compile(function, mode=None, **options):
        return torch_compile(function, backend=backend, **options)

    torch.compiler.reset()
    torch_compile = torch.compile
    monkeypatch.setattr(torch, 'compile', compile)
    return graphs


@pytest.fixture(scope='session')
def image_folder(tmp_path_factory):
    """An image folder with 3 classes, 24 training and 9 validation images. The colour of an image shows its class."""
    root = tmp_path_factory.mktemp('tree')
    generator = np.random.RandomState(0)
    for split, number in (('train', 8), ('val', 3)):
        for label, name in enumerate(('blue', 'green', 'red')):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = generator.randint(0, 100, (40, 50, 3), dtype=np.uint8)
                pixels[..., 2 - label] += 150
                Image.fromarray(pixels).save(folder / f'{i}.png')
    return root
