"""Complete runs of main.py."""
import functools
import shutil
import sys

import pytest
import timm
import torch
from PIL import Image

import curve
import folder2lmdb
import main
import visualize_mask
from conftest import DEIT_TINY, PLAIN, TINY, open_picture, run_main
from datasets import Digits
from main import parse_args
from outputs import assert_same, checkpoint, log_lines, tensorboard, timeless
from runtime.checkpoint import load_checkpoint
from runtime.preprocessing import Preprocessing
from runtime.utils import InputError


def accuracy_lines(printed):
    return [line for line in printed.splitlines() if line.startswith(('Accuracy', '* Acc@1'))]


def test_flags_of_the_data_set(monkeypatch):
    """`build_dataset` receives each flag."""
    given = {'data_set': 'IMNET', 'data_path': 'a', 'use_lmdb': True, 'nb_classes': 7, 'inat_category': 'genus',
             'input_size': 96, 'fast_transforms': True, 'color_jitter': 0.1, 'aa': 'augmix',
             'train_interpolation': 'random'}
    flags = [word for name, value in given.items()
             for word in ([f'--{name}'] if value is True else [f'--{name}', str(value)])]
    calls = []
    monkeypatch.setattr(main, 'build_dataset',
                        lambda is_train, **options: calls.append((is_train, options)) or Digits(is_train))
    given['preprocessing'] = Preprocessing(mean=(0.1, 0.2, 0.3))
    monkeypatch.setattr('runtime.preprocessing.pretrained_input', lambda model: (224, given['preprocessing']))
    assert parse_args(['--fast-resize']).fast_transforms                               # its former name
    args = parse_args([*flags, '--device', 'cpu', '--output-dir', 'a', '--pretrained'])
    loaders = main.build_loaders(args, torch.device('cpu'))
    assert calls == [(True, given), (False, given)]
    assert all(loader.preprocessing == given['preprocessing'] for loader in loaders)


def test_output_of_training(digits_run):
    done, folder = digits_run
    assert 'deit_tiny_patch16_shrink_base' in done.stdout and '1,437 training and 360 test images' in done.stdout
    line = next(line for line in done.stdout.splitlines() if line.startswith('Epoch: [0/'))
    assert all(name in line for name in ('[10/20]', 'eta:', 'loss:', 'lr:', 'keep_rate: 0.7', 'images/s:',
                                         'loader_wait:'))
    assert 'Accuracy of the network on the 360 test images: ' in done.stdout
    assert 'Accuracy of the EMA network on the 360 test images: ' in done.stdout
    stats, = log_lines(folder)
    assert stats['epoch'] == 0 and stats['train_keep_rate'] == 0.7 and stats['n_parameters'] == 1_930_570
    assert {'train_loss', 'train_lr', 'train_images_per_second', 'train_loader_wait', 'test_loss', 'test_acc1',
            'test_acc5', 'test_ema_acc1'} <= stats.keys()
    assert stats['test_acc1'] > 20                   # with ten classes
    state = checkpoint(folder)
    assert {'model', 'optimizer', 'lr_scheduler', 'epoch', 'model_ema', 'scaler', 'args'} <= state.keys()
    assert type(state['args']) is dict and state['epoch'] == 0
    assert_same(state, checkpoint(folder, 'best_checkpoint.pth'))
    assert list(folder.glob('events.out.tfevents*'))


def test_evaluation_of_a_checkpoint(digits_run, capsys):
    done, folder = digits_run
    main.main(parse_args([*PLAIN, '--eval', '--resume', str(folder / 'checkpoint.pth')]))
    assert accuracy_lines(capsys.readouterr().out) == accuracy_lines(done.stdout)
    main.main(parse_args([*PLAIN, '--eval', '--resume', str(folder / 'checkpoint.pth'), '--base_keep_rate', '0.3']))
    other_rate = capsys.readouterr().out
    assert accuracy_lines(other_rate) != accuracy_lines(done.stdout)
    assert 'trained with base_keep_rate 0.7, this run has 0.3' in other_rate


def test_evaluation_with_the_flags_of_the_checkpoint(digits_run, tmp_path, capsys):
    """Those that are not given are the checkpoint's, as in export.py; given ones win, and differences are said."""
    done, folder = digits_run
    flags = ['--resume', str(folder / 'checkpoint.pth'), '--device', 'cpu', '--num-workers', '0']
    main.main(parse_args([*flags, '--eval']))
    printed = capsys.readouterr().out
    assert accuracy_lines(printed) == accuracy_lines(done.stdout) and 'note' not in printed
    main.main(parse_args([*flags, '--visualize-mask', '--n-visualization', '2', '--no-fuse-token', '--output-dir',
                          str(tmp_path)]))
    printed = capsys.readouterr().out
    assert printed.count('note: ') == 1 and 'trained with way fuse, this run has drop' in printed
    assert (tmp_path / 'grid.png').exists()


@pytest.mark.parametrize('depth, blocks', [(12, (3, 6, 9)), (6, (1, 3, 4)), (16, (4, 8, 12))])
def test_reorganising_blocks_follow_the_depth(depth, blocks):
    args = parse_args(['--model', 'deit_tiny_patch16_shrink_base', '--model-kwargs', f'depth={depth}'])
    with torch.device('meta'):
        rates = main.build_model(args, 10).block_keep_rates()
    assert tuple(i for i, rate in enumerate(rates) if rate < 1) == blocks


def test_evaluation_by_two_processes(digits_run):
    """Without --dist-eval; `test_training_by_one_and_two_processes` has it."""
    done, folder = digits_run
    evaluated = run_main(*PLAIN, '--eval', '--resume', folder / 'checkpoint.pth', processes=2)
    assert accuracy_lines(evaluated.stdout) == accuracy_lines(done.stdout)


def test_training_by_one_and_two_processes(image_folder, tmp_path):
    flags = [*PLAIN, '--data-path', str(image_folder), '--drop-path', '0', '--opt', 'sgd', '--epochs', '2',
             '--dist-eval', '--no-repeated-aug', '--model-ema-decay', '0.5', '--data-set', 'IMNET', '--smoothing', '0']
    main.main(parse_args([*flags, '--batch-size', '8', '--output_dir', str(tmp_path / '1')]))
    done = run_main(*flags, '--batch-size', '4', '--output_dir', tmp_path / '2', processes=2)
    assert done.stdout.count('2 process(es) on cpu') == 1 and len(accuracy_lines(done.stdout)) == 2 * 4
    one, two = (checkpoint(tmp_path / name) for name in '12')
    for part in ('model', 'model_ema'):
        for key, value in one[part].items():
            torch.testing.assert_close(two[part][key], value, rtol=0, atol=1e-5)
    for one, two in zip(*(log_lines(tmp_path / name) for name in '12'), strict=True):
        for key in ('train_loss', 'test_loss', 'test_ema_loss', 'test_acc1'):
            assert one[key] == pytest.approx(two[key], rel=1e-5), key


def test_folder_that_holds_a_run(digits_run, tmp_path, capsys):
    """A new run is refused there, whichever checkpoint it is, and begins anew with --overwrite."""
    folder = shutil.copytree(digits_run[1], tmp_path / 'run')
    flags = [*PLAIN, '--epochs', '1', '--output_dir', str(folder), '--seed', '1']
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(InputError, match='checkpoint.pth exists: --resume auto .* --overwrite'):
        main.main(parse_args(flags))
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for name in 'checkpoint.pth', 'previous_checkpoint.pth':
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(InputError, match='best_checkpoint.pth exists'):
        main.main(parse_args(flags))
    (folder / 'checkpoint.pth').write_bytes(b'')       # whatever it is
    main.main(parse_args([*flags, '--overwrite', '--lr', '0', '--min-lr', '0', '--model-ema-decay', '1']))
    line, = log_lines(folder)
    assert line['train_loss'] > 2.2 and len(tensorboard(folder)['train/loss']) == 1
    assert len(tensorboard(folder / 'steps')['step/loss']) == 2
    assert checkpoint(folder, 'best_checkpoint.pth')['best_acc1'] == line['test_acc1'] < 30
    assert not (folder / 'previous_checkpoint.pth').exists()
    main.main(parse_args([*PLAIN, '--epochs', '1', '--output_dir', str(folder), '--resume', 'auto']))
    assert 'Nothing is left to train' in capsys.readouterr().out


@pytest.mark.parametrize('flags, note', [
    (['--shrink_start_epoch', '10', '--epochs', '3'],
     'reaches 0.7 after 10 + 0 epochs, but the run has 3: the last one ends at 1;'),
    (['--shrink_start_epoch', '3', '--epochs', '3'], 'the last one ends at 1;'),
    (['--shrink_epochs', '4', '--epochs', '2'], 'the last one ends at 0.85'),
    (['--shrink_epochs', '3', '--epochs', '3'], ''), (['--shrink_start_epoch', '9', '--base_keep_rate', '1'], ''),
    (['--warmup-epochs', '3', '--epochs', '3'], 'the warm-up of 3 epochs is not shorter than the run of 3: '),
    (['--warmup-epochs', '2', '--epochs', '3'], ''),
    (['--model-ema', '--epochs', '3'], 'covers 25,000 updates, but the run has 60: '),
    (['--model-ema', '--epochs', '3', '--accum-steps', '7'], 'but the run has 9: '),
    (['--model-ema', '--epochs', '3', '--model-ema-decay', '0.9'], '')], ids=lambda value: ''.join(value)[:40])
def test_notes_on_the_length_of_the_run(flags, note, capsys):
    flags = [*TINY, '--no-model-ema', *flags]
    main.log_notes(parse_args([*flags, '--output-dir', 'a']), num_steps=20)
    printed = capsys.readouterr().out
    assert printed.count('note: ') == printed.count('\n') == bool(note) and note in printed
    main.log_notes(parse_args(flags), num_steps=20)
    assert capsys.readouterr().out == 'note: nothing will be saved; give --output-dir\n' + printed


def test_start_of_the_schedule_by_default():
    """Trained weights need no epochs with all tokens."""
    for flags, start in (([], 10), (['--finetune', 'a'], 0), (['--pretrained'], 0),
                         (['--pretrained', '--shrink-start-epoch', '4'], 4)):
        assert parse_args(['--model', 'deit_tiny_patch16_224', '--fuse_token', *flags]).shrink_start_epoch == start


def test_output_folder_as_a_checkpoint(digits_run, tmp_path):
    """Its newest one, in each program and for each flag."""
    import export
    folder = shutil.copytree(digits_run[1], tmp_path / 'run')
    assert_same(load_checkpoint(str(folder)), load_checkpoint(str(folder / 'checkpoint.pth')))
    assert parse_args(['--eval', '--resume', str(folder)]).drop_loc == (1, 2, 3)
    flags = ['--format', 'pt2', '--output', str(tmp_path / 'a.pt2')]
    assert export.parse_args(['--resume', str(folder), *flags])[0].drop_loc == (1, 2, 3)
    (folder / 'checkpoint.pth').rename(folder / 'previous_checkpoint.pth')             # killed while it was renamed
    assert load_checkpoint(str(folder))['epoch'] == 0


def test_resume_after_an_epoch(digits_run, tmp_path, capsys):
    _, folder = digits_run
    main.main(parse_args([*PLAIN, '--epochs', '2', '--resume', str(folder / 'checkpoint.pth'), '--output_dir',
                          str(tmp_path)]))
    printed = capsys.readouterr().out
    assert 'Epoch: [1/' in printed and 'Epoch: [0/' not in printed
    assert [line['epoch'] for line in log_lines(tmp_path)] == [1] and checkpoint(tmp_path)['epoch'] == 1


def test_token_counts(tmp_path, capsys):
    """The schedule of a file trains without a falling keep rate, and is evaluated."""
    (tmp_path / 'counts.json').write_text('[17, 17, 9, 5]')
    flags = ['--model', 'deit_tiny_patch16_shrink_base', '--fuse_token', '--input-size', '32', '--num_workers', '0',
             '--device', 'cpu', '--model-kwargs', 'patch_size=8', 'depth=4', 'embed_dim=24']
    flags += ['--output_dir', str(tmp_path)]
    main.main(parse_args([*flags, '--epochs', '1', '--token-counts', str(tmp_path / 'counts.json')]))
    trained = capsys.readouterr().out
    assert 'train_keep_rate' not in log_lines(tmp_path)[0]
    assert checkpoint(tmp_path)['args']['token_counts'] == (17, 17, 9, 5)
    flags += ['--resume', str(tmp_path / 'checkpoint.pth'), '--eval', '--token-counts']
    main.main(parse_args([*flags, '17,17,9,5']))
    evaluated = capsys.readouterr().out
    assert accuracy_lines(evaluated) == accuracy_lines(trained) and 'note' not in evaluated
    main.main(parse_args([*flags, '17,17,9,4']))
    assert 'trained with token_counts (17, 17, 9, 5), this run has (17, 17, 9, 4)' in capsys.readouterr().out
    with pytest.raises(SystemExit):                    # a curve has rates
        curve.parse_args(['--resume', flags[flags.index('--resume') + 1], '--knn', '5'])
    assert 'has token_counts (17, 17, 9, 5)' in capsys.readouterr().err


def test_finetune_at_another_resolution(digits_run, tmp_path, capsys):
    _, folder = digits_run
    main.main(parse_args([*PLAIN, '--epochs', '1', '--input-size', '48', '--finetune', str(folder / 'checkpoint.pth'),
                          '--output_dir', str(tmp_path)]))
    printed = capsys.readouterr().out
    assert 'resized pos_embed from 2×2 patches to 3×3' in printed and 'dropped' not in printed
    assert checkpoint(tmp_path)['model']['pos_embed'].shape == (1, 10, 192)


def test_image_folder(image_folder, tmp_path, capsys):
    flags = [*PLAIN, '--data-path', str(image_folder), '--batch-size', '8', '--num_workers', '2']
    main.main(parse_args([*flags, '--epochs', '2', '--output_dir', str(tmp_path)]))
    trained = capsys.readouterr().out
    assert 'IMNET: 24 training and 9 test images of 3 classes' in trained
    main.main(parse_args([*flags, '--eval', '--resume', str(tmp_path / 'checkpoint.pth'), '--no-model-ema']))
    assert accuracy_lines(capsys.readouterr().out)[-1] == accuracy_lines(trained)[-3]


def test_lmdb_losses(image_folder, tmp_path):
    tree = shutil.copytree(image_folder, tmp_path / 'tree')
    for split in ('train', 'val'):
        folder2lmdb.convert(str(tree / split), str(tree / f'{split}.lmdb'))
    flags = [*TINY, '--data-path', str(tree), '--batch-size', '8', '--epochs', '1']
    main.main(parse_args([*flags, '--output_dir', str(tmp_path / 'a')]))
    main.main(parse_args([*flags, '--output_dir', str(tmp_path / 'b'), '--use-lmdb']))
    one, other = (log_lines(tmp_path / name)[0] for name in 'ab')
    assert timeless(one) == timeless(other)


def test_losses_with_any_number_of_workers(image_folder, tmp_path):
    """All random operations are enabled: crops, RandAugment, erasing, mixup, drop path."""
    logs = []
    for workers in ('0', '1', '2'):
        main.main(parse_args([*TINY, '--data-path', str(image_folder), '--batch-size', '8', '--epochs', '2',
                              '--num-workers', workers, '--output-dir', str(tmp_path / workers)]))
        logs.append([timeless(line) for line in log_lines(tmp_path / workers)])
    assert logs[0] == logs[1] == logs[2]


@pytest.mark.parametrize('workers', ['0', '2'])
def test_broken_image(workers, image_folder, tmp_path, monkeypatch, capsys):
    tree = shutil.copytree(image_folder, tmp_path / 'tree')
    (tree / 'train' / 'red' / '3.png').write_bytes(b'no picture')
    flags = [*TINY, '--data-path', str(tree), '--batch-size', '8', '--epochs', '1', '--num_workers', workers,
             '--no-repeated-aug']                      # so that all images are read
    monkeypatch.setattr(sys, 'argv', ['main.py', *flags])
    with pytest.raises(SystemExit) as exit_:
        main.run()
    main.kill_workers()                                # as at exit, or torch waits 20 s for them some tests later
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count('\n') == 1, error
    assert error.startswith('main.py: error: ') and 'red/3.png does not decode' in error


@pytest.mark.parametrize('kind', ['soft', 'hard'])
def test_distillation(kind, tmp_path, image_folder):
    torch.save({'model': timm.create_model('resnet10t', num_classes=3).state_dict()}, tmp_path / 'teacher.pth')
    main.main(parse_args([
        *TINY, '--data-path', str(image_folder), '--batch-size', '8', '--epochs', '1', '--output_dir', str(tmp_path),
        '--model', 'deit_tiny_distilled_patch16_shrink_base', '--distillation-type', kind,
        '--teacher-model', 'resnet10t', '--teacher-path', str(tmp_path / 'teacher.pth')]))
    assert checkpoint(tmp_path)['optimizer']['state']                                  # both heads have gradients
    assert not any(key.startswith('teacher') for key in checkpoint(tmp_path)['model'])


def test_timm_model(image_folder, tmp_path):
    main.main(parse_args([
        '--model', 'deit_tiny_patch16_224', '--model-kwargs', 'depth=2', '--data-path', str(image_folder),
        '--input-size', '32', '--batch-size', '8',
        '--epochs', '1', '--num_workers', '0', '--device', 'cpu', '--no-model-ema', '--output_dir', str(tmp_path)]))
    assert 'train_keep_rate' not in log_lines(tmp_path)[0] and checkpoint(tmp_path)['model_ema'] is None


def test_model_kwargs():
    args = parse_args([*DEIT_TINY, '--input-size', '48', '--model-kwargs', 'patch_size=8', 'embed_dim=96', 'depth=10',
                       'class_token=True', 'global_pool=token', 'act_layer=relu'])
    model = main.build_model(args, 10)
    assert (model.patch_embed.num_patches, model.embed_dim, len(model.blocks)) == (36, 96, 10)
    assert type(model.blocks[0].mlp.act) is torch.nn.ReLU and model.global_pool == 'token'
    twice = parse_args([*DEIT_TINY, '--model-kwargs', 'depth=2', 'embed_dim=96', '--model-kwargs', 'depth=3'])
    assert twice.model_kwargs == {'depth': 3, 'embed_dim': 96} and parse_args(DEIT_TINY).model_kwargs == {}


@pytest.mark.parametrize('name', ['inception_v3', 'vgg11', 'levit_128s', 'tiny_vit_5m_224', 'coat_tiny'])
def test_timm_models_without_stochastic_depth_or_patch_size(name):
    """Models without stochastic depth, or whose patch size timm stores in another way or not at all."""
    with torch.device('meta'):
        model = main.build_model(parse_args(['--model', name]), 7)
    assert model.num_classes == 7


def test_wrong_model_kwargs_without_stochastic_depth():
    with pytest.raises(InputError, match='no_such_argument'):
        main.build_model(parse_args(['--model', 'vgg11', '--model-kwargs', 'no_such_argument=3']), 7)


@pytest.fixture
def short_windows(monkeypatch):
    monkeypatch.setattr(main, 'report_speed', functools.partial(main.report_speed, windows=2, window_seconds=0.01))


def test_speed_and_masks(digits_run, tmp_path, capsys, short_windows):
    _, folder = digits_run
    flags = [*PLAIN, '--output_dir', str(tmp_path), '--resume', str(folder / 'checkpoint.pth')]
    main.main(parse_args([*flags, '--only_test_speed', '--batch-size', '1', '--mixup', '0.8']))
    assert 'images/s' in (tmp_path / 'speed_macs.txt').read_text() and 'GMACs' in capsys.readouterr().out
    line, = log_lines(tmp_path)
    assert line['speed_images_per_second'] > 0 and 0 < line['speed_gmacs'] < 1
    main.main(parse_args([*flags, '--visualize_mask', '--n_visualization', '5', '--batch-size', '2']))
    assert sorted(path.name for path in tmp_path.glob('*.jpg')) == sorted(
        f'img_{i}_{stage}.jpg' for i in range(5) for stage in ('a', 'block1', 'block2', 'block3'))
    assert sorted(path.name for path in tmp_path.glob('*.png')) == ['attention.png', 'grid.png']
    assert 'on the 5 test images' in capsys.readouterr().out


def test_pictures_by_one_and_two_processes(image_folder, tmp_path, capsys):
    flags = [*PLAIN, '--data-path', str(image_folder), '--batch-size', '2']
    torch.save({'model': main.build_model(parse_args(flags), 3).state_dict()}, tmp_path / 'new.pth')
    flags += ['--visualize_mask', '--n_visualization', '7', '--resume', str(tmp_path / 'new.pth')]
    main.main(parse_args([*flags, '--output_dir', str(tmp_path / '0')]))
    printed, done = capsys.readouterr().out, run_main(*flags, '--output_dir', tmp_path / '2', processes=2)
    assert accuracy_lines(done.stdout) == accuracy_lines(printed) and 'on the 7 test images' in printed
    names = sorted(path.name for path in (tmp_path / '0').iterdir())
    assert names == sorted(['grid.png', 'attention.png', *(
        f'img_{i}_{stage}.jpg' for i in range(7) for stage in ('a', 'block1', 'block2', 'block3'))])
    assert names == sorted(path.name for path in (tmp_path / '2').iterdir())
    for name in names:
        assert (open_picture(tmp_path / '0' / name) - open_picture(tmp_path / '2' / name)).abs().float().mean() < 1
    grid, attention = ((open_picture(tmp_path / '0' / f'{name}.png') == 230).all(-1).sum()
                       for name in ('grid', 'attention'))
    assert grid < 1000 < attention                     # grey marks patches dropped by earlier stages
    loader_val = main.build_loaders(parse_args(flags), torch.device('cpu'))[1]
    for i in range(7):
        pixels = loader_val.dataset[i * 9 // 7][0].permute(1, 2, 0)
        assert (open_picture(tmp_path / '0' / f'img_{i}_a.jpg') - pixels).abs().float().mean() < 8
    brightest = [open_picture(tmp_path / '0' / f'img_{i}_a.jpg').float().mean((0, 1)).argmax().item() for i in range(7)]
    assert brightest == [2, 2, 2, 1, 1, 0, 0]          # the classes are blue, green and red; all are shown


def test_precision_of_pictures(digits_run, tmp_path, monkeypatch):
    precise = []
    for name in 'save_masked', 'draw_sheets':
        monkeypatch.setattr(visualize_mask, name,
                            lambda *_, **__: precise.append(torch.is_autocast_enabled('cpu')) or [])
    main.main(parse_args([*PLAIN, '--output_dir', str(tmp_path), '--resume', str(digits_run[1] / 'checkpoint.pth'),
                          '--visualize_mask', '--n_visualization', '2', '--amp-dtype', 'bfloat16']))
    assert precise == [True, True]


def test_sheet_of_the_first_images(digits_run, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(visualize_mask, 'SHEET_IMAGES', 3)
    monkeypatch.setattr(visualize_mask, 'draw_sheets', lambda model, loader, classes, **_: [
        shown.append(len(loader.dataset)) or Image.new('RGB', (1, 1))] * 2)
    main.main(parse_args([*PLAIN, '--output_dir', str(tmp_path), '--resume', str(digits_run[1] / 'checkpoint.pth'),
                          '--visualize_mask', '--n_visualization', '5']))
    assert shown == [3] and len(list(tmp_path.glob('*.jpg'))) == 5 * 4


@pytest.mark.gpu
def test_training_on_a_gpu_in_bfloat16(tmp_path):
    done = run_main(*PLAIN, '--device', 'cuda', '--amp-dtype', 'bfloat16', '--epochs', '2', '--output_dir', tmp_path)
    assert 'on cuda, torch.bfloat16' in done.stdout and 'memory:' in done.stdout
    assert log_lines(tmp_path)[-1]['test_acc1'] > 20


@pytest.mark.parametrize('compiled_graphs', ['captured'], indirect=True)
def test_compiled_and_channels_last_run(image_folder, tmp_path, compiled_graphs, short_windows):
    """The run anneals the keep rate, averages the weights, evaluates both models and is resumed."""
    flags = [*PLAIN, '--data-path', str(image_folder), '--batch-size', '6', '--shrink_epochs', '2', '--drop-path', '0',
             '--model-ema-decay', '0.5', '--model-kwargs', 'depth=3', 'embed_dim=48', '--drop_loc', '1,2']
    for name, changes in (('plain', []), ('compiled', ['--compile', '--channels-last', '--test-speed'])):
        for epochs, resume in (('2', []), ('3', ['--resume', str(tmp_path / name / 'checkpoint.pth')])):
            main.main(parse_args([*flags, *changes, '--epochs', epochs, *resume, '--output_dir', str(tmp_path / name)]))
    plain, compiled = ([line for line in log_lines(tmp_path / name) if 'epoch' in line]
                       for name in ('plain', 'compiled'))
    for ours, theirs in zip(compiled, plain, strict=True):
        for key in ('train_loss', 'test_loss', 'test_ema_loss', 'train_keep_rate'):
            assert ours[key] == pytest.approx(theirs[key], abs=1e-3), key
    assert 4 < len(compiled_graphs) < 12
    assert 'compiled' in (tmp_path / 'compiled' / 'speed_macs.txt').read_text()
    assert checkpoint(tmp_path / 'compiled')['model'].keys() == checkpoint(tmp_path / 'plain')['model'].keys()
