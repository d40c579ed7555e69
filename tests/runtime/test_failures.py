"""Processes that fail in a group: what each prints, and that all end. The processes are forked; torch is loaded."""
import ctypes
import errno
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from runtime import distributed, failures, program
from runtime.failures import Failures, exit_failed
from runtime.utils import InputError

fork = multiprocessing.get_context('fork')


@pytest.fixture(autouse=True)
def short_periods(monkeypatch):
    monkeypatch.setattr(Failures, 'PERIOD', 0.1)
    monkeypatch.setattr(Failures, 'GRACE', 0.3)
    monkeypatch.setattr(program, 'name', 'main.py')


def block():
    """Wait in C, as in a synchronisation with a GPU: no signal handler of Python runs."""
    libc = ctypes.CDLL(None)
    while True:
        libc.sleep(100)


def fail(error):
    exit_failed('main.py', error)


def run(tmp_path, *behaviours, timeout=600, gloo=True, stops=None):
    """Call behaviours[rank]() in a process of a group each; → their exit statuses and what each printed on stderr.

    The first process hosts the store. The status is None if a process has not ended after 20 s, or if it `stops`.
    """
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]

    def process(rank):
        sys.stderr = open(tmp_path / f'{rank}.err', 'w', buffering=1, errors='backslashreplace')     # as Python's
        store = dist.TCPStore('127.0.0.1', port, len(behaviours), is_master=rank == 0)
        if gloo:
            dist.init_process_group('gloo', store=dist.PrefixStore('group', store), rank=rank,
                                    world_size=len(behaviours))
        Failures.group = Failures(dist.PrefixStore('failures', store), rank, len(behaviours), timeout)
        behaviours[rank]()
        sys.exit(0)

    processes = [fork.Process(target=process, args=(rank,)) for rank in range(len(behaviours))]
    for one in processes:
        one.start()
    limit = time.monotonic() + 20
    for rank, one in enumerate(processes):
        if rank != stops:
            one.join(max(0, limit - time.monotonic()))
    statuses = [one.exitcode for one in processes]
    for one in processes:
        one.kill()
    return statuses, [(tmp_path / f'{rank}.err').read_text() for rank in range(len(behaviours))]


@pytest.mark.parametrize('gloo', [True, False])
def test_one_process_fails_while_the_others_wait_in_c(gloo, tmp_path):
    """The first prints the cause, and all end with its status."""
    statuses, printed = run(tmp_path, block, block, lambda: fail(InputError('no such file')), gloo=gloo)
    assert statuses == [2, 2, 2]
    assert printed[:2] == ['main.py: error: process 2: no such file\n', '']


def test_name_of_another_program(tmp_path, monkeypatch):
    monkeypatch.setattr(program, 'name', 'curve.py')
    _, printed = run(tmp_path, block, lambda: exit_failed('curve.py', InputError('no such file')))
    assert printed[0] == 'curve.py: error: process 1: no such file\n'


def test_interrupt_of_one_process(tmp_path):
    statuses, printed = run(tmp_path, block, lambda: fail(KeyboardInterrupt()))
    assert statuses == [130, 130] and printed[0] == 'main.py: error: process 1: interrupted\n'


def test_unexpected_error_of_one_process(tmp_path):
    def divide():
        try:
            1 / 0
        except ZeroDivisionError as error:
            fail(error)

    statuses, printed = run(tmp_path, block, divide)
    assert statuses == [1, 1]
    assert printed[0] == 'main.py: error: process 1: division by zero\n' and 'Traceback' in printed[1]


def test_first_process_fails(tmp_path):
    statuses, printed = run(tmp_path, lambda: fail(InputError('no such file')), block, block)
    assert statuses == [2, 2, 2] and printed == ['main.py: error: no such file\n', '', '']


def test_error_of_nccl_alone(tmp_path, monkeypatch):
    """It has no other cause than itself: no healthy process is blamed, although none reports that it waits."""
    monkeypatch.setattr(dist, 'get_backend', lambda: 'nccl')
    statuses, printed = run(tmp_path, block, block, lambda: fail(dist.DistBackendError('NCCL error: unhandled')))
    assert statuses == [1, 1, 1]
    assert printed[0] == 'main.py: error: the processes lost contact: NCCL error: unhandled\n' and not printed[1]


def test_error_of_nccl_after_a_cause(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, 'get_backend', lambda: 'nccl')
    statuses, printed = run(tmp_path, lambda: fail(dist.DistBackendError('NCCL error: remote process exited')), block,
                            lambda: fail(FloatingPointError('the loss is not finite')))
    assert statuses == [1, 1, 1]
    assert printed[0] == 'main.py: error: process 2: the loss is not finite\n'


@pytest.mark.parametrize('gone', [0, 1, 2])
def test_process_that_dies_while_the_others_wait_in_c(gone, tmp_path):
    """Within --dist-timeout, by its missing signs of life."""
    behaviours = [block, block, block]
    behaviours[gone] = lambda: time.sleep(1) or os.kill(os.getpid(), signal.SIGKILL)
    statuses, printed = run(tmp_path, *behaviours, timeout=2)
    assert statuses == [-9 if rank == gone else 1 for rank in range(3)]
    speaker = 1 if gone == 0 else 0
    assert printed[speaker] == f'main.py: error: process {gone} of 3 ended or no longer answers\n'
    assert not any(text for rank, text in enumerate(printed) if rank != speaker)


def test_process_that_dies_and_a_scheduler_that_ends_the_job(tmp_path, monkeypatch):
    """SIGTERM is a request that the processes cannot agree on if one is gone: the limit is then a short one."""
    monkeypatch.setattr(Failures, 'HURRY', 2.)

    def terminated():
        with distributed.StopSignal(torch.device('cpu')):
            os.kill(os.getpid(), signal.SIGTERM)
            block()

    statuses, printed = run(tmp_path, terminated, lambda: time.sleep(1) or os.kill(os.getpid(), signal.SIGKILL))
    assert statuses == [1, -9] and re.fullmatch('main.py: error: process 1 of 2 ended .*\n', printed[0])


@pytest.mark.parametrize('late', [0, 1])
def test_processes_that_end_well(late, tmp_path):
    """They wait for each other, for instance for the first, which writes a checkpoint, longer than for a silent one."""
    def end(seconds):
        time.sleep(seconds)
        distributed.leave_process_group()

    behaviours = [lambda: end(0), lambda: end(0)]
    behaviours[late] = lambda: end(2.5)
    assert run(tmp_path, *behaviours, timeout=1) == ([0, 0], ['', ''])


def test_process_that_fails_while_another_waits_for_the_end(tmp_path):
    def leave():
        try:
            distributed.leave_process_group()
        except RuntimeError as error:                  # of gloo; NCCL would wait
            fail(error)

    statuses, printed = run(tmp_path, lambda: time.sleep(1) or fail(InputError('a')), leave)
    assert statuses == [2, 2] and printed == ['main.py: error: a\n', '']


def test_first_process_stops(tmp_path):
    """The store that it hosts no longer answers."""
    statuses, printed = run(tmp_path, lambda: time.sleep(1) or os.kill(os.getpid(), signal.SIGSTOP), block, block,
                            timeout=1, stops=0)
    assert statuses == [None, 1, 1]
    assert printed[1:] == ['main.py: error: process 0 of 3 ended or no longer answers\n', '']


def test_checkpoint_is_written_before_the_end(tmp_path):
    """Of a process that learns that another one failed."""
    def write(timeout):
        time.sleep(1.5)
        (tmp_path / 'written').touch()

    def wait():
        Failures.group.finish = write
        block()

    statuses, _ = run(tmp_path, wait, lambda: fail(InputError('no such file')))
    assert statuses == [2, 2] and (tmp_path / 'written').exists()


@pytest.mark.parametrize('name', ['/data/igloo/1.jpg', '\udcff1.png'])
def test_names_of_files(name, tmp_path):
    """That look like an error of gloo, or are not UTF-8."""
    statuses, printed = run(tmp_path, block, lambda: fail(InputError(f'{name} does not decode')))
    shown = name.encode(errors='backslashreplace').decode()
    assert statuses == [2, 2] and printed[0] == f'main.py: error: process 1: {shown} does not decode\n'


def test_full_shared_memory_without_a_name(capsys, monkeypatch):
    """As multiprocessing says it; on another disk it stays what it is."""
    for free, named in ((0, True), (2 ** 20, False)):
        monkeypatch.setattr('shutil.disk_usage', lambda _: SimpleNamespace(free=free))
        with pytest.raises(SystemExit):
            exit_failed('main.py', OSError(errno.ENOSPC, 'No space left on device'))
        assert ('/dev/shm' in capsys.readouterr().err) == named


@pytest.mark.parametrize('error, status, line', [
    (InputError('wrong'), 2, 'wrong'), (FloatingPointError('not finite'), 1, 'not finite'),
    (RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed. '), 1,
     r'DataLoader worker \(pid 7\) is killed by signal: Killed. It may have run out of memory: .*'),
    (RuntimeError('Caught RuntimeError in DataLoader worker process 0.\nTraceback (most recent call last):\n'
                  'RuntimeError: unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device '
                  '(28)'), 1,
     '/dev/shm, .* is full .* --shm-size 8g.*--num-workers 0'),
    (RuntimeError('DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader\'s workers '
                  'are out of shared memory. Please try to raise your shared memory limit.'), 1,
     '/dev/shm, .* is full.*'),
    (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20 MiB.\nMore'), 1,
     'out of memory; lower --batch-size.*'),
    (MemoryError(), 1, 'out of memory; lower --batch-size: MemoryError'),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried"), 1,
     'out of memory; lower --batch-size: .*'),
    (RuntimeError('Too many open files. Communication with the workers is no longer possible.'), 1, 'Too many .*'),
    (ConnectionResetError(104, 'Connection reset by peer'), 1,
     r'a DataLoader worker died: \[Errno 104\] Connection reset by peer It may have run out of memory: .*')])
def test_exit_after_an_expected_failure(error, status, line, capsys, monkeypatch):
    monkeypatch.setattr(failures.Failures, 'group', None)
    with pytest.raises(SystemExit) as exit_:
        exit_failed('main.py', error)
    assert exit_.value.code == status
    assert re.fullmatch(f'main.py: error: {line}\n', capsys.readouterr().err)
