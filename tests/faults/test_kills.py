"""SIGKILL at random moments: a resumed run has the same result as an undisturbed one."""
import os
import random
import shutil
import signal
import time
from concurrent.futures import ProcessPoolExecutor

import pytest

from outputs import assert_same, result
from runs import SAVES, Run, at_file_operation, fork


def at_a_moment(draw, console):
    """Return wait(run, folder), which waits for a random moment between the first line and the last evaluation."""
    lines, delay = 1 + draw.randrange(console.count('\n') - 8), draw.uniform(0, 0.2)

    def wait(run, folder):
        run.wait_for(lambda: run.read('out').count('\n') >= lines)
        time.sleep(delay)

    return wait


def while_saving(draw, saves):
    """Return wait(run, folder), which waits for a random moment while a checkpoint is written."""
    save, delay = draw.randrange(saves), draw.uniform(0, 0.03)

    def wait(run, folder):
        temporary = folder / 'checkpoint.pth.tmp'
        for _ in range(save):
            run.wait_for(temporary.exists)
            run.wait_for(lambda: not temporary.exists())
        run.wait_for(temporary.exists)
        time.sleep(delay)

    return wait


def between_file_operations(draw, saves, folder):
    """Return before(rank), which makes the first process kill itself before a random file operation of a save."""
    save, operation, count = draw.randrange(saves - 1), draw.randrange(4), [0, 0]

    def is_it(event, name):
        if event == 'open' and name == 'checkpoint.pth.tmp':
            count[:] = count[0] + 1, 0
        elif count[0]:
            count[1] += 1
        return count[0] > save and count[1] >= operation

    def before(rank):
        if rank == 0:
            at_file_operation(folder, lambda: os.kill(os.getpid(), signal.SIGKILL), is_it)

    return before


def killed_and_resumed(i, processes, seed, folder, undisturbed):
    """Kill a run, then run the same command to its end. Return whether the run was killed while saving."""
    draw = random.Random(f'{seed} {processes} {i}')
    victims = draw.choice([[0], [1], [0, 1]] if processes == 2 else [[0]])
    saves, before, wait = SAVES[processes], None, None
    if i % 2 == 0:
        wait = at_a_moment(draw, (undisturbed / 'console.txt').read_text())
    elif i % 4 == 1:
        wait, victims = while_saving(draw, saves), victims if 0 in victims else [0]
    else:
        before = between_file_operations(draw, saves, folder)
    with Run(folder, processes=processes, before=before) as run:
        if wait:
            wait(run, folder)
            for victim in victims:
                run.processes[victim].kill()
        else:
            run.processes[0].join(120)
            victims = [0]
        statuses = run.finish(60)                      # a process that lost its peer ends by itself
        assert 0 not in statuses and {statuses[victim] for victim in victims} == {-signal.SIGKILL}, f'{statuses}\n{run}'
    saving = (folder / 'checkpoint.pth.tmp').exists()
    with Run(folder, processes=processes) as run:
        run.ends_well()
        assert_same(result(folder), result(undisturbed), f'run {i} of {processes}\n{run}')
    shutil.rmtree(folder)
    return saving or before is not None


@pytest.mark.parametrize('processes', [1, 2])
def test_sigkill(processes, undisturbed, seed, tmp_path, table):
    reference = undisturbed(processes)
    with ProcessPoolExecutor(2 // processes, fork) as pool:
        saving = list(pool.map(killed_and_resumed, range(10), [processes] * 10, [seed] * 10,
                               [tmp_path / str(i) for i in range(10)], [reference] * 10))
    assert sum(saving) >= 4
    table(10, f'SIGKILL at a random moment, {processes} process{"es" if processes > 1 else ""}, '
              f'{sum(saving)} times while saving; then resumed')
