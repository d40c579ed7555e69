import json

import pytest

from outputs import events, log_lines
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
