"""What saving costs training: `python tests/faults/saving.py [flags of main.py]`.

One run, of which every other epoch is saved as always and the others not at all; by default the digits of run_code.sh
with the moving average beside, evaluated after each epoch. Prints the time of the saves beside that of the training,
and how much longer an epoch with saving took than the one before it without.
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
    """Train → seconds of each epoch, seconds of its saves, in the order of the epochs, of which the odd are saved."""
    save, train_epoch, epochs, saves = main.RunOutput.save, main.train_epoch, [], []

    def timed_epoch(*args):
        epochs.append(time.perf_counter())
        saves.append(0.)
        return train_epoch(*args)

    def timed_save(*args):
        start = time.perf_counter()
        if len(epochs) % 2 == 0:
            save(*args)
        saves[-1] += time.perf_counter() - start

    main.RunOutput.save, main.train_epoch = timed_save, timed_epoch
    with tempfile.TemporaryDirectory() as folder:
        main.main(main.parse_args([*flags, '--output_dir', folder]))
    epochs.append(time.perf_counter())
    return [end - start for start, end in zip(epochs, epochs[1:])], saves


if __name__ == '__main__':
    epochs, saves = measure(sys.argv[1:] or RECIPE)
    pairs = list(zip(epochs[2::2], epochs[3::2]))                          # without what the first epoch has to set up
    without = statistics.median(one for one, _ in pairs)
    cost = statistics.median(saved - one for one, saved in pairs)
    print(f'an epoch without saving takes {without:.2f} s, with it {cost:+.3f} s ({cost / without:+.1%}), '
          f'of which the save itself {statistics.median(saves[3::2]):.3f} s; medians of {len(pairs)} pairs')
