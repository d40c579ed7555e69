import argparse
import io
import json
import os
import random
import shutil
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import folder2lmdb
import main
import utils
from conftest import TINY, reference, run_main
from engine import keep_rate_at
from main import parse_args
from outputs import assert_same, checkpoint, events, log_lines, result
from samplers import TrainSampler

PLAIN = [*TINY, '--mixup', '0', '--cutmix', '0', '--aa=', '--color-jitter', '0', '--reprob', '0', '--print-freq', '10']


# --- Command line ---------------------------------------------------------------------------------------------------

def documented_defaults():
    return dict(
        base_keep_rate=0.7, fuse_token=False, drop_loc=(3, 6, 9), shrink_start_epoch=10, shrink_epochs=0, eval=False,
        test_speed=False, only_test_speed=False, visualize_mask=False, n_visualization=128, input_size=224, drop=0.0,
        drop_path=0.1, model_ema=True, model_ema_decay=0.99996, model_ema_force_cpu=False, opt='adamw', opt_eps=1e-8,
        opt_betas=None, clip_grad=None, momentum=0.9, weight_decay=0.05, epochs=300, batch_size=64, sched='cosine',
        lr=5e-4, lr_noise=None, lr_noise_pct=0.67, lr_noise_std=1.0, warmup_lr=1e-6, min_lr=1e-5, decay_epochs=30,
        warmup_epochs=5, patience_epochs=10, decay_rate=0.1, color_jitter=0.4, aa='rand-m9-mstd0.5-inc1', smoothing=0.1,
        train_interpolation='bicubic', repeated_aug=True, reprob=0.25, remode='pixel', recount=1, mixup=0.8, cutmix=1.0,
        cutmix_minmax=None, mixup_prob=1.0, mixup_switch_prob=0.5, mixup_mode='batch', teacher_model='regnety_160',
        teacher_path=None, distillation_type='none', distillation_alpha=0.5, distillation_tau=1.0, finetune=None,
        use_lmdb=False, inat_category='name', pin_mem=True, output_dir='', seed=0, resume='', start_epoch=0,
        dist_eval=False, world_size=1, dist_url='env://', amp_dtype='auto', eval_interval=1, log_masks=True)


def test_defaults_of_the_command_line():
    args = vars(parse_args([]))
    assert {key: args[key] for key in documented_defaults()} == documented_defaults()
    assert args['model'] == 'deit_small_patch16_shrink_base' and args['data_set'] == 'DIGITS'
    assert args['device'] == ('cuda' if torch.cuda.is_available() else 'cpu')


def test_flags_with_dashes_and_underscores():
    one = parse_args(['--base_keep_rate', '0.5', '--drop_loc', '(2, 5)', '--no_model_ema', '--output_dir=a_b'])
    other = parse_args(['--base-keep-rate=0.5', '--drop-loc', '2,5', '--no-model-ema', '--output-dir', 'a_b'])
    assert one == other and one.drop_loc == (2, 5) and one.output_dir == 'a_b' and not one.model_ema
    assert parse_args(['--model', 'deit_small_patch16_224_shrink05']).base_keep_rate == 0.5
    assert parse_args(['--model', 'deit_small_patch16_224']).base_keep_rate is None


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    """A checkpoint of a model that takes images of 224 pixels only."""
    path = tmp_path_factory.mktemp('teacher') / 'teacher.pth'
    torch.save({'model': timm.create_model('deit_tiny_patch16_224', num_classes=10).state_dict()}, path)
    return path


@pytest.fixture
def trees(image_folder, teacher, tmp_path):
    """Trees that are wrong in one way each."""
    shutil.copytree(image_folder, tmp_path / 'other_classes')
    (tmp_path / 'other_classes' / 'val' / 'red').rename(tmp_path / 'other_classes' / 'val' / 'pink')
    (tmp_path / 'no_val' / 'train' / 'a').mkdir(parents=True)
    Image.new('RGB', (8, 8)).save(tmp_path / 'no_val' / 'train' / 'a' / '0.png')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'junk.pth').write_text('junk')
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
    (['--eval', '--resume', '{root}/junk.pth'], 'junk.pth is not a checkpoint'),
    (['--resume', '{root}/junk.pth'], 'junk.pth is not a checkpoint'),
    (['--finetune', '{root}/junk.pth'], 'junk.pth is not a checkpoint'),
    (['--distillation-type', 'hard'], '--teacher-path'),
    (['--distillation-type', 'hard', '--teacher-path', 'x'], 'distillation token'),
    (['--input-size', '40'], '40'),
    (['--model', 'deit_small_patch16_224', '--fuse_token'], 'does not reorganise tokens'),
    (['--model', 'deit_small_patch16_224', '--shrink_epochs', '3'], 'shrink_epochs'),
    (['--model', 'no_such_model'], 'no_such_model'),
    (['--opt', 'no_such_optimizer'], 'no_such_optimizer'),
    (['--data-set', 'CIFAR'], '--data-path'),
    (['--data-path', ''], 'needs --data-path'),
    (['--data-set', 'DIGITS', '--data-path', '{tree}'], '--data-set DIGITS'),
    (['--finetune', ''], '--finetune'),
    (['--eval', '--finetune', '{root}/junk.pth'], '--resume'),
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
    (['--output_dir', '{root}/junk.pth'], 'junk.pth cannot be made'),
    (['--data-set', 'CIFAR', '--data-path', '{root}'], 'cifar-100-python'),
    (['--data-set', 'INAT', '--data-path', '{root}'], 'categories.json'),
    (['--mixup', '0.8', '--batch-size', '3'], 'odd'),
    (['--no-such-flag'], 'no-such-flag'),
    (['--device', 'abacus'], 'abacus'),
    (['--use-lmdb', '--data-path', '{root}'], 'train.lmdb'),
    (['--compile'], 'g++'),
    (['--world_size', '2'], 'RANK')], ids=lambda value: ' '.join(value) if isinstance(value, list) else '')
def test_wrong_input_is_one_line_and_status_2(flags, named, trees, image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('CXX', 'no_such_compiler')
    flags = [flag.format(root=trees, tree=image_folder) for flag in flags]
    monkeypatch.setattr(sys, 'argv', ['main.py', *PLAIN, '--output_dir', 'out', *flags])
    with pytest.raises(SystemExit) as exit_:
        main.run()
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count('\n') == 1 and named in error, error
    assert not (tmp_path / 'out').exists() and not (tmp_path / 'made').exists()


# --- The pieces of a run --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', reference('training.json')['learning_rate'])
def test_learning_rate_and_parameter_groups_are_the_originals(name, monkeypatch):
    case = reference('training.json')['learning_rate'][name]
    monkeypatch.setattr(utils, 'world_size', lambda: case['world'])
    args = parse_args([*case['flags'], '--no-model-ema'])
    training = main.Training(args, main.build_model(args, 1000), torch.device('cpu'))
    optimizer = training.optimizer
    assert type(optimizer).__name__ == case['opt']
    assert [{'weight_decay': group['weight_decay'], 'tensors': len(group['params']),
             'params': sum(p.numel() for p in group['params']), 'betas': list(group['betas']), 'eps': group['eps']}
            for group in optimizer.param_groups] == case['groups']
    for epoch in range(args.epochs):
        if str(epoch) in case['lr_by_epoch']:
            assert optimizer.param_groups[0]['lr'] == pytest.approx(case['lr_by_epoch'][str(epoch)], rel=1e-9), epoch
        training.lr_scheduler.step(epoch)


@pytest.mark.parametrize('flags, mixes, loss', [
    ([], True, 'SoftTargetCrossEntropy'), (['--mixup', '0'], True, 'SoftTargetCrossEntropy'),
    (['--mixup', '0', '--cutmix', '0'], False, 'LabelSmoothingCrossEntropy'),
    (['--mixup', '0', '--cutmix', '0', '--cutmix-minmax', '0.2', '0.8'], True, 'SoftTargetCrossEntropy'),
    (['--mixup', '0', '--cutmix', '0', '--smoothing', '0'], False, 'CrossEntropyLoss')])
def test_the_loss_goes_with_the_mixing(flags, mixes, loss):
    mixup, criterion = main.build_criterion(parse_args(flags), 10, torch.device('cpu'))
    assert (mixup is not None) == mixes and type(criterion.base_criterion).__name__ == loss
    if mixes:
        images, labels = mixup(torch.randn(4, 3, 8, 8), torch.arange(4))
        assert criterion(images, torch.randn(4, 10), labels).isfinite()


def test_finetuning_names_what_is_left_over(tmp_path):
    args = parse_args(PLAIN)
    model = main.build_model(args, 10)
    weights = timm.create_model('deit_tiny_distilled_patch16_224', img_size=32).state_dict()
    torch.save({'model': weights}, tmp_path / 'distilled.pth')
    with pytest.raises(utils.InputError, match='dist_token is not in the model'):
        main.load_finetune(model, str(tmp_path / 'distilled.pth'))
    weights = timm.create_model('deit_tiny_patch16_224').state_dict()
    weights.pop('blocks.0.norm1.bias')
    torch.save({'model': weights}, tmp_path / 'lacking.pth')
    with pytest.raises(utils.InputError, match='blocks.0.norm1.bias is missing'):
        main.load_finetune(model, str(tmp_path / 'lacking.pth'))


def test_finetuning_takes_all_but_the_head_and_resizes_the_positions(tmp_path, capsys):
    source = timm.create_model('deit_tiny_patch16_224')
    torch.save({'model': source.state_dict()}, tmp_path / 'deit.pth')
    model = main.build_model(parse_args([*PLAIN, '--input-size', '288']), 10)
    main.load_finetune(model, str(tmp_path / 'deit.pth'))
    printed = capsys.readouterr().out
    assert 'dropped head.bias [1000]' in printed and 'resized pos_embed from 14×14 patches to 18×18' in printed
    own = model.state_dict()
    same = [key for key, value in source.state_dict().items() if own[key].shape == value.shape]
    assert len(same) == len(own) - 3 and all(torch.equal(own[key], source.state_dict()[key]) for key in same)
    grid = source.pos_embed[:, 1:].detach().reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=(18, 18), mode='bicubic', align_corners=False)
    torch.testing.assert_close(own['pos_embed'][:, 1:], expected.flatten(2).transpose(1, 2))


def test_finetuning_stays_in_eval_mode_and_distils_all_the_same():
    args = parse_args([*PLAIN, '--finetune', 'x', '--model', 'deit_tiny_distilled_patch16_shrink_base',
                       '--distillation-type', 'hard', '--teacher-path', 'x', '--drop-path', '0.5'])
    model = main.build_model(args, 10)
    main.set_training_mode(model, args)
    assert not any(module.training for module in model.blocks.modules())
    assert [head.shape for head in model(torch.zeros(2, 3, 32, 32))] == [(2, 10), (2, 10)]


@pytest.mark.parametrize('flags', [
    ['--batch-size', '4', '--accum-steps', '2'],
    ['--batch-size', '8', '--sched', 'plateau', '--patience-epochs', '0', '--lr-noise', '0.1']], ids=' '.join)
def test_resumed_at_any_step_a_run_ends_with_the_same_bits(flags, image_folder, tmp_path, monkeypatch, one_thread):
    flags = [*TINY, '--data-path', str(image_folder), '--epochs', '3', '--shrink_epochs', '2',
             '--model-ema-decay', '0.9', '--checkpoint-interval', '1', *flags]         # and all of the augmentation
    save, kept = utils.save_checkpoint, []

    def save_and_keep(state, folder, best=False):
        save(state, folder, best)
        kept.append(shutil.copytree(folder, tmp_path / str(len(kept)), copy_function=keep))

    def keep(path, copy):
        (os.link if path.endswith('.pth') else shutil.copy)(path, copy)

    monkeypatch.setattr(utils, 'save_checkpoint', save_and_keep)
    main.main(parse_args([*flags, '--output_dir', str(tmp_path / 'whole'), '--resume', 'auto']))
    monkeypatch.setattr(utils, 'save_checkpoint', save)
    assert len(kept) == 9                            # 3 updates in each of 3 epochs
    for i in (0, 2, 4, 7):
        torch.manual_seed(i)                         # the state that a process happens to be in does not matter
        main.main(parse_args([*flags, '--output_dir', str(kept[i]), '--resume', 'auto']))
        assert_same(result(kept[i]), result(tmp_path / 'whole'))


@pytest.mark.parametrize('torn', [1, 0])
def test_what_a_run_broken_off_has_logged_is_not_repeated(torn, tmp_path):
    lines = [{'speed_gmacs': 1.0}, ['a', 'note'], *({'epoch': epoch} for epoch in range(4))]
    (tmp_path / 'log.txt').write_bytes(b'\xff\n' + b''.join(json.dumps(line).encode() + b'\n' for line in lines)
                                       + b'{"epoch": 4, "tr' * torn + (1 - torn) * b'{"epoch": null}')
    with main.RunOutput(parse_args(['--resume', 'auto', '--output-dir', str(tmp_path)]), 2):
        pass
    assert log_lines(tmp_path) == lines[:4]


def test_with_other_steps_a_run_goes_on_at_the_like_of_its_step(image_folder, tmp_path, capsys, one_thread):
    flags = [*TINY, '--data-path', str(image_folder), '--epochs', '1', '--checkpoint-interval', '4', '--output_dir',
             str(tmp_path), '--resume', 'auto', '--no-repeated-aug']
    main.main(parse_args([*flags, '--batch-size', '4']))                               # 6 steps
    (tmp_path / 'previous_checkpoint.pth').replace(tmp_path / 'checkpoint.pth')
    main.main(parse_args([*flags, '--batch-size', '2', '--print-freq', '1']))          # 12 steps
    out = capsys.readouterr().out
    assert 'saved at step 4 of 6, an epoch has 12 now; training goes on at step 8' in out
    assert '[ 9/12]' in out and '[ 8/12]' not in out


def test_with_other_updates_a_run_goes_on_where_one_begins(capsys):
    training = main.Training(args := parse_args(PLAIN), main.build_model(args, 10), torch.device('cpu'))
    assert training.start_step(6, 2) == 0
    training.progress = {'step': 4, 'num_steps': 6}
    assert training.start_step(6, 2) == 4 and capsys.readouterr().out == ''
    training.progress['step'] = 6                                          # which the last update ended, though of one
    assert training.start_step(6, 4) == 6 and capsys.readouterr().out == ''
    training.progress['step'] = 4
    assert training.start_step(6, 3) == 3 and training.progress == {'step': 3, 'num_steps': 6}
    assert 'goes on at step 3' in capsys.readouterr().out


@pytest.mark.parametrize('sched', ['cosine', 'step'])
def test_a_resumed_run_takes_its_rates_from_its_own_flags(sched, capsys):
    """As a run that had them from the start, while the moments of the optimizer stay."""
    def training(*flags):
        args = parse_args([*PLAIN, '--sched', sched, '--decay-epochs', '2', *flags])
        return args, main.Training(args, main.build_model(args, 10), torch.device('cpu'))

    def groups(training):
        return [{name: value for name, value in group.items() if name != 'params'}
                for group in training.optimizer.param_groups]

    args, first = training('--epochs', '20', '--opt', 'sgd')
    for parameter in first.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    first.optimizer.step()
    first.lr_scheduler.step(4)
    first.epoch = 5
    saved = first.checkpoint(args)
    for flags in ([], ['--lr', '1e-4'], ['--epochs', '9'], ['--weight-decay', '0.3'], ['--batch-size', '32'],
                  ['--momentum', '0.5']):
        args, resumed = training('--epochs', '20', '--opt', 'sgd', *flags)
        _, own = training('--epochs', '20', '--opt', 'sgd', *flags)
        own.lr_scheduler.step(4)
        resumed.resume(saved, 'a.pth')
        assert groups(resumed) == groups(own) and (groups(own) == groups(first)) == (
            not flags or (sched, flags[0]) == ('step', '--epochs')), flags
        assert_same(resumed.optimizer.state_dict()['state'], first.optimizer.state_dict()['state'])
        resumed.lr_scheduler.step(5)
        own.lr_scheduler.step(5)
        assert groups(resumed) == groups(own)


def test_of_a_plateau_only_the_rate_and_what_led_to_it_go_on():
    def training(*flags):
        args = parse_args([*PLAIN, '--sched', 'plateau', '--warmup-lr', '1e-3', *flags])
        return args, main.Training(args, main.build_model(args, 10), torch.device('cpu'))

    args, first = training()
    for epoch, accuracy in enumerate((10., 20., 15.)):
        first.lr_scheduler.step(epoch, accuracy)
    for group in first.optimizer.param_groups:
        group['lr'] = 7e-4
    first.epoch = 3
    _, resumed = training('--weight-decay', '0.3', '--patience-epochs', '3', '--decay-rate', '0.5', '--min-lr', '1e-7')
    resumed.resume(first.checkpoint(args), 'a.pth')
    plateau = resumed.lr_scheduler.lr_scheduler
    assert (plateau.best, plateau.num_bad_epochs) == (20., 1)
    assert (plateau.patience, plateau.factor, set(plateau.min_lrs)) == (3, 0.5, {1e-7})
    assert {group['lr'] for group in resumed.optimizer.param_groups} == {7e-4}
    assert {group['weight_decay'] for group in resumed.optimizer.param_groups} == {0., 0.3}


def test_a_resumed_run_tells_of_another_schedule(digits_run, tmp_path, capsys):
    _, folder = digits_run
    main.read_resume(parse_args([*PLAIN, '--lr', '1e-4']), str(folder / 'checkpoint.pth'))
    assert 'trained with lr 0.0024, this run has 0.0001' in capsys.readouterr().out
    state = checkpoint(folder)
    torch.save(state | {'args': argparse.Namespace(**state['args'])}, tmp_path / 'original.pth')
    main.read_resume(parse_args([*PLAIN, '--lr', '1e-4', '--epochs', '7']), str(tmp_path / 'original.pth'))
    out = capsys.readouterr().out
    assert 'trained with lr' not in out and 'trained with epochs' in out


@pytest.mark.parametrize('where, accum_steps', [('training', 1), ('evaluation', 1), ('evaluation', 2)])
def test_a_signal_ends_a_run_that_then_goes_on_exactly(where, accum_steps, image_folder, tmp_path, monkeypatch,
                                                       one_thread):
    flags = [*TINY, '--data-path', str(image_folder), '--batch-size', '8', '--epochs', '2', '--resume', 'auto',
             '--accum-steps', str(accum_steps)]
    main.main(parse_args([*flags, '--output_dir', str(tmp_path / 'whole')]))
    calls, function = [], 'train_one_epoch' if where == 'training' else 'evaluate'

    def signal_and_call(*arguments, **options):
        calls.append(signal.raise_signal(signal.SIGUSR1))
        return original(*arguments, **options)

    original = getattr(main, function)
    monkeypatch.setattr(main, function, signal_and_call)
    with pytest.raises(utils.Stopped) as stopped:
        main.main(parse_args([*flags, '--output_dir', str(tmp_path / 'stopped')]))
    assert stopped.value.signum == signal.SIGUSR1 and len(calls) == 1
    assert checkpoint(tmp_path / 'stopped')['progress']['step'] == (1 if where == 'training' else 3)
    monkeypatch.setattr(main, function, original)
    main.main(parse_args([*flags, '--output_dir', str(tmp_path / 'stopped')]))
    assert_same(result(tmp_path / 'stopped'), result(tmp_path / 'whole'))


def test_what_does_not_fit_is_not_resumed(digits_run, tmp_path):
    _, folder = digits_run
    args = parse_args([*PLAIN, '--sched', 'plateau'])                      # which alone goes on with its scheduler
    wrong = ('lr_scheduler', None), ('optimizer', None), ('epoch', 'x'), ('optimizer', {'param_groups': []})
    for key, value in wrong:
        training = main.Training(args, main.build_model(args, 10), torch.device('cpu'))
        with pytest.raises(utils.InputError, match='a.pth lacks a part'):
            training.resume(checkpoint(folder) | {key: value}, 'a.pth')
    with pytest.raises(utils.InputError, match='trained with --opt adamw'):
        main.read_resume(parse_args([*PLAIN, '--opt', 'sgd']), str(folder / 'checkpoint.pth'))


def test_each_epoch_has_its_order_its_rate_its_evaluation_and_its_best(image_folder, tmp_path, monkeypatch):
    orders, accuracies, best = [], iter([50., 70., 60.]), []
    order = TrainSampler.__iter__
    monkeypatch.setattr(TrainSampler, '__iter__', lambda self: iter(orders.append(list(order(self))) or orders[-1]))
    monkeypatch.setattr(main, 'test_stats', lambda *_: {'test_acc1': next(accuracies)})
    monkeypatch.setattr(main.RunOutput, 'save', lambda self, state, is_best: best.append(is_best))
    main.main(parse_args([
        *PLAIN, '--data-path', str(image_folder), '--batch-size', '8', '--epochs', '6', '--eval-interval', '2',
        '--shrink_start_epoch', '1', '--shrink_epochs', '4', '--output_dir', str(tmp_path), '--sched', 'step',
        '--decay-epochs', '2']))
    lines = log_lines(tmp_path)
    expected = [keep_rate_at(3 * epoch + 2, 3, 1, 4, 0.7) for epoch in range(6)]
    assert [line['train_keep_rate'] for line in lines] == expected and len(set(expected)) == 6
    assert [key for share in orders for _, key in share] == [(0, epoch, i) for epoch in range(6) for i in range(24)]
    assert len({tuple(index for index, _ in share) for share in orders}) == 6
    assert ['test_acc1' in line for line in lines] == [False, True] * 3
    assert best == [False, True, False, True, False, False]


def test_the_moving_average_moves_slowly(digits_run):
    args = parse_args(PLAIN)
    utils.seed_all(0)
    start = main.build_model(args, 10).state_dict()['blocks.5.mlp.fc1.weight']
    state = checkpoint(digits_run[1])
    model, ema = (state[key]['blocks.5.mlp.fc1.weight'] for key in ('model', 'model_ema'))
    assert 0 < (ema - start).norm() < 0.01 * (model - start).norm()


def test_training_augments_and_validation_does_not():
    args = parse_args([*TINY, '--num_workers', '0'])
    train, val = (loader.dataset for loader in main.build_loaders(args, torch.device('cpu')))
    assert not torch.equal(train[5, (0, 0, 0)][0], train[5, (0, 0, 1)][0])
    assert torch.equal(val[5][0], val[5][0]) and type(val.transform.transforms[0]).__name__ == 'Resize'


# --- As its users start it ------------------------------------------------------------------------------------------

def accuracy_lines(done):
    return [line for line in done.stdout.splitlines() if line.startswith(('Accuracy', '* Acc@1'))]


@pytest.fixture(scope='module')
def digits_run(tmp_path_factory):
    """A process that trained on the digits for an epoch, and its output folder."""
    folder = tmp_path_factory.mktemp('digits')
    return run_main(*PLAIN, '--epochs', '1', '--output_dir', folder), folder


def test_training_prints_and_saves(digits_run):
    done, folder = digits_run
    assert 'deit_tiny_patch16_shrink_base' in done.stdout and '1,437 training and 360 test images' in done.stdout
    line = next(line for line in done.stdout.splitlines() if line.startswith('Epoch: [0]'))
    assert all(name in line for name in ('[10/20]', 'eta:', 'loss:', 'lr:', 'keep_rate: 0.7', 'images/s:'))
    assert 'Accuracy of the network on the 360 test images: ' in done.stdout
    assert 'Accuracy of the EMA network on the 360 test images: ' in done.stdout
    stats, = log_lines(folder)
    assert stats['epoch'] == 0 and stats['train_keep_rate'] == 0.7 and stats['n_parameters'] == 5_489_482
    assert {'train_loss', 'train_lr', 'train_images_per_second', 'test_loss', 'test_acc1', 'test_acc5',
            'test_ema_acc1'} <= stats.keys()
    assert stats['test_acc1'] > 20                   # of ten classes
    state = checkpoint(folder)
    assert {'model', 'optimizer', 'lr_scheduler', 'epoch', 'model_ema', 'scaler', 'args'} <= state.keys()
    assert type(state['args']) is dict and state['epoch'] == 0
    assert_same(state, checkpoint(folder, 'best_checkpoint.pth'))
    assert list(folder.glob('events.out.tfevents*'))


def test_evaluation_finds_the_figures_of_training(digits_run):
    done, folder = digits_run
    evaluated = run_main(*PLAIN, '--eval', '--resume', folder / 'checkpoint.pth')
    assert accuracy_lines(evaluated) == accuracy_lines(done)
    other_rate = run_main(*PLAIN, '--eval', '--resume', folder / 'checkpoint.pth', '--base_keep_rate', '0.3')
    assert accuracy_lines(other_rate) != accuracy_lines(done)
    assert 'trained with base_keep_rate 0.7, this run has 0.3' in other_rate.stdout


def test_two_processes_evaluate_as_one(digits_run):
    done, folder = digits_run
    for dist_eval in ([], ['--dist-eval']):
        evaluated = run_main(*PLAIN, '--eval', '--resume', folder / 'checkpoint.pth', *dist_eval, processes=2)
        assert accuracy_lines(evaluated) == accuracy_lines(done)


def test_two_processes_train(tmp_path):
    done = run_main(*PLAIN, '--epochs', '1', '--batch-size', '32', '--dist-eval', '--output_dir', tmp_path, processes=2)
    assert '2 process(es) on cpu' in done.stdout
    stats, = log_lines(tmp_path)
    assert stats['test_acc1'] > 20 and len(accuracy_lines(done)) == 4                  # from the first process alone


def test_two_processes_train_as_one(image_folder, tmp_path):
    flags = [*PLAIN, '--data-path', image_folder, '--drop-path', '0', '--opt', 'sgd', '--epochs', '2', '--dist-eval',
             '--no-repeated-aug', '--model-ema-decay', '0.5', '--data-set', 'IMNET', '--smoothing', '0']
    run_main(*flags, '--batch-size', '8', '--output_dir', tmp_path / '1')
    run_main(*flags, '--batch-size', '4', '--output_dir', tmp_path / '2', processes=2)
    one, two = (checkpoint(tmp_path / name) for name in '12')
    for part in ('model', 'model_ema'):
        for key, value in one[part].items():
            torch.testing.assert_close(two[part][key], value, rtol=0, atol=1e-5)
    assert log_lines(tmp_path / '1')[-1]['train_loss'] == pytest.approx(log_lines(tmp_path / '2')[-1]['train_loss'])


def test_resume_goes_on(digits_run, tmp_path):
    _, folder = digits_run
    done = run_main(*PLAIN, '--epochs', '2', '--resume', folder / 'checkpoint.pth', '--output_dir', tmp_path)
    assert 'Epoch: [1]' in done.stdout and 'Epoch: [0]' not in done.stdout
    assert [line['epoch'] for line in log_lines(tmp_path)] == [1] and checkpoint(tmp_path)['epoch'] == 1


def test_finetune_at_another_resolution(digits_run, tmp_path):
    _, folder = digits_run
    done = run_main(*PLAIN, '--epochs', '1', '--input-size', '48', '--finetune', folder / 'checkpoint.pth',
                    '--output_dir', tmp_path)
    assert 'resized pos_embed from 2×2 patches to 3×3' in done.stdout and 'dropped' not in done.stdout
    assert checkpoint(tmp_path)['model']['pos_embed'].shape == (1, 10, 192)


def test_image_folder_trains_and_evaluates(image_folder, tmp_path):
    flags = [*PLAIN, '--data-path', image_folder, '--batch-size', '8', '--num_workers', '2']
    trained = run_main(*flags, '--epochs', '2', '--output_dir', tmp_path)
    assert 'IMNET: 24 training and 9 test images of 3 classes' in trained.stdout
    evaluated = run_main(*flags, '--eval', '--resume', tmp_path / 'checkpoint.pth', '--no-model-ema')
    assert accuracy_lines(evaluated)[-1] == accuracy_lines(trained)[-3]


def test_lmdb_gives_the_losses_of_the_tree(image_folder, tmp_path):
    tree = shutil.copytree(image_folder, tmp_path / 'tree')
    for split in ('train', 'val'):
        folder2lmdb.convert(str(tree / split), str(tree / f'{split}.lmdb'))
    flags = [*TINY, '--data-path', str(tree), '--batch-size', '8', '--epochs', '1']
    main.main(parse_args([*flags, '--output_dir', str(tmp_path / 'a')]))
    main.main(parse_args([*flags, '--output_dir', str(tmp_path / 'b'), '--use-lmdb']))
    one, other = (log_lines(tmp_path / name)[0] for name in 'ab')
    assert {**one, 'train_images_per_second': 0} == {**other, 'train_images_per_second': 0}


def test_smaller_gpus_take_more_batches_and_keep_fewer_activations():
    args = parse_args([*TINY, '--grad-checkpointing', '--accum-steps', '4', '--lr', '1e-3'])
    model = main.build_model(args, 10)
    assert model.grad_checkpointing and not main.build_model(parse_args(TINY), 10).grad_checkpointing
    training = main.Training(args, model, torch.device('cpu'))
    training.lr_scheduler.step(0)
    assert training.optimizer.param_groups[0]['lr'] == pytest.approx(1e-3 * 64 * 4 / 512)


@pytest.mark.parametrize('flags, expected', [
    (['--reprob', '0'], None), ([], (0.25, True, False, 1)),
    (['--remode', 'rand', '--recount', '3'], (0.25, False, True, 3)),
    (['--reprob', '0.5', '--remode', 'const'], (0.5, False, False, 1))])
def test_erasing_is_as_asked(flags, expected, monkeypatch):
    calls = []
    monkeypatch.setattr(main, 'train_one_epoch', lambda *args, erase, **settings: calls.append(erase) or
                        utils.Progress('', 1, 1, torch.device('cpu')))
    monkeypatch.setattr(main, 'test_stats', lambda *_: {'test_acc1': 0.})
    main.main(parse_args([*TINY, '--epochs', '1', *flags]))
    erase, = calls
    assert expected == (erase and (erase.probability, erase.per_pixel, erase.rand_color, erase.max_count))


def test_workers_change_no_loss(image_folder, tmp_path):
    """With every random piece on: crops, RandAugment, erasing, mixup, drop path."""
    logs = []
    for workers in ('0', '1', '2'):
        main.main(parse_args([*TINY, '--data-path', str(image_folder), '--batch-size', '8', '--epochs', '2',
                              '--num-workers', workers, '--output-dir', str(tmp_path / workers)]))
        logs.append([{**line, 'train_images_per_second': 0} for line in log_lines(tmp_path / workers)])
    assert logs[0] == logs[1] == logs[2]


@pytest.mark.parametrize('workers', ['0', '2'])
def test_a_picture_that_does_not_decode_is_named(workers, image_folder, tmp_path, monkeypatch, capsys):
    tree = shutil.copytree(image_folder, tmp_path / 'tree')
    (tree / 'train' / 'red' / '3.png').write_bytes(b'no picture')
    flags = [*TINY, '--data-path', str(tree), '--batch-size', '8', '--epochs', '1', '--num_workers', workers,
             '--no-repeated-aug']                      # so that each picture is read
    monkeypatch.setattr(sys, 'argv', ['main.py', *flags])
    with pytest.raises(SystemExit) as exit_:
        main.run()
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count('\n') == 1, error
    assert error.startswith('main.py: error: ') and 'red/3.png does not decode' in error


@pytest.mark.parametrize('kind', ['soft', 'hard'])
def test_distillation_trains(kind, tmp_path, image_folder):
    torch.save({'model': timm.create_model('resnet10t', num_classes=3).state_dict()}, tmp_path / 'teacher.pth')
    main.main(parse_args([
        *TINY, '--data-path', str(image_folder), '--batch-size', '8', '--epochs', '1', '--output_dir', str(tmp_path),
        '--model', 'deit_tiny_distilled_patch16_shrink_base', '--distillation-type', kind,
        '--teacher-model', 'resnet10t', '--teacher-path', str(tmp_path / 'teacher.pth')]))
    assert checkpoint(tmp_path)['optimizer']['state']                                  # both heads had gradients
    assert not any(key.startswith('teacher') for key in checkpoint(tmp_path)['model'])


def test_timms_own_model_trains_in_the_same_loop(image_folder, tmp_path):
    main.main(parse_args([
        '--model', 'deit_tiny_patch16_224', '--data-path', str(image_folder), '--input-size', '32', '--batch-size', '8',
        '--epochs', '1', '--num_workers', '0', '--device', 'cpu', '--no-model-ema', '--output_dir', str(tmp_path)]))
    assert 'train_keep_rate' not in log_lines(tmp_path)[0] and checkpoint(tmp_path)['model_ema'] is None


@pytest.mark.parametrize('name', ['inception_v3', 'vgg11', 'levit_128s', 'tiny_vit_5m_224', 'coat_tiny'])
def test_timms_models_are_built_whatever_they_are_made_of(name):
    """Without stochastic depth, or with patches whose size timm tells in another way, or not at all."""
    with torch.device('meta'):
        model = main.build_model(parse_args(['--model', name]), 7)
    assert model.num_classes == 7


def test_speed_and_masks(digits_run, tmp_path, capsys):
    _, folder = digits_run
    flags = [*PLAIN, '--output_dir', str(tmp_path), '--resume', str(folder / 'checkpoint.pth')]
    main.main(parse_args([*flags, '--only_test_speed', '--batch-size', '1', '--mixup', '0.8']))
    assert 'images/s' in (tmp_path / 'speed_macs.txt').read_text() and 'GMACs' in capsys.readouterr().out
    line, = log_lines(tmp_path)
    assert line['speed_images_per_second'] > 0 and 0 < line['speed_gmacs'] < 1
    main.main(parse_args([*flags, '--visualize_mask', '--n_visualization', '5', '--batch-size', '2']))
    assert sorted(path.name for path in tmp_path.glob('*.jpg')) == sorted(
        f'img_{i}_{stage}.jpg' for i in range(5) for stage in ('a', 'l0', 'l1', 'l2'))
    assert sorted(path.name for path in tmp_path.glob('*.png')) == ['attention.png', 'grid.png']
    assert 'on the 5 test images' in capsys.readouterr().out


def open_picture(path):
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture)).int()                               # (H, W, 3)


def test_pictures_are_of_the_data_set_and_those_of_two_processes_the_same(image_folder, digits_run, tmp_path):
    flags = [*PLAIN, '--data-path', str(image_folder), '--batch-size', '2', '--visualize_mask',
             '--n_visualization', '7', '--resume', str(tmp_path / 'new.pth')]
    torch.save({'model': main.build_model(parse_args(flags), 3).state_dict()}, tmp_path / 'new.pth')
    done = [run_main(*flags, '--output_dir', tmp_path / str(processes), processes=processes) for processes in (0, 2)]
    assert accuracy_lines(done[0]) == accuracy_lines(done[1]) and 'on the 7 test images' in done[0].stdout
    names = sorted(path.name for path in (tmp_path / '0').iterdir())
    assert names == sorted(['grid.png', 'attention.png', *(
        f'img_{i}_{stage}.jpg' for i in range(7) for stage in ('a', 'l0', 'l1', 'l2'))])
    assert names == sorted(path.name for path in (tmp_path / '2').iterdir())
    for name in names:
        assert (open_picture(tmp_path / '0' / name) - open_picture(tmp_path / '2' / name)).abs().float().mean() < 1
    grid, attention = ((open_picture(tmp_path / '0' / f'{name}.png') == 230).all(-1).sum()
                       for name in ('grid', 'attention'))
    assert grid < 1000 < attention                     # the grey of what went before
    loader_val = main.build_loaders(parse_args(flags), torch.device('cpu'))[1]
    for i in range(7):
        pixels = loader_val.dataset[i * 9 // 7][0].permute(1, 2, 0)
        assert (open_picture(tmp_path / '0' / f'img_{i}_a.jpg') - pixels).abs().float().mean() < 8
    brightest = [open_picture(tmp_path / '0' / f'img_{i}_a.jpg').float().mean((0, 1)).argmax().item() for i in range(7)]
    assert brightest == [2, 2, 2, 1, 1, 0, 0]          # the classes are blue, green and red, and all are shown


def test_pictures_and_sheets_are_in_the_precision_of_the_evaluation(digits_run, tmp_path, monkeypatch):
    precise = []
    for name in 'save_masked', 'draw_sheets':
        monkeypatch.setattr(main, name, lambda *_: precise.append(torch.is_autocast_enabled('cpu')) or [])
    main.main(parse_args([*PLAIN, '--output_dir', str(tmp_path), '--resume', str(digits_run[1] / 'checkpoint.pth'),
                          '--visualize_mask', '--n_visualization', '2', '--amp-dtype', 'bfloat16']))
    assert precise == [True, True]


def test_as_many_samples_as_asked_for_from_the_whole_data_set():
    assert [main.spread(range(9), number).indices for number in (1, 3, 8, 9, 20)] == [
        [0], [0, 3, 6], [0, 1, 2, 3, 4, 5, 6, 7], list(range(9)), list(range(9))]


def test_large_sheets_show_the_first_images(digits_run, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(main, 'SHEET_IMAGES', 3)
    monkeypatch.setattr(main, 'draw_sheets', lambda model, loader, classes: [
        shown.append(len(loader.dataset)) or Image.new('RGB', (1, 1))] * 2)
    main.main(parse_args([*PLAIN, '--output_dir', str(tmp_path), '--resume', str(digits_run[1] / 'checkpoint.pth'),
                          '--visualize_mask', '--n_visualization', '5']))
    assert shown == [3] and len(list(tmp_path.glob('*.jpg'))) == 5 * 4


def images_logged(folder):
    """[(tag, step, picture (H, W, 3))] of TensorBoard's files."""
    return [(value.tag, event.step, open_picture(io.BytesIO(value.image.encoded_image_string)))
            for event in events(folder) for value in event.summary.value if value.HasField('image')]


def test_tensorboard_shows_the_same_images_at_every_evaluation_and_training_does_not_notice(image_folder, tmp_path):
    flags = [*TINY, '--data-path', str(image_folder), '--batch-size', '8', '--epochs', '3', '--eval-interval', '2']
    main.main(parse_args([*flags, '--output_dir', str(tmp_path / 'with')]))
    main.main(parse_args([*flags, '--output_dir', str(tmp_path / 'without'), '--no-log-masks']))
    images = images_logged(tmp_path / 'with')
    assert [image[:2] for image in images] == [('masks', 1), ('masks', 2)] and not images_logged(tmp_path / 'without')
    before, after = (image[2] for image in images)
    assert before.shape == after.shape and not torch.equal(before, after)
    inputs = [np.s_[40:200, left:left + 180] for left in (4, 796)]                     # the first column of each half
    assert all(torch.equal(before[place], after[place]) and before[place].float().std() > 1 for place in inputs)
    assert (before[40:200, 200:790] == 0).all(-1).any() and (after[40:200, 200:790] == 0).all(-1).any()
    one, other = (checkpoint(tmp_path / name) for name in ('with', 'without'))
    for state in one, other:
        state.pop('args')
    assert_same(one, other)


def test_drawing_sheets_moves_no_generator_and_changes_no_mode(image_folder):
    args = parse_args([*TINY, '--data-path', str(image_folder), '--batch-size', '8'])
    dataset = main.build_loaders(args, torch.device('cpu'))[1].dataset
    model = main.build_model(args, 3).train()
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    grid, attention = main.sheets_of(args, model, main.spread(dataset, 8), dataset.classes, torch.device('cpu'))
    assert grid.size == attention.size and grid.tobytes() != attention.tobytes()
    assert torch.equal(torch.get_rng_state(), states[0]) and np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2] and all(module.training for module in model.modules())


def test_masks_are_logged_of_an_evit_in_the_first_process_with_a_folder_alone(monkeypatch):
    drawn = []
    monkeypatch.setattr(main, 'sheets_of', lambda *_: drawn.append(1) or (np.zeros((1, 1, 3)), None))
    monkeypatch.setattr(main, 'spread', lambda *_: None)

    class Output:
        def write_event(epoch, **content):
            pass

    dataset = SimpleNamespace(classes=[])
    for flags, folder, calls in (([], 'folder', 1), ([], None, 0), (['--no-log-masks'], 'folder', 0),
                                 (['--model', 'deit_tiny_patch16_224'], 'folder', 0)):
        drawn.clear()
        Output.folder = folder
        main.log_masks(parse_args(flags), None, dataset, Output, 0, torch.device('cpu'))
        assert len(drawn) == calls, flags


@pytest.mark.gpu
def test_trains_on_a_gpu_in_bfloat16(tmp_path):
    done = run_main(*PLAIN, '--device', 'cuda', '--amp-dtype', 'bfloat16', '--epochs', '2', '--output_dir', tmp_path)
    assert 'on cuda, torch.bfloat16' in done.stdout and 'memory:' in done.stdout
    assert log_lines(tmp_path)[-1]['test_acc1'] > 20


@pytest.mark.parametrize('compiled_graphs', ['captured'], indirect=True)
def test_compiled_and_channels_last_runs_are_those_of_an_eager_one(image_folder, tmp_path, compiled_graphs):
    """Through epochs in which the rate falls, with the average, evaluations and a resumed run."""
    flags = [*PLAIN, '--data-path', str(image_folder), '--batch-size', '6', '--shrink_epochs', '2', '--drop-path', '0',
             '--model-ema-decay', '0.5']
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
