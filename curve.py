"""Draw accuracy against speed of one set of weights, at several keep rates: `python curve.py --help`.

    python curve.py --model vit_base_patch16_224 --pretrained --keep-rates 1 0.7 0.5 --token-ways fuse merge \\
        --data-path /path/to/imagenet --output_dir curve

The flags of model, data and run are those of main.py.
"""
if __name__ == '__main__':                             # before the imports, which take seconds: see `start`
    from runtime.program import start
    start('curve')

import atexit
import dataclasses
import sys
from functools import partial

import torch

from datasets import (DATA_FLAGS, add_data_arguments, build_dataset, build_loader, check_same_classes,
                      fill_data_arguments)
from evit.reorganization import WAYS
from evit.settings import TokenSettings
from measuring.accuracy_curve import SUMS, Evaluation, format_table, plan_rows, write_csv
from measuring.knn import Neighbours
from measuring.plots import plot_curve
from runtime.arguments import ArgumentParser, HelpFormatter, add_run_arguments, keep_rate, positive, with_dashes
from runtime.attention_priority import flash_first
from runtime.checkpoint import check_classes, find_checkpoint, load_adapted, load_run, load_weights, read_flags
from runtime.distributed import (ignore_stop_signals, init_process_group, kill_workers, leave_process_group, log, rank,
                                 world_size)
from runtime.failures import run_program
from runtime.logger import make_output_folder
from runtime.model_factory import MODEL_FLAGS, add_model_arguments, create_model, fill_model_arguments
from runtime.preprocessing import input_of
from runtime.utils import atomic_write, choose_amp_dtype, choose_kernels, seed_all
from samplers import EvalSampler

# --- Command line ---------------------------------------------------------------------------------------------------

def get_args_parser():
    parser = ArgumentParser(description='EViT: accuracy against speed', allow_abbrev=False,
                            formatter_class=HelpFormatter)
    add = parser.add_argument_group('curve').add_argument
    add('--keep-rates', nargs='+', type=keep_rate, help="keep rates to evaluate (default: the model's)")
    add('--token-ways', nargs='+', choices=[*WAYS], help="in each of these ways (default: the model's)")
    add('--knn', type=positive(int), metavar='K', help='classify by the K nearest training images')
    add('--knn-bank', choices=['full', 'own'], help='their features: of the full model (default), or of the same rate')
    _, model = add_model_arguments(parser)
    model.add_argument('--resume', default='', metavar='CHECKPOINT',
                       help='file or https address of the weights; auto: the newest of the output folder')
    add_data_arguments(parser)
    add = add_run_arguments(parser).add_argument
    add('--batch-size', type=positive(int), default=64, help='images per process; evaluation uses 1.5 times as many')
    parser.set_defaults(output_dir='curve')
    return parser


def parse_args(argv):
    """The command line as a Namespace. Exits with status 2 on an error."""
    parser = get_args_parser()
    args = parser.parse_args([with_dashes(text) if text.startswith('--') else text for text in argv])
    for wrong, message in ((not (args.resume or args.pretrained), 'give --resume CHECKPOINT or --pretrained'),
                           (args.knn_bank and not args.knn, '--knn-bank needs --knn'),
                           (not (args.keep_rates or args.knn), 'give --keep-rates, --knn or both'),
                           (args.token_counts and (args.keep_rates or args.knn),
                            '--token-counts takes no --keep-rates and no --knn')):
        if wrong:
            parser.error(message)
    fill_data_arguments(args, parser)
    trained = read_flags(args.resume, args.output_dir) if args.resume else None
    is_evit = fill_model_arguments(args, parser, trained, as_evit=True)
    if args.token_counts:
        parser.error(f'the checkpoint has token_counts {args.token_counts}, at which a curve has no rates; give '
                     '--base-keep-rate to replace them, or evaluate it with main.py --eval')
    args.measure_speed = bool(args.keep_rates)
    if not args.keep_rates:
        args.keep_rates = [args.base_keep_rate if is_evit else 1.]
    return args


# --- What the curve is made of --------------------------------------------------------------------------------------

def build_loaders(args, device):
    """Loaders of the validation set and, for --knn, of the training images in their order, without augmentation."""
    atexit.register(kill_workers)                      # they ignore SIGTERM, which would end them otherwise
    preprocessing = input_of(args.model, args.pretrained)[1]
    load = partial(build_loader, batch_size=int(1.5 * args.batch_size), device=device, num_workers=args.num_workers,
                   pin_memory=args.pin_mem, channels_last=args.channels_last, worker_init_fn=ignore_stop_signals,
                   preprocessing=preprocessing)
    build = partial(build_dataset, augment=False, input_size=args.input_size, preprocessing=preprocessing,
                    **{name: getattr(args, name) for name in DATA_FLAGS})
    dataset_val, processes = build(False), (world_size(), rank())
    loader_val = load(dataset_val, EvalSampler(dataset_val, *(processes if args.dist_eval else (1, 0))))
    if not args.knn:
        return loader_val, None
    dataset_train = build(True)
    check_same_classes(dataset_train, dataset_val)
    return loader_val, load(dataset_train, EvalSampler(dataset_train, *processes))


def build_model(args, dataset, device):
    """The EViT on the device with the weights that the flags name, in eval mode.

    --knn does not use the head, so it takes weights that classify other classes than `dataset` has, or none.
    """
    source = find_checkpoint(args.resume, args.output_dir, device, required=True)
    model = create_model(args.model, pretrained=args.pretrained and not source, new_head=bool(args.knn),
                         tokens=TokenSettings.of_flags(vars(args)), input_size=args.input_size,
                         model_kwargs=args.model_kwargs, num_classes=len(dataset.classes))
    checkpoint = load_run(source, vars(args), evaluates_only=True) if source else None
    if source and args.knn:
        load_adapted(model, checkpoint, source)
    elif source:
        check_classes(checkpoint, dataset, source)
        load_weights(model, checkpoint['model'], source)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    return model.to(device, memory_format=layout).eval()


def settings_of_curve(args, model, amp_dtype, num_images):
    """What the accuracies of a curve depend on, beside the weights, the rate and the way; a dict."""
    tokens = dataclasses.asdict(model.token_settings)
    del tokens['base_keep_rate'], tokens['way']
    names = *DATA_FLAGS, *MODEL_FLAGS, 'batch_size', 'knn', 'knn_bank'
    return {name: getattr(args, name) for name in names} | tokens | {'precision': str(amp_dtype), 'images': num_images}


# --- The program ----------------------------------------------------------------------------------------------------

def main(args):
    device = init_process_group(args.device, args.dist_url, args.world_size, args.dist_timeout)
    with flash_first(device):
        measure(args, device)


def measure(args, device):
    """Measure all rows; write them."""
    amp_dtype = choose_amp_dtype(args.amp_dtype, device)
    choose_kernels(device, args.deterministic)
    seed_all(0)
    loader, loader_train = build_loaders(args, device)
    model = build_model(args, loader.dataset, device)
    folder = make_output_folder(args.output_dir)
    neighbours = Neighbours(args.knn, args.knn_bank == 'own') if args.knn else None
    evaluation = Evaluation(model, plan_rows(args.keep_rates, args.token_ways or [model.token_settings.way]),
                            folder / 'curve.json', settings_of_curve(args, model, amp_dtype, len(loader.dataset)),
                            device, amp_dtype, args.dist_eval, neighbours)
    if neighbours and not all(row.complete for row in evaluation.rows):
        neighbours.fill(evaluation.models, [(row.way, row.rate) for row in evaluation.rows], loader_train,
                        len(loader.dataset.classes), device, amp_dtype, args.print_freq)
    evaluation.run(loader, args.print_freq)
    num_images = int(evaluation.rows[0].sums[SUMS.index('images')])
    note = f'{num_images:,} images'
    if args.measure_speed:
        log('Measuring the throughput of each row')
        evaluation.measure_speed(args.input_size, args.batch_size)
        protocol = dataclasses.replace(evaluation.rows[0].speed.protocol, keep_rate=None)
        note += f'; {protocol}'
    log('\n'.join([*format_table(evaluation.rows), note]))
    if rank() == 0:
        write_csv(folder / 'curve.csv', evaluation.rows)
        if args.measure_speed:
            with atomic_write(folder / 'curve.png') as path:
                plot_curve(path, [row.columns() for row in evaluation.rows], f'{args.model}, {num_images:,} images')
        log(f'Wrote curve.csv{" and curve.png" * args.measure_speed} to {folder}')


def run(argv=None):
    """The program, on a command line, by default that of the process."""
    def program():
        main(parse_args(sys.argv[1:] if argv is None else argv))
        leave_process_group()

    run_program('curve.py', program)
