"""The flags of main.py, and what is built of them."""
import os
import shutil
import sys

import pytest
import timm
import torch
from PIL import Image

import main
from conftest import DEIT_TINY, PLAIN, TINY, UNCHANGED
from main import parse_args
from runtime.preprocessing import Preprocessing

# --- Command line ---------------------------------------------------------------------------------------------------


def test_defaults_of_the_recipe():
    args = parse_args([])
    assert args.model == 'deit_small_patch16_shrink_base' and args.data_set == 'DIGITS'
    expected = dict(base_keep_rate=0.7, fuse_token=False, drop_loc=None, shrink_start_epoch=10, shrink_epochs=0,
                    epochs=300, batch_size=64, lr=5e-4, weight_decay=0.05, warmup_epochs=5, mixup=0.8, cutmix=1.0,
                    drop_path=0.1, smoothing=0.1, reprob=0.25, repeated_aug=True, model_ema=True, pin_mem=True)
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.device == ('cuda' if torch.cuda.is_available() else 'cpu')


def test_deterministic_kernels(monkeypatch):
    monkeypatch.setattr(main, 'choose_kernels', lambda *arguments: sys.exit(str(arguments)))
    for flags, chosen in ((['--deterministic'], True), ([], False)):
        with pytest.raises(SystemExit, match=f"type='cpu'.*{chosen}"):
            main.main(parse_args([*PLAIN, *flags]))


def test_flags_with_dashes_and_underscores():
    one = parse_args(['--base_keep_rate', '0.5', '--drop_loc', '(2, 5)', '--no_model_ema', '--output_dir=a_b'])
    other = parse_args(['--base-keep-rate=0.5', '--drop-loc', '2,5', '--no-model-ema', '--output-dir', 'a_b'])
    assert one == other and one.drop_loc == (2, 5) and one.output_dir == 'a_b' and not one.model_ema
    assert parse_args(['--model', 'deit_small_patch16_224_shrink05']).base_keep_rate == 0.5
    assert parse_args(['--model', 'deit_small_patch16_224']).base_keep_rate is None


def test_token_flags_make_an_evit(capsys):
    args = parse_args(['--model', 'vit_large_patch16_224', '--shrink-epochs', '3'])
    assert (args.base_keep_rate, args.fuse_token, args.drop_loc, args.shrink_start_epoch) == (0.7, False, None, 10)
    with pytest.raises(SystemExit):
        parse_args(['--visualize-mask', '--model', 'deit_small_patch16_224', '--pretrained'])
    assert 'does not reorganise tokens; give a token flag' in capsys.readouterr().err


def test_images_of_pretrained_weights():
    """The sizes and statistics that timm's configuration of the weights gives."""
    args = parse_args(['--model', 'eva02_base_patch14_448', '--pretrained'])
    mean = (0.48145466, 0.4578275, 0.40821073)
    assert args.input_size == 448 and main.input_of(args.model, args.pretrained)[1].mean == mean
    args = parse_args(['--model', 'vit_base_patch16_224.orig_in21k', '--pretrained', '--input-size', '96'])
    expected = Preprocessing((0.5,) * 3, (0.5,) * 3, 'bicubic', 0.9)
    assert args.input_size == 96 and main.input_of(args.model, args.pretrained)[1] == expected
    assert main.input_of(parse_args([]).model, pretrained=False) == (224, Preprocessing())


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    """A checkpoint of a model that accepts only images of 224 pixels."""
    path = tmp_path_factory.mktemp('teacher') / 'teacher.pth'
    torch.save({'model': timm.create_model('deit_tiny_patch16_224', num_classes=10).state_dict()}, path)
    return path


@pytest.fixture
def trees(image_folder, teacher, tmp_path):
    """Image folders and checkpoints that each cause one error."""
    shutil.copytree(image_folder, tmp_path / 'other_classes')
    (tmp_path / 'other_classes' / 'val' / 'red').rename(tmp_path / 'other_classes' / 'val' / 'pink')
    (tmp_path / 'no_val' / 'train' / 'a').mkdir(parents=True)
    Image.new('RGB', (8, 8)).save(tmp_path / 'no_val' / 'train' / 'a' / '0.png')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'junk.pth').write_text('junk')
    (tmp_path / 'broken').symlink_to('nowhere')
    os.link(teacher, tmp_path / 'teacher.pth')
    return tmp_path


@pytest.mark.parametrize('flags, named', [
    (['--data-path', '{root}/absent'], 'absent'),
    (['--data-path', '{root}/empty'], 'train/'),
    (['--data-path', '{root}/no_val'], 'val/'),
    (['--data-path', '{root}/other_classes'], 'red is in train only'),
    (['--data-path', '{tree}', '--batch-size', '26'], '24 training images'),
    (['--base_keep_rate', '0'], '(0, 1]'),
    (['--base_keep_rate', '1.01'], '(0, 1]'),
    (['--base_keep_rate', 'nan'], '(0, 1]'),
    (['--drop_loc', '3;6'], '3;6'),
    (['--drop_loc', '__import__("os").mkdir("made")'], 'block numbers'),
    (['--drop_loc', '3,12'], '(3, 12)'),
    (['--drop_loc', '-1'], '-1'),
    (['--eval'], '--resume'),
    (['--eval', '--resume', '{root}/absent.pth'], 'absent.pth does not exist'),
    (['--eval', '--resume', 'auto'], 'has no checkpoint.pth'),
    (['--resume', 'auto', '--output_dir', ''], 'needs the --output-dir'),
    (['--resume', 'auto', '--overwrite'], '--resume= --overwrite'),
    (['--eval', '--resume', '{root}/junk.pth'], 'junk.pth is not a checkpoint'),
    (['--resume', '{root}/junk.pth'], 'junk.pth is not a checkpoint'),
    (['--finetune', '{root}/junk.pth'], 'junk.pth is not a checkpoint'),
    (['--distillation-type', 'hard'], '--teacher-path'),
    (['--distillation-type', 'hard', '--teacher-path', 'x'], 'distillation token'),
    (['--input-size', '40'], '40'),
    (['--model', 'test_resnet', '--fuse_token'], 'test_resnet: ResNet cannot become an EViT: it is no VisionTransf'),
    (['--model', 'test_vit2', '--shrink_epochs', '3', '--model-kwargs', 'class_token=False', 'global_pool=avg'],
     'has no class token'),
    (['--model', 'vit_small_patch16_224.no_such_tag'], 'no_such_tag'),
    (['--model', 'vit_tiny_patch16_224', '--pretrained'], 'the weights of vit_tiny_patch16_224 cannot be loaded'),
    (['--model', 'vit_tiny_patch16_224', '--pretrained', '--eval'], 'know 1000 classes, the data has 10'),
    (['--model', 'no_such_model'], 'no_such_model'),
    (['--opt', 'no_such_optimizer'], 'no_such_optimizer'),
    (['--opt', 'adahessian'], 'second derivatives'),
    (['--opt', 'lookahead_adahessian'], 'second derivatives'),
    (['--data-set', 'CIFAR'], '--data-path'),
    (['--data-path', ''], 'needs --data-path'),
    (['--data-set', 'DIGITS', '--data-path', '{tree}'], '--data-set DIGITS'),
    (['--finetune', ''], '--finetune'),
    (['--eval', '--finetune', '{root}/junk.pth'], '--resume'),
    (['--fuse_token', '--merge_token'], 'either fused (fuse_token) or merged'),
    (['--token-counts', '5,4', '--shrink_start_epoch', '3'], '--token-counts takes no --shrink-start-epoch'),
    (['--token-counts', 'x'], 'neither a list of numbers'),
    (['--eval', '--resume', 'x', '--keep_rates', '1', '0.5'], '--keep-rates is a flag of curve.py'),
    (['--eval', '--resume', 'x', '--knn=5'], '--knn is a flag of curve.py'),
    (['--drop_loc', '[3,6'], 'block numbers'),
    (['--drop_loc', ''], 'block numbers'),
    (['--aa', 'no_policy'], 'no_policy'),
    (['--teacher-model', 'no_teacher'], 'no_teacher'),
    (['--drop-path', '1'], '--drop-path'),
    (['--mixup', 'nan'], '--mixup'),
    (['--lr', 'inf'], '--lr'),
    (['--cutmix-minmax', '0.9', '0.1'], 'smaller share first'),
    (['--device', 'meta'], 'meta'),
    (['--device', 'cuda:x'], 'cuda:x'),
    (['--sched', 'plateau', '--decay-rate', '1'], '--sched plateau'),
    (['--lr-noise', '0', '--lr-noise-pct', '0'], '--lr-noise-pct'),
    (['--distillation-type', 'hard', '--teacher-path', '{root}/teacher.pth', '--teacher-model', 'deit_tiny_patch16_224',
      '--model', 'deit_tiny_distilled_patch16_shrink_base'], 'no images of 32 pixels'),
    (['--opt', 'adan', '--opt-betas', '.8', '.9'], '--opt adan'),
    (['--output_dir', '{root}/broken'], 'broken is a file or a broken link'),
    (['--output_dir', '{root}/junk.pth'], 'junk.pth is a file or a broken link; name a folder'),
    (['--data-set', 'CIFAR', '--data-path', '{root}'], 'cifar-100-python'),
    (['--data-set', 'INAT', '--data-path', '{root}'], 'categories.json'),
    (['--mixup', '0.8', '--batch-size', '3'], 'odd'),
    (['--no-such-flag'], 'no-such-flag'),
    (['--device', 'abacus'], 'abacus'),
    (['--use-lmdb', '--data-path', '{root}'], 'train.lmdb'),
    (['--compile'], 'g++'),
    (['--model-kwargs', 'patch_size'], "'patch_size' is not KEY=VALUE"),
    (['--model-kwargs', '=3'], "'=3' is not KEY=VALUE"),
    (['--model-kwargs', 'no_such_argument=3'], 'no_such_argument'),
    (['--model-kwargs', 'deph=6'], 'shrink_base has no argument deph, but depth, act_layer, attn_drop_rate, '),
    (['--resume', '{root}/empty'], 'empty/checkpoint.pth does not exist'),
    (['--data-path', '{tree}/train'], '/train has no train/ folder; train/<class>/<image> is expected; give {tree}?'),
    (['--model-kwargs', 'embed_dim=100'], "with --model-kwargs {'embed_dim': 100}"),
    (['--model-kwargs', 'patch_size=0'], '--model-kwargs'),
    (['--model-kwargs', 'act_layer=no_such_layer'], 'no_such_layer'),
    (['--model-kwargs', 'patch_size=__import__("os").mkdir("made")'], '--model-kwargs'),
    (['--model-kwargs', 'base_keep_rate=0.3'], 'cannot set base_keep_rate: it has a flag'),
    (['--model-kwargs', 'num_classes=3'], 'cannot set num_classes'),
    (['--model-kwargs', 'checkpoint_path=a.pth'], 'cannot set checkpoint_path'),
    (['--world_size', '2'], 'RANK')], ids=lambda value: ' '.join(value) if isinstance(value, list) else '')
def test_wrong_input(flags, named, trees, image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('CXX', 'no_such_compiler')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    flags = [flag.format(root=trees, tree=image_folder) for flag in flags]
    named = named.replace('{tree}', str(image_folder))
    monkeypatch.setattr(sys, 'argv', ['main.py', *DEIT_TINY, *UNCHANGED, '--output_dir', 'out', *flags])
    with pytest.raises(SystemExit) as exit_:
        main.run()
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count('\n') == 1 and named in error, error
    assert not (tmp_path / 'out').exists() and not (tmp_path / 'made').exists()


# --- Parts of a run -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('flags, mixes, loss', [
    ([], True, 'SoftTargetCrossEntropy'), (['--mixup', '0'], True, 'SoftTargetCrossEntropy'),
    (['--mixup', '0', '--cutmix', '0'], False, 'LabelSmoothingCrossEntropy'),
    (['--mixup', '0', '--cutmix', '0', '--cutmix-minmax', '0.2', '0.8'], True, 'SoftTargetCrossEntropy'),
    (['--mixup', '0', '--cutmix', '0', '--smoothing', '0'], False, 'CrossEntropyLoss')])
def test_mixup_and_loss(flags, mixes, loss):
    mixup, token_labeling, criterion = main.build_criterion(parse_args(flags), None, 10, torch.device('cpu'))
    assert (mixup is not None) == mixes and token_labeling is None and type(criterion.base_criterion).__name__ == loss
    if mixes:
        images, labels = mixup(torch.randn(4, 3, 8, 8), torch.arange(4))
        assert criterion(images, torch.randn(4, 10), labels).isfinite()


@pytest.mark.parametrize('mixup', ['0', '0.8'])
def test_loss_of_an_lv_vit(mixup):
    """MixToken stands in for mixup and cutmix."""
    args = parse_args(['--model', 'lvvit_s', '--mixup', mixup, '--cutmix', '0', '--dense-weight', '2'])
    model = timm.create_model('lvvit_s', embed_dim=12, depth=1)
    mix, token_labeling, criterion = main.build_criterion(args, model, 10, torch.device('cpu'))
    assert (mix is None) == token_labeling.mix == (mixup == '0') and criterion.dense_weight == 2
    assert (token_labeling.grid_size, token_labeling.smoothing) == ((14, 14), 0.1)


def test_augmentation_of_training_and_validation():
    args = parse_args([*TINY, '--num_workers', '0'])
    train, val = (loader.dataset for loader in main.build_loaders(args, torch.device('cpu'))[:2])
    assert not torch.equal(train[5, (0, 0, 0)][0], train[5, (0, 0, 1)][0])
    assert torch.equal(val[5][0], val[5][0]) and type(val.transform.transforms[0]).__name__ == 'Resize'
