import csv

import pytest
import torch

from measuring import size_bias
from measuring.benchmark import Protocol
from measuring.size_bias import FORMS, pass_of


@pytest.mark.parametrize('length', [16, 21])
def test_forms(length):
    """All forms of the bias have the same output and gradients; attention without it differs."""
    protocol = Protocol(None, 3, torch.device('cpu'), torch.float32, None, 1, 0.01, train=True)
    results = {name: pass_of(form, length, protocol)() for name, form in FORMS.items()}
    for name in 'padded mask', 'channel':
        for found, expected in zip(results[name], results['mask'], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(results['mask'][0], results['no bias'][0], atol=1e-2)


def test_table(tmp_path, capsys):
    file = tmp_path / 'figures.csv'
    size_bias.main(['--device', 'cpu', '--batch-size', '2', '--lengths', '9', '12', '--windows', '2',
                    '--window-seconds', '0.01', '--csv', str(file)])
    with open(file, newline='') as rows:
        names = [row['model'] for row in csv.DictReader(rows) if float(row['median']) > 0]
    assert names == [f'{name}, {length} tokens' for length in (9, 12) for name in FORMS]
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
