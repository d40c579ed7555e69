"""SIGTERM, SIGUSR1, SIGUSR2: all processes save and exit with 143. The resumed run equals an undisturbed one."""
import os
import signal
import time

from outputs import assert_same, result
from runs import Run

STOPPED = 128 + signal.SIGTERM
EVALUATION = 'Epoch: [0] [10/10]', 'Test: [1/2]'       # after these lines, one starts or continues
STOPS = [                                              # call, signal, ranks that get it, line after which it is sent
    (os.kill, signal.SIGTERM, [1], 'Epoch: [0] [ 2/10]'),
    (os.kill, signal.SIGUSR1, [0], 'Epoch: [0] [ 5/10]'),
    (os.killpg, signal.SIGUSR2, [1], 'Epoch: [0] [ 8/10]'),                # DataLoader workers receive it, too
    (os.kill, signal.SIGTERM, [1], EVALUATION[0]),
    (os.killpg, signal.SIGUSR1, [0, 1], EVALUATION[1]),
    (os.kill, signal.SIGUSR2, [0], EVALUATION[1]),
    (os.killpg, signal.SIGTERM, [0, 1], 'Epoch: [1] [ 3/10]'),
    (os.kill, signal.SIGTERM, [0, 1], 'Epoch: [1] [ 6/10]')]


def steps(run):
    return [line for line in run.read('out').splitlines() if line.startswith(('Epoch', 'Test'))]


def test_signal_to_any_process(undisturbed, tmp_path, table):
    seconds, evaluates = [], False
    for send, signum, ranks, line in STOPS:
        with Run(tmp_path, processes=2) as run:
            run.wait_for_line(line)
            start = time.monotonic()
            for rank in ranks:
                send(run.pids[rank], signum)
            assert run.finish(30) == [STOPPED] * 2, str(run)
            seconds.append(time.monotonic() - start)
            assert not any(word in run.read('err', rank) for rank in (0, 1) for word in ('rror', 'Traceback')), str(run)
            assert not evaluates or steps(run)[0].startswith('Test'), run  # an interrupted evaluation is done first
            evaluates = line in EVALUATION
            assert not evaluates or 'Max accuracy' not in run.read('out'), str(run)
    with Run(tmp_path, processes=2) as run:
        run.ends_well()
    assert_same(result(tmp_path), result(undisturbed(2)))
    table(len(STOPS), 'SIGTERM, SIGUSR1 or SIGUSR2 to one or both of 2 processes, or also to DataLoader workers, in '
                      f'training and in evaluation: all exit with 143 within {max(seconds):.1f} s; then resumed')


def test_second_signal(tmp_path, table):
    with Run(tmp_path, processes=2) as run:
        run.wait_for_line('Epoch: [0] [ 6/10]')
        os.kill(run.pids[1], signal.SIGSTOP)           # so that no step can be finished
        os.kill(run.pids[0], signal.SIGTERM)
        time.sleep(1)
        assert run.processes[0].is_alive(), str(run)
        os.kill(run.pids[0], signal.SIGTERM)
        run.processes[0].join(1)
        assert run.processes[0].exitcode in (-signal.SIGTERM, STOPPED), str(run)
    table(1, 'a second SIGTERM to a process that cannot finish its step: it exits at once')
