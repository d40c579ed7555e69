import torch

import speed_test
from measuring.benchmark import Protocol
from measuring.profile import covered, profile_pass


def test_covered_time():
    assert covered([(0, 4), (1, 2), (3, 6), (8, 9)]) == 7
    assert covered([]) == 0


def test_kernels_of_a_pass():
    protocol = Protocol(32, 2, torch.device('cpu'), torch.float32, None, 1, 0.01)
    a = torch.randn(300, 300)
    text = profile_pass(lambda: a.mm(a).mm(a), protocol)
    assert text.startswith('2 kernels in a pass of ') and str(protocol) in text.splitlines()[0]
    assert ' 6  ' in next(line for line in text.splitlines() if 'aten::mm' in line)        # in three passes


def test_profile_of_training_steps(tmp_path, capsys):
    """Of each model, in one file, which a second call replaces."""
    file = tmp_path / 'kernels.txt'
    models = [f'deit_tiny_patch16_shrink_base@{rate}:32' for rate in (0.5, 0.7)]
    for _ in range(2):
        assert speed_test.main(['--models', *models, '--device', 'cpu', '--train', '--batch-size', '2', '--windows',
                                '1', '--window-seconds', '0.01', '--profile', str(file)]) == 0
    text = file.read_text()
    assert [text.count(f'{name}: ') for name in ('deit_tiny_patch16_shrink_base@0.5',
                                                 'deit_tiny_patch16_shrink_base@0.7')] == [1, 1]
    assert 'whole training steps' in text and 'aten::_fused_adamw_' in text
