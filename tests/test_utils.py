import argparse
import errno
import os
import queue
import random
import shutil
import signal

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist

import utils
from utils import InputError


def draws():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_seed_all_is_a_function_of_its_key():
    def drawn(*key):
        utils.seed_all(*key)
        return draws()

    assert drawn(0, 1, 2) == drawn(0, 1, 2)
    different = [drawn(*key) for key in ((0, 1, 2), (0, 2, 1), (1, 1, 2), (0, 1, 2, 1))]
    for values in zip(*different, strict=True):
        assert len(set(values)) == 4                 # in each of the three generators


def weights_of(path):
    return utils.load_checkpoint(str(path))['model']['w'].tolist()


def save(number, folder, best=False):
    utils.save_checkpoint({'model': {'w': torch.tensor([number])}}, folder, best)


def test_checkpoint_there_and_back(tmp_path):
    state = {'model': {'w': torch.arange(3.)}, 'epoch': 2, 'args': {'drop_loc': (3, 6, 9), 'lr': 5e-4, 'aa': None}}
    utils.save_checkpoint(state, tmp_path, best=True)
    for name in ('checkpoint.pth', 'best_checkpoint.pth'):
        loaded = utils.load_checkpoint(str(tmp_path / name))
        assert torch.equal(loaded.pop('model')['w'], state['model']['w'])
        assert loaded == {'epoch': 2, 'args': state['args']}
        assert torch.load(tmp_path / name, weights_only=True)['epoch'] == 2        # by others, who know of no checksum
        assert torch.load(tmp_path / name, weights_only=True, mmap=True)['epoch'] == 2
        assert (tmp_path / name).stat().st_mode & 0o002 == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ['best_checkpoint.pth', 'checkpoint.pth']


@pytest.mark.parametrize('links', [True, False])
def test_the_checkpoint_before_the_last_and_the_best_stay(links, tmp_path, monkeypatch):
    if not links:
        monkeypatch.setattr(os, 'link', lambda path, target: os.rmdir(path))           # fails by an OSError
    for number in range(4):
        save(number, tmp_path, best=number == 1)
    files = {path.name: weights_of(path) for path in tmp_path.iterdir()}
    assert files == {'checkpoint.pth': [3], 'previous_checkpoint.pth': [2], 'best_checkpoint.pth': [1]}


@pytest.mark.parametrize('function', ['fsync', 'link'])
def test_a_failed_save_leaves_the_checkpoints(function, tmp_path, monkeypatch):
    save(0, tmp_path, best=True)
    save(1, tmp_path)

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, fail)
    monkeypatch.setattr(shutil, 'copyfile', fail)
    with pytest.raises(OSError, match='cannot be saved, the last one is kept: No space left on device'):
        save(2, tmp_path, best=True)
    files = {path.name: weights_of(path) for path in tmp_path.iterdir()}
    assert files == {'checkpoint.pth': [1], 'previous_checkpoint.pth': [0], 'best_checkpoint.pth': [0]}


def test_each_cut_and_each_changed_byte_is_noticed(tmp_path):
    save(7, tmp_path)
    path = tmp_path / 'checkpoint.pth'
    whole = path.read_bytes()
    damaged = [whole[:i] for i in range(len(whole))]
    damaged += [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1:] for i in range(len(whole))]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(utils.DamagedCheckpoint, match='checkpoint.pth'):
            utils.load_checkpoint(str(path))
    path.write_bytes(whole)
    assert weights_of(path) == [7]


def test_the_newest_whole_checkpoint_is_found(tmp_path, capsys):
    def found():
        return utils.newest_checkpoint(str(tmp_path), torch.device('cpu'))

    assert found() == ''
    save(0, tmp_path)
    assert found() == str(tmp_path / 'checkpoint.pth')
    save(1, tmp_path)
    (tmp_path / 'checkpoint.pth').write_bytes(b'PK damaged')
    assert found() == str(tmp_path / 'previous_checkpoint.pth') and weights_of(found()) == [0]
    assert 'the one before it is taken' in capsys.readouterr().out
    assert (tmp_path / 'damaged_checkpoint.pth').read_bytes() == b'PK damaged'
    save(2, tmp_path)                                # takes the place of the damaged one, not of the whole one
    assert weights_of(tmp_path / 'previous_checkpoint.pth') == [0]
    for name in ('checkpoint.pth', 'previous_checkpoint.pth'):
        (tmp_path / name).write_bytes(b'PK damaged')
    with pytest.raises(InputError, match='no other to go on from'):
        found()                                      # rather than to begin a long run anew
    assert (tmp_path / 'checkpoint.pth').exists()


def test_a_checkpoint_of_the_original_and_a_bare_state_dict(tmp_path):
    weights = {'w': torch.ones(2)}
    torch.save({'model': weights, 'args': argparse.Namespace(lr=5e-4, drop_loc='(3, 6, 9)')}, tmp_path / 'original.pth')
    torch.save(weights, tmp_path / 'bare.pth')
    assert vars(utils.load_checkpoint(str(tmp_path / 'original.pth'))['args'])['drop_loc'] == '(3, 6, 9)'
    assert torch.equal(utils.load_checkpoint(str(tmp_path / 'bare.pth'))['model']['w'], weights['w'])


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_what_is_no_checkpoint_is_refused_and_runs_no_code(tmp_path):
    torch.save({'model': Malicious(tmp_path / 'made')}, tmp_path / 'malicious.pth')
    whole = tmp_path / 'whole.pth'
    torch.save({'model': {'w': torch.zeros(1000)}}, whole)
    (tmp_path / 'cut.pth').write_bytes(whole.read_bytes()[:1000])
    (tmp_path / 'text.pth').write_text('no checkpoint')
    (tmp_path / 'empty.pth').touch()
    torch.save([1, 2], tmp_path / 'list.pth')
    torch.save({'model': 3}, tmp_path / 'number.pth')
    for name in ('malicious', 'cut', 'text', 'empty', 'list', 'number', 'absent'):
        with pytest.raises(InputError, match=f'{name}.pth') as error:
            utils.load_checkpoint(str(tmp_path / f'{name}.pth'))
        assert '\n' not in str(error.value)
    assert not (tmp_path / 'made').exists()


def test_weights_of_another_model_are_refused_by_their_keys():
    model = timm.create_model('deit_tiny_patch16_224', img_size=32, num_classes=3)
    weights = model.state_dict()
    before = {key: value.clone() for key, value in weights.items()}
    wrong = {key: value + 1 for key, value in weights.items() if key != 'norm.bias'}
    wrong |= {'head.weight': torch.zeros(7, 192), 'extra': torch.zeros(1)}
    with pytest.raises(InputError, match='norm.bias is missing; extra is not in the model; head.weight is'):
        utils.load_weights(model, wrong, 'a.pth')
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.fixture
def environment(monkeypatch):
    """A function that sets the variables of launchers to those given, and to no others."""
    def change(variables):
        for name in [*os.environ]:
            if name.startswith('SLURM_') or name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    before = dict(os.environ)
    yield change
    for name in os.environ.keys() - before.keys():
        del os.environ[name]                         # what srun's variables were taken over to


SRUN = {'SLURM_PROCID': '1', 'SLURM_LOCALID': '0', 'SLURM_STEP_NUM_TASKS': '2', 'SLURM_STEP_NODELIST': 'n[7-8]',
        'SLURM_JOB_ID': '42', 'SLURM_STEP_ID': '0'}
TORCHRUN = {'RANK': '0', 'WORLD_SIZE': '1', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '0'}


@pytest.mark.parametrize('variables, named', [
    ({'WORLD_SIZE': '2'}, 'RANK'), ({'RANK': '1'}, 'WORLD_SIZE'), ({'RANK': 'x', 'WORLD_SIZE': '2'}, 'RANK=x'),
    ({'RANK': '0', 'WORLD_SIZE': '2'}, 'MASTER_ADDR and MASTER_PORT'),
    ({**TORCHRUN, 'RANK': '2', 'WORLD_SIZE': '2'}, 'RANK=2 in a world of 2'),
    ({**TORCHRUN, 'MASTER_PORT': 'http'}, 'MASTER_PORT=http'),
    ({**TORCHRUN, 'RANK': '1', 'WORLD_SIZE': '2', 'MASTER_PORT': '1'}, 'process 1 of 2 did not meet the others'),
    ({name: value for name, value in SRUN.items() if name != 'SLURM_PROCID'}, 'SLURM_PROCID'),
    (SRUN, 'MASTER_ADDR')], ids=str)
def test_an_environment_that_is_wrong_or_half_set_is_one_line(variables, named, environment, monkeypatch):
    monkeypatch.setenv('PATH', '')                   # there is no scontrol
    environment(variables)
    with pytest.raises(InputError, match=named) as error:
        utils.init_process_group('cpu', timeout=1)
    assert '\n' not in str(error.value)


def test_alone_without_a_launcher(environment, capsys):
    environment({'WORLD_SIZE': '1', 'SLURM_STEP_NUM_TASKS': '1', 'SLURM_PROCID': '0'})
    assert utils.init_process_group('cpu') == torch.device('cpu') and utils.world_size() == 1
    assert not capsys.readouterr().out
    environment({'SLURM_NTASKS': '2', 'SLURM_PROCID': '0'})                # in a batch script, which forgot srun
    utils.init_process_group('cpu')
    assert 'the job has 2 tasks, but this process is alone' in capsys.readouterr().out
    with pytest.raises(InputError, match='RANK'):
        environment({})
        utils.init_process_group('cpu', world_size=2)


def test_srun_tells_what_torchrun_would(environment, tmp_path, monkeypatch):
    (tmp_path / 'scontrol').write_text('#!/bin/sh\n[ "$*" = "show hostnames n[7-8]" ] && printf "n7\\nn8\\n"\n')
    (tmp_path / 'scontrol').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
    environment(SRUN)
    utils.adopt_slurm()
    told = {name: os.environ[name] for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')}
    assert told == {'RANK': '1', 'WORLD_SIZE': '2', 'LOCAL_RANK': '0', 'MASTER_ADDR': 'n7', 'MASTER_PORT': '15042'}
    environment({**SRUN, 'RANK': '0', 'MASTER_ADDR': 'mine'})
    utils.adopt_slurm()
    assert os.environ['RANK'] == '0' and os.environ['MASTER_ADDR'] == 'mine'           # torchrun under srun


@pytest.mark.parametrize('signum', utils.StopSignal.SIGNALS)
def test_a_first_signal_is_noted_and_a_second_one_ends_the_process(signum, monkeypatch):
    statuses, handler = queue.Queue(), signal.getsignal(signum)
    times, readings = iter([7., 7., 7.4, 7.6]), queue.Queue()              # of the first signal, which is read twice, …
    other = signal.SIGUSR1 if signum == signal.SIGTERM else signal.SIGTERM

    def monotonic():
        readings.put(now := next(times))
        return now

    monkeypatch.setattr(os, '_exit', statuses.put)
    monkeypatch.setattr(utils.time, 'monotonic', monotonic)
    with utils.StopSignal(torch.device('cpu')) as stop:
        assert stop.agreed() == 0
        signal.raise_signal(signum)
        assert [readings.get(timeout=60) for _ in range(2)] == [7., 7.]
        signal.raise_signal(other)                   # passed on by a launcher
        assert readings.get(timeout=60) == 7.4 and stop.agreed() == signum
        signal.raise_signal(signum)
        assert statuses.get(timeout=60) == 128 + signum
    assert signal.getsignal(signum) == handler and signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize('name, variables, expected', [
    ('cuda', {}, 'cuda:0'), ('cuda:1', {}, 'cuda:1'),
    ('cuda', {**TORCHRUN, 'WORLD_SIZE': '4', 'LOCAL_RANK': '1'}, 'cuda:1'),
    ('cuda:0', {**TORCHRUN, 'WORLD_SIZE': '4', 'LOCAL_RANK': '2'}, None)])
def test_a_process_takes_the_gpu_of_its_local_rank(name, variables, expected, environment, monkeypatch):
    environment(variables)
    joined, chosen = [], []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    monkeypatch.setattr(utils, 'rendezvous', lambda *arguments, **options: iter([(dist.HashStore(), 0, 4)]))
    monkeypatch.setattr(utils.Failures, 'store', None)
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda backend, **kwargs: joined.append(backend))
    if expected is None:
        with pytest.raises(InputError, match='cuda:2 is asked for, but torch sees 2'):
            utils.init_process_group(name)
        return
    assert utils.init_process_group(name) == torch.device(expected) and chosen == [torch.device(expected)]
    assert joined == (['nccl'] if variables else [])
