"""A quick check with one fault of each main kind: `python -m pytest tests/faults/smoke.py`.

SIGKILL while saving and elsewhere, SIGTERM, a full disk, a truncated checkpoint, and a checkpoint that contains code.
The other files in this folder test all faults.
"""
import os
import signal

import pytest

from outputs import assert_same, result
from runs import Run
from test_files import (CHECKPOINT, WAYS, cut, damaged_and_resumed, disk, ends_for_lack_of_space, fill,  # noqa: F401
                        killed_before_its_last_save, refuses_malicious_checkpoint, resize, write_zip)
from test_kills import killed_and_resumed


@pytest.mark.parametrize('i', [0, 1], ids=['elsewhere', 'while saving'])
def test_sigkill(i, undisturbed, seed, tmp_path):
    killed_and_resumed(i, 1, seed, tmp_path / 'run', undisturbed(1))


def test_sigterm(undisturbed, tmp_path):
    with Run(tmp_path) as run:
        run.wait_for_line('Epoch: [0/2] [ 7/20]')
        os.kill(run.pids[0], signal.SIGTERM)
        assert run.finish(30) == [128 + signal.SIGTERM], str(run)
    with Run(tmp_path) as run:
        run.ends_well()
    assert_same(result(tmp_path), result(undisturbed(1)))


def test_full_disk(disk, undisturbed):                                     # noqa: F811, a fixture
    resize(disk, 6 * CHECKPOINT)
    with Run(disk) as run:
        run.wait_for_line('Epoch: [1/2] [20/20]')
        fill(disk)
        ends_for_lack_of_space(run, disk)
    (disk / 'filler').unlink()
    with Run(disk) as run:
        run.ends_well()
    assert_same(result(disk), result(undisturbed(1)))


def test_cut_checkpoint(killed_before_its_last_save, undisturbed, tmp_path):           # noqa: F811, a fixture
    left, console = damaged_and_resumed(cut, 0.6, killed_before_its_last_save, tmp_path / 'run')
    assert 'the previous one is used' in console
    assert_same(left, result(undisturbed(1)))


def test_malicious_checkpoint(tmp_path):
    refuses_malicious_checkpoint(write_zip, WAYS[:1], tmp_path)
