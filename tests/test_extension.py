"""A researcher's own score and way, which are entered in the tables and nowhere else."""
import csv
import functools
import math

import pytest
import torch

import curve
import export
import main
import speed_test
from conftest import UNCHANGED
from evit.reorganization import SCORES, WAYS, Reorganization, Way, reorganize_tokens
from outputs import checkpoint, log_lines

FLAGS = ['--model', 'deit_tiny_patch16_224', '--model-kwargs', 'patch_size=4', 'embed_dim=32', 'num_heads=2', 'depth=4',
         '--input-size', '16', '--num_workers', '0', '--device', 'cpu', '--data-set', 'DIGITS']
OWN = ['--base_keep_rate', '0.3', '--token-score', 'value_norm', '--token-way', 'average']


def value_norm(q, k, v, scale, bias=None):
    return v.float().norm(dim=-1).mean(dim=1)


def average_tokens(tokens, scores, k, sizes=None):
    remaining, idx = reorganize_tokens(tokens, scores, k)
    others = torch.ones_like(scores).scatter(1, idx, 0.) / (tokens.shape[1] - k)
    return torch.cat([remaining, others.unsqueeze(1).to(tokens.dtype) @ tokens], dim=1), Reorganization(idx)


@pytest.fixture
def own_tables(monkeypatch):
    monkeypatch.setitem(SCORES, 'value_norm', value_norm)
    monkeypatch.setitem(WAYS, 'average', Way(average_tokens, 'averaged', extra_tokens=1))


def test_own_score_and_way(own_tables, tmp_path, capsys, monkeypatch):
    """They train, resume, are evaluated, drawn, exported and measured, and are told from others."""
    run, saved = str(tmp_path / 'run'), str(tmp_path / 'run' / 'checkpoint.pth')
    train = [*FLAGS, *OWN, *UNCHANGED, '--batch-size', '32', '--warmup-epochs', '0', '--shrink_start_epoch', '0',
             '--lr', '2e-2', '--no-model-ema', '--output_dir', run]
    main.main(main.parse_args([*train, '--epochs', '1']))
    main.main(main.parse_args([*train, '--epochs', '2', '--resume', saved]))
    assert checkpoint(run)['args']['token_score'] == 'value_norm' and checkpoint(run)['args']['token_way'] == 'average'
    accuracy = log_lines(run)[1]['test_acc1']
    capsys.readouterr()

    # Flags that are not given are those of the checkpoint; others are reported, and change the result
    evaluate = ['--eval', '--resume', saved, *FLAGS[9:]]
    main.main(main.parse_args(evaluate))
    printed = capsys.readouterr().out
    assert f'{accuracy:.3f}' in printed and 'note' not in printed
    for other in (['--token-score', 'class_attention'], ['--token-way', 'drop']):
        main.main(main.parse_args([*evaluate, *other]))
        printed = capsys.readouterr().out
        assert f'{accuracy:.3f}' not in printed and f'trained with {other[0].rpartition("-")[2]}' in printed

    folder = tmp_path / 'curve'
    measure = functools.partialmethod(curve.Evaluation.measure_speed, windows=1, window_seconds=0.01)
    monkeypatch.setattr(curve.Evaluation, 'measure_speed', measure)
    curve.main(curve.parse_args(['--resume', saved, '--keep-rates', '0.3', '--token-ways', 'average', 'drop',
                                 *FLAGS[9:], '--output_dir', str(folder)]))
    with open(folder / 'curve.csv') as file:
        rows = {row['way']: row for row in csv.DictReader(file)}
    assert math.isclose(float(rows['average']['top1']), accuracy) and rows['drop']['top1'] != rows['average']['top1']
    with pytest.raises(main.InputError, match='is of score value_norm, this run has class_attention'):
        curve.main(curve.parse_args(['--resume', saved, '--keep-rates', '0.3', '--token-score', 'class_attention',
                                     *FLAGS[9:], '--output_dir', str(folder)]))

    main.main(main.parse_args(['--visualize-mask', '--n-visualization', '2', '--resume', saved, *FLAGS[9:],
                               '--output_dir', str(tmp_path / 'pictures')]))
    assert (tmp_path / 'pictures' / 'attention.png').exists()

    args, state = export.parse_args(['--resume', saved, '--format', 'pt2', '--output', str(tmp_path / 'a.pt2')])
    model = export.build(args, state)
    assert (model.token_settings.score, model.token_settings.way) == ('value_norm', 'average')
    capsys.readouterr()
    export.main(['--resume', saved, '--format', 'pt2', '--output', str(tmp_path / 'a.pt2')])
    assert 'same class' in capsys.readouterr().out
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        exported, = torch.export.load(tmp_path / 'a.pt2').module()(images)
        torch.testing.assert_close(exported, model(images), rtol=1e-4, atol=1e-4)

    assert speed_test.main(['--models', 'deit_tiny_patch16_224@0.5-average:32', '--batch-size', '1', '--windows', '1',
                            '--window-seconds', '0.01', '--reference', '--device', 'cpu']) == 0
    assert '@0.5-average' in capsys.readouterr().out


def test_unknown_names():
    for flag in ('--token-score', '--token-way'):
        with pytest.raises(SystemExit):
            main.parse_args([flag, 'no_such_name'])
