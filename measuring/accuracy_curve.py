"""Accuracy against speed of one set of weights, at several keep rates and ways to treat the tokens not kept."""
import copy
import csv
import dataclasses
import itertools
import json
import math

import torch
import torch.distributed as dist

from measuring.accuracy import count_correct
from measuring.benchmark import Protocol, Throughput, macs, measured_pass, stopwatch, time_in_turn
from measuring.knn import finite_loss
from models_evit import to_evit
from runtime.distributed import all_reduce, broadcast_object, rank, world_size
from runtime.logger import Progress
from runtime.utils import InputError, atomic_write, autocast

FULL = 'full'                                          # the way of the row at rate 1
BATCHES_PER_SAVE = 20
SUMS = 'top1', 'top5', 'loss', 'images', 'same'


@dataclasses.dataclass
class Row:
    """A point of the curve.

    Attributes:
        way: of WAYS, or FULL.
        rate: keep rate.
        batches: how many batches each process has counted.
        complete: whether they are all.
        sums: by SUMS: images right at 1 and at 5, losses, images, those with the class of the full model.
        gmacs, speed, ratio: per image; images/s; its ratio to the row at rate 1.
    """
    way: str
    rate: float
    batches: int = 0
    complete: bool = False
    sums: list = dataclasses.field(default_factory=lambda: len(SUMS) * [0.])
    gmacs: float = math.nan
    speed: Throughput = None
    ratio: float = math.nan

    def columns(self):
        """{column: figure} of the table; accuracies in percent."""
        top1, top5, loss, images, same = self.sums
        return {'way': self.way, 'rate': self.rate, 'gmacs': self.gmacs,
                'images_per_second': self.speed.median if self.speed else math.nan, 'ratio': self.ratio,
                'top1': 100 * top1 / images, 'top5': 100 * top5 / images, 'loss': loss / images,
                'same': 100 * same / images, 'images': int(images)}


class Evaluation:
    """One pass over the images for all rows, whose sums go to a file now and then.

    Args:
        model: an EViT on the device; it is not changed.
        rows: [Row].
        file: Path of the state, JSON. Rows that are complete in it are not evaluated again, the others continue.
        settings: dict of what the sums depend on, beside the weights and the number of processes.
        sharded: each process has its share of the images, as in `engine.evaluate`.
        neighbours: `measuring.knn.Neighbours` to classify by instead of the head, or None.
    Raises:
        InputError: the file has other settings.
    """

    def __init__(self, model, rows, file, settings, device, amp_dtype, sharded=False, neighbours=None):
        self.models = {row.way: with_way(model, model.token_settings.way if row.way == FULL else row.way).eval()
                       for row in rows}
        self.rows, self.file, self.sharded = rows, file, sharded
        weights = sum(parameter.double().abs().sum() for parameter in model.parameters()).item()
        self.settings = settings | {'weights': weights, 'processes': world_size() if sharded else 1}
        self.device, self.amp_dtype, self.neighbours = device, amp_dtype, neighbours
        self.restore()

    def restore(self):
        """Take over the sums of the file."""
        self.others = []                               # rows of the file that this run does not name
        text = broadcast_object(self.file.read_bytes() if rank() == 0 and self.file.is_file() else None)
        if text is None:
            return
        try:
            state = json.loads(text)
            found, stored = state['settings'], {(row['way'], row['rate']): Row(**row) for row in state['rows']}
        except (ValueError, KeyError, TypeError):
            raise InputError(f'{self.file} is damaged; remove it to begin anew') from None
        for name, value in self.settings.items():
            if found.get(name) != json.loads(json.dumps(value)):
                raise InputError(f'{self.file} is of {name} {found.get(name)}, this run has {value}; give another '
                                 '--output-dir')
        self.rows[:] = [stored.pop((row.way, row.rate), row) for row in self.rows]
        self.others = [row for row in stored.values() if row.complete]
        open_rows = [row for row in self.rows if not row.complete]
        if len({row.batches for row in open_rows}) > 1:                    # a new row, which has to begin at the start
            self.rows[:] = [row if row.complete else Row(row.way, row.rate) for row in self.rows]

    def save(self):
        if rank() == 0:
            names = 'way', 'rate', 'batches', 'complete', 'sums'
            rows = [{name: getattr(row, name) for name in names} for row in self.rows + self.others]
            with atomic_write(self.file) as temporary:
                temporary.write_text(json.dumps({'settings': self.settings, 'rows': rows}))

    @torch.no_grad()
    def run(self, loader, print_freq=50):
        """Evaluate the rows that are not complete; `loader` as in `engine.evaluate`, with an `EvalSampler`."""
        rows = [row for row in self.rows if not row.complete]
        if not rows:
            return
        start, num_batches = rows[0].batches, len(loader)
        common_batches = int(all_reduce(torch.tensor(num_batches, device=self.device), dist.ReduceOp.MIN))
        loader.sampler.skip(start * loader.batch_size)                     # a pass that was interrupted goes on
        progress = Progress('Curve:', num_batches, print_freq, self.device)
        progress.step = progress.start_step = start
        totals = torch.zeros(len(rows), len(SUMS), dtype=torch.float64, device=self.device)
        for images, labels in loader:
            full = self.classify(images, FULL, 1.)
            for row, sums in zip(rows, totals):
                logits = full if row.way == FULL else self.classify(images, row.way, row.rate)
                same = (logits.argmax(dim=1) == full.argmax(dim=1)).sum()
                counted = count_correct(logits, labels, finite_loss(logits, labels))
                sums += torch.cat([counted, same.double().reshape(1)])
            progress.add_batch(finite_loss(full, labels), len(images))
            if progress.step % BATCHES_PER_SAVE == 0 and progress.step <= common_batches:
                self.add(rows, totals, progress.step)
        self.add(rows, totals, num_batches, complete=True)

    def classify(self, images, way, rate):
        """Images (B, 3, H, W) → logits (B, classes), of the head or of the neighbours."""
        with autocast(self.device, self.amp_dtype):
            if not self.neighbours:
                return self.models[way](images, keep_rate=rate).float()
            features = self.models[way].forward_features(images, rate)[:, 0]
        return self.neighbours.vote(features, way, rate)

    def add(self, rows, totals, batches, complete=False):
        """Move the totals of the processes to the rows, and write the file."""
        for row, sums in zip(rows, (all_reduce(totals) if self.sharded else totals).tolist()):
            row.sums = [one + other for one, other in zip(row.sums, sums)]
            row.batches, row.complete = batches, complete
        totals.zero_()
        self.save()

    def measure_speed(self, input_size, batch_size, windows=5, window_seconds=0.5):
        """Add GMACs, images/s with windows in turn, and its ratio to the first row."""
        protocols = [Protocol(input_size, batch_size, self.device, self.amp_dtype, row.rate, windows, window_seconds)
                     for row in self.rows]
        images = protocols[0].images()                 # the same for all rows
        speeds = time_in_turn([stopwatch(measured_pass(self.models[row.way], images, protocol), protocol)
                               for row, protocol in zip(self.rows, protocols)], protocols)
        for row, speed in zip(self.rows, speeds):
            row.speed, row.ratio = speed, speed.ratio_to(speeds[0])
            row.gmacs = macs(self.models[row.way], input_size, row.rate)


def plan_rows(rates, ways):
    """The row at rate 1, then each other rate in each way."""
    rates = sorted(set(rates) - {1.}, reverse=True)
    return [Row(FULL, 1.), *(Row(way, rate) for way in dict.fromkeys(ways) for rate in rates)]


def with_way(model, way):
    """A copy of an EViT that treats the tokens that are not kept in another way; it shares the parameters."""
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    twin = copy.deepcopy(model, shared)
    return to_evit(twin, way=way)


def format_table(rows):
    """Rows → lines of text."""
    yield ' way   rate   GMACs  images/s  ratio  top-1, %  top-5, %    loss  same class as full, %'
    for row in map(Row.columns, rows):
        yield (f'{row["way"]:>5} {row["rate"]:5g} {row["gmacs"]:7.3f} {row["images_per_second"]:9.1f} '
               f'{row["ratio"]:6.3f} {row["top1"]:9.2f} {row["top5"]:9.2f} {row["loss"]:7.3f} {row["same"]:22.2f}'
               ).replace('nan', '  –')                  # speed that was not measured


def write_csv(path, rows):
    """Write the columns of the rows under a header line."""
    with atomic_write(path) as temporary, open(temporary, 'w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0].columns()))
        writer.writeheader()
        writer.writerows(map(Row.columns, rows))
