"""Plots of accuracy against speed."""
import itertools
import textwrap

from evit.reorganization import WAYS


def headless_pyplot():
    """matplotlib.pyplot, which needs no screen then."""
    import matplotlib  # only needed here
    matplotlib.use('Agg')
    from matplotlib import pyplot
    return pyplot


def label_points(axes, labels):
    """Write each (text, x, y) beside its point, on the side where it overlaps least; above is tried first."""
    from matplotlib.transforms import Bbox
    axes.figure.canvas.draw()                          # computes the positions
    taken = [Bbox([pixels - 5, pixels + 5]) for pixels in axes.transData.transform([point for _, *point in labels])]
    if axes.get_legend():
        taken.append(axes.get_legend().get_window_extent())
    for text, *point in labels:
        sides = [axes.annotate(text, point, (6 * x, 6 * y), textcoords='offset points', fontsize=8,
                               ha=('center', 'left', 'right')[x], va=('center', 'bottom', 'top')[y])
                 for x, y in ((0, 1), (1, 0), (-1, 0), (0, -1))]
        boxes = [side.get_window_extent() for side in sides]
        best = min(range(len(sides)), key=lambda i: sum(map(boxes[i].overlaps, taken)))
        taken.append(boxes[best])
        for side in sides[:best] + sides[best + 1:]:
            side.remove()


def plot_throughput(path, rows, title):
    """Figure 4 of the paper, as a PNG: images/s against published accuracy, for the rows of speed_test.py with both."""
    pyplot = headless_pyplot()
    figure, axes = pyplot.subplots(figsize=(9, 7), layout='constrained')
    points = sorted((row['speed'].median, row['top1'], row['model']) for row in rows
                    if 'speed' in row and row['top1'] and not row['model'].startswith('plain'))
    evits = sorted((point for point in points if '@' in point[2]), key=lambda point: point[2])     # by keep rate
    others = [point for point in points if point not in evits]
    for group, line, name in ((evits, 'o-', 'EViT-DeiT-S at its keep rates'), (others, 's', 'other models')):
        if group:
            axes.plot([x for x, _, _ in group], [y for _, y, _ in group], line, label=name)
    axes.set(xscale='log', xlabel='images/s',
             ylabel='ImageNet-1k top-1, %, published by the authors (EViT) or timm (others)')
    axes.xaxis.set_major_formatter('{x:g}')
    axes.xaxis.set_minor_formatter('{x:g}')
    axes.margins(x=0.15)
    axes.set_title(textwrap.fill(title, 110), fontsize=8)
    axes.grid(alpha=0.3)
    if points:
        axes.legend()
    label_points(axes, [(model.partition('@')[2], x, y) for x, y, model in evits]
                 + [(model.partition('_patch')[0].partition('.')[0], x, y) for x, y, model in others])
    figure.savefig(path, format='png', dpi=120)
    pyplot.close(figure)


def plot_curve(path, points, title):
    """Draw top-1 accuracy against GMACs and against the ratio of throughput, a line for each way, as a PNG.

    Args:
        points: the columns of each `Row`, the first at rate 1.
    """
    pyplot = headless_pyplot()
    figure, panels = pyplot.subplots(1, 2, sharey=True, figsize=(11, 5), layout='constrained')
    labels = {'gmacs': 'GMACs per image', 'ratio': 'images/s over those at keep rate 1'}
    for axes, (column, label) in zip(panels, labels.items()):
        axes.axhline(points[0]['top1'], color='grey', linewidth=0.8)
        for way, marker in zip(WAYS, itertools.cycle('ovsD^')):
            line = [points[0], *(point for point in points if point['way'] == way)]
            if len(line) > 1:
                axes.plot([point[column] for point in line], [point['top1'] for point in line], marker + '-', label=way)
                for point in line[1:]:
                    axes.annotate(f'{point["rate"]:g}', (point[column], point['top1']), (4, 4), fontsize=8,
                                  textcoords='offset points')
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    panels[0].invert_xaxis()                           # faster to the right, as in the other
    panels[0].set_ylabel('top-1 accuracy, %')
    figure.suptitle(title, fontsize=9)
    if len(points) > 1:
        panels[0].legend(title='other tokens')
    figure.savefig(path, format='png', dpi=100)
    pyplot.close(figure)
