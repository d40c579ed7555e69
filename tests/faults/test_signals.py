"""SIGTERM and its like: all processes save and exit with 143, and the resumed run ends as if nothing had happened."""
import os
import signal
import time

import torch

from runs import Run, result, same

STOPS = [                                              # signal, to whom, once the console shows this line
    (signal.SIGTERM, [1], 'Epoch: [0] [ 3/10]'),
    (signal.SIGUSR1, [0], 'Epoch: [0] [ 6/10]'),
    (signal.SIGUSR2, [1], 'Epoch: [0] [ 9/10]'),
    (signal.SIGTERM, [0], 'Epoch: [0] [10/10]'),       # so, in the evaluation
    (signal.SIGTERM, [1], 'Test: [1/2]'),
    (signal.SIGTERM, [0, 1], 'Epoch: [1] [ 2/10]'),
    (signal.SIGUSR1, [0, 1], 'Epoch: [1] [ 6/10]')]


def stop(run, signum, ranks, line, send):
    """Send a signal once a line is there. → seconds until all processes have ended, with 143 and without an error."""
    run.wait_for_line(line)
    start = time.monotonic()
    for rank in ranks:
        send(run.pids[rank], signum)
    assert run.finish(30) == [128 + signal.SIGTERM] * 2, run
    assert not any('rror' in run.read('err', rank) for rank in (0, 1)), run
    return time.monotonic() - start


def stopped_and_resumed(folder, send):
    seconds = []
    for signum, ranks, line in STOPS:
        with Run(folder, processes=2) as run:
            seconds.append(stop(run, signum, ranks, line, send))
            assert 'damaged' not in run.read('out') + run.read('err')
    with Run(folder, processes=2) as run:
        run.ends_well()
    return seconds


def test_a_signal_to_one_process_stops_all_of_them(undisturbed, tmp_path, table):
    seconds = stopped_and_resumed(tmp_path, os.kill)
    assert same(result(tmp_path), result(undisturbed(2)))
    table(len(STOPS), 'SIGTERM, SIGUSR1 or SIGUSR2 to one or both of 2 processes, in training and in evaluation: '
                      f'143 within {max(seconds):.1f} s; then resumed')


def test_a_signal_to_loader_workers_too(undisturbed, tmp_path, table):
    stopped_and_resumed(tmp_path, os.killpg)
    assert same(result(tmp_path), result(undisturbed(2)))
    table(len(STOPS), 'the same to a whole process group, DataLoader workers included')


def test_a_run_stopped_in_evaluation_begins_with_it(undisturbed, tmp_path, table):
    with Run(tmp_path, processes=2) as run:
        stop(run, signal.SIGTERM, [1], 'Epoch: [0] [10/10]', os.kill)
        assert 'Max accuracy' not in run.read('out')
    assert torch.load(tmp_path / 'checkpoint.pth', weights_only=True)['best_acc1'] == 0
    with Run(tmp_path, processes=2) as run:
        run.ends_well()
        steps = [line for line in run.read('out').splitlines() if line.startswith(('Epoch', 'Test'))]
    assert steps[0].startswith('Test') and not any(line.startswith('Epoch: [0]') for line in steps)
    assert same(result(tmp_path), result(undisturbed(2)))
    table(1, 'SIGTERM in the evaluation of an epoch: the resumed run begins with it')


def test_a_second_signal_ends_at_once(undisturbed, tmp_path, table):
    with Run(tmp_path, processes=2) as run:
        run.wait_for_line('Epoch: [0] [ 6/10]')
        os.kill(run.pids[1], signal.SIGSTOP)           # so that no step will ever be finished
        os.kill(run.pids[0], signal.SIGTERM)
        time.sleep(1)
        assert run.processes[0].is_alive()
        os.kill(run.pids[0], signal.SIGTERM)
        run.processes[0].join(1)
        assert run.processes[0].exitcode in (-signal.SIGTERM, 128 + signal.SIGTERM), run
    with Run(tmp_path, processes=2) as run:
        run.ends_well()
    assert same(result(tmp_path), result(undisturbed(2)))
    table(1, 'a second SIGTERM, while the run cannot finish its step: it ends at once; then resumed')
