import argparse
import os
import random

import numpy as np
import pytest
import timm
import torch

import utils
from utils import InputError


def draws():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_seed_all_is_a_function_of_its_key():
    def drawn(*key):
        utils.seed_all(*key)
        return draws()

    assert drawn(0, 1, 2) == drawn(0, 1, 2)
    different = [drawn(*key) for key in ((0, 1, 2), (0, 2, 1), (1, 1, 2), (0, 1, 2, 1))]
    for values in zip(*different, strict=True):
        assert len(set(values)) == 4                 # in each of the three generators


def test_checkpoint_there_and_back(tmp_path):
    state = {'model': {'w': torch.arange(3.)}, 'epoch': 2, 'args': {'drop_loc': (3, 6, 9), 'lr': 5e-4, 'aa': None}}
    utils.save_checkpoint(state, tmp_path / 'a.pth', tmp_path / 'b.pth')
    for name in ('a.pth', 'b.pth'):
        loaded = utils.load_checkpoint(str(tmp_path / name))
        assert torch.equal(loaded.pop('model')['w'], state['model']['w'])
        assert loaded == {'epoch': 2, 'args': state['args']}
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.pth', 'b.pth']


def test_a_failed_save_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / 'checkpoint.pth'
    utils.save_checkpoint({'model': {'w': torch.zeros(1)}}, path)
    monkeypatch.setattr(torch, 'save', lambda state, file: (file.write_bytes(b'half'), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        utils.save_checkpoint({'model': {'w': torch.ones(1)}}, path)
    assert utils.load_checkpoint(str(path))['model']['w'] == 0


def test_a_checkpoint_of_the_original_and_a_bare_state_dict(tmp_path):
    weights = {'w': torch.ones(2)}
    torch.save({'model': weights, 'args': argparse.Namespace(lr=5e-4, drop_loc='(3, 6, 9)')}, tmp_path / 'original.pth')
    torch.save(weights, tmp_path / 'bare.pth')
    assert vars(utils.load_checkpoint(str(tmp_path / 'original.pth'))['args'])['drop_loc'] == '(3, 6, 9)'
    assert torch.equal(utils.load_checkpoint(str(tmp_path / 'bare.pth'))['model']['w'], weights['w'])


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_what_is_no_checkpoint_is_refused_and_runs_no_code(tmp_path):
    torch.save({'model': Malicious(tmp_path / 'made')}, tmp_path / 'malicious.pth')
    whole = tmp_path / 'whole.pth'
    torch.save({'model': {'w': torch.zeros(1000)}}, whole)
    (tmp_path / 'cut.pth').write_bytes(whole.read_bytes()[:1000])
    (tmp_path / 'text.pth').write_text('no checkpoint')
    (tmp_path / 'empty.pth').touch()
    torch.save([1, 2], tmp_path / 'list.pth')
    torch.save({'model': 3}, tmp_path / 'number.pth')
    for name in ('malicious', 'cut', 'text', 'empty', 'list', 'number', 'absent'):
        with pytest.raises(InputError, match=f'{name}.pth') as error:
            utils.load_checkpoint(str(tmp_path / f'{name}.pth'))
        assert '\n' not in str(error.value)
    assert not (tmp_path / 'made').exists()


def test_weights_of_another_model_are_refused_by_their_keys():
    model = timm.create_model('deit_tiny_patch16_224', img_size=32, num_classes=3)
    weights = model.state_dict()
    before = {key: value.clone() for key, value in weights.items()}
    wrong = {key: value + 1 for key, value in weights.items() if key != 'norm.bias'}
    wrong |= {'head.weight': torch.zeros(7, 192), 'extra': torch.zeros(1)}
    with pytest.raises(InputError, match='norm.bias is missing; extra is not in the model; head.weight is'):
        utils.load_weights(model, wrong, 'a.pth')
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_world_of_several_needs_a_rank(monkeypatch):
    monkeypatch.delenv('RANK', raising=False)
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    with pytest.raises(InputError, match='RANK'):
        utils.init_process_group('cpu', world_size=2)
    assert utils.init_process_group('cpu') == torch.device('cpu') and utils.world_size() == 1


@pytest.mark.parametrize('name, environment, expected', [
    ('cuda', {}, 'cuda:0'), ('cuda:1', {}, 'cuda:1'),
    ('cuda', {'RANK': '3', 'WORLD_SIZE': '4', 'LOCAL_RANK': '1'}, 'cuda:1')])
def test_a_process_takes_the_gpu_of_its_local_rank(name, environment, expected, monkeypatch):
    for key in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    joined, chosen = [], []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda backend, **kwargs: joined.append(backend))
    assert utils.init_process_group(name) == torch.device(expected) and chosen == [torch.device(expected)]
    assert joined == (['nccl'] if environment else [])
