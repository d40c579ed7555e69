"""Accuracy against speed of one set of weights, at several keep rates and ways to treat the tokens not kept."""
import copy
import csv
import dataclasses
import itertools
import json
import math

import torch
import torch.distributed as dist

from measuring.benchmark import Protocol, Throughput, macs, measured_pass, stopwatch, time_in_turn
from runtime.distributed import all_reduce, broadcast_object, log, rank, world_size
from engine import count
from measuring.knn import finite_loss
from runtime.logger import Progress
from models_evit import WAYS, to_evit
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
        return {'way': self.way, 'rate': self.rate, 'gmacs': self.gmacs, 'images_per_second': self.speed.median,
                'ratio': self.ratio, 'top1': 100 * top1 / images, 'top5': 100 * top5 / images, 'loss': loss / images,
                'same': 100 * same / images, 'images': int(images)}


def way_of(model):
    """The way of an EViT."""
    return 'fuse' if model.fuse_token else 'merge' if model.merge_token else 'drop'


# --- Evaluation -----------------------------------------------------------------------------------------------------

class Evaluation:
    """One pass over the images for all rows, whose sums go to a file now and then.

    Args:
        model: an EViT on the device; it is not changed.
        rows: [Row].
        file: Path of the state, JSON. Rows that are complete in it are not evaluated again, the others continue.
        settings: dict of what the sums depend on, beside the weights and the number of processes.
        sharded: each process has its share of the images, as in `engine.evaluate`.
        neighbours: `knn.Neighbours` to classify by instead of the head, or None.
    Raises:
        InputError: the file has other settings.
    """

    def __init__(self, model, rows, file, settings, device, amp_dtype, sharded=False, neighbours=None):
        self.models = {row.way: with_way(model, way_of(model) if row.way == FULL else row.way).eval() for row in rows}
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
                counted = count(logits, labels, finite_loss(logits, labels))
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
    return to_evit(twin, model.base_keep_rate, model.drop_loc, uniform=model.uniform, **WAYS[way])


def draw_curve(model, loader, rates, ways, folder, settings, *, device, amp_dtype, input_size, batch_size,
               sharded=False, print_freq=50, neighbours=None, loader_train=None):
    """Print the table of a model's accuracy and speed at each keep rate in each way, and write it with a plot.

    Args:
        model: an EViT on the device.
        loader: of the validation images.
        rates, ways: keep rates, and names of WAYS.
        folder: Path for curve.csv, curve.png and the state curve.json; it exists.
        settings, device, amp_dtype, sharded, neighbours: as in `Evaluation`.
        input_size, batch_size: of the measurement of speed.
        loader_train: for the bank of the neighbours.
    """
    evaluation = Evaluation(model, plan_rows(rates, ways), folder / 'curve.json', settings, device, amp_dtype, sharded,
                            neighbours)
    if neighbours and not all(row.complete for row in evaluation.rows):
        neighbours.fill(evaluation.models, [(row.way, row.rate) for row in evaluation.rows], loader_train,
                        len(loader.dataset.classes), device, amp_dtype, print_freq)
    evaluation.run(loader, print_freq)
    log('Measuring the throughput of each row')
    evaluation.measure_speed(input_size, batch_size)
    rows, num_images = evaluation.rows, int(evaluation.rows[0].sums[SUMS.index('images')])
    protocol = dataclasses.replace(rows[0].speed.protocol, keep_rate=None)
    log('\n'.join([*format_table(rows), f'{num_images:,} images; {protocol}']))
    if rank() == 0:
        write_files(folder, rows, f'{settings["model"]}, {num_images:,} images')
        log(f'Wrote curve.csv and curve.png to {folder}')


# --- Output ---------------------------------------------------------------------------------------------------------

def format_table(rows):
    """Rows → lines of text."""
    yield ' way   rate   GMACs  images/s  ratio  top-1, %  top-5, %    loss  same class as full, %'
    for row in map(Row.columns, rows):
        yield (f'{row["way"]:>5} {row["rate"]:5g} {row["gmacs"]:7.3f} {row["images_per_second"]:9.1f} '
               f'{row["ratio"]:6.3f} {row["top1"]:9.2f} {row["top5"]:9.2f} {row["loss"]:7.3f} {row["same"]:22.2f}')


def write_files(folder, rows, title):
    """Write curve.csv and curve.png."""
    with atomic_write(folder / 'curve.csv') as path, open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0].columns()))
        writer.writeheader()
        writer.writerows(map(Row.columns, rows))
    with atomic_write(folder / 'curve.png') as path:
        plot(path, rows, title)


def plot(path, rows, title):
    """Draw top-1 accuracy against the ratio of throughput, a line for each way."""
    import matplotlib                                  # only needed here
    matplotlib.use('Agg')
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(7, 5), layout='constrained')
    points = [row.columns() for row in rows]
    axes.axhline(points[0]['top1'], color='grey', linewidth=0.8)
    for way, marker in zip(WAYS, 'ovs'):
        line = [points[0], *(point for point in points if point['way'] == way)]
        if len(line) > 1:
            axes.plot([point['ratio'] for point in line], [point['top1'] for point in line], marker + '-', label=way)
            for point in line[1:]:
                axes.annotate(f'{point["rate"]:g}', (point['ratio'], point['top1']), (4, 4), fontsize=8,
                              textcoords='offset points')
    axes.set(xlabel='images/s over those at keep rate 1', ylabel='top-1 accuracy, %')
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    if len(points) > 1:
        axes.legend(title='other tokens')
    figure.savefig(path, format='png', dpi=120)
    pyplot.close(figure)
