"""Runs on a GPU: precision, compilation, a process group, signals, pictures, the recipe of the digits.

With EVIT_GPU_TESTS_DEVICE=cpu, the same tests run on a CPU with gloo, without code generation and with a short recipe:
this checks the tests themselves.
"""
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest
import torch

import main
from conftest import PLAIN, ROOT, run_recipe
from formats.token_labels import labels_of_patches
from main import parse_args
from outputs import assert_same, checkpoint, log_lines

DEVICE = os.environ.get('EVIT_GPU_TESTS_DEVICE', 'cuda')
# 16 patches, two blocks that drop some of them
FLAGS = [*PLAIN, '--device', DEVICE, '--lr', '9.6e-3', '--drop-path', '0', '--drop_loc', '1,2',
         '--model-kwargs', 'patch_size=8', 'embed_dim=64', 'num_heads=4', 'depth=4']
# main.py, which also tells when DDP wraps the model
PROGRAM = '''
import torch.distributed, main, trainer
ddp = trainer.DistributedDataParallel
trainer.DistributedDataParallel = lambda *args, **kwargs: (
    print('DDP over', torch.distributed.get_backend(), flush=True) or ddp(*args, **kwargs))
main.run()
'''

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures('one_thread', 'exact_products')]


@pytest.fixture(scope='module')
def exact_products():
    """Do without TF32, so that compiled and eager runs can be compared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, 'choose_kernels', lambda device, deterministic: None)
        patch.setattr(torch.backends.cudnn, 'allow_tf32', False)
        yield


@pytest.fixture
def compiler(request):
    """Prepare torch.compile. On a CPU, where code generation takes minutes, graphs are only traced."""
    torch.compiler.reset()
    if DEVICE == 'cpu':
        request.getfixturevalue('compiled_graphs')


def run(folder, *flags):
    """Call main.py in this process with its output in `folder`."""
    main.main(parse_args([*FLAGS, *flags, '--output_dir', str(folder)]))


def falling_rate(folder, *flags):
    """Train for two epochs, in the first of which the keep rate falls; → lines of log.txt.

    Longer runs would differ by much more than rounding, since they would keep other tokens at a near tie.
    """
    run(folder, '--amp-dtype', 'float32', '--epochs', '2', '--shrink_epochs', '1', '--model-ema-decay', '0.9', *flags)
    return log_lines(folder)


@pytest.fixture(scope='module')
def eager(tmp_path_factory, exact_products):
    """The output folder of an eager run, and the lines of its log."""
    folder = tmp_path_factory.mktemp('eager')
    return folder, falling_rate(folder)


# --- Compilation ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('flags', [[], ['--grad-checkpointing']], ids=['plain', 'checkpointing'])
def test_compiled_training_while_the_rate_falls(flags, eager, compiler, tmp_path):
    rates = [line['train_keep_rate'] for line in eager[1]]
    assert rates == pytest.approx([0.85, 0.7], abs=0.01)                   # the means of the epochs
    for ours, theirs in zip(falling_rate(tmp_path, '--compile', *flags), eager[1], strict=True):
        for key in 'train_loss', 'test_loss', 'test_ema_loss', 'train_keep_rate':
            assert ours[key] == pytest.approx(theirs[key], abs=0.005), key


def test_evaluation_as_a_cuda_graph(eager, compiler, tmp_path, monkeypatch, capsys):
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, 'replay', lambda graph: replays.append(1) or replay(graph))
    figures = []
    for flags in [], ['--compile']:
        run(tmp_path, '--eval', '--resume', str(eager[0] / 'checkpoint.pth'), '--batch-size', '32', *flags)
        figures.append([tuple(map(float, line)) for line in re.findall(
            r'Acc@1 (\S+) Acc@5 (\S+) loss (\S+)', capsys.readouterr().out)])
    assert len(figures[0]) == 2                        # of the model and of its moving average
    for (acc1, acc5, loss), expected in zip(*figures, strict=True):
        assert (acc1, acc5) == pytest.approx(expected[:2], abs=0.6)        # two images
        assert loss == pytest.approx(expected[2], abs=0.002)
    assert bool(replays) == (DEVICE == 'cuda')


def test_lv_vit(compiler, tmp_path):
    """Training with labels of patches and MixToken, compiled and eager; the labels of maps as on a CPU."""
    losses = []
    for name in 'eager', 'compiled':
        flags = ['--compile'] if name == 'compiled' else []
        falling_rate(tmp_path / name, '--model', 'lvvit_s_shrink_base', *flags)
        losses.append([line['train_loss'] for line in log_lines(tmp_path / name)])
    assert losses[1] == pytest.approx(losses[0], abs=0.01) and losses[0][1] < losses[0][0]
    classes = torch.stack([torch.randperm(9)[:5] for _ in range(2 * 6 * 6)]).reshape(2, 6, 6, 5).permute(0, 3, 1, 2)
    maps = torch.stack([torch.randn(2, 5, 6, 6), classes], dim=1).half()
    boxes = torch.tensor([[0., 0.1, 0.8, 1.], [0.3, 0.3, 0.7, 0.9]])
    found = labels_of_patches(maps.to(DEVICE), boxes.to(DEVICE), 9, (4, 4)).cpu()
    torch.testing.assert_close(found, labels_of_patches(maps, boxes, 9, (4, 4)))


# --- Precision and the moving average -------------------------------------------------------------------------------

def test_float16_and_its_resumption(tmp_path):
    """The GradScaler goes on with its scale and with its count of updates since the last overflow."""
    scalers, updates = [], []
    for epochs in '1', '3':
        run(tmp_path, '--amp-dtype', 'float16', '--epochs', epochs, '--resume', 'auto')
        state = checkpoint(tmp_path)
        scalers.append(state['scaler'])
        updates.append(int(state['optimizer']['state'][0]['step']))
    lines = log_lines(tmp_path)
    assert [line['epoch'] for line in lines] == [0, 1, 2] and lines[2]['train_loss'] < lines[0]['train_loss']
    first, second = scalers
    assert first['_growth_tracker'] > 0 and second['scale'] <= first['scale']
    assert (second['_growth_tracker'] == first['_growth_tracker'] + updates[1] - updates[0]
            or second['scale'] < first['scale'])       # after an overflow


def test_moving_average_on_the_cpu(tmp_path):
    """With a decay of 0, the average is the model. On a GPU it is not evaluated while training."""
    run(tmp_path, '--epochs', '1', '--model-ema-force-cpu', '--model-ema-decay', '0')
    state = checkpoint(tmp_path)
    assert_same(state['model_ema'], {key: value.cpu() for key, value in state['model'].items()})
    line, = log_lines(tmp_path)
    assert ('test_ema_loss' in line) == (DEVICE == 'cpu')


# --- Processes ------------------------------------------------------------------------------------------------------

def group_of_one():
    """The environment of a process that is a group by itself, as torchrun would set it."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    return {'RANK': '0', 'LOCAL_RANK': '0', 'WORLD_SIZE': '1', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}


def start(folder, stop_after, environment):
    """Train as a process of its own, which gets SIGTERM after a line that starts so; → exit status, console output."""
    command = [sys.executable, '-c', PROGRAM, *FLAGS, '--epochs', '2', '--dist-eval', '--print-freq', '1',
               '--resume', 'auto', '--output_dir', str(folder)]
    printed = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
                          env=os.environ | environment) as process:
        limit = threading.Timer(150, process.kill)
        limit.start()
        for line in process.stdout:
            printed.append(line)
            if stop_after and line.startswith(stop_after):
                process.send_signal(signal.SIGTERM)
        limit.cancel()
    return process.returncode, ''.join(printed)


@pytest.mark.parametrize('in_group', [False, True], ids=['alone', 'group'])
def test_stop_and_resumption(in_group, tmp_path):
    """In a group, the process agrees on the signal over NCCL, and leaves the group after a barrier."""
    backend = 'nccl' if DEVICE == 'cuda' else 'gloo'
    for stop_after, status in (('Epoch: [0/2] [ 3/', 128 + signal.SIGTERM), (None, 0)):
        ended, printed = start(tmp_path, stop_after, group_of_one() if in_group else {})
        assert ended == status, printed
        assert f'1 process(es) on {DEVICE}' in printed and (f'DDP over {backend}' in printed) == in_group
        assert ('the state is saved' in printed) == bool(stop_after)
        steps = re.findall(r'^(?:Epoch: \[0/2\] \[ 1/|Test|Epoch)', printed, re.MULTILINE)
        assert (steps[0] == 'Epoch: [0/2] [ 1/') == bool(stop_after)         # the second run does not start anew
    assert [line['epoch'] for line in log_lines(tmp_path)] == [0, 1]


# --- Whole programs -------------------------------------------------------------------------------------------------

def test_pictures(eager, tmp_path):
    run(tmp_path, '--visualize_mask', '--n_visualization', '5', '--resume', str(eager[0] / 'checkpoint.pth'))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([
        'attention.png', 'grid.png',
        *(f'img_{i}_{stage}.jpg' for i in range(5) for stage in ('a', 'block1', 'block2'))])


def test_recipe_of_the_digits_in_bfloat16(tmp_path):
    short = ['--epochs', '1', '--warmup-epochs', '0', '--shrink_start_epoch', '0', '--shrink_epochs', '1']
    printed = run_recipe('run_code.sh', '--device', DEVICE, '--amp-dtype', 'bfloat16',
                         *(short if DEVICE == 'cpu' else []), logdir=tmp_path)
    assert f'on {DEVICE}, torch.bfloat16' in printed
    assert log_lines(tmp_path)[-1]['test_acc1'] >= (95 if DEVICE == 'cuda' else 5)
