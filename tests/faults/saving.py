"""What saving costs training: `python tests/faults/saving.py [flags of main.py]`.

One run, of which every other epoch is saved as always and the others not at all; by default the digits of run_code.sh
with the moving average beside, evaluated after each epoch. Prints how much more time, and how much more time of the
processor, an epoch with saving took than the one before it without; the second is the surer figure on a shared machine.
"""
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import main  # noqa: E402

RECIPE = ['--model', 'deit_tiny_patch16_shrink_base', '--fuse_token', '--data-set', 'DIGITS', '--input-size', '48',
          '--batch-size', '64', '--num_workers', '1', '--epochs', '13', '--warmup-epochs', '0',
          '--shrink_start_epoch', '0', '--lr', '4e-3', '--clip-grad', '1', '--drop-path', '0', '--mixup', '0',
          '--cutmix', '0', '--aa', '', '--color-jitter', '0', '--reprob', '0', '--no-repeated-aug']


def measure(flags):
    """Train → (seconds, seconds of the processor) of each epoch; the odd ones are saved."""
    save, train_epoch, starts = main.RunOutput.save, main.train_epoch, []

    def timed_epoch(*args):
        starts.append((time.perf_counter(), time.process_time()))
        return train_epoch(*args)

    def every_other_save(*args):
        if len(starts) % 2 == 0:
            save(*args)

    main.RunOutput.save, main.train_epoch = every_other_save, timed_epoch
    with tempfile.TemporaryDirectory() as folder:
        main.main(main.parse_args([*flags, '--output_dir', folder]))
    return [tuple(end - start for start, end in zip(*ends)) for ends in zip(starts, starts[1:])]


if __name__ == '__main__':
    epochs = measure(sys.argv[1:] or RECIPE)
    pairs = list(zip(epochs[2::2], epochs[3::2]))                          # without what the first epoch has to set up
    for i, what in enumerate(('time', 'time of the processor')):
        without = statistics.median(one[i] for one, _ in pairs)
        cost = statistics.median(saved[i] - one[i] for one, saved in pairs)
        print(f'{what}: an epoch without saving takes {without:.2f} s, with it {cost:+.3f} s ({cost / without:+.1%}); '
              f'medians of {len(pairs)} pairs')
