"""Train, finetune, evaluate, measure or visualize an EViT or another timm model: `python main.py --help`.

The same path serves a CPU, one GPU and, started by torchrun or srun, many GPUs.
"""
if __name__ == '__main__':                             # before the imports, which take seconds: see `start`
    from runtime.program import start
    start('main')

import argparse
import atexit
import math
import sys
from functools import partial

import torch
from timm.data import Mixup

from datasets import (DATA_FLAGS, SeededDataset, add_data_arguments, build_dataset, build_loader, check_same_classes,
                      fill_data_arguments, spread)
from engine import evaluate, keep_rate_at
from evit.settings import TokenSettings
from formats.token_labels import LabelledTokens, TokenLabeling
from losses import DistillationLoss, TokenLabelingLoss, build_base_criterion
from measuring.benchmark import report_speed
from models_evit import is_lvvit
from runtime.arguments import (ArgumentParser, HelpFormatter, add_run_arguments, fraction, natural, non_negative,
                               positive, timm_model, with_dashes, within)
from runtime.attention_priority import flash_first
from runtime.checkpoint import (check_classes, find_checkpoint, load_evaluated, load_finetune, load_run, load_teacher,
                                read_flags, refuse_checkpoints)
from runtime.distributed import (ignore_stop_signals, init_process_group, kill_workers, leave_process_group, log, rank,
                                 world_size)
from runtime.failures import run_program
from runtime.model_factory import add_model_arguments, create_model, fill_model_arguments, flag_of
from runtime.preprocessing import input_of
from runtime.utils import InputError, choose_amp_dtype, choose_kernels, seed_all
from samplers import EvalSampler, TrainSampler
from trainer import Trainer
from visualize_mask import visualize

SHRINK_DEFAULTS = {'shrink_start_epoch': 10, 'shrink_epochs': 0}
AUGMENTATION = 'fast_transforms', 'color_jitter', 'aa', 'train_interpolation'
LOGGED_MASKS = 8


# --- Command line ---------------------------------------------------------------------------------------------------

def get_args_parser():
    parser = ArgumentParser(description='EViT: training and evaluation', allow_abbrev=False,
                            formatter_class=HelpFormatter)
    on_off = argparse.BooleanOptionalAction
    tokens, model = add_model_arguments(parser)
    add = tokens.add_argument
    add('--shrink-start-epoch', type=natural, help='epoch in which the keep rate starts to fall from 1 (default: 10; 0 '
        'with --finetune or --pretrained)')
    add('--shrink-epochs', type=natural, help='epochs in which it falls to the base keep rate (default: 0)')
    add = parser.add_argument_group('modes').add_argument
    add('--eval', action='store_true', help='evaluate a checkpoint and exit')
    add('--test-speed', action='store_true', help='measure throughput and MACs before the run')
    add('--only-test-speed', action='store_true', help='measure throughput and MACs and exit')
    add('--visualize-mask', action='store_true', help='write pictures of the kept patches and exit')
    add('--n-visualization', type=positive(int), default=128, help='number of images to visualize')

    add = model.add_argument
    add('--drop', type=fraction, default=0.0, help='dropout rate of the head')
    add('--drop-path', type=within(0, 0.99), default=0.1, help='stochastic depth rate')
    add('--grad-checkpointing', action='store_true', help='recompute activations in the backward pass to save memory')
    add('--compile', action='store_true', help='compile the model: minutes of start-up, then more images/s')
    add('--model-ema', action=on_off, default=True, help='keep an exponential moving average of the weights')
    add('--model-ema-decay', type=fraction, default=0.99996, help='decay of the moving average')
    add('--model-ema-force-cpu', action='store_true',
        help='keep the moving average in main memory; while training on a GPU it is not evaluated then')

    add = parser.add_argument_group('optimizer').add_argument
    add('--opt', default='adamw', help='name of a timm optimizer')
    add('--opt-eps', type=float, default=1e-8, help='epsilon')
    add('--opt-betas', type=float, nargs=2, help="betas (default: the optimizer's own)")
    add('--clip-grad', type=non_negative, help='maximum norm of the gradient, 0 for no clipping (default: none)')
    add('--momentum', type=float, default=0.9, help='momentum of SGD and its like')
    add('--weight-decay', type=non_negative, default=0.05, help='weight decay')

    add = parser.add_argument_group('schedule').add_argument
    add('--epochs', type=positive(int), default=300, help='number of epochs')
    add('--batch-size', type=positive(int), default=64, help='images per process; validation uses 1.5 times as many')
    add('--accum-steps', type=positive(int), default=1, help='batches per update, to save memory')
    add('--sched', default='cosine', choices=['cosine', 'tanh', 'step', 'multistep', 'plateau', 'poly'],
        help='learning rate schedule')
    add('--lr', type=non_negative, default=5e-4, help='learning rate at a global batch size of 512, scaled linearly')
    add('--lr-noise', type=float, nargs='+', help='fractions of the epochs where noise on the rate starts and ends')
    add('--lr-noise-pct', type=within(0.01), default=0.67, help='limit of the noise')
    add('--lr-noise-std', type=within(0, 100), default=1.0, help='standard deviation of the noise')
    add('--warmup-lr', type=non_negative, default=1e-6, help='learning rate at the start of the warm-up')
    add('--min-lr', type=non_negative, default=1e-5, help='lowest learning rate')
    add('--decay-epochs', type=within(1), default=30, help='epochs between decays of --sched step')
    add('--warmup-epochs', type=natural, default=5, help='epochs of warm-up')
    add('--patience-epochs', type=natural, default=10, help='epochs without progress before --sched plateau decays')
    add('--decay-rate', type=float, default=0.1, help='factor of a decay')

    add = parser.add_argument_group('augmentation').add_argument
    add('--color-jitter', type=non_negative, default=0.4, help='colour jitter, if --aa is empty')
    add('--aa', default='rand-m9-mstd0.5-inc1', help="timm's AutoAugment policy, '' for none")
    add('--smoothing', type=within(0, 0.99), default=0.1, help='label smoothing')
    add('--train-interpolation', choices=['random', 'bilinear', 'bicubic'],
        help="of the crops (default: bicubic, with --pretrained the weights')")
    add('--fast-transforms', '--fast-resize', action='store_true',
        help='decode and augment training images with simplejpeg and OpenCV instead of Pillow: twice as many images/s '
             'of a core, with the same random draws, but not bit for bit the same pixels')
    add('--repeated-aug', action=on_off, default=True,
        help='each image three times per epoch, which covers a third of the images')
    add('--reprob', type=fraction, default=0.25, help='probability of random erasing')
    add('--remode', default='pixel', choices=['const', 'rand', 'pixel'], help='fill of random erasing')
    add('--recount', type=positive(int), default=1, help='maximum number of erased regions')
    add('--mixup', type=non_negative, default=0.8, help='alpha of mixup, 0 for none')
    add('--cutmix', type=non_negative, default=1.0, help='alpha of cutmix, 0 for none')
    add('--cutmix-minmax', type=fraction, nargs=2, help='minimum and maximum ratio of cutmix, instead of alpha')
    add('--mixup-prob', type=fraction, default=1.0, help='probability of mixup or cutmix per batch')
    add('--mixup-switch-prob', type=fraction, default=0.5, help='probability of cutmix if both are on')
    add('--mixup-mode', default='batch', choices=['batch', 'pair', 'elem'],
        help='mix per batch, pair or element; a GPU waits in each step for the factors of pairs and elements')

    add = parser.add_argument_group('distillation').add_argument
    add('--teacher-model', type=timm_model, default='regnety_160', help='name of a timm model')
    add('--teacher-path', help='checkpoint of the teacher, file or https address')
    add('--distillation-type', default='none', choices=['none', 'soft', 'hard'], help='kind of distillation')
    add('--distillation-alpha', type=fraction, default=0.5, help='weight of the distillation loss')
    add('--distillation-tau', type=float, default=1.0, help='temperature of soft distillation')

    add = parser.add_argument_group('token labels (LV-ViT)').add_argument
    add('--dense-weight', type=non_negative,
        help='weight of the loss of the patch tokens, 0 for none (default: 0.5 for an LV-ViT)')
    add('--token-label-path', metavar='FOLDER', help="label maps of the training images, <class>/<image>.pt (default: "
        "each patch has its image's label)")

    add = parser.add_argument_group('finetuning').add_argument
    add('--finetune', metavar='CHECKPOINT', help='start from these weights, which may have another head or resolution')

    add_data_arguments(parser)
    add = add_run_arguments(parser).add_argument
    add('--seed', type=natural, default=0, help='random seed')
    add('--resume', default='', metavar='CHECKPOINT',
        help='file or https address to continue from; auto: the newest of the output folder, if it has one')
    add('--overwrite', action='store_true', help='begin anew in an output folder that holds a run, and remove its '
        'checkpoints')
    add('--checkpoint-interval', type=positive(int), default=500,
        help='updates between checkpoints; one is saved after each epoch, too')
    add('--skip-nonfinite', type=natural, default=0,
        help='consecutive updates with a non-finite loss to skip before failing')
    add('--start-epoch', type=natural, default=0, help='number of the first epoch')
    add('--eval-interval', type=positive(int), default=1, help='epochs between evaluations')
    add('--log-masks', action=on_off, default=True,
        help='at each evaluation, show in TensorBoard which patches of 8 validation images are kept')
    return parser


def parse_args(argv, parser=None):
    """The command line as a Namespace; flags may be written with - or with _. Exits with status 2 on an error.

    Args:
        argv: list of str.
        parser: one that knows more flags than main.py has.
    """
    parser = parser or get_args_parser()
    for name in ('--keep-rates', '--token-ways', '--knn', '--knn-bank'):
        if any(text == name or text.startswith(f'{name}=') for text in map(with_dashes, argv)):
            parser.error(f'{name} is a flag of curve.py: python curve.py {name} …, without --eval')
    args = parser.parse_args([with_dashes(text) if text.startswith('--') else text for text in argv])
    fill_data_arguments(args, parser, needs_path=not args.only_test_speed)
    is_resumed = args.resume and (args.eval or args.visualize_mask)
    is_shrinking = any(getattr(args, name) is not None for name in SHRINK_DEFAULTS)
    fill_model_arguments(args, parser, read_flags(args.resume, args.output_dir) if is_resumed else None, is_shrinking)
    fill_shrink_arguments(args, parser)
    if args.train_interpolation is None:
        args.train_interpolation = input_of(args.model, args.pretrained)[1].interpolation
    if args.dense_weight is None:
        args.dense_weight = 0.5 if is_lvvit(args.model) else 0.
    for wrong, message in wrong_combinations(args):
        if wrong:
            parser.error(message)
    return args


def fill_shrink_arguments(args, parser):
    """Complete the schedule of the keep rate, which an EViT alone has."""
    for name, default in SHRINK_DEFAULTS.items():
        if args.token_counts and getattr(args, name) is not None:
            parser.error(f'--token-counts takes no {flag_of(name)}')
        if args.base_keep_rate is not None and getattr(args, name) is None:
            is_trained = name == 'shrink_start_epoch' and (args.finetune or args.pretrained)
            setattr(args, name, 0 if is_trained else default)


def evaluates_only(args):
    return args.eval or args.visualize_mask


def wrong_combinations(args):
    """Pairs of a condition on the flags and the error message if it holds."""
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax
    return (
        (args.finetune == '', '--finetune names no checkpoint'),
        (args.distillation_type != 'none' and not args.teacher_path,
         f'--distillation-type {args.distillation_type} needs --teacher-path'),
        (args.distillation_type != 'none' and 'distilled' not in args.model,
         f'--distillation-type {args.distillation_type} needs a model with a distillation token, not {args.model}'),
        (mixes and args.batch_size % 2 and not evaluates_only(args) and not args.only_test_speed,
         f'mixup and cutmix pair images; --batch-size {args.batch_size} is odd'),
        (args.dense_weight > 0 and not is_lvvit(args.model),
         f'--dense-weight: {args.model} does not classify its patches; LV-ViTs do'),
        (args.token_label_path and not args.dense_weight, '--token-label-path needs an LV-ViT and a --dense-weight'),
        (args.token_label_path and (args.data_set != 'IMNET' or args.use_lmdb or mixes),
         '--token-label-path goes with --data-set IMNET, --mixup 0 and --cutmix 0, without --use-lmdb'),
        (args.visualize_mask and args.base_keep_rate is None,
         f'--visualize-mask: {args.model} does not reorganise tokens; give a token flag such as --base-keep-rate'),
        (args.cutmix_minmax and args.cutmix_minmax[0] > args.cutmix_minmax[1],
         '--cutmix-minmax takes the smaller share first'),
        (evaluates_only(args) and not (args.resume or args.pretrained),
         '--eval and --visualize-mask need --resume CHECKPOINT or --pretrained'),
        (args.overwrite and args.resume, '--overwrite begins anew, --resume goes on with a run; give one of them, '
         'for a recipe --resume= --overwrite'),
        (args.resume == 'auto' and not args.output_dir, '--resume auto needs the --output-dir of the run'))


# --- What a run is made of ------------------------------------------------------------------------------------------

def build_loaders(args, device):
    """Loaders of the training set, of the validation set, and of the validation images that TensorBoard shows.

    The first and the last are None if the run does not need them.
    """
    atexit.register(kill_workers)                      # they ignore SIGTERM, which would end them otherwise
    preprocessing = input_of(args.model, args.pretrained)[1]
    options = {name: getattr(args, name) for name in (*DATA_FLAGS, 'input_size', *AUGMENTATION)}
    options['preprocessing'] = preprocessing
    load = partial(build_loader, device=device, num_workers=args.num_workers, pin_memory=args.pin_mem,
                   channels_last=args.channels_last, worker_init_fn=ignore_stop_signals, preprocessing=preprocessing)
    dataset_train = None if evaluates_only(args) else build_dataset(True, **options)
    dataset_val, eval_batch = build_dataset(False, **options), int(1.5 * args.batch_size)
    processes = (world_size(), rank()) if args.dist_eval else (1, 0)
    loader_val = load(dataset_val, EvalSampler(dataset_val, *processes), eval_batch)
    if dataset_train is None:
        return None, loader_val, None
    check_same_classes(dataset_train, dataset_val)
    if args.token_label_path:
        dataset_train = LabelledTokens(dataset_train, args.token_label_path)
    mask_loader, seeded = None, SeededDataset(dataset_train)
    if args.log_masks and args.output_dir and args.base_keep_rate is not None and rank() == 0:
        mask_loader = build_loader(spread(dataset_val, LOGGED_MASKS), None, args.batch_size, device,
                                   preprocessing=preprocessing)
    sampler = TrainSampler(dataset_train, world_size(), rank(), args.seed, args.repeated_aug)
    if len(sampler) < args.batch_size:
        raise InputError(f'{len(dataset_train)} training images give each of {world_size()} process(es) '
                         f'{len(sampler)} an epoch, fewer than one batch of {args.batch_size}; lower --batch-size')
    return load(seeded, sampler, args.batch_size, drop_last=True), loader_val, mask_loader


def build_model(args, num_classes, pretrained=False):
    """The model on the CPU, with new weights or timm's."""
    return create_model(args.model, pretrained=pretrained, new_head=not args.eval,
                        tokens=TokenSettings.of_flags(vars(args)), input_size=args.input_size,
                        grad_checkpointing=args.grad_checkpointing, model_kwargs=args.model_kwargs,
                        num_classes=num_classes, drop_rate=args.drop, drop_path_rate=args.drop_path)


def build_criterion(args, model, num_classes, device, dataset=None):
    """Mixup and token labelling, each None if the run has none, and the loss for them."""
    mixup = teacher = None
    if args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax:
        mixup = Mixup(args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob,
                      args.mixup_mode, label_smoothing=args.smoothing, num_classes=num_classes)
    if args.dense_weight:
        token_labeling = TokenLabeling(num_classes, model.patch_embed.grid_size, args.smoothing, mix=mixup is None)
        return mixup, token_labeling, TokenLabelingLoss(args.dense_weight)
    if args.distillation_type != 'none':
        teacher = load_teacher(args.teacher_model, args.teacher_path, num_classes, args.input_size, device,
                               dataset)
    base_criterion = build_base_criterion(args.smoothing, soft_labels=mixup is not None)
    return mixup, None, DistillationLoss(base_criterion, teacher, args.distillation_type, args.distillation_alpha,
                                         args.distillation_tau)


# --- The modes ------------------------------------------------------------------------------------------------------

def main(args):
    device = init_process_group(args.device, args.dist_url, args.world_size, args.dist_timeout)
    with flash_first(device):
        run_mode(args, device)


def run_mode(args, device):
    """Build what the mode needs, and run it."""
    amp_dtype = choose_amp_dtype(args.amp_dtype, device)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    choose_kernels(device, args.deterministic)
    seed_all(args.seed)
    measure_speed = partial(report_speed, args.model, input_size=args.input_size, output_dir=args.output_dir,
                            batch_size=args.batch_size, device=device, amp_dtype=amp_dtype, compiled=args.compile,
                            channels_last=args.channels_last)
    if args.only_test_speed:
        model = build_model(args, num_classes=1000).to(device, memory_format=memory_format)
        return measure_speed(model)

    if not evaluates_only(args) and args.output_dir and not (args.resume or args.overwrite):
        refuse_checkpoints(args.output_dir)
    source = find_checkpoint(args.resume, args.output_dir, device, required=evaluates_only(args))
    checkpoint = load_run(source, vars(args), evaluates_only(args)) if source else None
    loader_train, loader_val, mask_loader = build_loaders(args, device)
    num_classes = len(loader_val.dataset.classes)
    model = build_model(args, num_classes, pretrained=args.pretrained and not source and not args.finetune)
    average = None
    if checkpoint:
        check_classes(checkpoint, loader_val.dataset, source)
    if evaluates_only(args) and source:
        average = load_evaluated(model, checkpoint, source, with_average=args.eval and args.model_ema)
    elif args.finetune and not source:
        load_finetune(model, args.finetune, loader_val.dataset)
    model.to(device, memory_format=memory_format)
    log_setting(args, model, loader_train, loader_val, device, amp_dtype)
    if args.test_speed:
        measure_speed(model)

    evaluate_model = partial(evaluate, loader=loader_val, device=device, amp_dtype=amp_dtype, compiled=args.compile,
                             sharded=args.dist_eval, print_freq=args.print_freq)
    if args.eval:
        evaluate_model(model, average=average and average.to(device, memory_format=memory_format))
    elif args.visualize_mask:
        images = visualize(model, loader_val, args.n_visualization, args.output_dir or 'visualization', args.batch_size,
                           device, amp_dtype, args.num_workers, args.pin_mem)
        evaluate_model(model, loader=images, sharded=True)
    else:
        log_notes(args, len(loader_train))
        mixup, token_labeling, criterion = build_criterion(args, model, num_classes, device, loader_val.dataset)
        trainer = Trainer(args, model, device, amp_dtype, criterion, mixup, loader_train, evaluate_model, mask_loader,
                          token_labeling)
        if checkpoint:
            trainer.resume(checkpoint, source)
        del checkpoint                                 # as large as all of the trainer's state
        trainer.fit()


def log_setting(args, model, loader_train, loader_val, device, amp_dtype):
    """Print a line on the model, the data and the device."""
    num_parameters = sum(p.numel() for p in model.parameters())
    images = f'{len(loader_val.dataset):,} test images of {len(loader_val.dataset.classes)} classes'
    if loader_train:
        images = f'{len(loader_train.dataset):,} training and {images}'
    log(f'{args.model}: {num_parameters:,} parameters; {args.data_set}: {images}; '
        f'{world_size()} process(es) on {device.type}, {amp_dtype}')
    for name, loader in ('train.lmdb', loader_train), ('val.lmdb', loader_val):
        dataset = getattr(loader, 'dataset', None)
        dataset = getattr(dataset, 'dataset', dataset)                     # in a SeededDataset
        if getattr(dataset, 'reencoding', None):
            log(f'{name}: images are {dataset.reencoding}')


def log_notes(args, num_steps):
    """Say which flags do not suit the length of the run, in which an epoch has `num_steps` steps, or save nothing."""
    if not args.output_dir:
        log('note: nothing will be saved; give --output-dir')
    if args.warmup_epochs >= args.epochs:
        log(f'note: the warm-up of {args.warmup_epochs} epochs is not shorter than the run of {args.epochs}: the '
            'learning rate only rises; lower --warmup-epochs')
    if args.base_keep_rate is not None and not args.token_counts:
        rate = keep_rate_at(args.epochs * num_steps - 1, num_steps, args.shrink_start_epoch, args.shrink_epochs,
                            args.base_keep_rate)
        if rate > args.base_keep_rate + 0.01:
            log(f'note: the keep rate reaches {args.base_keep_rate:g} after {args.shrink_start_epoch} + '
                f'{args.shrink_epochs} epochs, but the run has {args.epochs}: the last one ends at {rate:.3g}; lower '
                '--shrink-start-epoch or --shrink-epochs')
    covered = 1 / (1 - args.model_ema_decay) if args.model_ema_decay < 1 else math.inf
    updates = args.epochs * math.ceil(num_steps / args.accum_steps)
    if args.model_ema and covered > updates:
        log(f'note: the moving average covers {covered:,.0f} updates, but the run has {updates:,}: it stays near the '
            'first weights; lower --model-ema-decay, or give --no-model-ema')


def run(argv=None, parser=None):
    """The program; the arguments are those of `parse_args`; by default `argv` is the command line of the process."""
    def program():
        main(parse_args(sys.argv[1:] if argv is None else argv, parser))
        leave_process_group()

    run_program('main.py', program)
