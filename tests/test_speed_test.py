"""The measuring: MACs against the paper, windows in turn, and a model left as it was found."""
import csv
import functools
import itertools
import time
import types

import pytest
import timm
import torch
import torch.nn as nn
import torchprofile
from PIL import Image
from timm.utils import ModelEmaV3

import folder2lmdb
import speed_test
from speed_test import (Candidate, LoadingProtocol, Protocol, Throughput, check_real, compare, macs, measured_pass,
                        paired_throughput, peak_memory, stopwatch, throughput)
from utils import InputError, check_compiler

TINY = 'deit_tiny_patch16_shrink_base'
QUICK = dict(batch_size=2, window_seconds=0.001)


pytestmark = pytest.mark.usefixtures('one_thread')


def protocol(**changes):
    settings = dict(input_size=32, batch_size=2, device=torch.device('cpu'), amp_dtype=torch.float32, keep_rate=None,
                    windows=5, window_seconds=0.001)
    return Protocol(**settings | changes)


def tiny(**kwargs):
    return timm.create_model(TINY, img_size=32, **kwargs)


class Recorder(nn.Module):
    """Writes into `calls` what it is given at each pass; its logits are the images' means."""

    def __init__(self, calls=None, name='model', seconds=0.):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.calls, self.name, self.seconds = [] if calls is None else calls, name, seconds

    def forward(self, x, **kwargs):
        time.sleep(self.seconds)
        self.calls.append(types.SimpleNamespace(
            name=self.name, shape=tuple(x.shape), kwargs=kwargs, training=self.training,
            inference=torch.is_inference_mode_enabled(),
            autocast=torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else None))
        return x.mean((2, 3)) * self.weight


@pytest.mark.parametrize('fuse_token, gmacs', [
    (True, {1.0: 4.604, 0.9: 4.026, 0.8: 3.480, 0.7: 3.032, 0.6: 2.638, 0.5: 2.311}),
    (False, {0.9: 3.992, 0.8: 3.447, 0.7: 3.000, 0.6: 2.611, 0.5: 2.284}),
], ids=['fused', 'dropped'])
def test_macs_agree_with_the_paper(fuse_token, gmacs):
    model = timm.create_model('deit_small_patch16_shrink_base', base_keep_rate=0.7, fuse_token=fuse_token)
    assert {rate: macs(model, keep_rate=rate) for rate in gmacs if rate != 0.7} | {0.7: macs(model)} \
        == pytest.approx(gmacs, rel=0.005)


def test_macs_agree_with_torchprofile():
    model = timm.create_model('deit_small_patch16_shrink_base', base_keep_rate=0.7, fuse_token=True).eval()
    counted = torchprofile.profile_macs(model, torch.zeros(1, 3, 224, 224)) / 1e9
    assert macs(model) == pytest.approx(counted, rel=0.005)


def test_macs_of_timm_models():
    assert macs(timm.create_model('resnet18'), 64) == pytest.approx(1.81 * (64 / 224)**2, rel=0.02)
    # One whose class token goes into a module as the parameter that it is, and the counting of whose attention
    # does not hang on the kernel that timm chooses.
    cait = timm.create_model('cait_xxs24_224', img_size=32, depth=2)
    assert macs(cait, 32) > 0
    deit = timm.create_model('deit_tiny_patch16_224', img_size=32, depth=2)
    fused = macs(deit, 32)
    for block in deit.blocks:
        block.attn.fused_attn = False
    assert macs(deit, 32) == fused


def test_macs_leave_the_model_unharmed():
    model = tiny(drop_path_rate=0.1)
    model.blocks[2].eval()
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    macs(model, 32)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    model(torch.randn(2, 3, 32, 32)).sum().backward()


def test_throughput_is_images_per_second():
    result = throughput(Recorder(seconds=0.01), 32, batch_size=3, window_seconds=0.05)
    assert 100 < result.median <= 300                       # at most 3 images in 0.01 s
    assert len(result.rates) == 5 and result.min <= result.median <= result.max


def test_every_window_lasts(monkeypatch):
    """On a clock that each pass moves on by a second, a window of 10.5 s is 11 passes or a burst more."""
    clock, model, ends = [0.], Recorder(), []
    model.register_forward_hook(lambda *_: clock.__setitem__(0, clock[0] + 1.))
    monkeypatch.setattr(speed_test.time, 'perf_counter', lambda: ends.append(clock[0]) or clock[0])
    result = throughput(model, 8, batch_size=4, window_seconds=10.5)
    assert result.rates == (4.,) * 5
    assert ends[-1] >= 2 + 6 * 10.5                         # the check's two passes, the warm-up, five windows


def test_clock_is_read_seldom_in_a_window(monkeypatch):
    clock, model, readings = [0.], Recorder(), []
    model.register_forward_hook(lambda *_: clock.__setitem__(0, clock[0] + 0.01))
    monkeypatch.setattr(speed_test.time, 'perf_counter', lambda: readings.append(clock[0]) or clock[0])
    settings = protocol(window_seconds=10.)
    window = stopwatch(measured_pass(model, settings), settings)
    readings.clear()
    window()
    assert len(readings) <= 12                              # of a thousand passes


class PretendCuda(Protocol):
    """A protocol for a GPU, whose images are on the CPU."""

    def images(self, seed=0):
        return protocol().images(seed)


def test_clock_is_read_synchronised(monkeypatch):
    events = []
    clock = time.perf_counter
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda device: events.append('synchronised'))
    monkeypatch.setattr(speed_test.time, 'perf_counter', lambda: events.append('clock') or clock())
    settings = PretendCuda(**vars(protocol(device=torch.device('cuda'))))
    stopwatch(measured_pass(Recorder(), settings), settings)()
    before = [event for event, following in zip(events, events[1:]) if following == 'clock']
    assert len(before) >= 4 and set(before) == {'synchronised'}


def test_peak_memory_counts_this_model_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'memory_allocated', lambda device: 100 * 2**20)
    monkeypatch.setattr(torch.cuda, 'reset_peak_memory_stats', lambda device: None)
    monkeypatch.setattr(torch.cuda, 'max_memory_allocated', lambda device: 130 * 2**20)
    model = nn.Identity()
    model.register_parameter('weight', nn.Parameter(torch.ones(2**20)))
    model.register_buffer('buffer', torch.ones(2**18))
    assert peak_memory(model, PretendCuda(**vars(protocol(device=torch.device('cuda'))))) == 30 + 4 + 1


def test_conditions_of_a_measured_pass():
    model = Recorder().train()
    throughput(model, 16, keep_rate=0.5, amp_dtype=torch.bfloat16, **QUICK)
    assert model.training
    for call in model.calls:
        assert call.inference and not call.training and call.autocast == torch.bfloat16
        assert call.shape == (2, 3, 16, 16) and call.kwargs == {'keep_rate': 0.5}
    model.calls.clear()
    throughput(model, 16, **QUICK)
    assert all(call.autocast is None and call.kwargs == {} for call in model.calls)


def test_modes_and_random_state_are_restored():
    model = tiny().train()
    model.blocks[2].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    throughput(model, 32, **QUICK)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)

    broken = Recorder()
    broken.register_forward_hook(lambda *_: torch.full((2, 3), torch.nan))
    with pytest.raises(ValueError, match='not finite'):
        throughput(broken, 32, **QUICK)
    assert broken.training


def test_windows_are_taken_in_turn():
    calls = []
    slow, fast = paired_throughput([Recorder(calls, 'A', 0.004), Recorder(calls, 'B', 0.001)], 8, batch_size=2,
                                   window_seconds=0.02)
    turns = [call.name for call, before in zip(calls[1:], calls) if call.name != before.name]
    assert turns == ['B'] + ['A', 'B'] * 5                  # A's check and warm-up, B's, then the windows
    assert fast.ratio_to(slow) > 1.5


def test_ratio_is_of_paired_windows():
    """A machine that slows down tenfold for some of the windows slows both models."""
    ours, theirs = (Throughput(rates, protocol()) for rates in [(4., 4., .4, 2., .2), (2., 2., .2, 1., .1)])
    assert ours.ratio_to(theirs) == pytest.approx(2.)
    assert Throughput((1., 8., 3.), protocol()).ratio_to(Throughput((1., 2., 3.), protocol())) == 1.   # medians: 1.5


def test_printed_line_says_what_was_measured():
    settings = protocol(batch_size=7, amp_dtype=torch.bfloat16, keep_rate=0.6, window_seconds=0.25)
    line = str(Throughput((10., 30., 20.), settings))
    assert line.startswith('20.0 [10.0–30.0] images/s; ') and '\n' not in line and line.isprintable()
    for word in ['batch 7', '32×32', 'bfloat16 autocast', 'keep rate 0.6', 'cpu', f'torch {torch.__version__}',
                 '5 windows', '0.25 s', 'inference', 'eval', 'warm-up', 'synchronised', 'median']:
        assert word in line
    assert 'autocast' not in str(protocol()) and 'keep rate' not in str(protocol())


@pytest.mark.parametrize('output, message', [
    (lambda x: torch.ones(len(x), 10), 'depend'),
    (lambda x: x.mean((2, 3)) * torch.inf, 'finite'),
    (lambda x: x.mean((2, 3)).index_fill(1, torch.tensor([1]), torch.nan), 'finite'),
])
def test_check_real_refuses(output, message):
    model = nn.Identity()
    model.forward = output
    with pytest.raises(ValueError, match=message):
        check_real(model, protocol())


def test_check_real_accepts_what_attends():
    model = tiny().train()
    check_real(model, protocol(amp_dtype=torch.bfloat16))
    assert model.training


def test_no_peak_memory_on_the_cpu():
    assert peak_memory(tiny(), protocol()) is None


@pytest.mark.gpu
@pytest.mark.parametrize('train', [False, True])
def test_compiled_on_cuda(train):
    """As a CUDA graph; and the memory that it takes is counted."""
    model = tiny(depth=4, drop_loc=(1, 2)).cuda()
    settings = protocol(device=torch.device('cuda'), amp_dtype=torch.bfloat16, compiled=True, train=train)
    assert peak_memory(model, settings) > 5
    result = throughput(model, 32, amp_dtype=torch.bfloat16, compiled=True, train=train, **QUICK)
    assert result.median > 0


@pytest.mark.gpu
def test_on_cuda():
    model = tiny().cuda()
    result = throughput(model, 32, amp_dtype=torch.bfloat16, **QUICK)
    assert result.median > 0 and torch.cuda.get_device_name() in str(result)
    assert macs(model, 32) == pytest.approx(macs(tiny(), 32))
    weights = sum(p.nbytes for p in model.parameters()) / 2**20
    alone = peak_memory(model, result.protocol)
    other = torch.empty(2**26, device='cuda')
    assert weights < alone < 3 * weights
    assert peak_memory(model, result.protocol) == pytest.approx(alone, rel=0.05)
    del other


def test_compare_goes_on_after_a_failure(monkeypatch):
    def build(candidate, *args):
        name = candidate.name
        if name == 'refused':
            raise RuntimeError('out of\nmemory')
        model = Recorder()
        if name == 'broken':
            model.register_forward_hook(lambda _, args, out: out * torch.nan)
        return model

    monkeypatch.setattr(speed_test, 'build_model', build)
    rows = compare([Candidate(name) for name in ['broken', 'one', 'refused', 'two']], protocol(), fuse_token=True)
    assert (rows[0]['model'], rows[0]['failure']) == ('broken', 'ValueError: the output is not finite')
    assert (rows[2]['model'], rows[2]['failure']) == ('refused', 'RuntimeError: out of memory')
    assert 'speed' not in rows[0] and 'speed' not in rows[2]
    assert rows[1]['speed'].median > 0 and rows[1]['ratio'] > 0 and rows[3]['ratio'] == 1.
    lines = list(speed_test.format_table(rows))
    assert 'failed: ValueError' in lines[1] and 'failed: RuntimeError' in lines[3] and '1.000' in lines[4]

    calls = []

    def fails_late(watch, passes=iter(range(100))):
        if next(passes) >= 3:
            raise torch.OutOfMemoryError('late')
        return 1.

    with monkeypatch.context() as patch:
        patch.setattr(speed_test, 'stopwatch', lambda run, settings: functools.partial(
            fails_late if calls.append(1) or len(calls) == 2 else lambda _: 2., None))       # after the matrix product
        late = compare([Candidate('one'), Candidate('two')], protocol(), fuse_token=True)
    assert late[0]['failure'] == 'OutOfMemoryError: late' and 'speed' not in late[0]
    assert late[1]['speed'].rates == 5 * (2.,) and late[1]['ratio'] == 1.

    rows = compare([Candidate('one'), Candidate('broken')], protocol(), fuse_token=True)
    assert 'ratio' not in rows[0] and rows[0]['speed'].median > 0
    assert len(list(speed_test.format_table(rows))) == 3


def test_models_are_built_as_asked():
    model = speed_test.build_model(Candidate(TINY, 0.4, 48), True)
    assert model.base_keep_rate == 0.4 and model.blocks[3].fuse_token and not model.training
    assert model.patch_embed.img_size == (48, 48)
    plain = speed_test.build_model(Candidate(TINY, None, 48), False)
    assert plain.base_keep_rate == 0.7 and not plain.blocks[3].fuse_token
    speed_test.build_model(Candidate('resnet18', None, 48), True)


def test_reference_is_measured_as_the_original_was(monkeypatch):
    seen = []
    monkeypatch.setattr(speed_test, 'measured_pass', lambda model, settings: seen.append((model, settings)))
    monkeypatch.setattr(speed_test, 'stopwatch', lambda run, settings: lambda: 1.)
    ours = protocol(amp_dtype=torch.bfloat16, compiled=True)
    candidates = [Candidate(TINY, 0.5), Candidate('deit_tiny_patch16_224')]
    rows = compare(candidates, ours, fuse_token=True, reference=True)
    assert [row['model'] for row in rows] == [f'{TINY}@0.5', 'deit_tiny_patch16_224', 'plain@0.5, bfloat16 autocast',
                                              'plain@0.5, float32, gradients on']
    assert [type(model).__name__ for model, _ in seen] == ['EViT', 'VisionTransformer', 'PlainEViT', 'PlainEViT']
    assert all(not module.training for model, _ in seen for module in model.modules())
    assert seen[2][0].model.base_keep_rate == 0.5 and seen[2][0].model.blocks[3].fuse_token
    assert [settings for _, settings in seen] == [row['protocol'] for row in rows] == [
        ours, ours, protocol(amp_dtype=torch.bfloat16), protocol(gradients=True)]
    assert rows[2]['gmacs'] == pytest.approx(rows[0]['gmacs'], rel=0.02)
    assert 'with gradients' in str(rows[3]['protocol']) and 'compiled' in str(ours) and 'eager' in str(protocol())
    assert [row['share'] / row['gmacs'] for row in rows[:3]] == pytest.approx(3 * [1e9 / 2048 ** 3])
    assert 'share' not in rows[3]                                              # of another precision
    assert list(speed_test.format_table(rows))[4].split()[-2] == '–'
    for settings, labels in ((protocol(), ['plain@0.5, float32', 'plain@0.5, float32, gradients on']),
                             (protocol(train=True), ['plain@0.5, float32'])):
        rows = compare(candidates[:1], settings, fuse_token=True, reference=True)
        assert [row['model'] for row in rows[1:]] == labels



@pytest.mark.parametrize('gradients', [False, True])
def test_gradients_are_recorded_where_asked(gradients):
    model = tiny(num_classes=3).eval()
    logits = speed_test.forward(model, torch.zeros(1, 3, 32, 32), protocol(gradients=gradients))
    assert logits.requires_grad == gradients and logits.is_inference() != gradients


def test_compiled_models_are_measured():
    model = tiny(depth=4, drop_loc=(1, 2), num_classes=3)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, 'compile', functools.partial(torch.compile, backend=backend))
        result = throughput(model, 32, compiled=True, **QUICK)
    assert len(graphs) == 1 and result.median > 0 and 'compiled' in str(result)


def test_command_line(tmp_path, capsys):
    file = tmp_path / 'speed.csv'
    speed_test.main(['--models', f'{TINY}@0.5', 'test_efficientnet', 'deit_tiny_patch16_224', '--input-size', '64',
                     '--batch-size', '2', '--device', 'cpu', '--no-fuse-token', '--window-seconds', '0.01',
                     '--csv', str(file)])
    header, titles, *lines = capsys.readouterr().out.splitlines()
    assert 'batch 2 of 64×64, float32, eager' in header and 'dropped' in header
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


def test_training_steps_train():
    """A whole step: the weights move, and their average moves after them by 1 − decay of the way."""
    model, settings = tiny(num_classes=3).eval(), protocol(train=True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    step = measured_pass(model, settings)
    assert model.training and 'whole training steps' in str(settings)
    first = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    step()
    ema = next(cell.cell_contents for cell in step.__closure__ if isinstance(cell.cell_contents, ModelEmaV3))
    for name, parameter in model.named_parameters():
        assert parameter.grad is None and not torch.equal(parameter, first[name]) and not torch.equal(first[name],
                                                                                                      before[name])
        torch.testing.assert_close(ema.module.get_parameter(name) - before[name],
                                   0.00004 * (first[name] + parameter - 2 * before[name]), rtol=0.5, atol=1e-8)


def test_training_and_compiled_training_are_measured(monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend=backend))
    for compiled in (False, True):
        result = throughput(tiny(depth=4, drop_loc=(1, 2)), 32, train=True, compiled=compiled, **QUICK)
        assert result.median > 0 and len(graphs) == compiled


def test_channels_last_changes_the_layout_alone():
    settings = protocol(channels_last=True)
    assert settings.images().is_contiguous(memory_format=torch.channels_last) and 'channels last' in str(settings)
    assert torch.equal(settings.images(), protocol().images()) and protocol().images().is_contiguous()


@pytest.mark.parametrize('train', [False, True])
def test_without_a_compiler_nothing_is_compiled(train, monkeypatch):
    monkeypatch.setenv('CXX', 'no_such_compiler -m64')
    with pytest.raises(InputError, match='C.. compiler'):
        measured_pass(tiny(), protocol(compiled=True, train=train))
    monkeypatch.setenv('CXX', 'env g++')
    check_compiler(torch.device('cpu'))


@pytest.mark.parametrize('failures', [0, 1])
def test_exit_status_tells_of_a_failure(failures, monkeypatch, capsys):
    row = {'model': 'a', 'input_size': 32, 'top1': None, 'failure': 'RuntimeError: out of memory'}
    monkeypatch.setattr(speed_test, 'compare', lambda *_: failures * [row] or [{'model': 'b', 'input_size': 32}])
    monkeypatch.setattr(speed_test, 'format_table', lambda rows: [])
    assert speed_test.main(['--device', 'cpu']) == failures


def test_checking_with_gradients_keeps_no_graph(monkeypatch):
    outputs = []

    def forward_with_graph(model, images, settings):
        outputs.append(model(images))
        return outputs[-1]

    class Kept(Exception):
        pass

    def equal(first, second):
        assert first.grad_fn is None and second.grad_fn is None
        raise Kept

    monkeypatch.setattr(speed_test, 'forward', forward_with_graph)
    monkeypatch.setattr(torch, 'equal', equal)
    with pytest.raises(Kept):
        check_real(tiny(), protocol(gradients=True))
    assert outputs[0].grad_fn is not None


def test_figure_4(monkeypatch, tmp_path, capsys):
    """By default the paper's models, each at its size, the accuracies with them; a picture of those that have one."""
    monkeypatch.setattr(speed_test, 'measured_pass', lambda model, settings: None)
    monkeypatch.setattr(speed_test, 'stopwatch', lambda run, settings: lambda: 100. + (settings.input_size or 0) % 7)
    monkeypatch.setattr(speed_test, 'matrix_product', lambda settings: (None, 1.))
    monkeypatch.setattr(speed_test, 'macs', lambda model, size: 1.)
    built = []
    monkeypatch.setattr(speed_test, 'build_model', lambda candidate, fuse: built.append(candidate) or nn.Linear(1, 1))
    speed_test.main(['--device', 'cpu', '--plot', str(tmp_path / 'a.png'), '--csv', str(tmp_path / 'a.csv')])
    assert all(timm.is_model(candidate.name) for candidate in built)
    names = {candidate.name for candidate in built}
    for family in ('swin', 'tnt', 'twins', 'visformer', 'cait', 'coat', 'convit', 'nfnet_f0', 'efficientnet_b0',
                   'efficientnet_b1', 'efficientnet_b2', 'pvt_v2', 'deit_small_patch16_224', 'deit_base_patch16_224'):
        assert any(name.startswith(family) for name in names), family
    evits = {candidate for candidate in built if 'shrink' in candidate.name}
    assert {candidate.keep_rate for candidate in evits if candidate.input_size == 224} == {0.5, 0.6, 0.7, 0.8, 0.9}
    assert {candidate.input_size for candidate in evits} == {224, 256, 272, 288, 304}
    with open(tmp_path / 'a.csv', newline='') as file:
        rows = {(row['model'], row['input_size']): row for row in csv.DictReader(file)}
    assert len(rows) == len(built)
    assert rows[f'{speed_test.EVIT_SMALL}@0.7', '224']['top1'] == '79.5'
    assert rows[f'{speed_test.EVIT_SMALL}@0.8', '256']['top1'] == ''
    assert (rows['nfnet_f0', '256']['top1'], rows['nfnet_f0', '256']['source']) == ('83.6', 'NFNet, arXiv:2102.06171')
    with Image.open(tmp_path / 'a.png') as picture:
        assert picture.format == 'PNG' and min(picture.size) >= 600


def test_labels_of_crowded_points_stay_apart():
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(9, 7))
    points = [('convit_small', 7.1, 81.3), ('swin_tiny', 7.8, 81.3), ('coat_lite_small', 8.2, 81.9),
              ('pvt_v2_b2', 8.5, 82.), ('tnt_s', 9., 81.5)]
    axes.plot([x for _, x, _ in points], [y for _, _, y in points], 's')
    axes.set(xscale='log', xlim=(3, 30), ylim=(77, 84))
    speed_test.label_points(axes, points)
    assert [(text.get_text(), *text.xy) for text in axes.texts] == points
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert not any(box.contains(*axes.transData.transform(point)) for box in boxes for _, *point in points)
    pyplot.close(figure)


def test_accuracies_are_of_what_they_were_reported_for():
    candidate = Candidate(speed_test.EVIT_SMALL, 0.7, 224)
    assert speed_test.reported(candidate, True).top1 == 79.5
    assert speed_test.reported(candidate, False) is None                         # reported for fused tokens
    assert speed_test.reported(candidate._replace(input_size=256), True) is None
    assert speed_test.reported(candidate._replace(keep_rate=0.75), True) is None
    for candidate, found in speed_test.REPORTED.items():
        assert 70 < found.top1 < 90 and 'arXiv:' in found.source and timm.is_model(candidate.name)


def test_largest_batch(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_properties',
                        lambda device: types.SimpleNamespace(total_memory=400 * 2**20))

    def memory(model, settings):
        if settings.batch_size > limit:
            raise torch.OutOfMemoryError
        assert not settings.compiled
        return settings.batch_size

    monkeypatch.setattr(speed_test, 'peak_memory', memory)
    for limit, expected in ((40, 32), (1000, 64), (1, 1)):                     # a quarter are 100 MiB
        assert speed_test.largest_batch(None, protocol(batch_size=None, compiled=True)) == expected


@pytest.mark.parametrize('arguments, message', [
    (['--models', 'no_such_model'], 'no_such_model'),
    (['--models', 'deit_tiny_patch16_224.no_such_tag'], 'no_such_tag'),
    (['--models', f'{TINY}@0'], '(0, 1]'),
    (['--models', f'{TINY}@1.5'], '(0, 1]'),
    (['--models', f'{TINY}@nan'], '(0, 1]'),
    (['--models', f'{TINY}@'], '(0, 1]'),
    (['--models', 'deit_tiny_patch16_224@0.5'], 'no keep rate'),
    (['--models', TINY, '--input-size', '100'], 'multiple of the patch size'),
    (['--models', TINY, 'deit_tiny_patch16_224', '--batch-size', '0'], '--batch-size'),
    (['--models', TINY, '--csv', 'no/such/folder/speed.csv'], 'no/such/folder'),
    (['--models', f'{TINY}:100'], 'multiple of the patch size'),
    (['--models', f'{TINY}:0'], "must be a number of pixels, not '0'"),
    (['--models', f'{TINY}@0.5:x'], "must be a number of pixels, not 'x'"),
    (['--models', TINY, '--device', 'cpu', '--batch-size', 'auto'], 'on a CPU, give a number'),
    (['--models', TINY, '--plot', 'no/such/folder/speed.png'], 'no/such/folder'),
    (['--loader', '--data-path', '.', '--plot', 'speed.png'], '--plot'),
    (['--loader', '--data-path', '.', '--compile'], '--compile'),
    (['--models', TINY, '--loader'], 'not allowed with'),
    (['--loader'], '--loader needs --data-path'),
    (['--models', TINY, '--data-path', '.'], '--data-path needs --loader'),
    (['--loader', '--data-path', '.', '--csv', 'speed.csv'], 'go with --models'),
])
def test_wrong_input(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        speed_test.main(arguments)
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and message in captured.err.splitlines()[-1] and captured.out == ''


def test_right_input():
    args = speed_test.parse_args(['--models', f'{TINY}@1', 'resnet18', '--input-size', '224'])
    assert args.models == [Candidate(TINY, 1.), Candidate('resnet18')] and args.fuse_token
    args = speed_test.parse_args(['--models', f'{TINY}@0.8:256', 'resnet18:160', '--batch-size', '7'])
    assert args.models == [Candidate(TINY, 0.8, 256), Candidate('resnet18', None, 160)] and args.batch_size == 7
    # Neither a convolutional stem, nor patches that overlap, must divide the input.
    assert speed_test.parse_args(['--models', 'resnet18', 'pvt_v2_b0', '--input-size', '250'])


# --- The input pipeline ---------------------------------------------------------------------------------------------

def loading_protocol(**changes):
    settings = dict(input_size=32, batch_size=4, device=torch.device('cpu'), num_workers=1, windows=2,
                    window_seconds=0.001)
    return LoadingProtocol(**settings | changes)


@pytest.fixture(scope='module')
def both(image_folder, tmp_path_factory):
    """The tree, and databases beside it."""
    folder = tmp_path_factory.mktemp('both')
    for split in ('train', 'val'):
        (folder / split).symlink_to(image_folder / split)
        folder2lmdb.convert(str(image_folder / split), str(folder / f'{split}.lmdb'))
    return folder


def test_pipelines_deliver_every_image_once_an_epoch(both):
    for is_train, number in ((True, 24), (False, 9)):
        for pipeline in speed_test.pipelines(both, is_train, loading_protocol()):
            batches = list(pipeline.batches(pipeline.dataset, 0))
            assert [batch.shape[1:] for batch in batches] == len(batches) * [(3, 32, 32)]
            assert sum(map(len, batches)) == number and batches[0].dtype == torch.float32
            assert abs(torch.cat(batches).mean()) < 1.5                              # normalised
    plain, *ours = (torch.cat(list(pipeline.batches(pipeline.dataset, 0)))
                    for pipeline in speed_test.pipelines(both, False, loading_protocol()))
    for images in ours:
        torch.testing.assert_close(images, plain, rtol=0, atol=1e-6)


def test_the_plain_pipeline_is_timed_on_what_there_is(both, tmp_path):
    names = [pipeline.name for pipeline in speed_test.pipelines(both, True, loading_protocol())]
    assert names == ['train, ImageFolder, plain', 'train, ImageFolder', 'train, ImageFolder, --fast-resize',
                     'train, ImageFolderLMDB', 'train, ImageFolderLMDB, --fast-resize']
    (tmp_path / 'val.lmdb').symlink_to(both / 'val.lmdb')
    names = [pipeline.name for pipeline in speed_test.pipelines(tmp_path, False, loading_protocol())]
    assert names == ['val, ImageFolderLMDB, plain', 'val, ImageFolderLMDB']


def test_ours_erases_as_the_plain_pipeline_does(both, monkeypatch):
    monkeypatch.setattr(speed_test, 'RandomErasing', lambda **settings: lambda images: images.zero_())
    pipelines = list(speed_test.pipelines(both, True, loading_protocol()))
    empty = [not any(map(torch.any, pipeline.batches(pipeline.dataset, 0))) for pipeline in pipelines]
    assert empty == [False] + 4 * [True]
    plain = pipelines[0].dataset.transform.transforms[-1]
    assert (plain.probability, plain.per_pixel) == (0.25, True)
    assert speed_test.ERASING == {'probability': 0.25, 'mode': 'pixel'}


def test_loading_rate_is_images_per_second(monkeypatch):
    clock = [0.]

    def batches():
        while True:
            clock[0] += 0.01
            yield torch.empty(8, 1)

    monkeypatch.setattr(speed_test.time, 'perf_counter', lambda: clock[0])
    assert speed_test.loading_rate(batches(), loading_protocol(window_seconds=0.2)) == pytest.approx(800)
    assert 0.2 <= clock[0] < 0.22


def test_stages_add_up_to_the_pipeline(both):
    pipeline = list(speed_test.pipelines(both, True, loading_protocol()))[1]
    times = speed_test.time_stages(pipeline)
    steps = ['RandomResizedCropAndInterpolation', 'RandomHorizontalFlip', 'RandAugment', 'MaybePILToTensor']
    assert list(times) == ['read and decode', *steps, 'batch']
    assert all(0 < milliseconds < 100 for milliseconds in times.values())


def test_loader_command_line(both, tmp_path, capsys):
    speed_test.main(['--loader', '--data-path', str(both), '--input-size', '32', '--batch-size', '4', '--device', 'cpu',
                     '--num-workers', '1', '--windows', '2', '--window-seconds', '0.01'])
    header, titles, *lines = capsys.readouterr().out.splitlines()
    assert 'batches of 4 of 32×32' in header and '2 windows' in header and '1 workers' in header
    assert titles.count('images/s') == titles.count('ratio') == 2
    assert len(lines) == 8 + 1 + 8 and [line.count('1.000') for line in lines[:8:5]] == [2, 2]
    with pytest.raises(InputError, match='has neither train/ nor train.lmdb'):
        speed_test.main(['--loader', '--data-path', str(tmp_path)])
