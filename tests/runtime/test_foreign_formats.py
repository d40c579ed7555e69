"""Checkpoints of other code bases, as --finetune and --knn take them."""
import re

import pytest
import timm
import torch

from models_evit import to_evit
from runtime.checkpoint import load_finetune
from runtime.reading import load_checkpoint
from runtime.utils import InputError

SMALL = dict(img_size=32, embed_dim=32, depth=2, num_heads=2, num_classes=5)


def build(name='vit_tiny_patch16_224', **options):
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **options})


def body(model, prefix=''):
    """The weights of a model without its head, under a prefix."""
    return {f'{prefix}{key}': value + 1 for key, value in model.state_dict().items() if not key.startswith('head')}


def load(checkpoint, model, tmp_path):
    """Load a checkpoint into a new model's place; → the keys that have not become 1 more."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save(checkpoint, tmp_path / 'a.pth')
    load_finetune(model, str(tmp_path / 'a.pth'))
    return {key for key, value in model.state_dict().items() if not torch.equal(value, before[key] + 1)}


HEAD = {'head.weight', 'head.bias'}
PROJECTION = {'head.mlp.0.weight': torch.ones(2, 2), 'head.last_layer.weight_g': torch.ones(2)}


def under(prefix, weights):
    return {prefix + key: value for key, value in weights.items()}


def test_teacher_of_dino(tmp_path, capsys):
    model = build()
    student = {key: value + 9 for key, value in body(model, 'module.backbone.').items()}
    teacher = body(model, 'backbone.') | PROJECTION
    checkpoint = {'student': student | under('module.', PROJECTION), 'teacher': teacher, 'optimizer': {'state': {}},
                  'epoch': 100, 'dino_loss': {'center': torch.zeros(1, 4)}}
    assert load(checkpoint, to_evit(model, 0.5), tmp_path) == HEAD
    printed = capsys.readouterr().out
    assert 'the weights under teacher are taken, those under student left out' in printed
    assert 'taken is what is under backbone' in printed and 'left out head (tensors: 2)' in printed
    assert 'no head.weight is taken' in printed


@pytest.mark.parametrize('prefix', ['backbone.', 'module.backbone.', 'model.', 'model._orig_mod.', 'net.encoder.'])
def test_prefixes(prefix, tmp_path):
    model = build()
    assert load({'state_dict': body(model, prefix)}, model, tmp_path) == HEAD


def test_base_encoder_of_moco(tmp_path):
    model = build()
    other = {key: value + 5 for key, value in body(model, 'module.momentum_encoder.').items()}
    projection = {'head.0.weight': torch.ones(3, 3), 'head.1.running_mean': torch.ones(3)}
    state = {**other, **body(model, 'module.base_encoder.'), **under('module.base_encoder.', projection),
             'module.predictor.0.weight': torch.ones(3, 3)}
    assert load({'state_dict': state}, model, tmp_path) == HEAD


DECODER = {'mask_token': torch.ones(1, 1, 8), 'decoder_pos_embed': torch.ones(1, 5, 8),
           'decoder_blocks.0.attn.qkv.weight': torch.ones(24, 8), 'decoder_pred.weight': torch.ones(8, 8)}


@pytest.mark.parametrize('decoder', [DECODER, {}], ids=['whole', 'encoder'])
def test_masked_autoencoder(decoder, tmp_path, capsys):
    model = build()
    assert load({'model': body(model) | decoder}, to_evit(model, 0.5), tmp_path) == HEAD
    names = 'decoder_blocks, decoder_pos_embed, decoder_pred, mask_token (tensors: 4)'
    assert (f'left out {names}' in capsys.readouterr().out) == bool(decoder)
    model, state = build(global_pool='avg'), body(build()) | decoder         # whose tokens get a new norm, as in MAE
    fresh = load({'model': state}, model, tmp_path)
    assert fresh == HEAD | {'fc_norm.weight', 'fc_norm.bias'} and (model.fc_norm.weight == 1).all()
    printed = capsys.readouterr().out
    assert re.search(r'left out .*norm', printed) and 'no fc_norm.weight is taken, it starts anew' in printed


def test_a_norm_that_is_missing_is_no_format(tmp_path):
    model = build(global_pool='avg')
    state = {key: value for key, value in body(model).items() if not key.startswith('fc_norm')}
    with pytest.raises(InputError, match='fc_norm.weight is missing'):
        load({'model': state}, model, tmp_path)


def test_official_layout_of_eva02(tmp_path, capsys):
    model = build('eva02_base_patch14_224', img_size=28, scale_mlp=True)
    state = {}
    for key, value in body(model).items():
        for ours, theirs in (('mlp.fc1_g', 'mlp.w1'), ('mlp.fc1_x', 'mlp.w2'), ('mlp.fc2', 'mlp.w3'),
                             ('mlp.norm', 'mlp.ffn_ln'), ('attn.norm', 'attn.inner_attn_ln')):
            key = key.replace(ours, theirs)
        state[key.replace('fc_norm', 'norm')] = value
    state |= {'mask_token': torch.ones(1, 1, 32), 'lm_head.weight': torch.ones(8, 32),
              'rope.freqs_cos': torch.ones(4, 16)}
    assert load({'module': state}, to_evit(model, 0.5), tmp_path) == HEAD
    printed = capsys.readouterr().out
    assert 'the weights under module are taken' in printed and 'left out lm_head, mask_token (tensors: 2)' in printed


def test_names_of_the_state_dict(tmp_path):
    for name in 'net', 'ema_weights', 'model':
        torch.save({name: {'w': torch.ones(1)}, 'epoch': 3}, tmp_path / 'a.pth')
        assert load_checkpoint(str(tmp_path / 'a.pth')) == {'model': {'w': torch.ones(1)}, 'epoch': 3}
    torch.save({'generator': {'w': torch.ones(1)}, 'judge': {'w': torch.ones(1)}}, tmp_path / 'a.pth')
    with pytest.raises(InputError, match='holds several state dicts, generator, judge'):
        load_checkpoint(str(tmp_path / 'a.pth'))
