import json

import pytest

from outputs import log_lines
from runtime.logger import RunLog


@pytest.mark.parametrize('torn', [1, 0])
def test_log_of_an_interrupted_run(torn, tmp_path):
    lines = [{'speed_gmacs': 1.0}, ['a', 'note'], *({'epoch': epoch} for epoch in range(4))]
    (tmp_path / 'log.txt').write_bytes(b'\xff\n' + b''.join(json.dumps(line).encode() + b'\n' for line in lines)
                                       + b'{"epoch": 4, "tr' * torn + (1 - torn) * b'{"epoch": null}')
    with RunLog(tmp_path, 2, resumed=True):
        pass
    assert log_lines(tmp_path) == lines[:4]
