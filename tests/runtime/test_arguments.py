import argparse

import pytest
import timm

from runtime.arguments import (ArgumentParser, block_numbers, fraction, keep_rate, key_value, natural, non_negative,
                               positive, timm_model, token_counts, with_dashes, within)


@pytest.mark.parametrize('kind, right, wrong', [
    (key_value, {'a=1': ('a', 1), 'a=(1, 2)': ('a', (1, 2)), 'a=b=c': ('a', 'b=c'), 'a=': ('a', ''),
                 'a=True': ('a', True)}, ['a', '=1', 'a-b=1', '']),
    (within(1, 3, int), {'1': 1, '3': 3}, ['0', '4', '1.5', 'x', '', '9' * 400]),
    (within(0.5), {'0.5': 0.5, '1e9': 1e9}, ['0.4', 'inf', 'nan']),
    (positive(int), {'1': 1}, ['0', '-1', '0.5']), (positive(float), {'1e-300': 1e-300}, ['0', '-1', 'inf', 'nan']),
    (natural, {'0': 0, '2147483648': 2 ** 31}, ['-1', '2147483649']),
    (keep_rate, {'1': 1., '0.7': 0.7}, ['0', '1.01', 'nan']),
    (fraction, {'0': 0., '1': 1.}, ['-0.1', '1.1']), (non_negative, {'0': 0.}, ['-1', 'inf']),
    (block_numbers, {'3,6,9': (3, 6, 9), '(3, 6,)': (3, 6), '[2]': (2,)}, ['', '3;6', '[3,6', 'a'])])
def test_types(kind, right, wrong):
    assert {text: kind(text) for text in right} == right
    for text in wrong:
        with pytest.raises((ValueError, argparse.ArgumentTypeError)):
            kind(text)


def test_token_counts(tmp_path):
    """From the command line or from a file."""
    assert token_counts('197,150,9') == (197, 150, 9)
    file = tmp_path / 'counts.json'
    file.write_text('[197, 150, 9]')
    assert token_counts(str(file)) == (197, 150, 9)
    for text in ('{}', '[1.5]', '[true]', '3', '', '[197'):
        file.write_text(text)
        with pytest.raises(argparse.ArgumentTypeError, match='counts.json'):
            token_counts(str(file))
    for text, reason in ((str(tmp_path / 'no.json'), 'No such file'), ('197;3', "'197;3': it is neither a list of")):
        with pytest.raises(argparse.ArgumentTypeError, match=reason):
            token_counts(text)


def test_one_line_per_error(capsys):
    parser = ArgumentParser(prog='program')
    parser.add_argument('--number', type=within(0, 1))
    for text, message in (('2', 'must be from 0 to 1, not 2'), ('x', "invalid float value: 'x'")):
        with pytest.raises(SystemExit) as exit_:
            parser.parse_args(['--number', text])
        assert exit_.value.code == 2
        assert capsys.readouterr().err == f'program: error: argument --number: {message}\n'


def test_with_dashes():
    assert with_dashes('--base_keep_rate=a_b') == '--base-keep-rate=a_b' and with_dashes('--x') == '--x'


def test_old_names_of_timm(capsys):
    """Each becomes the name that timm maps it to, of which everything is known; or it is one error."""
    renamed, lost = timm.models.get_deprecated_models(), 0
    for old, new in renamed.items():
        try:
            assert timm_model(old) == new and timm.get_pretrained_cfg(new)
        except argparse.ArgumentTypeError:             # two weights that timm has no longer
            lost += 1
    assert len(renamed) > 200 and lost <= 2
    assert 'note: vit_base_patch16_224_in21k is an old name of vit_base_patch16_224.augreg_in21k\n' in capsys.readouterr().out


def test_models_that_timm_lacks_or_does_not_describe(monkeypatch):
    monkeypatch.setitem(timm.models._registry._model_entrypoints, 'nameless', lambda **_: None)
    monkeypatch.setitem(timm.models._registry._deprecated_models, 'removed', None)
    for name, reason in (('nameless', 'no configuration'), ('removed', 'removed'), ('absent', 'neither'),
                         ('vit_tiny_patch16_224.no_tag', 'no_tag')):
        with pytest.raises(argparse.ArgumentTypeError, match=reason):
            timm_model(name)
