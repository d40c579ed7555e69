import argparse
import errno
import os
import shutil
import threading
from functools import partial

import pytest
import timm
import torch

from conftest import DEIT_TINY, PLAIN
from main import build_model, parse_args
from outputs import assert_same
from runtime.checkpoint import (CheckpointWriter, DamagedCheckpoint, check_classes, load_checkpoint, load_finetune,
                                load_run, load_teacher, load_weights, newest_checkpoint, write_checkpoint)
from runtime.utils import InputError


def weights_of(path):
    return load_checkpoint(str(path))['model']['w'].tolist()


def save(number, folder, best=False):
    write_checkpoint({'model': {'w': torch.tensor([number])}}, folder, best)


def test_checkpoint_round_trip(tmp_path):
    state = {'model': {'w': torch.arange(3.)}, 'epoch': 2, 'args': {'drop_loc': (3, 6, 9), 'lr': 5e-4, 'aa': None}}
    write_checkpoint(state, tmp_path, best=True)
    for name in ('checkpoint.pth', 'best_checkpoint.pth'):
        loaded = load_checkpoint(str(tmp_path / name))
        assert torch.equal(loaded.pop('model')['w'], state['model']['w'])
        assert loaded == {'epoch': 2, 'args': state['args']}
        assert torch.load(tmp_path / name, weights_only=True)['epoch'] == 2        # plain torch.load reads it, too
        assert torch.load(tmp_path / name, weights_only=True, mmap=True)['epoch'] == 2
        assert (tmp_path / name).stat().st_mode & 0o002 == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ['best_checkpoint.pth', 'checkpoint.pth']


def test_copy_of_the_state_while_training_goes_on(tmp_path, monkeypatch):
    """The main thread clones the tensors where they are, and waits for no copy to main memory."""
    threads, to_cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, 'cpu', lambda tensor: threads.append(threading.get_ident()) or to_cpu(tensor))
    weights = torch.tensor([1.], requires_grad=True)
    with CheckpointWriter(tmp_path) as writer:
        writer.write({'model': {'w': weights}, 'args': {'drop_loc': (3, 6)}, 'epoch': 1})
        weights.data += 1
    assert weights_of(tmp_path / 'checkpoint.pth') == [1]
    assert len(threads) == 1 and threads[0] != threading.get_ident()


@pytest.mark.parametrize('links', [True, False])
def test_previous_and_best_checkpoint(links, tmp_path, monkeypatch):
    if not links:
        monkeypatch.setattr(os, 'link', lambda path, target: os.rmdir(path))           # raises OSError
    for number in range(4):
        save(number, tmp_path, best=number == 1)
    files = {path.name: weights_of(path) for path in tmp_path.iterdir()}
    assert files == {'checkpoint.pth': [3], 'previous_checkpoint.pth': [2], 'best_checkpoint.pth': [1]}


@pytest.mark.parametrize('function', ['fsync', 'link'])
def test_failed_save_keeps_the_checkpoints(function, tmp_path, monkeypatch):
    save(0, tmp_path, best=True)
    save(1, tmp_path)

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, fail)
    monkeypatch.setattr(shutil, 'copyfile', fail)
    with pytest.raises(OSError, match='cannot be saved, the last one is kept: No space left on device'):
        save(2, tmp_path, best=True)
    files = {path.name: weights_of(path) for path in tmp_path.iterdir()}
    assert files == {'checkpoint.pth': [1], 'previous_checkpoint.pth': [0], 'best_checkpoint.pth': [0]}


def test_every_cut_and_every_flipped_bit(tmp_path):
    """Each damaged file is refused, or loads the same values if the damage is in padding or an unused field.

    Two bits of each byte are flipped: bit 4, which marks a record as a directory, and one other. All bits would take
    four times as long.
    """
    state = {'model': {'w': torch.arange(5.)}, 'epoch': 3, 'args': {'drop_loc': (3, 6, 9)}}
    write_checkpoint(state, tmp_path)
    path = tmp_path / 'checkpoint.pth'
    whole, refused = path.read_bytes(), 0
    for i in range(len(whole)):
        path.write_bytes(whole[:i])
        with pytest.raises(DamagedCheckpoint, match='checkpoint.pth'):
            load_checkpoint(str(path))
        for bit in {i % 8, 4}:
            path.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << bit]) + whole[i + 1:])
            try:
                assert_same(load_checkpoint(str(path)), state, f'bit {bit} of byte {i}')
            except DamagedCheckpoint:
                refused += 1
    assert refused > len(whole) / 2
    path.write_bytes(whole)
    assert_same(load_checkpoint(str(path)), state)


def test_checkpoint_zipped_by_another_program(tmp_path):
    write_checkpoint({'model': {'w': torch.ones(2)}}, tmp_path)
    shutil.unpack_archive(tmp_path / 'checkpoint.pth', tmp_path / 'a', 'zip')
    path = shutil.make_archive(str(tmp_path / 'again'), 'zip', tmp_path / 'a')         # has entries for folders
    assert load_checkpoint(path)['model']['w'].tolist() == [1, 1]


def test_newest_undamaged_checkpoint(tmp_path, capsys):
    def found():
        return newest_checkpoint(str(tmp_path), torch.device('cpu'))

    assert found() == ''
    save(0, tmp_path)
    assert found() == str(tmp_path / 'checkpoint.pth')
    save(1, tmp_path)
    (tmp_path / 'checkpoint.pth').write_bytes(b'PK damaged')
    assert found() == str(tmp_path / 'previous_checkpoint.pth') and weights_of(found()) == [0]
    assert 'the previous one is used' in capsys.readouterr().out
    assert (tmp_path / 'damaged_checkpoint.pth').read_bytes() == b'PK damaged'
    save(2, tmp_path)                                # replaces the damaged one, not the undamaged one
    assert weights_of(tmp_path / 'previous_checkpoint.pth') == [0]
    for name in ('checkpoint.pth', 'previous_checkpoint.pth'):
        (tmp_path / name).write_bytes(b'PK damaged')
    with pytest.raises(InputError, match='no other to go on from'):
        found()                                      # a long run must not start over
    assert (tmp_path / 'checkpoint.pth').exists()


def test_checkpoint_of_the_original_code_and_bare_state_dict(tmp_path):
    weights = {'w': torch.ones(2)}
    torch.save({'model': weights, 'args': argparse.Namespace(lr=5e-4, drop_loc='(3, 6, 9)')}, tmp_path / 'original.pth')
    torch.save(weights, tmp_path / 'bare.pth')
    assert vars(load_checkpoint(str(tmp_path / 'original.pth'))['args'])['drop_loc'] == '(3, 6, 9)'
    assert torch.equal(load_checkpoint(str(tmp_path / 'bare.pth'))['model']['w'], weights['w'])


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_files_that_are_no_checkpoint_or_contain_code(tmp_path):
    torch.save({'model': Malicious(tmp_path / 'made')}, tmp_path / 'malicious.pth')
    whole = tmp_path / 'whole.pth'
    torch.save({'model': {'w': torch.zeros(1000)}}, whole)
    (tmp_path / 'cut.pth').write_bytes(whole.read_bytes()[:1000])
    (tmp_path / 'text.pth').write_text('no checkpoint')
    (tmp_path / 'empty.pth').touch()
    torch.save([1, 2], tmp_path / 'list.pth')
    torch.save({'model': 3}, tmp_path / 'number.pth')
    torch.save({'model': {0: torch.zeros(1)}}, tmp_path / 'keys.pth')
    torch.save({'state_dict': None, 'epoch': 1}, tmp_path / 'nothing.pth')
    for name in ('malicious', 'cut', 'text', 'empty', 'list', 'number', 'keys', 'nothing', 'absent'):
        with pytest.raises(InputError, match=f'{name}.pth') as error:
            load_checkpoint(str(tmp_path / f'{name}.pth'))
        assert '\n' not in str(error.value)
    assert not (tmp_path / 'made').exists()


def test_weights_of_another_model():
    model = timm.create_model('deit_tiny_patch16_224', img_size=32, num_classes=3)
    weights = model.state_dict()
    before = {key: value.clone() for key, value in weights.items()}
    wrong = {key: value + 1 for key, value in weights.items() if key != 'norm.bias'}
    wrong |= {'head.weight': torch.zeros(7, 192), 'extra': torch.zeros(1)}
    with pytest.raises(InputError, match='norm.bias is missing; extra is not in the model; head.weight is'):
        load_weights(model, wrong, 'a.pth')
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_finetuning_from_another_architecture(tmp_path):
    args = parse_args(PLAIN)
    model = build_model(args, 10)
    weights = timm.create_model('deit_tiny_distilled_patch16_224', img_size=32).state_dict()
    torch.save({'model': weights}, tmp_path / 'distilled.pth')
    with pytest.raises(InputError, match='dist_token is not in the model'):
        load_finetune(model, str(tmp_path / 'distilled.pth'))
    weights = timm.create_model('deit_tiny_patch16_224').state_dict()
    weights.pop('blocks.0.norm1.bias')
    torch.save({'model': weights}, tmp_path / 'lacking.pth')
    with pytest.raises(InputError, match='blocks.0.norm1.bias is missing'):
        load_finetune(model, str(tmp_path / 'lacking.pth'))


def test_finetuning_at_another_resolution_and_head(tmp_path, capsys):
    source = timm.create_model('deit_tiny_patch16_224')
    torch.save({'model': source.state_dict()}, tmp_path / 'deit.pth')
    model = build_model(parse_args([*DEIT_TINY, '--input-size', '288']), 10)
    load_finetune(model, str(tmp_path / 'deit.pth'))
    printed = capsys.readouterr().out
    assert 'dropped head.bias [1000]' in printed and 'resized pos_embed from 14×14 patches to 18×18' in printed
    own = model.state_dict()
    same = [key for key, value in source.state_dict().items() if own[key].shape == value.shape]
    assert len(same) == len(own) - 3 and all(torch.equal(own[key], source.state_dict()[key]) for key in same)
    grid = source.pos_embed[:, 1:].detach().reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=(18, 18), mode='bicubic', align_corners=False)
    torch.testing.assert_close(own['pos_embed'][:, 1:], expected.flatten(2).transpose(1, 2))


def test_notes_on_another_schedule(digits_run, tmp_path, capsys):
    _, folder = digits_run
    settings = vars(parse_args([*PLAIN, '--lr', '1e-4', '--epochs', '7']))
    load_run(str(folder / 'checkpoint.pth'), settings, evaluates_only=False)
    assert 'trained with lr 0.0024, this run has 0.0001' in capsys.readouterr().out
    state = load_checkpoint(str(folder / 'checkpoint.pth'))
    torch.save(state | {'args': argparse.Namespace(**state['args'])}, tmp_path / 'original.pth')
    load_run(str(tmp_path / 'original.pth'), settings, evaluates_only=False)
    out = capsys.readouterr().out
    assert 'trained with lr' not in out and 'trained with epochs' in out


class Named:
    """A data set of which only the names of the classes are known."""

    def __repr__(self):                                # the name of a test must not be an address
        return type(self).__name__

    def __init__(self, *classes, has_class_names=True):
        self.classes, self.has_class_names = list(classes), has_class_names


@pytest.mark.parametrize('classes, differences', [
    (['c1', 'c2', 'zz'], 'c0 is in the checkpoint only, zz is in the data only;'),
    (['c0', 'c2', 'c1'], 'class 1 is c1 in the checkpoint, c2 in the data, class 2 is c2 in the checkpoint, c1 in the'),
    (['c0', 'c1'], 'c2 is in the checkpoint only'), (['c0', 'c1', 'c2', 'c3'], 'c3 is in the data only'),
    (list('abcdefg'), 'c0 is in the checkpoint only, .*, a is in the data only, and 6 more')], ids=str)
def test_other_classes_than_the_checkpoint(classes, differences):
    with pytest.raises(InputError, match='a.pth was trained on other classes.*' + differences) as error:
        check_classes({'classes': ['c0', 'c1', 'c2']}, Named(*classes), 'a.pth')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('checkpoint, dataset', [
    ({'classes': ['a', 'b']}, Named('a', 'b')), ({'classes': ['caf\u00e9']}, Named('cafe\u0301')),
    ({}, Named('a')), ({'classes': None}, Named('a')),
    ({'classes': 1000}, Named('a')), ({'classes': {'a': 0}}, Named('b')),                  # of other programs
    ({'classes': ['a', 'b']}, Named('0', '1', has_class_names=False)),
    ({'classes': ['0', '1'], 'args': {'use_lmdb': True}}, Named('a', 'b'))], ids=str)
def test_classes_that_are_the_same_or_unknown(checkpoint, dataset):
    check_classes(checkpoint, dataset, 'a.pth')


def test_head_of_other_classes_is_reported(tmp_path, capsys):
    model = timm.create_model('vit_tiny_patch16_224', img_size=32, depth=1, num_classes=2)
    torch.save({'model': model.state_dict(), 'classes': ['a', 'b']}, tmp_path / 'a.pth')
    load_finetune(model, str(tmp_path / 'a.pth'), Named('a', 'b'))
    assert 'other classes' not in capsys.readouterr().out
    load_finetune(model, str(tmp_path / 'a.pth'), Named('a', 'c'))
    assert ('the head is taken over, although it was trained on other classes: b is in the checkpoint only'
            in capsys.readouterr().out)
    model.reset_classifier(3)                          # whose head is new
    load_finetune(model, str(tmp_path / 'a.pth'), Named('a', 'c', 'd'))
    assert 'other classes' not in capsys.readouterr().out


def test_teacher_of_other_classes(tmp_path):
    torch.save({'model': timm.create_model('resnet10t', num_classes=2).state_dict(), 'classes': ['a', 'b']},
               tmp_path / 'a.pth')
    load = partial(load_teacher, 'resnet10t', str(tmp_path / 'a.pth'), 2, 32, torch.device('cpu'))
    load(Named('a', 'b'))
    with pytest.raises(InputError, match='other classes'):
        load(Named('b', 'c'))


@pytest.mark.parametrize('number, printed', [(37, ''), (36, 'resized pos_embed from 37×37 patches to 36×36 patches')])
def test_position_embedding_of_the_same_grid(number, printed, tmp_path, capsys):
    """A format that embeds the prefix tokens, too, has the same grid; that is not resizing."""
    model = timm.create_model('vit_small_patch14_reg4_dinov2', img_size=14 * number, depth=1, embed_dim=48, num_heads=2)
    weights = model.state_dict()
    weights['register_tokens'] = weights.pop('reg_token')
    weights |= {'pos_embed': torch.randn(1, 1 + 37 ** 2, 48), 'mask_token': torch.zeros(1, 48)}
    torch.save({'model': weights}, tmp_path / 'a.pth')
    load_finetune(model, str(tmp_path / 'a.pth'))
    out = capsys.readouterr().out
    assert printed in out if printed else 'resized' not in out
