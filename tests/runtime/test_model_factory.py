import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import main
import visualize_mask
from conftest import ROOT
from main import parse_args
from models_evit import resize_pos_embed, to_evit
from runtime.checkpoint import load_finetune
from runtime.utils import InputError
from visualize_mask import kept_patches, mask_images

REGISTERS = ['--model', 'vit_small_patch14_reg4_dinov2', '--input-size', '32', '--batch-size', '64', '--lr', '2.4e-3',
             '--model-kwargs', 'patch_size=8', 'embed_dim=64', 'num_heads=2', 'depth=4', '--num-workers', '0',
             '--warmup-epochs', '0', '--base_keep_rate', '0.7', '--fuse_token', '--device', 'cpu']


def weights_of(model, seed=0):
    """Random weights that depend on the names and shapes alone, large enough for differences to show."""
    generator = torch.Generator().manual_seed(seed)
    return {key: ('norm' in key and key.endswith('weight')) + 0.05 * torch.randn(value.shape, generator=generator)
            for key, value in model.state_dict().items()}


@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    """A cache of timm's hub with weights of test_vit, and no other way to the hub."""
    folder = tmp_path_factory.mktemp('hub')
    repository = folder / 'models--timm--test_vit.r160_in1k'
    (repository / 'snapshots' / '0').mkdir(parents=True)
    (repository / 'refs').mkdir()
    (repository / 'refs' / 'main').write_text('0')
    safetensors.torch.save_file(weights_of(timm.create_model('test_vit')),
                                repository / 'snapshots' / '0' / 'model.safetensors')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
        patch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(folder))
        patch.setattr('timm.models._hub.get_cache_dir', lambda *_, **__: str(folder), raising=False)
        yield folder


@pytest.fixture(scope='module')
def many_classes(tmp_path_factory):
    """A validation set of 1,000 classes with a wide and a high image now and then, and a training set."""
    root, draw = tmp_path_factory.mktemp('classes'), np.random.RandomState(0)
    for i in range(1000):
        for split in ('train', 'val'):
            (root / split / f'{i:04}').mkdir(parents=True)
            size = [(24, 24), (40, 24), (24, 36)][i % 3] if split == 'val' else (8, 8)
            Image.fromarray(draw.randint(0, 256, (*size, 3), dtype=np.uint8)).save(root / split / f'{i:04}' / '0.png')
    return root


def test_registers_finetuned_evaluated_resumed_and_visualized(tmp_path, capsys):
    source = timm.create_model('vit_small_patch14_reg4_dinov2', img_size=56, patch_size=8, embed_dim=64, num_heads=2,
                               depth=4)
    weights = {key.replace('reg_token', 'register_tokens'): value for key, value in weights_of(source).items()}
    weights['mask_token'] = torch.zeros(1, 64)         # as in the files of DINOv2
    weights['pos_embed'] = torch.cat([torch.zeros(1, 1, 64), weights['pos_embed']], dim=1)
    safetensors.torch.save_file(weights, tmp_path / 'dinov2.safetensors')
    folder = tmp_path / 'run'
    main.main(parse_args([*REGISTERS, '--finetune', str(tmp_path / 'dinov2.safetensors'), '--epochs', '1',
                          '--output_dir', str(folder)]))
    finetuned = capsys.readouterr().out
    assert 'resized pos_embed from 7×7 patches to 4×4' in finetuned and 'head.weight is taken' in finetuned
    main.main(parse_args([*REGISTERS, '--eval', '--resume', str(folder / 'checkpoint.pth')]))
    evaluated = capsys.readouterr().out
    accuracies = [line for line in finetuned.splitlines() if line.startswith('Accuracy')]
    assert len(accuracies) == 2 and all(line in evaluated for line in accuracies)
    assert 'was trained with' not in evaluated
    # Flags of the model that are not given are the checkpoint's; others are reported
    data = ['--device', 'cpu', '--num-workers', '0', '--eval', '--resume', str(folder / 'checkpoint.pth')]
    main.main(parse_args(data))
    evaluated = capsys.readouterr().out
    assert all(line in evaluated for line in accuracies) and 'was trained with' not in evaluated
    main.main(parse_args([*data, '--data-set', 'BOARD_DIGITS']))
    assert 'was trained with data_set DIGITS, this run has BOARD_DIGITS' in capsys.readouterr().out
    main.main(parse_args([*data, '--base_keep_rate', '1']))
    assert 'was trained with base_keep_rate 0.7, this run has 1.0' in capsys.readouterr().out
    main.main(parse_args([*REGISTERS, '--epochs', '2', '--resume', 'auto', '--output_dir', str(folder)]))
    resumed = capsys.readouterr().out
    assert 'Epoch: [1/' in resumed and 'Epoch: [0/' not in resumed
    main.main(parse_args([*REGISTERS, '--visualize_mask', '--n_visualization', '2', '--resume',
                          str(folder / 'checkpoint.pth'), '--output_dir', str(tmp_path / 'pictures')]))
    with Image.open(tmp_path / 'pictures' / 'img_0_block3.jpg') as picture:
        blocks = np.asarray(picture.convert('L')).reshape(4, 8, 4, 8).max(axis=(1, 3))
    assert (blocks > 8).sum() <= 7                     # 16 → 12 → 10 → 8 tokens, of which 1 or more are fused


def test_pretrained_evaluated_with_its_own_transform(hub, many_classes, capsys):
    main.main(parse_args(['--model', 'test_vit', '--pretrained', '--eval', '--data-path', str(many_classes),
                          '--base-keep-rate', '0.6', '--num-workers', '0', '--device', 'cpu']))
    printed = capsys.readouterr().out
    model = to_evit(timm.create_model('test_vit', pretrained=True), 0.6).eval()
    assert torch.equal(model.head.bias, weights_of(timm.create_model('test_vit'))['head.bias'])
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    batches = list(DataLoader(ImageFolder(many_classes / 'val', transform), 250))
    with torch.no_grad():
        loss = sum(F.cross_entropy(model(images), labels).item() for images, labels in batches) / len(batches)
    assert f'loss {loss:.3f}' in printed


def test_pretrained_trained_and_visualized(hub, tmp_path, capsys, monkeypatch):
    flags = ['--model', 'test_vit', '--pretrained', '--input-size', '32', '--fuse-token', '--device', 'cpu',
             '--num-workers', '0', '--model-kwargs', 'patch_size=8']
    main.main(parse_args([*flags, '--epochs', '1', '--lr', '0', '--min-lr', '0', '--warmup-lr', '0', '--batch-size',
                          '128', '--output_dir', str(tmp_path)]))
    weights = torch.load(tmp_path / 'checkpoint.pth', weights_only=True)['model']
    expected = weights_of(timm.create_model('test_vit'))
    assert torch.equal(weights['blocks.3.mlp.fc1.weight'], expected['blocks.3.mlp.fc1.weight'])
    pictures = []
    monkeypatch.setattr(visualize_mask, 'save_masked', lambda model, batch, *_, **statistics: pictures.append(
        mask_images(batch, kept_patches(model, batch), (8, 8), **statistics)))
    main.main(parse_args([*flags, '--visualize-mask', '--n-visualization', '4', '--output_dir', str(tmp_path / 'v')]))
    assert 'the head is new' in capsys.readouterr().out
    digits = main.build_loaders(parse_args(flags), torch.device('cpu'))[1].dataset
    kept = pictures[0][0] > 0
    assert torch.equal(pictures[0][0][kept].mul(255).round(),
                       digits[0][0].expand_as(pictures[0][0])[kept].float())


@pytest.mark.parametrize('option, named', [('depth=8', 'blocks.6.'), ('qk_norm=True', 'q_norm'),
                                           ('global_pool=', 'pool')])
def test_pretrained_weights_that_do_not_fit(hub, option, named, capsys):
    """Also where the head is new, no part of the model is left with random weights."""
    args = parse_args(['--model', 'test_vit', '--pretrained', '--fuse-token', '--model-kwargs', option])
    with pytest.raises(InputError, match=named) as error:
        main.build_model(args, 10, pretrained=True)
    assert '\n' not in str(error.value)


def test_checkpoint_of_another_code_without_antialiasing_for_deit_only(tmp_path):
    for name, antialias in (('deit3_small_patch16_224', False), ('vit_small_patch16_224', True)):
        options = dict(embed_dim=48, num_heads=2, depth=2)
        source = timm.create_model(name, img_size=64, **options)
        model = to_evit(timm.create_model(name, img_size=32, **options))
        weights = weights_of(source)
        renamed = {'module.' + key.replace('ls1.gamma', 'gamma_1').replace('ls2.gamma', 'gamma_2'): value
                   for key, value in weights.items()}
        torch.save({'state_dict': renamed}, tmp_path / 'a.pth')
        load_finetune(model, str(tmp_path / 'a.pth'))
        prefix = weights['pos_embed'].shape[1] - 16
        grid = weights['pos_embed'][:, prefix:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
        expected = F.interpolate(grid, (2, 2), mode='bicubic', antialias=antialias).flatten(2).transpose(1, 2)
        torch.testing.assert_close(model.pos_embed[:, prefix:], expected)
        torch.testing.assert_close(resize_pos_embed(weights['pos_embed'], model), model.pos_embed.detach())
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items() if key != 'pos_embed')


def test_weights_that_cannot_be_had(tmp_path):
    command = [sys.executable, ROOT / 'main.py', '--model', 'vit_tiny_patch16_224', '--pretrained', '--base-keep-rate',
               '0.7', '--device', 'cpu']
    environment = {'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path), 'PATH': ''}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stderr.count('\n') == 1
    assert '--pretrained: the weights of vit_tiny_patch16_224 cannot be loaded' in done.stderr


def test_old_name_in_a_checkpoint_and_in_each_program(tmp_path, capsys):
    """Also a name that nothing has, which is one line."""
    import export
    import loader_benchmark
    import speed_test
    old, new = 'vit_tiny_patch16_224_in21k', 'vit_tiny_patch16_224.augreg_in21k'
    torch.save({'model': {'a': torch.zeros(1)}, 'args': {'model': old}}, tmp_path / 'a.pth')
    file = str(tmp_path / 'a.pth')
    assert parse_args(['--model', old]).model == parse_args(['--eval', '--resume', file]).model == new
    assert export.parse_args(['--resume', file, '--format', 'pt2', '--output', str(tmp_path / 'a.pt2')])[0].model == new
    assert speed_test.parse_candidate(f'{old}@0.5') == (new, 0.5, None, None)
    assert loader_benchmark.parse_args(['--model', old, '--data-path', 'a']).model == new
    torch.save({'model': {'a': torch.zeros(1)}, 'args': {'model': 'absent'}}, file)
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        parse_args(['--eval', '--resume', file])
    assert error.value.code == 2 and 'absent is neither in models_evit.py nor in timm; give --model' in (
        capsys.readouterr().err)


def test_weights_without_a_network(tmp_path):
    """One line, not one for each retry."""
    flags = ['--model', 'vit_tiny_patch16_224', '--pretrained', '--device', 'cpu']
    done = subprocess.run([sys.executable, ROOT / 'main.py', *flags],
                          env={**os.environ, 'HF_HUB_OFFLINE': '0', 'HF_ENDPOINT': 'http://127.0.0.1:9',
                               'HF_HOME': str(tmp_path)}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'cannot be loaded' in done.stderr, done.stderr
