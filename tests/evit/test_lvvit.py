"""LV-ViT and its EViT: the figures of the original, the loss of the tokens against a naive loop, checkpoints, modes."""
import math

import pytest
import timm
import torch
import torch.nn.functional as F

import export
import main
from conftest import reference, reference_images, reference_weights
from evit.lvvit import LVViT
from evit_definition import one_image
from formats.token_labels import Targets
from losses import TokenLabelingLoss
from measuring.benchmark import macs
from models_evit import from_evit, to_evit
from outputs import assert_same, checkpoint, log_lines
from runtime.checkpoint import load_checkpoint, load_finetune, load_weights
from runtime.compiled_model import CompiledModel
from runtime.utils import InputError

REFERENCE = reference('lvvit.json')
SMALL = dict(embed_dim=32, num_heads=2, depth=3, img_size=32, patch_size=8, num_classes=5)
DIGITS = ['--model', 'lvvit_s_shrink_base', '--fuse_token', '--drop_loc', '1,2', '--input-size', '16', '--batch-size',
          '64', '--model-kwargs', 'patch_size=4', 'embed_dim=32', 'num_heads=2', 'depth=3', '--warmup-epochs', '0',
          '--shrink_start_epoch', '0', '--lr', '1e-2', '--mixup', '0', '--cutmix', '0', '--aa=', '--reprob', '0',
          '--num_workers', '0', '--device', 'cpu']

pytestmark = pytest.mark.usefixtures('one_thread')


# --- The model ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('row', REFERENCE['rows'], ids=lambda row: f'{row["num_classes"]} classes')
def test_figures_of_the_original(row):
    """Of all tokens, in the registered model and in the one without any reorganisation."""
    model = timm.create_model('lvvit_s', num_classes=row['num_classes']).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == row['parameters']
    model.load_state_dict(reference_weights(model))
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-9)):            # float64 keeps the weights
        model, images = model.to(dtype), reference_images(row['images_seed'], 2, row['input_size']).to(dtype)
        with torch.no_grad():
            logits = model(images)
            class_logits, aux_logits = model.forward_heads(model.forward_features(images))
        for name, found in (('logits_norm', logits.norm(dim=1)), ('first_logits', logits[:, :5]),
                            ('class_logits_norm', class_logits.norm(dim=1)), ('aux_first', aux_logits[:, 0, :3]),
                            ('aux_logits_norm', aux_logits.flatten(1).norm(dim=1))):
            torch.testing.assert_close(found, torch.tensor(row[name], dtype=dtype), rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        assert type(from_evit(model)) is LVViT and torch.equal(model(images), logits)


def test_keys_and_shapes_of_the_original():
    model = timm.create_model('lvvit_s', img_size=384)
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    first = {key: shape for key, shape in shapes.items() if 'blocks' not in key or key.startswith('blocks.0.')}
    assert first == REFERENCE['keys']
    per_block = len([key for key in first if key.startswith('blocks.')])
    assert len(shapes) == len(first) + 15 * per_block


@pytest.mark.parametrize('drop_loc, rate, expected', [
    (None, 0.7, 4.68), (None, 0.5, 3.87), ((3, 7, 11), 0.7, 4.47), ((3, 7, 11), 0.5, 3.59), ((5, 9, 13), 0.7, 4.89),
    ((5, 9, 13), 0.5, 4.14)])
def test_computation(drop_loc, rate, expected):
    """GMACs as counted without the auxiliary classifier; in the default blocks, those of the paper with it."""
    model = timm.create_model('lvvit_s_shrink_base', base_keep_rate=rate, fuse_token=True, drop_loc=drop_loc)
    gmacs, tokens = macs(model), 196
    for _ in range(3):
        tokens = math.ceil(rate * tokens - 1e-9) + 1
    assert gmacs - tokens * 384 * 1000 / 1e9 == pytest.approx(expected, rel=5e-3)
    if drop_loc is None:
        assert model.token_settings.blocks(16) == (4, 8, 12) and round(gmacs, 1) == {0.7: 4.7, 0.5: 3.9}[rate]


@pytest.mark.parametrize('size, parameters, factor', [('t', 8_533_000, 1), ('s', 26_151_824, 2), ('m', 55_832_000, 2)])
def test_sizes(size, parameters, factor):
    """Those of TokenLabeling's table, 8.53 M and 55.83 M; the residual branches are divided in the larger ones."""
    model = timm.create_model(f'lvvit_{size}_shrink_base')
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(parameters, rel=2e-3)
    assert (getattr(model.blocks[0].ls1, 'factor', 1), model.token_settings.base_keep_rate) == (1 / factor, 0.7)
    preprocessing = main.input_of(f'lvvit_{size}', pretrained=False)[1]
    assert preprocessing.crop_pct == (1. if size == 'm' else 0.9)


def small_model(**options):
    """An LV-ViT with weights large enough for every part to matter."""
    torch.manual_seed(0)
    model = timm.create_model('lvvit_s', **SMALL | options).eval()
    for key, parameter in model.named_parameters():
        parameter.data = ('norm' in key and key.endswith('weight')) + torch.randn_like(parameter) * 0.2
    return model


def test_input_sizes():
    model = small_model()
    images = torch.randn(2, 3, 48, 48)
    with pytest.raises(AssertionError, match=r'input size \(48, 48\) does not match the model: \(32, 32\)'):
        model(images)
    dynamic = small_model(dynamic_img_size=True)
    dynamic.load_state_dict(model.state_dict())
    model.set_input_size(48)
    torch.testing.assert_close(dynamic(images), model(images))
    with pytest.raises(AssertionError, match='input size'):
        dynamic(torch.randn(2, 3, 44, 44))
    with pytest.raises(ValueError, match='the patch size of ConvStem is fixed'):
        model.set_input_size(48, 16)
    for options in (dict(patch_size=5), dict(dynamic_img_pad=True)):
        with pytest.raises(ValueError, match='even patch size'):
            small_model(**options)


@pytest.mark.parametrize('name, value', [('global_pool', 'avg'), ('patch_drop_rate', 0.1), ('init_values', 1e-4)])
def test_arguments_that_are_not_served(name, value):
    with pytest.raises(ValueError, match=f'EViTLVViT takes no {name}'):
        small_model(**{name: value})
    with pytest.raises(ValueError, match='classifies by the class token'):
        small_model().reset_classifier(3, 'avg')


def test_other_classes():
    model = small_model()
    images = torch.randn(2, 3, 32, 32)
    model.reset_classifier(3)
    assert model(images).shape == (2, 3) and model.aux_head.out_features == 3
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    model.reset_classifier(0)
    assert torch.equal(model(images), features) and features.shape == (2, 32)


# --- Training with labels of the tokens -----------------------------------------------------------------------------

def naive_loss(model, images, mixed, targets, dense_weight, rate, drop_loc, way):
    """One image, one token at a time; an image's patches are its own, or those of its partner."""
    x = model._pos_embed(model.patch_embed(images))
    image_losses, token_losses = [], []
    for i in range(len(x)):
        partner = len(x) - 1 - i
        vectors = torch.stack([x[i][0], *(x[partner if mixed[p] else i][1 + p] for p in range(len(mixed)))])
        features, tokens, _ = one_image(model, vectors, None, rate, drop_loc, way)
        image_losses.append(-(targets.images[i] * F.log_softmax(model.head(features[0]), dim=0)).sum())
        for feature, token in zip(features[1:], tokens):
            if token.patch is not None:
                label = targets.patches[i][token.patch]
                token_losses.append(-(label * F.log_softmax(model.aux_head(feature), dim=0)).sum())
    return sum(image_losses) / len(image_losses) + dense_weight * sum(token_losses) / len(token_losses)


@pytest.mark.parametrize('way', ['drop', 'fuse', 'merge'])
def test_loss_against_a_naive_loop(way):
    """MixToken, reorganisation twice, labels of the tokens that remain: the loss and all gradients, in float64."""
    model = small_model().double()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    mixed = torch.zeros(4, 4, dtype=torch.bool)
    mixed[1:3, :2] = True
    mixed = mixed.flatten()
    targets = Targets(torch.rand(4, 5, dtype=torch.float64).softmax(1), torch.rand(4, 16, 5, dtype=torch.float64))
    expected = naive_loss(from_evit(model), images, mixed, targets, 0.3, 0.6, (0, 1), way)
    expected_gradients = torch.autograd.grad(expected, [*model.parameters()])
    to_evit(model, 0.6, (0, 1), way=way)
    outputs = model(images, mixed=mixed)
    loss = TokenLabelingLoss(0.3)(images, outputs, targets)
    torch.testing.assert_close(loss, expected)
    for (name, _), one, other in zip(model.named_parameters(), torch.autograd.grad(loss, [*model.parameters()]),
                                     expected_gradients, strict=True):
        torch.testing.assert_close(one, other, msg=lambda text: f'{name}: {text}')
    assert (way == 'fuse') == bool((outputs[2] == 16).any())


def test_training_outputs_at_rate_1():
    model = small_model()
    images = torch.randn(3, 3, 32, 32)
    logits, token_logits, patches = model(images, mixed=torch.zeros(16, dtype=torch.bool))
    torch.testing.assert_close(logits + token_logits.amax(1) / 2, model(images))
    assert patches.tolist() == 3 * [[*range(16)]]


@pytest.mark.parametrize('compiled_graphs', ['captured'], indirect=True)
def test_compiled_training_outputs(compiled_graphs, monkeypatch):
    monkeypatch.setattr('runtime.compiled_model.check_compiler', lambda device: None)
    model = to_evit(small_model(), 0.5, (0, 1), fuse_token=True)
    compiled, mixed = CompiledModel(model, torch.device('cpu')), torch.arange(16) % 3 == 0
    images = torch.randn(3, 3, 32, 32)
    for rate in 1., 0.9, 0.8, 0.7, 0.5:                # as it falls
        for one, other in zip(compiled(images, keep_rate=rate, mixed=mixed),
                              model(images, keep_rate=rate, mixed=mixed), strict=True):
            torch.testing.assert_close(one, other)
    assert len(compiled_graphs) <= 4                   # all tokens, some (one or two), those of the base rate


# --- Checkpoints ----------------------------------------------------------------------------------------------------

def test_checkpoints_of_token_labeling(tmp_path, capsys):
    """With the prefix of DDP and a moving average; for finetuning, at another size and with other classes."""
    original, average = small_model(), small_model()
    for parameter in average.parameters():
        parameter.data += 0.1
    states = {name: {f'module.{key}': value for key, value in model.state_dict().items()}
              for name, model in (('state_dict', original), ('state_dict_ema', average))}
    torch.save({'arch': 'lvvit_s', 'epoch': 3, **states}, tmp_path / 'a.pth')
    torch.save({'state_dict_ema': states['state_dict_ema']}, tmp_path / 'ema.pth')
    loaded, alone = load_checkpoint(str(tmp_path / 'a.pth')), load_checkpoint(str(tmp_path / 'ema.pth'))
    for found, model in ((loaded['model'], original), (loaded['model_ema'], average), (alone['model'], average)):
        assert found.keys() == model.state_dict().keys()
        assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())
    images = torch.randn(2, 3, 32, 32)
    model = small_model()
    load_weights(model, loaded['model_ema'], 'a.pth')
    assert torch.equal(model(images), average(images))
    larger = small_model(img_size=48, num_classes=3)
    head = larger.head.weight.clone()
    load_finetune(larger, str(tmp_path / 'a.pth'))
    printed = capsys.readouterr().out
    assert all(f'dropped {name}.weight [5, 32]' in printed for name in ('head', 'aux_head'))
    assert 'resized pos_embed from 4×4 patches to 6×6' in printed
    grid = original.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, size=(6, 6), mode='bicubic', align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(larger.pos_embed[:, 1:], resized)
    assert torch.equal(larger.head.weight, head) and torch.equal(larger.pos_embed[:, 0], original.pos_embed[:, 0])
    assert torch.equal(larger.patch_embed.bn2.running_var, original.patch_embed.bn2.running_var)


def test_no_pretrained_weights():
    with pytest.raises(InputError, match='--pretrained: the weights of lvvit_s'):
        main.build_model(main.parse_args(['--model', 'lvvit_s', '--pretrained']), 1000, pretrained=True)


# --- The program ----------------------------------------------------------------------------------------------------

def run(folder, *flags):
    main.main(main.parse_args([*DIGITS, '--output_dir', str(folder), *map(str, flags)]))


def test_run(image_folder, tmp_path, capsys):
    """Each mode; training, with MixToken or mixup, is a function of seed, epoch and step."""
    run(tmp_path / 'a', '--epochs', 2)
    run(tmp_path / 'b', '--epochs', 1)
    run(tmp_path / 'b', '--epochs', 2, '--resume', 'auto')
    assert_same(checkpoint(tmp_path / 'a')['model'], checkpoint(tmp_path / 'b')['model'])
    losses = [line['train_loss'] for line in log_lines(tmp_path / 'a')]
    assert losses[1] < losses[0]
    source = tmp_path / 'a' / 'checkpoint.pth'
    few = ['--data-path', image_folder, '--batch-size', 8, '--mixup', 0.8]             # images, of other classes
    run(tmp_path / 'c', *few, '--epochs', 1, '--finetune', source)
    assert checkpoint(tmp_path / 'c')['args']['dense_weight'] == 0.5
    run(tmp_path / 'c', *few, '--epochs', 2, '--dense-weight', 0, '--resume', 'auto')
    assert 'was trained with dense_weight 0.5, this run has 0' in capsys.readouterr().out
    capsys.readouterr()
    run(tmp_path / 'd', '--eval', '--no-model-ema', '--resume', source)
    accuracy = log_lines(tmp_path / 'a')[-1]['test_acc1']
    assert f'Accuracy of the network on the 360 test images: {accuracy:.2f}%' in capsys.readouterr().out
    run(tmp_path / 'd', '--visualize_mask', '--n_visualization', 8, '--resume', source)
    assert (tmp_path / 'd' / 'grid.png').is_file()
    run(tmp_path / 'd', '--only_test_speed', '--batch-size', 2)
    assert 'GMACs an image' in capsys.readouterr().out
    export.main(['--resume', str(source), '--kept', '--format', 'pt2', '--output', str(tmp_path / 'a.pt2')])
    assert 'same class and kept patches' in capsys.readouterr().out


@pytest.mark.parametrize('flags, named', [
    (['--model', 'deit_tiny_patch16_224', '--dense-weight', '0.5'], 'deit_tiny_patch16_224 does not classify'),
    (['--dense-weight', '0', '--token-label-path', 'x'], '--token-label-path needs an LV-ViT'),
    (['--model', 'lvvit_s', '--token-label-path', 'x'], '--token-label-path goes with --data-set IMNET'),
    (['--model', 'lvvit_s', '--data-path', 'x', '--token-label-path', 'x', '--cutmix', '1'], '--cutmix 0'),
    (['--model', 'lvvit_s', '--dense-weight', '-1'], '--dense-weight')])
def test_wrong_flags(flags, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        main.parse_args(flags)
    assert stopped.value.code == 2 and named in capsys.readouterr().err
