"""Figure 4 of the paper: throughput against accuracy, from the rows of speed_test.py."""
import textwrap


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


def plot(path, rows, title):
    """Draw images/s against published top-1 accuracy, for the rows that have both, as a PNG."""
    import matplotlib                                  # only needed here
    matplotlib.use('Agg')
    from matplotlib import pyplot
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
