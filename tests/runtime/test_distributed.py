import datetime
import os
import queue
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from runtime import distributed
from runtime.distributed import (StopSignal, adopt_slurm, check_devices, cores_per_process, init_process_group,
                                 world_size)
from runtime.utils import InputError


@pytest.fixture
def environment():
    """A function that sets the launchers' variables to the given ones; all variables are restored afterwards."""
    before = dict(os.environ)

    def change(variables):
        for name in [*os.environ]:
            if name.startswith('SLURM_') or name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'):
                del os.environ[name]
        os.environ.update(variables)

    yield change
    os.environ.clear()
    os.environ.update(before)


SRUN = {'SLURM_PROCID': '1', 'SLURM_LOCALID': '0', 'SLURM_STEP_NUM_TASKS': '2', 'SLURM_STEP_NODELIST': 'n[7-8]',
        'SLURM_JOB_ID': '42', 'SLURM_STEP_ID': '0'}
TORCHRUN = {'RANK': '0', 'WORLD_SIZE': '1', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '0'}


@pytest.mark.parametrize('variables, named', [
    ({'WORLD_SIZE': '2'}, 'RANK'), ({'RANK': '1'}, 'WORLD_SIZE'), ({'RANK': 'x', 'WORLD_SIZE': '2'}, 'RANK=x'),
    ({'RANK': '0', 'WORLD_SIZE': '2'}, 'MASTER_ADDR and MASTER_PORT'),
    ({**TORCHRUN, 'RANK': '2', 'WORLD_SIZE': '2'}, 'RANK=2, but WORLD_SIZE=2'),
    ({**TORCHRUN, 'MASTER_PORT': 'http'}, 'MASTER_PORT=http'),
    ({**TORCHRUN, 'RANK': '1', 'WORLD_SIZE': '2', 'MASTER_PORT': '1'}, 'process 1 of 2 did not meet the others'),
    ({name: value for name, value in SRUN.items() if name != 'SLURM_PROCID'}, 'SLURM_PROCID'),
    (SRUN, 'MASTER_ADDR')], ids=str)
def test_wrong_environment(variables, named, environment, monkeypatch):
    monkeypatch.setenv('PATH', '')                   # scontrol is not found
    environment(variables)
    with pytest.raises(InputError, match=named) as error:
        init_process_group('cpu', timeout=1)
    assert '\n' not in str(error.value)


def test_single_process_without_a_launcher(environment, capsys):
    environment({'WORLD_SIZE': '1', 'SLURM_STEP_NUM_TASKS': '1', 'SLURM_PROCID': '0'})
    assert init_process_group('cpu') == torch.device('cpu') and world_size() == 1
    assert not capsys.readouterr().out
    environment({'SLURM_NTASKS': '2', 'SLURM_PROCID': '0'})                # in a batch script, without srun
    init_process_group('cpu')
    assert 'the job has 2 tasks, but this process is alone' in capsys.readouterr().out
    with pytest.raises(InputError, match='RANK'):
        environment({})
        init_process_group('cpu', world_size=2)


def test_variables_of_srun(environment, tmp_path, monkeypatch):
    (tmp_path / 'scontrol').write_text('#!/bin/sh\n[ "$*" = "show hostnames n[7-8]" ] && printf "n7\\nn8\\n"\n')
    (tmp_path / 'scontrol').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
    environment(SRUN)
    adopt_slurm()
    told = {name: os.environ[name] for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')}
    assert told == {'RANK': '1', 'WORLD_SIZE': '2', 'LOCAL_RANK': '0', 'MASTER_ADDR': 'n7', 'MASTER_PORT': '15042'}
    environment({**SRUN, 'RANK': '0', 'MASTER_ADDR': 'mine'})
    adopt_slurm()
    assert os.environ['RANK'] == '0' and os.environ['MASTER_ADDR'] == 'mine'           # torchrun under srun


@pytest.mark.parametrize('signum', StopSignal.SIGNALS)
def test_first_and_second_signal(signum, monkeypatch):
    statuses, handler = queue.Queue(), signal.signal(signum, signal.SIG_DFL)           # it may be ignored
    times, readings = iter([7., 7., 7.4, 7.6]), queue.Queue()              # the first signal reads the clock twice
    other = signal.SIGUSR1 if signum == signal.SIGTERM else signal.SIGTERM

    def monotonic():
        readings.put(now := next(times))
        return now

    monkeypatch.setattr(os, '_exit', statuses.put)
    monkeypatch.setattr(distributed.time, 'monotonic', monotonic)
    with StopSignal(torch.device('cpu')) as stop:
        assert stop.agreed() == 0
        signal.raise_signal(signum)
        assert [readings.get(timeout=60) for _ in range(2)] == [7., 7.]
        signal.raise_signal(other)                   # forwarded by a launcher
        assert readings.get(timeout=60) == 7.4 and stop.agreed() == signum
        signal.raise_signal(signum)
        assert statuses.get(timeout=60) == 128 + signum
    assert signal.signal(signum, handler) == signal.SIG_DFL and signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize('name, variables, expected', [
    ('cuda', {}, 'cuda:0'), ('cuda:1', {}, 'cuda:1'),
    ('cuda', {**TORCHRUN, 'WORLD_SIZE': '4', 'LOCAL_RANK': '1'}, 'cuda:1'),
    ('cuda:0', {**TORCHRUN, 'WORLD_SIZE': '4', 'LOCAL_RANK': '2'}, None)])
def test_gpu_of_the_local_rank(name, variables, expected, environment, monkeypatch):
    environment(variables)
    joined, chosen, store = [], [], dist.HashStore()
    for process in range(4):
        dist.PrefixStore('devices', store).set(str(process), f'GPU-{process}')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    monkeypatch.setattr(distributed, 'rendezvous', lambda *arguments, **options: iter([(store, 0, 4)]))
    checked, check = [], distributed.check_devices
    monkeypatch.setattr(distributed, 'check_devices', lambda *arguments: checked.append(check(*arguments)))
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: SimpleNamespace(uuid='GPU-0'))
    monkeypatch.setattr(distributed, 'Failures', lambda *_: None)
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda backend, **kwargs: joined.append(backend))
    if expected is None:
        with pytest.raises(InputError, match='cuda:2 is asked for, but torch sees 2'):
            init_process_group(name)
        return
    assert init_process_group(name) == torch.device(expected) and chosen == [torch.device(expected)]
    assert joined == (['nccl'] if variables else []) and len(checked) == len(joined)


def test_cores_per_process(monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: set(range(21)), raising=False)
    monkeypatch.delenv('SLURM_CPUS_PER_TASK', raising=False)
    for processes, cores in (('', 21), ('8', 2), ('64', 1), ('0', 21)):
        monkeypatch.setenv('LOCAL_WORLD_SIZE', processes)
        assert cores_per_process() == cores
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '')
    monkeypatch.setenv('SLURM_CPUS_PER_TASK', '5')
    assert cores_per_process() == 5
    monkeypatch.setenv('LOCAL_WORLD_SIZE', 'x')
    with pytest.raises(InputError, match='LOCAL_WORLD_SIZE=x'):
        cores_per_process()


def test_two_processes_with_one_gpu(monkeypatch):
    """As of eight processes that each see the same GPU; the first and the third have it here."""
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: SimpleNamespace(uuid='GPU-7'))
    store = dist.HashStore()
    for process, uuid in ((1, 'GPU-8'), (2, 'GPU-7')):
        store.set(str(process), uuid)
        store.set(f'read {process}', '')
    for rank in (0, 1):                                                    # the second has another GPU
        store.set('1', 'GPU-8')
        monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: SimpleNamespace(uuid=f'GPU-{7 + rank}'))
        with pytest.raises(InputError, match='processes 0, 2 have the same GPU; start one process for each GPU'):
            check_devices(store, torch.device('cuda', 0), rank, 3, datetime.timedelta(seconds=1))


def test_nccl_that_does_not_start(environment, monkeypatch):
    """Its own reason is told, all lines of it."""
    environment(TORCHRUN)

    def fail(*_, **__):
        raise dist.DistBackendError('NCCL error in: x.cpp:1, unhandled system error\nLast error:\nNo space left')

    # No real store: its threads would go on in this process, and processes forked from it later would hang
    monkeypatch.setattr(distributed, 'rendezvous', lambda *_, **__: iter([(dist.HashStore(), 0, 1)]))
    monkeypatch.setattr(dist, 'init_process_group', fail)
    with pytest.raises(InputError) as error:
        init_process_group('cpu', timeout=1)
    assert str(error.value) == ('process 0 of 1: NCCL did not start: NCCL error in: x.cpp:1, unhandled system error '
                                'Last error: No space left')
