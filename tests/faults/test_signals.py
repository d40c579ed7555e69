"""SIGTERM, SIGUSR1, SIGUSR2, SIGINT: all processes save and exit with 143 or 130; resuming is exact."""
import os
import signal
import time

import pytest

from outputs import assert_same, result
from runs import Run

STOPPED = 128 + signal.SIGTERM
EVALUATION = 'Epoch: [0/2] [10/10]', 'Test: [1/2]'     # after these lines, one starts or continues
STOPS = [                                              # call, signal, ranks that get it, line after which it is sent
    (os.kill, signal.SIGTERM, [1], 'Epoch: [0/2] [ 2/10]'),
    (os.kill, signal.SIGUSR1, [0], 'Epoch: [0/2] [ 5/10]'),
    (os.killpg, signal.SIGUSR2, [1], 'Epoch: [0/2] [ 8/10]'),                # DataLoader workers receive it, too
    (os.kill, signal.SIGTERM, [1], EVALUATION[0]),
    (os.killpg, signal.SIGUSR1, [0, 1], EVALUATION[1]),
    (os.kill, signal.SIGUSR2, [0], EVALUATION[1]),
    (os.killpg, signal.SIGTERM, [0, 1], 'Epoch: [1/2] [ 3/10]'),
    (os.kill, signal.SIGTERM, [0, 1], 'Epoch: [1/2] [ 6/10]'),
    (os.killpg, signal.SIGINT, [0, 1], 'Epoch: [1/2] [ 9/10]')]            # as Ctrl-C does


def heed_ctrl_c(rank):
    """Also if pytest runs in the background, where a shell makes it ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def steps(run):
    return [line for line in run.read('out').splitlines() if line.startswith(('Epoch', 'Test'))]


def test_signal_to_any_process(undisturbed, tmp_path, table):
    seconds, evaluates = [], False
    for send, signum, ranks, line in STOPS:
        with Run(tmp_path, processes=2, before=heed_ctrl_c) as run:
            run.wait_for_line(line)
            start = time.monotonic()
            for rank in ranks:
                send(run.pids[rank], signum)
            assert run.finish(30) == [128 + signum if signum == signal.SIGINT else STOPPED] * 2, str(run)
            seconds.append(time.monotonic() - start)
            assert not any(word in run.read('err', rank) for rank in (0, 1) for word in ('rror', 'Traceback')), str(run)
            assert not evaluates or steps(run)[0].startswith('Test'), run  # an interrupted evaluation is done first
            evaluates = line in EVALUATION
            assert not evaluates or 'Max accuracy' not in run.read('out'), str(run)
    with Run(tmp_path, processes=2) as run:
        run.ends_well()
    assert_same(result(tmp_path), result(undisturbed(2)))
    table(len(STOPS), 'SIGTERM, SIGUSR1, SIGUSR2 or SIGINT to one or both of 2 processes, or also to DataLoader '
                      f'workers, in training and in evaluation: all exit with 143 or 130 within {max(seconds):.1f} s; '
                      'then resumed')


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT])
def test_second_signal(signum, tmp_path, table):
    with Run(tmp_path, processes=2, before=heed_ctrl_c) as run:
        run.wait_for_line('Epoch: [0/2] [ 6/10]')
        os.kill(run.pids[1], signal.SIGSTOP)           # so that no step can be finished
        os.kill(run.pids[0], signum)
        time.sleep(1)
        assert run.processes[0].is_alive(), str(run)
        os.kill(run.pids[0], signum)
        run.processes[0].join(1)
        assert run.processes[0].exitcode in (-signum, 128 + signum), str(run)
    table(1, f'a second {signum.name} to a process that cannot finish its step: it exits at once')
