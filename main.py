"""Train, evaluate, finetune, measure and look at an EViT or any other timm model: `python main.py --help`.

One path for a CPU, a GPU and, started by torchrun, many GPUs.
"""
import argparse
import datetime
import json
import math
import os
import signal
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import timm
import torch
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.layers import to_2tuple
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import PlateauLRScheduler, create_scheduler
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Subset

import models_evit
import utils
from datasets import INAT_CATEGORIES, SeededDataset, build_dataset, build_loader, check_same_classes
from engine import check_weights, evaluate, keep_rate_at, train_one_epoch
from losses import DistillationLoss
from samplers import EvalSampler, TrainSampler
from speed_test import macs, throughput
from utils import InputError, log
from visualize_mask import SHEET_IMAGES, draw_sheets, save_masked

# What the flags set of an optimizer, and of the scheduler of --sched plateau what it has found out
HYPERPARAMETERS = {'lr', 'initial_lr', 'max_lr_snapshot', 'weight_decay', 'betas', 'beta1', 'betas_1d', 'eps',
                   'momentum'}
FOUND = {'best', 'num_bad_epochs', 'cooldown_counter', 'last_epoch', '_last_lr'}
SCHEDULE = ('epochs', 'batch_size', 'accum_steps', 'lr', 'warmup_lr', 'min_lr', 'warmup_epochs', 'weight_decay')
TOKEN_FLAGS = ('base_keep_rate', 'fuse_token', 'drop_loc', 'shrink_start_epoch', 'shrink_epochs')


# --- Command line ---------------------------------------------------------------------------------------------------

def keep_rate(text):
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f'a keep rate lies in (0, 1], not {text}')
    return value


def block_numbers(text):
    try:
        inside = text[1:-1] if text[:1] + text[-1:] in ('()', '[]') else text
        return tuple(int(number) for number in inside.rstrip(', ').split(','))
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is not a list of block numbers such as 3,6,9') from None


def within(low, high, kind=float):
    """An argparse type: a finite number of `kind` from `low` to `high`."""
    def parse(text):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f'{text} does not lie within {low} to {high}')
        return value

    parse.__name__ = kind.__name__                     # argparse's message names it
    return parse


share, non_negative = within(0, 1), within(0, math.inf)
positive_int, count = within(1, math.inf, int), within(0, 2 ** 31, int)


def get_args_parser():
    parser = utils.ArgumentParser(description='EViT: training and evaluation', allow_abbrev=False,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group('tokens (EViT models only)').add_argument
    add('--base-keep-rate', type=keep_rate, default=0.7, help='share of tokens kept; some models have another default')
    add('--fuse-token', action='store_true', help='fuse the tokens that are not kept into one')
    add('--drop-loc', type=block_numbers, default=(3, 6, 9), help='blocks that reorganise, from 0')
    add('--shrink-start-epoch', type=count, default=10, help='first epoch in which the keep rate falls from 1')
    add('--shrink-epochs', type=count, default=0, help='epochs it takes to fall to the base keep rate')

    add = parser.add_argument_group('modes').add_argument
    add('--eval', action='store_true', help='evaluate a checkpoint and exit')
    add('--test-speed', action='store_true', help='measure throughput and MACs before the run')
    add('--only-test-speed', action='store_true', help='measure throughput and MACs and exit')
    add('--visualize-mask', action='store_true', help='write pictures of the patches that are kept and exit')
    add('--n-visualization', type=positive_int, default=128, help='number of images to visualize')

    add = parser.add_argument_group('model').add_argument
    add('--model', default='deit_small_patch16_shrink_base', help='a model of models_evit.py or any of timm')
    add('--input-size', type=positive_int, default=224, help='pixels')
    add('--drop', type=share, default=0.0, help='dropout rate of the head')
    add('--drop-path', type=within(0, 0.99), default=0.1, help='stochastic depth rate')
    add('--grad-checkpointing', action='store_true',
        help='compute activations again in the backward pass instead of keeping them, for a smaller GPU')
    add('--compile', action='store_true', help='by torch.compile, for minutes at the start and more images/s after')
    add('--channels-last', action='store_true', help='lay images out pixel by pixel, as convolutions may like')
    add('--model-ema', action='store_true', default=True, help='keep a moving average of the weights')
    add('--no-model-ema', action='store_false', dest='model_ema')
    add('--model-ema-decay', type=share, default=0.99996)
    add('--model-ema-force-cpu', action='store_true',
        help='keep it in main memory; training on a GPU then does not evaluate it')

    add = parser.add_argument_group('optimizer').add_argument
    add('--opt', default='adamw', help="an optimizer by timm's name")
    add('--opt-eps', type=float, default=1e-8)
    add('--opt-betas', type=float, nargs=2, help="None: the optimizer's own")
    add('--clip-grad', type=non_negative, help='largest norm of the gradient; None: any')
    add('--momentum', type=float, default=0.9)
    add('--weight-decay', type=non_negative, default=0.05)

    add = parser.add_argument_group('schedule').add_argument
    add('--epochs', type=positive_int, default=300)
    add('--batch-size', type=positive_int, default=64, help='images a process; validation takes 1.5 times as many')
    add('--accum-steps', type=positive_int, default=1, help='batches that make one update, for a smaller GPU')
    add('--sched', default='cosine', choices=['cosine', 'tanh', 'step', 'multistep', 'plateau', 'poly'])
    add('--lr', type=non_negative, default=5e-4, help='learning rate, times global batch size / 512')
    add('--lr-noise', type=float, nargs='+', help='where noise on the rate begins and ends, as shares of the epochs')
    add('--lr-noise-pct', type=within(0.01, math.inf), default=0.67)
    add('--lr-noise-std', type=within(0, 100), default=1.0)
    add('--warmup-lr', type=non_negative, default=1e-6)
    add('--min-lr', type=non_negative, default=1e-5)
    add('--decay-epochs', type=within(1, math.inf), default=30)
    add('--warmup-epochs', type=count, default=5)
    add('--patience-epochs', type=count, default=10)
    add('--decay-rate', type=float, default=0.1)

    add = parser.add_argument_group('augmentation').add_argument
    add('--color-jitter', type=non_negative, default=0.4, help='where --aa is empty')
    add('--aa', default='rand-m9-mstd0.5-inc1', help="timm's AutoAugment policy, or '' for none")
    add('--smoothing', type=within(0, 0.99), default=0.1, help='label smoothing')
    add('--train-interpolation', default='bicubic', choices=['random', 'bilinear', 'bicubic'])
    add('--fast-resize', action='store_true',
        help="decode and resize training images by torch's code instead of Pillow's, which is faster; this changes "
             'the values of a resized image by up to 2 of 255, which augmentation may enlarge')
    add('--repeated-aug', action='store_true', default=True, help='three augmented copies of an image in an epoch')
    add('--no-repeated-aug', action='store_false', dest='repeated_aug')
    add('--reprob', type=share, default=0.25, help='random erasing: probability')
    add('--remode', default='pixel', choices=['const', 'rand', 'pixel'], help='random erasing: fill')
    add('--recount', type=positive_int, default=1, help='random erasing: number of regions')
    add('--mixup', type=non_negative, default=0.8, help='alpha of mixup; 0: none')
    add('--cutmix', type=non_negative, default=1.0, help='alpha of cutmix; 0: none')
    add('--cutmix-minmax', type=share, nargs=2, help='smallest and largest share of cutmix, instead of alpha')
    add('--mixup-prob', type=share, default=1.0, help='probability that a batch is mixed at all')
    add('--mixup-switch-prob', type=share, default=0.5, help='probability of cutmix where both are on')
    add('--mixup-mode', default='batch', choices=['batch', 'pair', 'elem'])

    add = parser.add_argument_group('distillation').add_argument
    add('--teacher-model', default='regnety_160', help="timm's name")
    add('--teacher-path', help='checkpoint or https address of the teacher')
    add('--distillation-type', default='none', choices=['none', 'soft', 'hard'])
    add('--distillation-alpha', type=share, default=0.5)
    add('--distillation-tau', type=float, default=1.0)

    add = parser.add_argument_group('finetuning').add_argument
    add('--finetune', metavar='CHECKPOINT', help='start from these weights, of another head or resolution even')

    add = parser.add_argument_group('data').add_argument
    add('--data-path', help='folder of the data set')
    add('--data-set', choices=['DIGITS', 'IMNET', 'CIFAR', 'INAT', 'INAT19'],
        help='None: IMNET (train/<class>/<image>, val/…) where --data-path is given, else DIGITS')
    add('--use-lmdb', action='store_true', help='read train.lmdb and val.lmdb instead of folders')
    add('--nb-classes', type=positive_int, default=1000,
        help='classes of an LMDB database of the original code, which does not tell them')
    add('--inat-category', default='name', choices=INAT_CATEGORIES)
    add('--num-workers', type=count, default=min(10, os.cpu_count()), help='processes that load data')
    add('--pin-mem', action='store_true', default=True)
    add('--no-pin-mem', action='store_false', dest='pin_mem')

    add = parser.add_argument_group('run').add_argument
    add('--output-dir', default='', help="'': nothing is saved")
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    add('--amp-dtype', default='auto', choices=['auto', 'bfloat16', 'float16', 'float32'],
        help='auto: bfloat16 on a GPU that has it, float16 on another, float32 on a CPU')
    add('--seed', type=count, default=0)
    add('--resume', default='', metavar='CHECKPOINT',
        help="go on from it, file or https address; auto: the output folder's newest, or anew where it has none")
    add('--checkpoint-interval', type=positive_int, default=500,
        help='updates of the weights after which a checkpoint is saved; one is after each epoch, too')
    add('--skip-nonfinite', type=count, default=0,
        help='updates in a row that may be left out because their loss is not finite, before the run fails')
    add('--start-epoch', type=count, default=0)
    add('--eval-interval', type=positive_int, default=1, help='epochs')
    add('--print-freq', type=positive_int, default=50, help='steps')
    add('--log-masks', action='store_true', default=True,
        help='show TensorBoard what an EViT keeps of 8 validation images, at each evaluation')
    add('--no-log-masks', action='store_false', dest='log_masks')
    add('--dist-eval', action='store_true', help='share the evaluation among the processes')
    add('--world-size', type=positive_int, default=1, help='number of processes, unless the environment tells it')
    add('--dist-url', default='env://', help='where the processes meet')
    add('--dist-timeout', type=within(1, 10 ** 6), default=600,
        help='seconds after which a process that the others wait for counts as lost')
    return parser


def with_dashes(flag):
    name, equals, value = flag.partition('=')
    return name.replace('_', '-') + equals + value


def parse_args(argv, parser=None):
    """The command line as a Namespace, every flag accepted with - and with _; exits with status 2 where it is wrong.

    A `parser` given knows more flags than main.py has.
    """
    parser = parser or get_args_parser()
    argv = [with_dashes(text) if text.startswith('--') else text for text in argv]
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(TOKEN_FLAGS)))       # None where not typed
    token_flags = ['--' + name for name in TOKEN_FLAGS if getattr(args, name) is not None]
    if args.model in models_evit.VARIANTS:
        parser.set_defaults(base_keep_rate=models_evit.VARIANTS[args.model].keep_rate)
        args = parser.parse_args(argv)
    if args.data_set is None:
        args.data_set = 'DIGITS' if args.data_path is None else 'IMNET'
    mixed = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax
    for wrong, message in (
            (not timm.is_model(args.model), f'--model {args.model} is neither in models_evit.py nor in timm'),
            (token_flags and args.model not in models_evit.VARIANTS,
             f'{", ".join(token_flags)}: {args.model} does not reorganise tokens; '
             f'take a model of models_evit.py or leave the flag out'),
            (args.data_set != 'DIGITS' and not args.data_path and not args.only_test_speed,
             f'--data-set {args.data_set} needs --data-path'),
            (args.data_set == 'DIGITS' and args.data_path is not None, '--data-set DIGITS takes no --data-path'),
            (args.finetune == '', '--finetune names no checkpoint'),
            (args.use_lmdb and args.data_set != 'IMNET', '--use-lmdb goes with --data-set IMNET and --data-path'),
            (args.distillation_type != 'none' and not args.teacher_path,
             f'--distillation-type {args.distillation_type} needs --teacher-path'),
            (not timm.is_model(args.teacher_model), f'--teacher-model {args.teacher_model} is not in timm'),
            (args.distillation_type != 'none' and 'distilled' not in args.model,
             f'--distillation-type {args.distillation_type} needs a model with a distillation token, not {args.model}'),
            (mixed and args.batch_size % 2 and not evaluates_only(args) and not args.only_test_speed,
             f'mixup and cutmix pair images; --batch-size {args.batch_size} is odd'),
            (args.visualize_mask and args.model not in models_evit.VARIANTS,
             f'--visualize-mask: {args.model} does not reorganise tokens; take a model of models_evit.py'),
            (args.cutmix_minmax and args.cutmix_minmax[0] > args.cutmix_minmax[1],
             '--cutmix-minmax takes the smaller share first'),
            (evaluates_only(args) and not args.resume,
             '--eval and --visualize-mask need --resume CHECKPOINT'),
            (args.resume == 'auto' and not args.output_dir, '--resume auto needs the --output-dir of the run')):
        if wrong:
            parser.error(message)
    return args


# --- What a run is made of ------------------------------------------------------------------------------------------

def build_loaders(args, device):
    """Loaders of (images, labels): of training, None where the run only evaluates, and of validation."""
    dataset_train = None if evaluates_only(args) else build_dataset(True, args)
    dataset_val = build_dataset(False, args)
    options = dict(num_workers=args.num_workers, pin_memory=args.pin_mem, channels_last=args.channels_last)
    shares = (utils.world_size(), utils.rank()) if args.dist_eval else (1, 0)
    loader_val = build_loader(dataset_val, EvalSampler(dataset_val, *shares), int(1.5 * args.batch_size), device,
                              **options)
    if dataset_train is None:
        return None, loader_val
    check_same_classes(dataset_train, dataset_val)
    sampler = TrainSampler(dataset_train, utils.world_size(), utils.rank(), args.seed, args.repeated_aug)
    if len(sampler) < args.batch_size:
        raise InputError(f'{len(dataset_train)} training images give each of {utils.world_size()} process(es) '
                         f'{len(sampler)} an epoch, fewer than one batch of {args.batch_size}; lower --batch-size')
    loader_train = build_loader(SeededDataset(dataset_train), sampler, args.batch_size, device, drop_last=True,
                                **options)
    return loader_train, loader_val


def evaluates_only(args):
    return args.eval or args.visualize_mask


def build_model(args, num_classes):
    """The model on the CPU, with new weights."""
    options = {'num_classes': num_classes, 'drop_rate': args.drop, 'drop_path_rate': args.drop_path,
               'base_keep_rate': args.base_keep_rate, 'fuse_token': args.fuse_token, 'drop_loc': args.drop_loc}
    if timm.get_pretrained_cfg(args.model).fixed_input_size:
        options['img_size'] = args.input_size
    try:
        model = timm.create_model(args.model, **options)
    except TypeError as error:                         # some of timm's models have no stochastic depth
        if "'drop_path_rate'" not in str(error):
            raise
        log(f'note: {args.model} takes no --drop-path')
        model = timm.create_model(args.model, **{**options, 'drop_path_rate': None})
    except (ValueError, AssertionError) as error:
        raise InputError(f'--model {args.model}: {error}') from None
    if args.grad_checkpointing:
        try:
            model.set_grad_checkpointing()
        except (AttributeError, AssertionError):
            raise InputError(f'--grad-checkpointing: {args.model} has none') from None
    patch_size = to_2tuple(getattr(getattr(model, 'patch_embed', None), 'patch_size', 1))
    if 'img_size' in options and any(args.input_size % side for side in patch_size):
        raise InputError(f'--input-size {args.input_size} is no multiple of the patch size {patch_size[0]}')
    return model


def runnable(args, model, device):
    """The model as the run calls it: compiled where --compile asks for it."""
    return utils.CompiledModel(model, device) if args.compile else model


def build_criterion(args, num_classes, device):
    """Mixup, or None, and the loss that goes with it."""
    mixup, base_criterion = None, torch.nn.CrossEntropyLoss()
    if args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax:
        mixup = Mixup(args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob,
                      args.mixup_mode, label_smoothing=args.smoothing, num_classes=num_classes)
        base_criterion = SoftTargetCrossEntropy()
    elif args.smoothing:
        base_criterion = LabelSmoothingCrossEntropy(args.smoothing)
    teacher = None
    if args.distillation_type != 'none':
        teacher = timm.create_model(args.teacher_model, num_classes=num_classes).to(device).eval()
        utils.load_weights(teacher, utils.load_checkpoint(args.teacher_path)['model'], args.teacher_path)
        try:
            with torch.no_grad():
                teacher(torch.zeros(1, 3, args.input_size, args.input_size, device=device))
        except (AssertionError, RuntimeError) as error:
            raise InputError(f'--teacher-model {args.teacher_model} takes no images of {args.input_size} pixels: '
                             f'{utils.one_line(error)}') from None
    return mixup, DistillationLoss(base_criterion, teacher, args.distillation_type, args.distillation_alpha,
                                   args.distillation_tau)


def choose_amp_dtype(name, device):
    """The torch.dtype that --amp-dtype stands for on a device."""
    if name != 'auto':
        return getattr(torch, name)
    if device.type == 'cpu':
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_finetune(model, source):
    """Start from a checkpoint that may have another head or another resolution; say what is dropped or resized."""
    weights, own = utils.load_checkpoint(source)['model'], model.state_dict()
    classifiers = model.pretrained_cfg['classifier']
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    head = {f'{name}.{part}' for name in classifiers for part in ('weight', 'bias')}
    for key in sorted(head & weights.keys() & own.keys()):
        if weights[key].shape != own[key].shape:
            log(f'{source}: dropped {key} {list(weights[key].shape)}, the model has {list(own[key].shape)}')
            del weights[key]
    for key in sorted(head & own.keys() - weights.keys()):
        log(f'{source}: no {key} is taken, it starts anew')
    old = weights.get('pos_embed')
    if old is not None and old.ndim == 3 and 'pos_embed' in own and old.shape != own['pos_embed'].shape:
        num_patches = old.shape[1] - model.num_prefix_tokens
        grid_size = math.isqrt(max(0, num_patches))
        if grid_size > 0 and grid_size ** 2 == num_patches:
            weights['pos_embed'] = models_evit.resize_pos_embed(old, model)
            log(f'{source}: resized pos_embed from {grid_size}×{grid_size} patches to '
                f'{"×".join(map(str, model.patch_embed.grid_size))}')
    utils.load_weights(model, weights, source, optional=head)


class Training:
    """What a run changes, and so what a checkpoint holds.

    Nothing random is among it, because every draw is a function of seed, epoch and position (`utils.seed_all`).
    """

    def __init__(self, args, model, device):
        self.model = model
        lr = args.lr * args.batch_size * args.accum_steps * utils.world_size() / 512
        fused = {'fused': True} if args.opt == 'adamw' else {}                         # one kernel for all tensors
        try:
            self.optimizer = create_optimizer_v2(model, **{**optimizer_kwargs(args), 'lr': lr, **fused})
        except (ValueError, AssertionError, IndexError, RuntimeError) as error:
            raise InputError(f'--opt {args.opt} cannot be used here: {error}') from None
        try:
            self.lr_scheduler, _ = create_scheduler(args, self.optimizer)
        except ValueError as error:
            raise InputError(f'--sched {args.sched} cannot be used here: {error}') from None
        if args.start_epoch:
            self.lr_scheduler.step(args.start_epoch - 1)
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=choose_amp_dtype(args.amp_dtype, device) == torch.float16)
        self.model_ema = None
        if args.model_ema:
            ema_device = torch.device('cpu') if args.model_ema_force_cpu else None
            self.model_ema = ModelEmaV3(model, decay=args.model_ema_decay, device=ema_device)
        self.epoch = args.start_epoch
        self.progress = None
        self.best_acc1 = 0.

    def checkpoint(self, args):
        """The checkpoint of a run that has done the epochs before `self.epoch`, and of that one `self.progress`."""
        return {
            'model': self.model.state_dict(),
            'optimizer': self.optimizer.state_dict(),
            'lr_scheduler': self.scheduler_state(),
            'epoch': self.epoch - 1,
            'progress': self.progress,
            'model_ema': self.model_ema.module.state_dict() if self.model_ema else None,
            'scaler': self.scaler.state_dict(),
            'best_acc1': self.best_acc1,
            'args': vars(args),
        }

    def scheduler_state(self):
        """What timm's scheduler hands out, and what the one of --sched plateau keeps back."""
        state = self.lr_scheduler.state_dict()
        if isinstance(self.lr_scheduler, PlateauLRScheduler):
            state |= {'inner': self.lr_scheduler.lr_scheduler.state_dict(), 'restore_lr': self.lr_scheduler.restore_lr}
        return state

    def load_optimizer(self, optimizer, scheduler):
        """Take what an optimizer has gathered; but its settings from the flags, and the rate from their schedule.

        Only the rate of --sched plateau goes on, which follows from the accuracies so far.
        """
        plateau = isinstance(self.lr_scheduler, PlateauLRScheduler)
        names = HYPERPARAMETERS - {'lr', 'initial_lr'} if plateau else HYPERPARAMETERS
        settings = [{name: group[name] for name in names & group.keys()} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(optimizer)
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        if plateau:
            found = scheduler.get('inner', scheduler)
            self.lr_scheduler.lr_scheduler.load_state_dict({name: found[name] for name in FOUND & found.keys()})
            self.lr_scheduler.restore_lr = scheduler.get('restore_lr')
        elif self.epoch:
            self.lr_scheduler.step(self.epoch - 1)

    def resume(self, checkpoint, source):
        """Go on after a checkpoint; one without an optimizer gives its weights alone."""
        utils.load_weights(self.model, checkpoint['model'], source)
        if self.model_ema and checkpoint.get('model_ema'):
            utils.load_weights(self.model_ema.module, checkpoint['model_ema'], f'model_ema of {source}')
        elif self.model_ema:
            self.model_ema.set(self.model)
        if 'optimizer' not in checkpoint:
            log(f'{source} has no optimizer: training starts at epoch {self.epoch} with its weights')
            return
        try:
            self.epoch = checkpoint['epoch'] + 1
            self.load_optimizer(checkpoint['optimizer'], checkpoint['lr_scheduler'])
            if checkpoint.get('scaler'):
                self.scaler.load_state_dict(checkpoint['scaler'])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f'{source} lacks a part, or is of another optimizer: {error!r}') from None
        self.best_acc1, self.progress = checkpoint.get('best_acc1', 0.), checkpoint.get('progress')

    def start_step(self, num_steps, accum_steps):
        """The step at which the epoch goes on, 0 if it begins; if steps or updates are others now, the like of it."""
        if not self.progress:
            return 0
        saved, of = self.progress['step'], self.progress['num_steps']
        step = num_steps if saved == of else saved * num_steps // of // accum_steps * accum_steps
        if (step, num_steps) != (saved, of):
            log(f'note: the checkpoint was saved at step {saved} of {of}, an epoch has {num_steps} now; training goes '
                f'on at step {step}')
            self.progress = {**self.progress, 'step': step, 'num_steps': num_steps}
        return step


def find_resume(args, device):
    """The file or address that --resume stands for, '' if the run begins anew."""
    if args.resume != 'auto':
        return args.resume
    source = utils.newest_checkpoint(args.output_dir, device)
    if evaluates_only(args) and not source:
        raise InputError(f'--resume auto: {args.output_dir} has no {utils.NEWEST}')
    log(f'Going on from {source}' if source else f'{args.output_dir} has no {utils.NEWEST}: the run begins')
    return source


def read_resume(args, source):
    """The checkpoint to resume; says which settings that change what it does it was trained with, if others.

    This run's hold, but where the state that has been gathered is of one kind only.
    """
    checkpoint = utils.load_checkpoint(source)
    trained = checkpoint.get('args') or {}
    if not isinstance(trained, dict):                  # of the original code, whose lr is the scaled one
        trained = {name: value for name, value in vars(trained).items() if name != 'lr'}
    for name in () if evaluates_only(args) else ('opt', 'sched'):
        if name in trained and trained[name] != getattr(args, name):
            raise InputError(f'{source} was trained with --{name} {trained[name]} and cannot go on with '
                             f'{getattr(args, name)}')
    settings = ('model', 'input_size', 'base_keep_rate', 'fuse_token', 'drop_loc')
    for name in settings if evaluates_only(args) else (*settings, 'finetune', *SCHEDULE):
        if name in trained and str(trained[name] or '') != str(getattr(args, name) or ''):
            log(f'note: {source} was trained with {name} {trained[name]}, this run has {getattr(args, name)}')
    return checkpoint


# --- What a run does ------------------------------------------------------------------------------------------------

def test_accuracy(args, model, loader, device, name='network', sharded=None, after_batch=None):
    """Evaluate, and print the figure that everybody looks for; → dict of `engine.evaluate`."""
    stats = evaluate(runnable(args, model, device), loader, device=device,
                     amp_dtype=choose_amp_dtype(args.amp_dtype, device),
                     sharded=args.dist_eval if sharded is None else sharded, print_freq=args.print_freq,
                     after_batch=after_batch)
    log(f'Accuracy of the {name} on the {stats["images"]} test images: {stats["acc1"]:.2f}%')
    return stats


def run_evaluation(args, model, loader, device, source):
    """Evaluate a checkpoint, and its moving average if it has one."""
    checkpoint = read_resume(args, source)
    utils.load_weights(model, checkpoint['model'], source)
    test_accuracy(args, model, loader, device)
    if args.model_ema and checkpoint.get('model_ema'):
        utils.load_weights(model, checkpoint['model_ema'], f'model_ema of {source}')
        test_accuracy(args, model, loader, device, 'EMA network')


def test_speed(args, model, device):
    """Print images/s and GMACs of the model, and write them to speed_macs.txt and log.txt in the output folder."""
    speed = throughput(model, args.input_size, batch_size=args.batch_size, device=device,
                       amp_dtype=choose_amp_dtype(args.amp_dtype, device), compiled=args.compile,
                       channels_last=args.channels_last)
    gmacs = macs(model, args.input_size)
    report = f'{args.model}: {speed}\n{args.model}: {gmacs:.3f} GMACs an image'
    log(report)
    if args.output_dir and utils.rank() == 0:
        folder = make_folder(args.output_dir)
        (folder / 'speed_macs.txt').write_text(report + '\n')
        write_log(folder, {'speed_images_per_second': speed.median, 'speed_gmacs': gmacs})


def visualize(args, model, dataset, device):
    """Write pictures of what the model keeps, each process its share of the images; print the accuracy over them."""
    subset = spread(dataset, args.n_visualization)
    sampler = EvalSampler(subset, utils.world_size(), utils.rank())
    loader = build_loader(subset, sampler, args.batch_size, device, args.num_workers, args.pin_mem)
    folder = make_folder(args.output_dir or 'visualization')
    numbers = iter(sampler)
    for images, _ in loader:
        with autocast(args, device):
            save_masked(model, images, [next(numbers) for _ in images], folder)
    if utils.rank() == 0:
        sheets = sheets_of(args, model, Subset(subset, range(min(SHEET_IMAGES, len(subset)))), dataset.classes, device)
        for name, sheet in zip(('grid.png', 'attention.png'), sheets):
            sheet.save(folder / name)
    log(f'Wrote pictures of {len(subset)} images to {folder}')
    test_accuracy(args, model, loader, device, sharded=True)


def spread(dataset, number):
    """So many samples from the whole of a data set, which may be ordered by class; all if it has no more."""
    number = min(number, len(dataset))
    return Subset(dataset, [i * len(dataset) // number for i in range(number)])


def sheets_of(args, model, dataset, classes, device):
    """The sheets of `draw_sheets`, of images read without workers; no generator moves."""
    loader = build_loader(dataset, range(len(dataset)), args.batch_size, device)
    with torch.random.fork_rng(devices=[]), autocast(args, device):                    # a DataLoader draws a seed
        return draw_sheets(model, loader, classes)


def autocast(args, device):
    """The precision of evaluation, so that pictures and accuracy tell of one model."""
    return utils.autocast(device, choose_amp_dtype(args.amp_dtype, device))


def make_folder(path):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f'the output folder {path} cannot be made or written to: {error.strerror}') from None
    return Path(path)


def write_log(folder, stats):
    """Add a line to log.txt."""
    # As the checkpoint, which promises that the line is there
    with utils.open_durably(folder / 'log.txt', 'a') as file:
        file.write(json.dumps(stats) + '\n')


def cut_log(folder, epoch):
    """Take the lines of an epoch and of those after it, and one that was broken off, out of log.txt."""
    def stays(line):
        try:
            stats = json.loads(line)
        except ValueError:                             # not UTF-8 included
            return False
        of = stats.get('epoch') if isinstance(stats, dict) else None
        return line.endswith(b'\n') and (not isinstance(of, int) or of < epoch)

    path = folder / 'log.txt'
    if path.exists():
        temporary = path.with_name('log.txt.tmp')
        with utils.open_durably(temporary, 'wb') as file:
            file.writelines(filter(stays, path.read_bytes().splitlines(keepends=True)))
        temporary.replace(path)


def set_training_mode(model, args):
    """Train mode; eval mode while finetuning, which the published recipe does without dropout and drop path."""
    model.train(not args.finetune)
    if args.distillation_type != 'none':
        # The model's own flag, not its layers', tells timm's distilled models to return both heads
        model.training = True
        model.set_distilled_training()


def train(args, training, loader_train, loader_val, num_classes, device):
    """Train to the last epoch; after each, evaluate, log and save. Raises utils.Stopped if a signal ends it before."""
    mixup, criterion = build_criterion(args, num_classes, device)
    parallel = runnable(args, training.model, device)
    if torch.distributed.is_initialized():
        parallel = DistributedDataParallel(parallel, device_ids=[device] if device.type == 'cuda' else None)
    start = time.perf_counter()
    if training.epoch >= args.epochs:
        log(f'Nothing is left to train: {training.epoch} of {args.epochs} epochs are done; another run needs another '
            'output folder')
    with utils.StopSignal(device) as stop, RunOutput(args, training.epoch) as output:
        while training.epoch < args.epochs:
            epoch = training.epoch
            stats = train_epoch(args, training, parallel, criterion, mixup, loader_train, output, stop, device)
            best = False
            if (epoch + 1) % args.eval_interval == 0 or epoch + 1 == args.epochs:
                stats |= test_stats(args, training, loader_val, device,
                                    lambda: stop_if_asked(args, training, output, stop))
                log_masks(args, training.model, loader_val.dataset, output, epoch, device)
                best = stats['test_acc1'] >= training.best_acc1
                training.best_acc1 = max(training.best_acc1, stats['test_acc1'])
                log(f'Max accuracy: {training.best_acc1:.2f}%')
            training.lr_scheduler.step(epoch, stats.get('test_acc1'))
            training.epoch, training.progress = epoch + 1, None
            output.write(stats, epoch, sum(p.numel() for p in training.model.parameters() if p.requires_grad))
            output.save(training.checkpoint(args), best)
    log(f'Training time {datetime.timedelta(seconds=round(time.perf_counter() - start))}')


def train_epoch(args, training, parallel, criterion, mixup, loader, output, stop, device):
    """Train for what is left of an epoch, and save at the interval; → the figures for the log."""
    epoch, num_steps = training.epoch, len(loader)
    erase = None
    if args.reprob:
        erase = RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, device=device)
    keep_rate_of_step = None
    if args.model in models_evit.VARIANTS:
        def keep_rate_of_step(step):
            return keep_rate_at(epoch * num_steps + step, num_steps, args.shrink_start_epoch, args.shrink_epochs,
                                args.base_keep_rate)

    def after_update(progress):
        signum = stop.agreed()
        if signum or progress.step // args.accum_steps % args.checkpoint_interval == 0:
            training.progress = progress.state_dict()
            check_weights(training.model, progress.title)
            output.save(training.checkpoint(args))
        if signum:
            leave(output, signum)

    set_training_mode(training.model, args)
    loader.sampler.set_epoch(epoch, training.start_step(num_steps, args.accum_steps) * args.batch_size)
    progress = train_one_epoch(
        parallel, criterion, loader, training.optimizer, epoch, device=device, scaler=training.scaler,
        amp_dtype=choose_amp_dtype(args.amp_dtype, device), seed=args.seed, keep_rate=keep_rate_of_step, erase=erase,
        mixup=mixup, model_ema=training.model_ema, clip_grad=args.clip_grad, accum_steps=args.accum_steps,
        skip_nonfinite=args.skip_nonfinite, print_freq=args.print_freq, state=training.progress,
        after_update=after_update)
    stats = progress.summary()
    training.progress = progress.state_dict()
    return {f'train_{key}': value for key, value in stats.items()}


def stop_if_asked(args, training, output, stop):
    """Within an evaluation, which will be done again: save and leave if a signal asks for it."""
    signum = stop.agreed()
    if signum:
        output.save(training.checkpoint(args))
        leave(output, signum)


def leave(output, signum):
    """End the run of all processes, once the first has saved it."""
    output.wait()
    log('Stopped by a signal; ' + ('the state is saved' if output.folder else 'nothing is saved without --output-dir'))
    utils.leave_process_group()
    raise utils.Stopped(signum)


def test_stats(args, training, loader, device, after_batch):
    """Figures of the model, and of its moving average beside it, for the log."""
    stats = test_accuracy(args, training.model, loader, device, after_batch=after_batch)
    if training.model_ema and next(training.model_ema.module.parameters()).device == device:
        ema_stats = test_accuracy(args, training.model_ema.module, loader, device, 'EMA network',
                                  after_batch=after_batch)
        stats |= {f'ema_{key}': value for key, value in ema_stats.items()}
    return {f'test_{key}': value for key, value in stats.items() if not key.endswith('images')}


def log_masks(args, model, dataset, output, epoch, device):
    """Show what the model keeps of the same 8 validation images each time, in the first process's TensorBoard."""
    if args.log_masks and output.folder and args.model in models_evit.VARIANTS:
        grid, _ = sheets_of(args, model, spread(dataset, 8), dataset.classes, device)
        output.write_event(epoch, summary=summary.image('masks', np.asarray(grid), dataformats='HWC'))


class RunOutput:
    """The output folder of the first process: checkpoints, log.txt (a JSON line an epoch), TensorBoard's files.

    Both logs are written before the checkpoint; so what they hold of epochs from `epoch` on is of a run that was broken
    off, and will come again. It is taken out of log.txt, and TensorBoard is told to pass it over.
    """

    def __init__(self, args, epoch):
        folder = make_folder(args.output_dir) if args.output_dir else None             # everywhere, to fail everywhere
        self.folder = folder if utils.rank() == 0 else None
        if self.folder:
            if args.resume:
                cut_log(self.folder, epoch)
            # Not its SummaryWriter, which leaves the writing to a thread that may be late when the run is killed
            self.events = EventsWriter(str(self.folder / 'events'))
            self.write_event(epoch, session_log=SessionLog(status=SessionLog.START))
            self.pool, self.saving = ThreadPoolExecutor(1), None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.folder:
            self.wait()
            self.pool.shutdown()
            self.events.close()

    def save(self, checkpoint, best=False):
        """Save a copy of a checkpoint while training goes on; raises what was wrong with the one before."""
        if self.folder:
            self.wait()
            self.saving = self.pool.submit(utils.save_checkpoint, utils.copy_to_cpu(checkpoint), self.folder, best)

    def wait(self):
        """Wait until the last checkpoint is saved; raises OSError if it cannot be."""
        if self.folder and self.saving:
            saving, self.saving = self.saving, None
            saving.result()

    def write(self, stats, epoch, num_parameters):
        if self.folder:
            write_log(self.folder, {**stats, 'epoch': epoch, 'n_parameters': num_parameters})
            for name, value in stats.items():
                self.write_event(epoch, summary=summary.scalar(name.replace('_', '/', 1), value))

    def write_event(self, epoch, **content):
        self.events.write_event(Event(step=epoch, wall_time=time.time(), **content))
        self.events.flush()


def main(args):
    device = utils.init_process_group(args.device, args.dist_url, args.world_size, args.dist_timeout)
    utils.allow_fast_kernels(device)
    utils.seed_all(args.seed)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    if args.only_test_speed:
        test_speed(args, build_model(args, num_classes=1000).to(device, memory_format=memory_format), device)
        return
    source = find_resume(args, device)
    loader_train, loader_val = build_loaders(args, device)
    num_classes = len(loader_val.dataset.classes)
    model = build_model(args, num_classes)
    if args.finetune and not source:
        load_finetune(model, args.finetune)
    model.to(device, memory_format=memory_format)
    log(describe(args, model, loader_train, loader_val, device))
    if args.test_speed:
        test_speed(args, model, device)
    if args.eval:
        run_evaluation(args, model, loader_val, device, source)
    elif args.visualize_mask:
        utils.load_weights(model, read_resume(args, source)['model'], source)
        visualize(args, model, loader_val.dataset, device)
    else:
        training = Training(args, model, device)
        if source:
            training.resume(read_resume(args, source), source)
        train(args, training, loader_train, loader_val, num_classes, device)


def describe(args, model, loader_train, loader_val, device):
    num_parameters = sum(p.numel() for p in model.parameters())
    images = f'{len(loader_val.dataset):,} test images of {len(loader_val.dataset.classes)} classes'
    if loader_train:
        images = f'{len(loader_train.dataset):,} training and {images}'
    return (f'{args.model}: {num_parameters:,} parameters; {args.data_set}: {images}; '
            f'{utils.world_size()} process(es) on {device.type}, {choose_amp_dtype(args.amp_dtype, device)}')


def run(argv=None, parser=None):
    """The program: an expected failure is one line, and the exit status 2 where the input is to blame.

    Args:
        argv: the command line, by default the process's own.
        parser: one that knows more flags than main.py has.
    """
    try:
        main(parse_args(sys.argv[1:] if argv is None else argv, parser))
        utils.leave_process_group()
    except utils.Stopped:
        sys.exit(128 + signal.SIGTERM)
    except Exception as error:
        fail(error)


def fail(error):
    """End a run that failed: say why, to the other processes too, and do not wait for them."""
    status, message, others = 1, utils.one_line(error), utils.Failures.cause(error)
    if others:
        shown, message = utils.rank() == 0, others
    elif isinstance(error, (InputError, FloatingPointError, OSError)):
        status = 2 if isinstance(error, InputError) else 1
        shown = os.environ.get('LOCAL_RANK', '0') == '0' or isinstance(error, (utils.DataError, OSError))
    elif str(error).startswith('DataLoader worker'):
        shown, message = True, f'{message.strip()} It may have run out of memory: lower --num-workers or --batch-size'
    else:
        traceback.print_exc()
        shown = False
    if shown:
        print(f'main.py: error: {message}', file=sys.stderr)
    if not others:
        utils.Failures.tell(message)
    if torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)                                                   # the group's end would wait for the others
    sys.exit(status)


if __name__ == '__main__':
    run()
