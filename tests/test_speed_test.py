"""speed_test.py: candidates, published accuracies, failures, table, CSV, Figure 4, command line."""
import csv
import itertools

import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image

import speed_test
from evit.plain import PlainEViT
from measuring import benchmark, plots
from measuring.benchmark import Protocol, Throughput, macs
from models_evit import EViT
from speed_test import (EVIT_SMALL, FIGURE_4, Candidate, add_ratios, build_candidate, compare, format_table, parse_args,
                        planned_rows, prepare, published_accuracy)

TINY = 'deit_tiny_patch16_shrink_base'

pytestmark = pytest.mark.usefixtures('one_thread')


def protocol(**changes):
    settings = dict(input_size=32, batch_size=2, device=torch.device('cpu'), amp_dtype=torch.float32, keep_rate=None,
                    windows=2, window_seconds=0.001)
    return Protocol(**settings | changes)


class StandIn(nn.Module):
    """A model that returns channel means of images, times `factor`, and runs out of memory after `passes` passes."""

    def __init__(self, factor=1., passes=10**6):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(factor))
        self.passes = passes

    def forward(self, x):
        self.passes -= 1
        if self.passes < 0:
            raise torch.OutOfMemoryError('out of\nmemory')
        return x.mean((2, 3)) * self.weight


@pytest.fixture
def stand_ins(monkeypatch):
    """A dict that the test fills: name of a timm model → arguments of the StandIn that replaces it."""
    arguments = {}
    monkeypatch.setattr(speed_test, 'build_candidate', lambda candidate, fuse: StandIn(**arguments[candidate.name]))
    return arguments


# --- Candidates -----------------------------------------------------------------------------------------------------

def test_built_candidates():
    model = build_candidate(Candidate(TINY, 0.4, 48), True)
    assert model.token_settings.base_keep_rate == 0.4 and model.token_settings.way == 'fuse' and not model.training
    assert model.patch_embed.img_size == (48, 48)
    default = build_candidate(Candidate(TINY, None, 48), False)
    assert default.token_settings.base_keep_rate == 0.7 and default.token_settings.way == 'drop'
    merging = build_candidate(Candidate(TINY, 0.4, 48, 'merge'), True)
    assert merging.blocks[3].token_settings.way == 'merge'
    build_candidate(Candidate('test_resnet', None, 48), True)                          # has no image size


def test_figure_4():
    """The models, input sizes and order are those of the paper. DeiT-S is last: ratios are relative to it."""
    assert parse_args([]).models is FIGURE_4 and all(timm.is_model(candidate.name) for candidate in FIGURE_4)
    rows = [(row.candidate.name, row.candidate.keep_rate, row.candidate.input_size)
            for row in planned_rows(FIGURE_4, protocol(input_size=None), reference=False)]
    assert rows == [
        (EVIT_SMALL, 0.8, 256), ('deit_small_patch16_272_shrink', None, 272),
        ('deit_small_patch16_288_shrink06', None, 288), ('deit_small_patch16_304_shrink05', None, 304),
        *((EVIT_SMALL, rate, 224) for rate in (0.5, 0.6, 0.7, 0.8, 0.9)),
        *((name, None, 224) for name in (
            'deit_base_patch16_224', 'swin_tiny_patch4_window7_224', 'swin_small_patch4_window7_224.ms_in1k',
            'tnt_s_patch16_224', 'twins_pcpvt_small', 'twins_svt_small', 'visformer_small', 'cait_xxs24_224',
            'coat_lite_small', 'convit_small')),
        ('dm_nfnet_f0', None, 256), ('efficientnet_b0', None, 224), ('tf_efficientnet_b1.aa_in1k', None, 240),
        ('tf_efficientnet_b2.aa_in1k', None, 260), ('pvt_v2_b1', None, 224), ('pvt_v2_b2', None, 224),
        ('deit_small_patch16_224', None, 224)]


@pytest.mark.parametrize('candidate, fuse_token, expected', [
    (Candidate(EVIT_SMALL, 0.7, 224), True, (79.5, 'EViT')),
    (Candidate(EVIT_SMALL, 0.7, 224), False, (79.4, 'EViT')),
    (Candidate(EVIT_SMALL, 0.5, 224), True, (78.5, 'EViT')),
    (Candidate(EVIT_SMALL, 0.5, 224, 'drop'), True, (78.4, 'EViT')),
    (Candidate(EVIT_SMALL, 0.5, 224, 'merge'), True, (None, None)),
    (Candidate(EVIT_SMALL, 0.75, 224), True, (None, None)),
    (Candidate(EVIT_SMALL, None, 224), True, (None, None)),
    (Candidate(EVIT_SMALL, 0.7, 256), True, (None, None)),
    (Candidate(TINY, 0.7, 224), True, (None, None)),
    (Candidate('deit_base_patch16_224', None, 224), True, (81.98, 'timm')),
    (Candidate('deit_base_patch16_224', None, 256), True, (None, None)),
    (Candidate('cait_xxs24_224', None, 224), False, (78.4, 'timm (distilled weights)')),
    (Candidate('dm_nfnet_f0', None, 192), True, (81.436, 'timm')),
    (Candidate('dm_nfnet_f0', None, 256), True, (83.468, 'timm')),
    (Candidate('dm_nfnet_f0', None, 224), True, (None, None)),
    (Candidate('swin_small_patch4_window7_224', None, 224), True, (None, None)),      # default: pretrained on 22k
    (Candidate('swin_small_patch4_window7_224.ms_in1k', None, 224), True, (83.228, 'timm')),
    (Candidate('tf_efficientnet_b1.ns_jft_in1k', None, 240), True, (None, None)),
], ids=str)
def test_published_accuracy(candidate, fuse_token, expected):
    assert published_accuracy(candidate, fuse_token) == expected


# --- Measurement ----------------------------------------------------------------------------------------------------

def test_rows_of_plain_evits():
    """A plain EViT is measured eagerly, once in our precision and once as the original code was measured."""
    candidates = [Candidate(TINY, 0.5), Candidate('deit_tiny_patch16_224'), Candidate(TINY, 0.5, way='merge')]

    def rows(settings):
        return [(row.label, row.protocol, row.plain) for row in planned_rows(candidates, settings, reference=True)]

    ours = protocol(amp_dtype=torch.bfloat16, compiled=True)
    assert rows(ours) == [
        (f'{TINY}@0.5', ours, False), ('deit_tiny_patch16_224', ours, False), (f'{TINY}@0.5-merge', ours, False),
        ('plain@0.5, bfloat16 autocast', protocol(amp_dtype=torch.bfloat16), True),
        ('plain@0.5, float32, gradients on', protocol(gradients=True), True),
        ('plain@0.5-merge, bfloat16 autocast', protocol(amp_dtype=torch.bfloat16), True),
        ('plain@0.5-merge, float32, gradients on', protocol(gradients=True), True)]
    assert rows(protocol())[3:5] == [('plain@0.5, float32', protocol(), True),
                                    ('plain@0.5, float32, gradients on', protocol(gradients=True), True)]
    assert rows(protocol(train=True))[3:4] == [('plain@0.5, float32', protocol(train=True), True)]


@pytest.mark.parametrize('plain', [False, True])
def test_measured_evit(plain, monkeypatch):
    """It is in eval mode and has the keep rate, token fusion and input size of the candidate."""
    models = []
    monkeypatch.setattr(speed_test, 'measured_pass', lambda model, *_: models.append(model) or (lambda: None))
    prepare(speed_test.PlannedRow(Candidate(TINY, 0.5, 32), 'label', protocol(), plain), True, {})
    model, = models
    assert type(model) is (PlainEViT if plain else EViT) and not any(module.training for module in model.modules())
    evit = model.model if plain else model
    assert evit.token_settings.base_keep_rate == 0.5 and evit.token_settings.way == 'fuse'
    assert evit.patch_embed.img_size == (32, 32)


def test_runtimes():
    """The same model in each; a runtime that cannot run it fails alone."""
    pytest.importorskip('onnxruntime')
    candidates, runtimes = [Candidate('test_vit', 0.5, 32)], ['torch', 'onnxruntime']
    rows = compare(candidates, protocol(windows=1), True, runtimes=runtimes)
    assert [row['model'] for row in rows] == [f'test_vit@0.5, {runtime}' for runtime in runtimes]
    assert all(row['speed'].median > 0 for row in rows) and rows[0]['gmacs'] == rows[1]['gmacs']
    rows = compare(candidates, protocol(windows=1, amp_dtype=torch.bfloat16), True, runtimes=runtimes)
    assert 'speed' in rows[0] and 'cannot be exported' in rows[1]['failure']
    planned = [*speed_test.planned_rows(candidates, protocol(), False, ['torch', 'compile', 'aoti'])]
    assert [(row.runtime, row.protocol.compiled) for row in planned] == [
        ('torch', False), ('compile', True), ('aoti', False)]


def test_comparison_with_plain_evits():
    rows = compare([Candidate(TINY, 0.5), Candidate('deit_tiny_patch16_224')], protocol(amp_dtype=torch.bfloat16),
                   fuse_token=True, reference=True)
    assert [row['model'] for row in rows] == [f'{TINY}@0.5', 'deit_tiny_patch16_224', 'plain@0.5, bfloat16 autocast',
                                              'plain@0.5, float32, gradients on']
    assert 0.9 < rows[0]['gmacs'] / rows[2]['gmacs'] < 1               # the plain one computes all of the last block
    assert all(row['speed'].protocol == row['protocol'] and row['ratio'] > 0 for row in rows)
    assert all(0 < row['share'] < 1 for row in rows[:3]) and 'share' not in rows[3]
    assert list(format_table(rows))[4].split()[-2] == '–'


def test_images_of_compared_models(stand_ins, monkeypatch):
    """Models with the same input size and number of images share a batch."""
    batch_sizes, batches = {'test_vit': 4, 'test_vit2': 4, 'test_vit3': 2}, []
    stand_ins |= {name: dict(factor=float(number)) for name, number in batch_sizes.items()}
    monkeypatch.setattr(speed_test, 'largest_batch', lambda model, settings: int(model.weight))
    monkeypatch.setattr(speed_test, 'measured_pass', lambda model, images, settings: (
        batches.append(images) or benchmark.measured_pass(model, images, settings)))
    candidates = [*(Candidate(name, None, 32) for name in batch_sizes), Candidate('test_vit', None, 64)]
    rows = compare(candidates, protocol(batch_size=None, windows=1), fuse_token=True)
    assert all('speed' in row for row in rows)
    assert [tuple(images.shape) for images in batches] == [(4, 3, 32, 32)] * 2 + [(2, 3, 32, 32), (4, 3, 64, 64)]
    assert batches[0] is batches[1] and torch.equal(batches[0], protocol(batch_size=4).images())


def test_accuracy_in_a_row(stand_ins):
    stand_ins['deit_base_patch16_224'] = {}
    candidates = [Candidate('deit_base_patch16_224', None, size) for size in (224, 64)]
    rows = compare(candidates, protocol(windows=1), fuse_token=True)
    assert [(row['input_size'], row['protocol'].input_size, row['top1'], row['source']) for row in rows] \
        == [(224, 224, 81.98, 'timm'), (64, 64, None, None)]
    assert [line.split()[-1] for line in format_table(rows)] == ['top-1', '82.0', '–']


def test_ratios():
    def row(*rates, **changes):
        return {'speed': Throughput(rates, protocol(**changes)), 'gmacs': 3., 'protocol': protocol(**changes)}

    rows = [row(1., 4.), {'failure': 'RuntimeError'}, row(8., 8., amp_dtype=torch.bfloat16), row(2., 2., train=True)]
    add_ratios(rows, Throughput((10., 10.), protocol()), product_gmacs=5.)
    assert [row.get('ratio') for row in rows] == [1.25, None, 4., 1.]
    assert [row.get('share') for row in rows] == pytest.approx([0.25 * 3 / 5, None, None, 0.2 * 3 * 3 / 5])
    rows = [row(1., 4.), {'failure': 'RuntimeError'}]
    add_ratios(rows, Throughput((10., 10.), protocol()), product_gmacs=5.)
    assert 'ratio' not in rows[0] and rows[0]['share'] == pytest.approx(0.15)


def test_failures_in_a_comparison(stand_ins):
    """Models fail before the timing, or in the second window at their sixth pass. The others are still measured."""
    stand_ins |= {'test_vit': dict(factor=torch.nan), 'test_vit2': dict(passes=0), 'test_vit3': {},
                  'test_efficientnet': dict(passes=5), 'test_resnet': {}}
    slow = protocol(window_seconds=1e-9)                                               # one pass fills a window
    rows = compare([Candidate(name) for name in stand_ins], slow, fuse_token=True)
    assert [row.get('failure') for row in rows] == [
        'ValueError: the output is not finite', 'OutOfMemoryError: out of memory', None,
        'OutOfMemoryError: out of memory', None]
    assert ['speed' in row for row in rows] == [False, False, True, False, True]
    assert 'gmacs' in rows[3] and len(rows[2]['speed'].rates) == 2                     # row 3 failed during the timing
    assert rows[2]['ratio'] > 0 and rows[4]['ratio'] == 1.
    lines = list(format_table(rows))
    assert 'failed: ValueError' in lines[1] and 'failed: OutOfMemoryError' in lines[4] and '1.000' in lines[5]


def test_failure_of_the_last_model(stand_ins):
    stand_ins |= {'test_resnet': {}, 'test_vit': dict(factor=torch.nan)}
    rows = compare([Candidate(name) for name in stand_ins], protocol(), fuse_token=True)
    assert 'ratio' not in rows[0] and rows[0]['speed'].median > 0
    assert list(format_table(rows))[1].split()[5] == '–' and len(list(format_table(rows))) == 3


# --- Plot -----------------------------------------------------------------------------------------------------------

def test_plotted_points(monkeypatch, tmp_path):
    """All models with a speed and an accuracy are plotted, except plain EViTs."""
    def row(model, rate, top1):
        return {'model': model, 'top1': top1, 'speed': Throughput((rate,), protocol())}

    drawn = []
    monkeypatch.setattr('measuring.plots.label_points', lambda axes, labels: drawn.append((axes, labels)))
    rows = [row(f'{EVIT_SMALL}@0.8', 20., 79.8), row(f'{EVIT_SMALL}@0.7', 30., 79.5), row('resnet18', 50., None),
            row('deit_base_patch16_224', 10., 81.98), row('plain@0.7, float32', 29., 79.5),
            {'model': 'deit_tiny_patch16_224', 'top1': 72.19, 'failure': 'RuntimeError'}]
    speed_test.plot_throughput(tmp_path / 'a.png', rows, 'title')
    (axes, labels), = drawn
    assert labels == [('0.7', 30., 79.5), ('0.8', 20., 79.8), ('deit_base', 10., 81.98)]
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[30., 79.5], [20., 79.8]], [[10., 81.98]]]
    assert 'timm' in axes.get_ylabel() and axes.get_title() == 'title'
    with Image.open(tmp_path / 'a.png') as picture:
        assert picture.format == 'PNG' and min(picture.size) >= 600


def test_labels_of_crowded_points():
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(9, 7))
    points = [('convit_small', 7.1, 81.3), ('swin_tiny', 7.8, 81.3), ('coat_lite_small', 8.2, 81.9),
              ('pvt_v2_b2', 8.5, 82.), ('tnt_s', 9., 81.5)]
    axes.plot([x for _, x, _ in points], [y for _, _, y in points], 's')
    axes.set(xscale='log', xlim=(3, 30), ylim=(77, 84))
    plots.label_points(axes, points)
    assert [(text.get_text(), *text.xy) for text in axes.texts] == points
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert not any(box.contains(*axes.transData.transform(point)) for box in boxes for _, *point in points)
    pyplot.close(figure)


# --- Command line ---------------------------------------------------------------------------------------------------

def test_command_line(tmp_path, capsys):
    file, picture = tmp_path / 'speed.csv', tmp_path / 'speed.png'
    status = speed_test.main([
        '--models', f'{TINY}@0.5', 'test_efficientnet', 'deit_tiny_patch16_224', '--input-size', '64', '--batch-size',
        '2', '--device', 'cpu', '--no-fuse-token', '--windows', '3', '--window-seconds', '0.01', '--csv', str(file),
        '--plot', str(picture)])
    header, titles, *lines = capsys.readouterr().out.splitlines()
    assert status == 0 and 'batch 2 of 64×64, float32, eager' in header and 'dropped' in header
    assert [line.split()[0] for line in lines] == [f'{TINY}@0.5', 'test_efficientnet', 'deit_tiny_patch16_224']
    for title in ['images/s', 'ratio', 'GMACs', 'params', 'memory']:
        assert title in titles
    with open(file, newline='') as opened:
        rows = list(csv.DictReader(opened))
    evit = timm.create_model(TINY, img_size=64, base_keep_rate=0.5)
    assert float(rows[0]['gmacs']) == pytest.approx(macs(evit, 64))
    assert float(rows[0]['mparams']) == pytest.approx(sum(p.numel() for p in evit.parameters()) / 1e6)
    assert float(rows[2]['ratio']) == 1. and rows[0]['memory_mib'] == '' and rows[0]['protocol'] in header
    assert all(float(row['min']) <= float(row['median']) <= float(row['max']) for row in rows)
    with Image.open(picture) as opened:
        assert opened.format == 'PNG'


def test_head_that_starts_at_zero():
    """Each runtime shows whether it works."""
    model = speed_test.build_candidate(speed_test.Candidate('resmlp_12_224', input_size=32), fuse_token=False)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 32, 32)).any()


@pytest.mark.parametrize('factor, status', [(1., 0), (torch.nan, 1)])
def test_exit_status(factor, status, stand_ins, tmp_path):
    stand_ins |= {'test_resnet': {}, 'test_vit': dict(factor=factor)}
    assert speed_test.main(['--models', *stand_ins, '--input-size', '32', '--device', 'cpu', '--windows', '1',
                            '--window-seconds', '0.001', '--csv', str(tmp_path / 'a.csv')]) == status
    with open(tmp_path / 'a.csv', newline='') as file:
        assert [bool(row['failure']) for row in csv.DictReader(file)] == [False, bool(status)]


@pytest.mark.parametrize('arguments, message', [
    (['--models', 'no_such_model'], 'no_such_model'),
    (['--models', 'deit_tiny_patch16_224.no_such_tag'], 'no_such_tag'),
    (['--models', f'{TINY}@0'], '@0: RATE must be in (0, 1]'),
    (['--models', f'{TINY}@1.5'], '@1.5: RATE must be in (0, 1]'),
    (['--models', f'{TINY}@nan'], '@nan: RATE must be in (0, 1]'),
    (['--models', f'{TINY}@'], '@: RATE must be in (0, 1]'),
    (['--models', 'test_resnet@0.5'], 'no keep rate'),
    (['--models', TINY, '--input-size', '100'], 'multiple of the patch size'),
    (['--models', TINY, 'deit_tiny_patch16_224', '--batch-size', '0'], '--batch-size'),
    (['--models', TINY, '--csv', 'no/such/folder/speed.csv'], 'no/such/folder'),
    (['--models', f'{TINY}:100'], 'multiple of the patch size'),
    (['--models', f'{TINY}:0'], ':0: RATE must be in (0, 1], WAY one of drop, fuse, merge, SIZE a number'),
    (['--models', f'{TINY}@0.5:x'], '@0.5:x: RATE must be in (0, 1]'),
    (['--models', f'{TINY}@0.5-mix'], '@0.5-mix: RATE must be in (0, 1]'),
    (['--models', TINY, '--device', 'tpu'], 'must be auto, cpu or cuda, not tpu'),
    (['--models', TINY, '--device', 'cpu', '--batch-size', 'auto'], 'on a CPU, give a number'),
    (['--models', TINY, '--plot', 'no/such/folder/speed.png'], 'no/such/folder'),
    (['--models', TINY, '--data-path', '.'], '--data-path'),
    (['--models', TINY, '--runtimes', 'torch', '--train'], 'compares inference on a CPU'),
    (['--models', TINY, '--runtimes', 'tensorrt'], 'tensorrt'),
])
def test_wrong_command_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        speed_test.main(arguments)
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.out == ''
    line, = captured.err.splitlines()
    assert message in line


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a CUDA device')
def test_device_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_args(['--device', 'cuda'])
    assert stopped.value.code == 2 and 'no CUDA device is available' in capsys.readouterr().err
    assert parse_args([]).device == torch.device('cpu')


def test_candidates_on_the_command_line():
    args = parse_args(['--models', f'{TINY}@1', 'resnet18', '--input-size', '224'])
    assert args.models == [Candidate(TINY, 1.), Candidate('resnet18')] and args.fuse_token
    args = parse_args(['--models', f'{TINY}@0.8:256', 'resnet18:160', '--batch-size', '7'])
    assert args.models == [Candidate(TINY, 0.8, 256), Candidate('resnet18', None, 160)] and args.batch_size == 7
    assert parse_args(['--models', f'{TINY}@0.8-merge:256']).models == [Candidate(TINY, 0.8, 256, 'merge')]
    assert parse_args(['--models', f'{TINY}@8e-1']).models == [Candidate(TINY, 0.8)]


def test_input_sizes_without_patches():
    """Models with a convolutional stem or overlapping patches accept any input size."""
    assert parse_args(['--models', 'resnet18', 'pvt_v2_b0', '--input-size', '250'])


def test_names_for_older_code():
    assert (speed_test.throughput, speed_test.macs) == (benchmark.throughput, benchmark.macs)
