"""Measure the cost of saving checkpoints: `python tests/faults/saving.py [flags of main.py]`.

One run saves in every second epoch only. By default it trains on the digits with a moving average. The script prints
how much more wall-clock and processor time an epoch with saving takes than the previous epoch, without saving. On a
shared machine, processor time is more reliable.
"""
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import main  # noqa: E402
from runtime.checkpoint import CheckpointWriter  # noqa: E402
from trainer import Trainer  # noqa: E402

RECIPE = ['--model', 'deit_tiny_patch16_shrink_base', '--fuse_token', '--data-set', 'DIGITS', '--input-size', '48',
          '--batch-size', '64', '--num_workers', '1', '--epochs', '13', '--warmup-epochs', '0',
          '--shrink_start_epoch', '0', '--lr', '4e-3', '--clip-grad', '1', '--drop-path', '0', '--mixup', '0',
          '--cutmix', '0', '--aa', '', '--color-jitter', '0', '--reprob', '0', '--no-repeated-aug']


def measure(flags):
    """Train and return (seconds, processor seconds) of each epoch. Only odd epochs are saved."""
    write, train_epoch, starts = CheckpointWriter.write, Trainer.train_epoch, []

    def timed_epoch(*args):
        starts.append((time.perf_counter(), time.process_time()))
        return train_epoch(*args)

    def write_every_other(*args):
        if len(starts) % 2 == 0:
            write(*args)

    CheckpointWriter.write, Trainer.train_epoch = write_every_other, timed_epoch
    with tempfile.TemporaryDirectory() as folder:
        main.main(main.parse_args([*flags, '--output_dir', folder]))
    return [tuple(end - start for start, end in zip(*ends)) for ends in zip(starts, starts[1:])]


if __name__ == '__main__':
    epochs = measure(sys.argv[1:] or RECIPE)
    pairs = list(zip(epochs[2::2], epochs[3::2]))                          # the first epochs include setup
    for i, what in enumerate(('wall-clock time', 'processor time')):
        without = statistics.median(one[i] for one, _ in pairs)
        cost = statistics.median(saved[i] - one[i] for one, saved in pairs)
        print(f'{what}: an epoch without saving takes {without:.2f} s, with it {cost:+.3f} s ({cost / without:+.1%}); '
              f'medians of {len(pairs)} pairs')
