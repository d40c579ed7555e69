import json

import pytest

from outputs import events, log_lines, tensorboard
from runtime.logger import RunLog


@pytest.mark.parametrize('torn', [1, 0])
def test_log_of_an_interrupted_run(torn, tmp_path):
    lines = [{'speed_gmacs': 1.0}, ['a', 'note'], *({'epoch': epoch} for epoch in range(4))]
    (tmp_path / 'log.txt').write_bytes(b'\xff\n' + b''.join(json.dumps(line).encode() + b'\n' for line in lines)
                                       + b'{"epoch": 4, "tr' * torn + (1 - torn) * b'{"epoch": null}')
    with RunLog(tmp_path, 2, resumed=True):
        pass
    assert log_lines(tmp_path) == lines[:4]


def test_flags_that_are_not_utf_8(tmp_path):
    """The name of a folder may be any bytes."""
    with RunLog(tmp_path, 0, flags={'output_dir': '\udcff', 'batch_size': 8}):
        pass
    text, = (value.tensor.string_val[0].decode() for event in events(tmp_path) for value in event.summary.value)
    assert text.splitlines()[2:] == ['| --batch-size | 8 |', r'| --output-dir | \udcff |']


def test_files_of_two_runs_within_a_second(tmp_path, monkeypatch):
    """None replaces the other's, and their order is that of the runs."""
    monkeypatch.setattr('tensorboardX.event_file_writer.time.time', lambda: 1.8e9)
    for epoch in range(3):
        with RunLog(tmp_path, epoch, epoch, resumed=True) as log:
            log.log_epoch(epoch, {'test_acc1': epoch}, 1)
            log.log_step(epoch + 1, {'loss': epoch})
    assert tensorboard(tmp_path)['test/acc1'] == [(0, 0.), (1, 1.), (2, 2.)]
    assert tensorboard(tmp_path / 'steps')['step/loss'] == [(1, 0.), (2, 1.), (3, 2.)]
