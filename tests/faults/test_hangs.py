"""Failures that could make other processes hang: none hangs, and the first process prints an error with the cause."""
import os
import shutil
import signal

import pytest

from cluster import children
from outputs import assert_same, result
from runs import Run


def hangs(run):
    """Stop the second process. The error of the first process names it."""
    os.kill(run.pids[1], signal.SIGSTOP)
    run.processes[0].join(40)
    assert run.processes[0].exitcode == 1 and 'process 1' in run.error(), str(run)


def dies(run):
    os.kill(run.pids[1], signal.SIGKILL)
    assert run.finish(40) == [1, -signal.SIGKILL] and 'process 1' in run.error(), str(run)


def loses_a_worker(rank):
    """Kill the DataLoader workers of process `rank`. The first process reports it, and both processes end."""
    def act(run):
        for worker in children(run.pids[rank]):
            os.kill(worker, signal.SIGKILL)
        assert run.finish(40) == [1, 1] and 'worker' in run.error(), str(run)

    return act


FAILURES = {'SIGSTOP to one of 2 processes, --dist-timeout 10': (hangs, 'Epoch: [0/2] [ 5/10]'),
            'SIGKILL to one of 2 processes': (dies, 'Epoch: [0/2] [ 9/10]'),
            'SIGKILL to a DataLoader worker of the first process': (loses_a_worker(0), 'Epoch: [1/2] [ 2/10]'),
            'SIGKILL to a DataLoader worker of the second process': (loses_a_worker(1), 'Epoch: [1/2] [ 6/10]')}


def test_process_that_hangs_or_dies(undisturbed, tmp_path, table):
    for what, (act, line) in FAILURES.items():
        with Run(tmp_path, '--dist-timeout', '10', processes=2) as run:
            run.wait_for_line(line)
            act(run)
    with Run(tmp_path, processes=2) as run:
        run.ends_well()
    assert_same(result(tmp_path), result(undisturbed(2)))
    for what in FAILURES:
        table(1, f'{what}: reported on the first process\'s console, no hang; then resumed')


@pytest.mark.parametrize('rank', [0, 1])
def test_data_set_that_vanishes(rank, image_folder, tmp_path, table):
    trees = [shutil.copytree(image_folder, tmp_path / f'tree{number}') for number in range(2)]
    with Run(tmp_path / 'run', '--batch-size', '4', '--epochs', '100', processes=2,
             of_rank=lambda rank: ['--data-path', trees[rank]]) as run:
        run.wait_for_line('Epoch: [1/')
        trees[rank].rename(tmp_path / 'gone')
        assert 0 not in run.finish(60), str(run)
        assert f'tree{rank}/' in run.error(), str(run)
    table(1, f'the data set of process {rank} of 2 is removed: the error of the first process names the file')


@pytest.mark.parametrize('flags, noticed', [(['--print-freq', '1'], 'logged'), (['--print-freq', '1000'], 'saved')],
                         ids=['logged', 'saved'])
def test_non_finite_loss(flags, noticed, tmp_path, table):
    with Run(tmp_path, '--warmup-epochs', '0', '--lr', '1e20', '--checkpoint-interval', '2', *flags,
             processes=2) as run:
        assert run.finish() == [1, 1], str(run)
        assert 'the loss of step 2 is not finite' in run.error(), str(run)
    assert not list(tmp_path.glob('*.pth'))
    table(1, f'a non-finite loss, detected when a step is {noticed}: one line names the step, nothing is saved')
