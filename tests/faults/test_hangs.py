"""What a process may wait for in vain: an error on the first process's console that names the cause, and no hang."""
import os
import shutil
import signal
from pathlib import Path

import pytest

from runs import Run, result, same


def children(pid):
    return [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


@pytest.mark.parametrize('signum', [signal.SIGSTOP, signal.SIGKILL])
def test_a_process_that_hangs_or_dies_is_named(signum, undisturbed, tmp_path, table):
    with Run(tmp_path, '--dist-timeout', '10', processes=2) as run:
        run.wait_for_line('Epoch: [0] [ 6/10]')
        os.kill(run.pids[1], signum)
        run.processes[0].join(40)
        assert run.processes[0].exitcode == 1, run
        assert 'process 1' in run.error(), run
    with Run(tmp_path, processes=2) as run:
        run.ends_well()
    assert same(result(tmp_path), result(undisturbed(2)))
    table(1, f'{signum.name} to one of 2 processes, --dist-timeout 10: the other names it; then resumed')


@pytest.mark.parametrize('processes', [1, 2])
def test_a_loader_worker_that_dies(processes, undisturbed, tmp_path, table):
    with Run(tmp_path, processes=processes) as run:
        run.wait_for_line('Epoch: [1] [ 4/')
        victim = run.pids[-1]
        for worker in children(victim):
            os.kill(worker, signal.SIGKILL)
        assert run.finish(40) == [1] * processes, run
        assert 'worker' in run.error(), run
    with Run(tmp_path, processes=processes) as run:
        run.ends_well()
    assert same(result(tmp_path), result(undisturbed(processes)))
    table(1, f'SIGKILL to a DataLoader worker of process {processes - 1}: the console says so; then resumed')


@pytest.mark.parametrize('rank', [0, 1])
def test_a_data_set_that_vanishes_under_one_process(rank, image_folder, tmp_path, table):
    trees = [shutil.copytree(image_folder, tmp_path / f'tree{number}') for number in range(2)]
    with Run(tmp_path / 'run', '--batch-size', '4', '--epochs', '100', processes=2,
             of_rank=lambda rank: ['--data-path', trees[rank]]) as run:
        run.wait_for_line('Epoch: [1]')
        trees[rank].rename(tmp_path / 'gone')
        assert 0 not in run.finish(60), run
        assert f'tree{rank}/' in run.error(), run
    table(1, f'a data set that vanishes under process {rank} of 2: the first one names the file')
