"""What a run reports: lines on the console, log.txt, TensorBoard."""
import datetime
import itertools
import json
import math
import os
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from runtime.distributed import all_reduce, log, rank, world_size
from runtime.utils import InputError, atomic_write, open_durably

# --- Console --------------------------------------------------------------------------------------------------------

class Progress:
    """Prints a line every `print_freq` steps of a pass over batches, and sums up the figures of the whole pass.

    The loss stays on the device between the lines, so that no step waits for it.

    Args:
        title: start of the lines.
        num_steps: number of batches of the pass.
        print_freq: steps from one line to the next.
        device: device of the losses.
        lockstep: whether all processes take the same steps, as in training. Then the figures are over all of them, and
            a loss that is not finite raises FloatingPointError in all of them.
        state: `state_dict` of an interrupted pass to continue.
        log_step: called with the step and the figures of each line, a dict; None to only print them.
    """

    def __init__(self, title, num_steps, print_freq, device, lockstep=False, state=None, log_step=None):
        self.title, self.num_steps, self.print_freq = title, num_steps, print_freq
        self.device, self.lockstep, self.log_step = device, lockstep, log_step
        self.world_size = world_size() if lockstep else 1
        self.step = self.images = self.skipped = self.skipped_in_a_row = 0
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.first_broken = torch.full((), math.inf, device=device)        # first step with a loss that is not finite
        self.values, self.means = {}, {}               # {name: last value}, {name: (mean, number of values)}
        if state:
            self.step, self.images = state['step'], state['images']
            self.skipped, self.skipped_in_a_row = state['skipped'], state['skipped_in_a_row']
            loss_sums = state['loss_sums']
            mine = loss_sums[rank()] if len(loss_sums) == self.world_size else loss_sums.sum() / self.world_size
            self.loss_sum += mine.to(device)
            # Older checkpoints have the last values alone
            self.means = state.get('means') or {name: (value, self.step) for name, value in state['values'].items()}
        self.first_images = self.last_images = self.images
        self.start_step = self.step
        self.start = self.last_time = time.perf_counter()
        self.waited = None                             # seconds for batches of `batches_of`, in this process

    def state_dict(self):
        """The pass so far, of all processes; raises FloatingPointError as a line would."""
        self.mean_loss()
        loss_sums = torch.zeros(self.world_size, dtype=torch.float64, device=self.device)
        loss_sums[rank()] = self.loss_sum
        return {'step': self.step, 'num_steps': self.num_steps, 'images': self.images, 'skipped': self.skipped,
                'skipped_in_a_row': self.skipped_in_a_row, 'loss_sums': all_reduce(loss_sums).cpu(),
                'means': {name: (float(mean), number) for name, (mean, number) in self.means.items()}}

    def batches_of(self, loader):
        """The batches of a loader; measures the time in which they are waited for, but for the first: workers start."""
        batches, self.waited = iter(loader), 0.
        yield from itertools.islice(batches, 1)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def add_batch(self, loss, num_images, counts=True, **values):
        """Add a batch: its mean loss (0-d, or None), its size, whether the figures count it, and more scalars of it.

        The scalars are numbers or tensors (0-d), which are not waited for between the lines; those of the first process
        are printed, and the summary has their means. A mean of equal values is that value, to the last bit.
        """
        self.step += 1
        if counts:
            self.images += num_images * self.world_size
        if counts and loss is not None:
            self.loss_sum += loss * num_images
            self.first_broken = self.first_broken.where(loss.isfinite() | (self.first_broken < self.step), self.step)
        self.values = values
        for name, value in values.items():
            value = value.detach().double() if isinstance(value, torch.Tensor) else value
            mean, number = self.means.get(name, (value, 0))
            self.means[name] = mean + (value - mean) / (number + 1), number + 1
        if self.step % self.print_freq == 0 or self.step == self.num_steps:
            self._print_line(loss)

    def skip(self, limit):
        """Count an update skipped for a non-finite loss; FloatingPointError after more than `limit` in a row."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        log(f'{self.title} step {self.step} is left out: its loss is not finite')
        if self.skipped_in_a_row > limit:
            raise FloatingPointError(f'{self.title} at step {self.step} the loss is not finite {self.skipped_in_a_row} '
                                     'times in a row; try a lower --lr, --clip-grad, or --amp-dtype float32')

    def mean_loss(self):
        """The mean loss so far, over all processes in lockstep, where it is finite or FloatingPointError is raised."""
        loss_sum = self.loss_sum.clone()
        mean = (all_reduce(loss_sum) if self.lockstep else loss_sum).item() / max(self.images, 1)
        if self.lockstep and not math.isfinite(mean):
            step = int(all_reduce(self.first_broken, dist.ReduceOp.MIN).item())
            raise FloatingPointError(f'{self.title} the loss of step {step} is not finite; '
                                     'try a lower --lr, --clip-grad, --amp-dtype float32, or --skip-nonfinite')
        return mean

    def _print_line(self, loss):
        losses, figures = [], {}
        if loss is not None:
            loss = loss.double() / self.world_size
            figures['loss'] = (all_reduce(loss) if self.lockstep else loss).item()
            losses = [f'loss: {figures["loss"]:.4f} ({self.mean_loss():.4f})']
        now = time.perf_counter()
        seconds = (now - self.start) / (self.step - self.start_step) * (self.num_steps - self.step)
        speed = (self.images - self.last_images) / (now - self.last_time)
        self.last_time, self.last_images = now, self.images
        values = {name: float(value) for name, value in self.values.items()}
        waits = [] if self.waited is None else [f'loader_wait: {self.waited / (now - self.start):.2f}']
        parts = [f'{self.title} [{self.step:{len(str(self.num_steps))}}/{self.num_steps}]',
                 f'eta: {datetime.timedelta(seconds=round(seconds))}', *losses,
                 *(f'{key}: {value:.4g}' for key, value in values.items()), f'images/s: {speed:.0f}', *waits]
        if self.device.type == 'cuda':
            parts.append(f'memory: {torch.cuda.max_memory_allocated(self.device) / 2 ** 20:.0f} MiB')
        log('  '.join(parts))
        if self.log_step:
            self.log_step(self.step, {**figures, **values, 'images_per_second': speed})

    def summary(self):
        """Mean loss and means of the scalars of the whole pass; images/s and loader_wait of the part in this process.

        The latter is the share of the time in which the step waited for `batches_of`, the largest of all processes.
        """
        seconds = time.perf_counter() - self.start
        waits = {}
        if self.waited is not None:
            share = torch.tensor(self.waited / seconds, device=self.device)
            waits['loader_wait'] = (all_reduce(share, dist.ReduceOp.MAX) if self.lockstep else share).item()
        skipped = {'skipped_steps': self.skipped} if self.skipped else {}
        return {'loss': self.mean_loss(), 'images_per_second': (self.images - self.first_images) / seconds,
                **waits, **{name: float(mean) for name, (mean, _) in self.means.items()}, **skipped}


# --- Files ----------------------------------------------------------------------------------------------------------

def make_output_folder(path):
    """Create a folder if it is missing → Path; InputError if it cannot be written to."""
    if os.path.lexists(path) and not os.path.isdir(path):
        raise InputError(f'--output-dir {path} is a file or a broken link; name a folder, which may be missing')
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f'the output folder {path} cannot be made or written to: {error.strerror}') from None
    return Path(path)


class RunLog:
    """log.txt, one JSON line per epoch, and TensorBoard's files in the output folder.

    An epoch is logged before its checkpoint is saved. If the run is killed in between, the epoch is trained again, so
    its lines are removed from log.txt, and TensorBoard is told to ignore its events. The figures of single steps, whose
    numbers are others than those of the epochs, are in the folder `steps`, for TensorBoard a run of its own.

    Args:
        folder: Path of the output folder; None to write nothing.
        epoch: the first epoch that this run will log.
        steps: how many steps of training are done.
        resumed: whether the folder may have entries of that epoch or later ones from before.
        overwrites: whether entries of all epochs are to go.
        flags: dict to show in TensorBoard.
    """

    def __init__(self, folder, epoch, steps=0, resumed=False, overwrites=False, flags={}):
        self.folder = folder
        if folder:
            if resumed or overwrites:
                cut_log(folder / 'log.txt', 0 if overwrites else epoch)
            (folder / 'steps').mkdir(exist_ok=True)
            self.events, self.step_events = map(new_events, (folder, folder / 'steps'))
            start = SessionLog(status=SessionLog.START)
            self._write_event(0 if overwrites else epoch, session_log=start)
            self._write_event(0 if overwrites else steps + 1, self.step_events, session_log=start)
            table = '\n'.join(['| flag | value |', '|---|---|', *(
                f'| --{name.replace("_", "-")} | {value} |' for name, value in sorted(flags.items()))])
            shown = table.encode(errors='backslashreplace').decode()       # the name of a file may be any bytes
            self._write_event(epoch, summary=summary.text('flags', shown))

    def log_epoch(self, epoch, stats, num_parameters):
        """Log the figures of an epoch, a dict of numbers, and the number of trained parameters."""
        if self.folder:
            append_line(self.folder / 'log.txt', {**stats, 'epoch': epoch, 'n_parameters': num_parameters})
            for name, value in stats.items():
                self._write_event(epoch, summary=summary.scalar(name.replace('_', '/', 1), value))

    def log_step(self, step, figures):
        """Log the figures of one step, counted over all epochs, a dict of numbers."""
        if self.folder:
            for name, value in figures.items():
                self._write_event(step, self.step_events, summary=summary.scalar(f'step/{name}', value))

    def log_image(self, epoch, tag, pixels):
        """Show TensorBoard an image, uint8 (H, W, 3)."""
        if self.folder:
            self._write_event(epoch, summary=summary.image(tag, pixels, dataformats='HWC'))

    def _write_event(self, step, events=None, **content):
        events = events or self.events
        events.write_event(Event(step=step, wall_time=time.time(), **content))
        events.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.folder:
            self.events.close()
            self.step_events.close()


def new_events(folder):
    """A writer of one more file of TensorBoard's.

    The name has the time in seconds; the number keeps a run that is resumed within one from replacing the file before.
    """
    number = len(list(folder.glob('events.out.tfevents.*')))
    # SummaryWriter would write in a thread, which may be late when the run is killed
    return EventsWriter(str(folder / 'events'), f'.{number:04}')


def append_line(path, stats):
    """Append a dict to a file as a line of JSON that survives a power cut, as the checkpoint after it does."""
    with open_durably(path, 'a') as file:
        file.write(json.dumps(stats) + '\n')


def cut_log(path, epoch):
    """Remove from log.txt the lines of `epoch` and later ones, and a line that was not written completely."""
    def stays(line):
        try:
            stats = json.loads(line)
        except ValueError:                             # including UnicodeDecodeError
            return False
        number = stats.get('epoch') if isinstance(stats, dict) else None
        return line.endswith(b'\n') and (not isinstance(number, int) or number < epoch)

    if path.exists():
        with atomic_write(path) as temporary, open_durably(temporary, 'wb') as file:
            file.writelines(filter(stays, path.read_bytes().splitlines(keepends=True)))
