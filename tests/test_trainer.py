import io
import os
import re
import shutil
import signal
import types
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from timm.utils import ModelEmaV3

import main
import trainer
from conftest import PLAIN, TINY, open_picture, reference
from datasets import DeviceLoader
from engine import keep_rate_at
from main import parse_args
from outputs import assert_same, checkpoint, events, log_lines, result, tensorboard
from runtime.checkpoint import CheckpointWriter, load_run, write_checkpoint
from runtime.distributed import StopSignal, Stopped
from runtime.logger import Progress
from runtime.utils import InputError, choose_amp_dtype, seed_all
from samplers import TrainSampler
from trainer import EmaInMainMemory, Trainer

CPU = torch.device('cpu')


def build_trainer(args, num_classes=10):
    return Trainer(args, main.build_model(args, num_classes), CPU, choose_amp_dtype(args.amp_dtype, CPU))


@pytest.mark.parametrize('name', reference('training.json')['learning_rate'])
def test_learning_rate_and_parameter_groups_of_the_original(name, monkeypatch):
    case = reference('training.json')['learning_rate'][name]
    monkeypatch.setattr(trainer, 'world_size', lambda: case['world'])
    args = parse_args([*case['flags'], '--no-model-ema'])
    training = build_trainer(args, 1000)
    optimizer = training.optimizer
    assert type(optimizer).__name__ == case['opt']
    assert [{'weight_decay': group['weight_decay'], 'tensors': len(group['params']),
             'params': sum(p.numel() for p in group['params']), 'betas': list(group['betas']), 'eps': group['eps']}
            for group in optimizer.param_groups] == case['groups']
    for epoch in range(args.epochs):
        if str(epoch) in case['lr_by_epoch']:
            assert optimizer.param_groups[0]['lr'] == pytest.approx(case['lr_by_epoch'][str(epoch)], rel=1e-9), epoch
        training.lr_scheduler.step(epoch)


def test_mode_while_finetuning_and_distilling():
    args = parse_args([*PLAIN, '--finetune', 'x', '--model', 'deit_tiny_distilled_patch16_shrink_base',
                       '--distillation-type', 'hard', '--teacher-path', 'x', '--drop-path', '0.5'])
    training = build_trainer(args)
    training.set_training_mode()
    model = training.model
    assert not any(module.training for module in model.blocks.modules())
    assert [head.shape for head in model(torch.zeros(2, 3, 32, 32))] == [(2, 10), (2, 10)]


@pytest.mark.parametrize('flags', [
    ['--batch-size', '4', '--accum-steps', '2'],
    ['--batch-size', '8', '--sched', 'plateau', '--patience-epochs', '0', '--lr-noise', '0.1',
     '--fast-transforms']], ids=' '.join)
def test_resume_at_any_step_bit_for_bit(flags, image_folder, tmp_path, monkeypatch, one_thread):
    flags = [*TINY, '--data-path', str(image_folder), '--epochs', '3', '--shrink_epochs', '2',
             '--model-ema-decay', '0.9', '--checkpoint-interval', '1', *flags]         # with all augmentation
    save, kept = write_checkpoint, []

    def save_and_keep(state, folder, best=False):
        save(state, folder, best)
        kept.append(shutil.copytree(folder, tmp_path / str(len(kept)), copy_function=keep))

    def keep(path, copy):
        (os.link if path.endswith('.pth') else shutil.copy)(path, copy)

    monkeypatch.setattr('runtime.checkpoint.write_checkpoint', save_and_keep)
    main.main(parse_args([*flags, '--output_dir', str(tmp_path / 'whole'), '--resume', 'auto']))
    monkeypatch.setattr('runtime.checkpoint.write_checkpoint', save)
    assert len(kept) == 9                            # 3 updates in each of 3 epochs
    for i in (0, 2, 4, 7):
        torch.manual_seed(i)                         # the global random state has no effect
        main.main(parse_args([*flags, '--output_dir', str(kept[i]), '--resume', 'auto']))
        assert_same(result(kept[i]), result(tmp_path / 'whole'))


def test_resume_with_another_batch_size(image_folder, tmp_path, capsys, one_thread):
    flags = [*TINY, '--data-path', str(image_folder), '--epochs', '1', '--checkpoint-interval', '4', '--output_dir',
             str(tmp_path), '--resume', 'auto', '--no-repeated-aug']
    main.main(parse_args([*flags, '--batch-size', '4']))                               # 6 steps
    (tmp_path / 'previous_checkpoint.pth').replace(tmp_path / 'checkpoint.pth')
    main.main(parse_args([*flags, '--batch-size', '2', '--print-freq', '1']))          # 12 steps
    out = capsys.readouterr().out
    assert 'saved at step 4 of 6, an epoch has 12 now; training goes on at step 8' in out
    assert '[ 9/12]' in out and '[ 8/12]' not in out


def test_progress_with_other_accum_steps(capsys):
    training = build_trainer(parse_args(PLAIN))
    for accum_steps, progress, start in ((2, None, 0), (2, {'step': 4, 'num_steps': 6}, 4),
                                         (4, {'step': 6, 'num_steps': 6}, 6)):         # the last update may be smaller
        training.accum_steps, training.progress = accum_steps, progress
        training.rescale_progress(6)
        assert training.start_step == start and training.progress == progress and capsys.readouterr().out == ''
    training.accum_steps, training.progress = 3, {'step': 4, 'num_steps': 6}
    training.rescale_progress(6)
    assert training.start_step == 3 and training.progress == {'step': 3, 'num_steps': 6}
    assert 'goes on at step 3' in capsys.readouterr().out


@pytest.mark.parametrize('sched', ['cosine', 'step'])
def test_resume_with_other_hyperparameters(sched, capsys):
    """The schedule is that of a run with the new flags from the start. The optimizer keeps its moments."""
    def training(*flags):
        args = parse_args([*PLAIN, '--sched', sched, '--decay-epochs', '2', *flags])
        return args, build_trainer(args)

    def groups(training):
        return [{name: value for name, value in group.items() if name != 'params'}
                for group in training.optimizer.param_groups]

    args, first = training('--epochs', '20', '--opt', 'sgd')
    for parameter in first.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    first.optimizer.step()
    first.lr_scheduler.step(4)
    first.epoch = 5
    saved = first.state_dict()
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


def test_resume_in_float16_from_a_checkpoint_of_the_original():
    """Its optimizer was not fused; `GradScaler.step` takes the fused one's word that it unscales by itself."""
    training = build_trainer(parse_args(PLAIN))
    saved = training.optimizer.state_dict()
    for group in saved['param_groups']:
        group.pop('fused')
    training.load_optimizer(saved, training.lr_scheduler.state_dict())
    assert all(group['fused'] for group in training.optimizer.param_groups)
    scaler = torch.amp.GradScaler('cpu')
    scaler.scale(training.model(torch.randn(2, 3, 32, 32)).sum()).backward()
    before = training.model.head.bias.clone()
    scaler.step(training.optimizer)
    assert not torch.equal(training.model.head.bias, before)


def test_resume_with_a_plateau_schedule():
    def training(*flags):
        args = parse_args([*PLAIN, '--sched', 'plateau', '--warmup-lr', '1e-3', *flags])
        return args, build_trainer(args)

    args, first = training()
    for epoch, accuracy in enumerate((10., 20., 15.)):
        first.lr_scheduler.step(epoch, accuracy)
    for group in first.optimizer.param_groups:
        group['lr'] = 7e-4
    first.epoch = 3
    _, resumed = training('--weight-decay', '0.3', '--patience-epochs', '3', '--decay-rate', '0.5', '--min-lr', '1e-7')
    resumed.resume(first.state_dict(), 'a.pth')
    plateau = resumed.lr_scheduler.lr_scheduler
    assert (plateau.best, plateau.num_bad_epochs) == (20., 1)
    assert (plateau.patience, plateau.factor, set(plateau.min_lrs)) == (3, 0.5, {1e-7})
    assert {group['lr'] for group in resumed.optimizer.param_groups} == {7e-4}
    assert {group['weight_decay'] for group in resumed.optimizer.param_groups} == {0., 0.3}


@pytest.mark.parametrize('where, accum_steps, signum', [
    ('training', 1, signal.SIGUSR1), ('evaluation', 1, signal.SIGINT), ('evaluation', 2, signal.SIGHUP)])
def test_signal_and_resume_bit_for_bit(where, accum_steps, signum, image_folder, tmp_path, monkeypatch, one_thread):
    previous = [signal.signal(number, signal.SIG_DFL) for number in StopSignal.OF_TERMINALS]   # which may be ignored
    flags = [*TINY, '--data-path', str(image_folder), '--batch-size', '8', '--epochs', '2', '--resume', 'auto',
             '--accum-steps', str(accum_steps)]
    main.main(parse_args([*flags, '--output_dir', str(tmp_path / 'whole')]))
    calls, function = [], 'train_one_epoch' if where == 'training' else 'evaluate'

    def signal_and_call(*arguments, **options):
        calls.append(signal.raise_signal(signum))
        return original(*arguments, **options)

    module = trainer if where == 'training' else main
    original = getattr(module, function)
    monkeypatch.setattr(module, function, signal_and_call)
    with pytest.raises(Stopped) as stopped:
        main.main(parse_args([*flags, '--output_dir', str(tmp_path / 'stopped')]))
    for number, handler in zip(StopSignal.OF_TERMINALS, previous):
        signal.signal(number, handler)
    status = {signal.SIGUSR1: 143, signal.SIGINT: 130, signal.SIGHUP: 129}[signum]
    assert (stopped.value.signum, stopped.value.code) == (signum, status) and len(calls) == 1
    assert checkpoint(tmp_path / 'stopped')['progress']['step'] == (1 if where == 'training' else 3)
    monkeypatch.setattr(module, function, original)
    main.main(parse_args([*flags, '--output_dir', str(tmp_path / 'stopped')]))
    assert_same(result(tmp_path / 'stopped'), result(tmp_path / 'whole'))


def test_resume_from_a_checkpoint_that_does_not_fit(digits_run, tmp_path):
    _, folder = digits_run
    args = parse_args([*PLAIN, '--sched', 'plateau'])                      # only plateau restores its scheduler
    wrong = ('lr_scheduler', None), ('optimizer', None), ('epoch', 'x'), ('optimizer', {'param_groups': []})
    for key, value in wrong:
        training = build_trainer(args)
        with pytest.raises(InputError, match='a.pth lacks a part'):
            training.resume(checkpoint(folder) | {key: value}, 'a.pth')
    with pytest.raises(InputError, match='trained with --opt adamw'):
        load_run(str(folder / 'checkpoint.pth'), vars(parse_args([*PLAIN, '--opt', 'sgd'])), evaluates_only=False)


def test_order_keep_rate_evaluation_and_best_of_each_epoch(image_folder, tmp_path, monkeypatch):
    orders, accuracies, best = [], iter([50., 70., 60.]), []
    order = TrainSampler.__iter__
    monkeypatch.setattr(TrainSampler, '__iter__', lambda self: iter(orders.append(list(order(self))) or orders[-1]))
    monkeypatch.setattr(Trainer, 'evaluate_epoch', lambda self: {'test_acc1': next(accuracies)})
    monkeypatch.setattr(CheckpointWriter, 'write', lambda self, state, is_best: best.append(is_best))
    main.main(parse_args([
        *PLAIN, '--data-path', str(image_folder), '--batch-size', '8', '--epochs', '6', '--eval-interval', '2',
        '--shrink_start_epoch', '1', '--shrink_epochs', '4', '--output_dir', str(tmp_path), '--sched', 'step',
        '--decay-epochs', '2']))
    lines = log_lines(tmp_path)
    rates = [[keep_rate_at(3 * epoch + step, 3, 1, 4, 0.7) for step in range(3)] for epoch in range(6)]
    assert [line['train_keep_rate'] for line in lines] == pytest.approx([np.mean(three) for three in rates])
    assert rates[0][-1] == 1 and rates[-1][-1] == 0.7 and len({three[-1] for three in rates}) == 6
    shown = tensorboard(tmp_path / 'steps')['step/keep_rate']
    assert shown == [(3 * epoch + 3, pytest.approx(three[-1])) for epoch, three in enumerate(rates)]
    assert [key for share in orders for _, key in share] == [(0, epoch, i) for epoch in range(6) for i in range(24)]
    assert len({tuple(index for index, _ in share) for share in orders}) == 6
    assert ['test_acc1' in line for line in lines] == [False, True] * 3
    assert best == [False, True, False, True, False, False]


def test_scalar_that_somebody_adds(image_folder, tmp_path, monkeypatch, capsys):
    """It appears on the console, in log.txt as its mean, and in TensorBoard for the epoch and at --print-freq steps."""
    add = Progress.add_batch

    def add_one_more(self, *batch, lr=None, **scalars):
        more = {} if lr is None else {'lr': lr, 'squared_step': torch.tensor(float(self.step)) ** 2}
        add(self, *batch, **more, **scalars)

    monkeypatch.setattr(Progress, 'add_batch', add_one_more)
    main.main(parse_args([*PLAIN, '--data-path', str(image_folder), '--batch-size', '6', '--epochs', '2',
                          '--print-freq', '2', '--output_dir', str(tmp_path)]))
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith('Epoch: ')]
    assert [line[:18] for line in printed] == ['Epoch: [0/2] [2/4]', 'Epoch: [0/2] [4/4]', 'Epoch: [1/2] [2/4]',
                                               'Epoch: [1/2] [4/4]']
    assert [re.search(r'  squared_step: (\d)  ', line)[1] for line in printed] == ['1', '9', '1', '9']
    lines, steps = log_lines(tmp_path), tensorboard(tmp_path / 'steps')
    assert [line['train_squared_step'] for line in lines] == [(0 + 1 + 4 + 9) / 4] * 2
    assert [line['train_keep_rate'] for line in lines] == [0.7] * 2        # to the last bit
    assert tensorboard(tmp_path)['train/squared_step'] == [(0, 3.5), (1, 3.5)]
    assert steps['step/squared_step'] == [(2, 1.), (4, 9.), (6, 1.), (8, 9.)]
    assert steps.keys() == {f'step/{name}' for name in ('loss', 'lr', 'keep_rate', 'squared_step', 'images_per_second')}
    text, = (value.tensor.string_val[0].decode() for event in events(tmp_path) for value in event.summary.value
             if value.tag == 'flags/text_summary')
    assert '| --print-freq | 2 |' in text and f'| --output-dir | {tmp_path} |' in text


def test_workers_begin_with_the_next_epoch_during_an_evaluation(image_folder, tmp_path, monkeypatch):
    """With its own samples, and not after the last epoch."""
    orders, begun = [], []
    order, prefetch = TrainSampler.__iter__, DeviceLoader.prefetch
    monkeypatch.setattr(TrainSampler, '__iter__', lambda self: iter(orders.append(list(order(self))) or orders[-1]))
    monkeypatch.setattr(DeviceLoader, 'prefetch', lambda self: begun.append(self.sampler.epoch) or prefetch(self))
    main.main(parse_args([*PLAIN, '--data-path', str(image_folder), '--batch-size', '8', '--epochs', '4',
                          '--eval-interval', '2', '--num_workers', '1', '--output_dir', str(tmp_path)]))
    assert begun == [2] and len(orders) == 4
    assert [key for share in orders for _, key in share] == [(0, epoch, i) for epoch in range(4) for i in range(24)]


def test_moving_average(digits_run):
    args = parse_args(PLAIN)
    seed_all(0)
    start = main.build_model(args, 10).state_dict()['blocks.2.mlp.fc1.weight']
    state = checkpoint(digits_run[1])
    model, ema = (state[key]['blocks.2.mlp.fc1.weight'] for key in ('model', 'model_ema'))
    assert 0 < (ema - start).norm() < 0.01 * (model - start).norm()


def test_moving_average_in_main_memory():
    """That of timm, also of buffers that are integers."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    averages = [kind(model, 0.9) for kind in (ModelEmaV3, EmaInMainMemory)]
    for _ in range(3):
        model(torch.randn(5, 3)).sum().backward()
        model[0].weight.data += model[0].weight.grad
        for average in averages:
            average.update(model)
    one, other = (average.module.state_dict() for average in averages)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value)
    assert one['1.num_batches_tracked'] == 3 and not torch.equal(one['0.weight'], model[0].weight)
    args = parse_args([*PLAIN, '--model-ema-force-cpu'])
    assert type(build_trainer(args).model_ema) is EmaInMainMemory


def test_grad_checkpointing_and_accumulation_flags():
    args = parse_args([*TINY, '--grad-checkpointing', '--accum-steps', '4', '--lr', '1e-3'])
    training = build_trainer(args)
    assert training.model.grad_checkpointing and not main.build_model(parse_args(TINY), 10).grad_checkpointing
    training.lr_scheduler.step(0)
    assert training.optimizer.param_groups[0]['lr'] == pytest.approx(1e-3 * 64 * 4 / 512)


@pytest.mark.parametrize('flags, expected', [
    (['--reprob', '0'], None), ([], (0.25, True, False, 1)),
    (['--remode', 'rand', '--recount', '3'], (0.25, False, True, 3)),
    (['--reprob', '0.5', '--remode', 'const'], (0.5, False, False, 1))])
def test_erasing_flags(flags, expected):
    erase = build_trainer(parse_args([*TINY, *flags])).train_one_epoch.keywords['erase']
    assert expected == (erase and (erase.probability, erase.per_pixel, erase.rand_color, erase.max_count))


def test_no_clipping():
    """0 is none, as for mixup and cutmix."""
    for flags in ([], ['--clip-grad', '0']):
        assert build_trainer(parse_args([*TINY, *flags])).train_one_epoch.keywords['clip_grad'] is None


def test_flags_of_an_epoch():
    """`train_one_epoch` receives each flag."""
    expected = dict(seed=5, clip_grad=0.3, accum_steps=2, skip_nonfinite=4, print_freq=9, amp_dtype=torch.bfloat16)
    flags = [f'--{name}={str(value).removeprefix("torch.")}' for name, value in expected.items()]
    keywords = build_trainer(parse_args([*TINY, *flags])).train_one_epoch.keywords
    assert {name: keywords[name] for name in expected} == expected


def images_logged(folder):
    """The images in TensorBoard's files, as [(tag, step, picture (H, W, 3))]."""
    return [(value.tag, event.step, open_picture(io.BytesIO(value.image.encoded_image_string)))
            for event in events(folder) for value in event.summary.value if value.HasField('image')]


def test_logged_masks_do_not_affect_training(image_folder, tmp_path):
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


@pytest.mark.parametrize('flags, logs', [
    ([], True), (['--output_dir', ''], False), (['--no-log-masks'], False),
    (['--model', 'deit_tiny_patch16_224'], False)], ids=['EViT', 'no folder', 'off', 'DeiT'])
def test_masks_are_logged_for_an_evit_with_a_folder(flags, logs, tmp_path):
    args = parse_args(['--output_dir', str(tmp_path), '--device', 'cpu', *flags])
    *_, mask_loader = main.build_loaders(args, CPU)
    assert bool(mask_loader) == logs and (not logs or len(mask_loader.dataset) == 8)


@pytest.mark.parametrize('share, lines', [(0.19, 0), (0.21, 1)])
def test_line_about_a_slow_loader(share, lines, monkeypatch, capsys):
    training = build_trainer(parse_args([*PLAIN, '--epochs', '1']))
    training.loader = MagicMock()
    progress = types.SimpleNamespace(summary=lambda: {'loader_wait': share}, state_dict=dict)
    monkeypatch.setattr(training, 'train_one_epoch', lambda *_, **__: progress)
    assert training.train_epoch(training.model) == {'train_loader_wait': share}
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == lines and all('21% of the time' in line and '1.3 times as fast' in line and all(
        name in line for name in ('--num-workers', '--fast-transforms', 'LMDB')) for line in printed)
