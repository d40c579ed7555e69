"""benchmark.py: MACs compared with the paper, timed windows, the state of the model after a measurement."""
import time
import types
import weakref

import pytest
import timm
import torch
import torch.nn as nn
import torchprofile
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import models_evit                                     # noqa: F401  registers the EViTs
from measuring import benchmark
from measuring.benchmark import (Protocol, Throughput, check_real, largest_batch, macs, measured_pass,
                                 paired_throughput, peak_memory, stopwatch, throughput)
from runtime.compiled_model import check_compiler
from runtime.utils import InputError

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
    """A model that appends the conditions of each pass to `calls` and returns the channel means of the images."""

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


class PretendCuda(Protocol):
    """A protocol for a GPU that creates its images on the CPU."""

    def images(self, seed=0):
        return protocol().images(seed)


def pretend_cuda():
    return PretendCuda(**vars(protocol(device=torch.device('cuda'))))


# --- MACs -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('fuse_token, gmacs', [
    (True, {1.0: 4.604, 0.9: 4.026, 0.8: 3.480, 0.7: 3.032, 0.6: 2.638, 0.5: 2.311}),
    (False, {0.9: 3.992, 0.8: 3.447, 0.7: 3.000, 0.6: 2.611, 0.5: 2.284}),
], ids=['fused', 'dropped'])
def test_macs_of_the_paper(fuse_token, gmacs):
    """Those of the whole last block, which is computed where somebody watches it; the head needs less."""
    model = timm.create_model('deit_small_patch16_shrink_base', base_keep_rate=0.7, fuse_token=fuse_token)
    # Queries and projection, MLP, products; at rate 1
    saved = 196 * (2 * 384 ** 2 + 8 * 384 ** 2 + 2 * 197 * 384) / 1e9
    needed = macs(model, keep_rate=1)
    model.blocks[-1].register_forward_hook(lambda *_: None)
    assert macs(model, keep_rate=1) - needed == pytest.approx(saved, rel=0.001)
    assert {rate: macs(model, keep_rate=rate) for rate in gmacs if rate != 0.7} | {0.7: macs(model)} \
        == pytest.approx(gmacs, rel=0.005)


def test_macs_of_torchprofile():
    model = timm.create_model('deit_small_patch16_shrink_base', base_keep_rate=0.7, fuse_token=True).eval()
    counted = torchprofile.profile_macs(model, torch.zeros(1, 3, 224, 224)) / 1e9
    assert macs(model) == pytest.approx(counted, rel=0.005)


def test_macs_of_a_convolutional_model():
    assert macs(timm.create_model('resnet18'), 64) == pytest.approx(1.81 * (64 / 224)**2, rel=0.02)


def test_macs_of_a_parameter_passed_to_a_module():
    assert macs(timm.create_model('cait_xxs24_224', img_size=32, depth=2), 32) > 0       # its class token


def test_macs_with_fused_and_explicit_attention():
    deit = timm.create_model('deit_tiny_patch16_224', img_size=32, depth=2)
    fused = macs(deit, 32)
    for block in deit.blocks:
        block.attn.fused_attn = False
    assert macs(deit, 32) == fused


def test_model_after_macs():
    model = tiny(drop_path_rate=0.1)
    model.blocks[2].eval()
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    macs(model, 32)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    model(torch.randn(2, 3, 32, 32)).sum().backward()


# --- Time -----------------------------------------------------------------------------------------------------------

def test_throughput_of_a_slow_model():
    result = throughput(Recorder(seconds=0.01), 32, batch_size=3, window_seconds=0.02)
    assert 100 < result.median <= 300                       # at most 3 images in 0.01 s
    assert len(result.rates) == 5 and result.min <= result.median <= result.max


def test_duration_of_a_window(monkeypatch):
    """If a pass takes a second, a window of 10.5 s has at least 11 passes."""
    clock, model, ends = [0.], Recorder(), []
    model.register_forward_hook(lambda *_: clock.__setitem__(0, clock[0] + 1.))
    monkeypatch.setattr(benchmark.time, 'perf_counter', lambda: ends.append(clock[0]) or clock[0])
    result = throughput(model, 8, batch_size=4, window_seconds=10.5)
    assert result.rates == (4.,) * 5
    assert ends[-1] >= 2 + 6 * 10.5                         # two passes of the check, warm-up, five windows


def test_number_of_clock_readings_in_a_window(monkeypatch):
    clock, model, readings = [0.], Recorder(), []
    model.register_forward_hook(lambda *_: clock.__setitem__(0, clock[0] + 0.01))
    monkeypatch.setattr(benchmark.time, 'perf_counter', lambda: readings.append(clock[0]) or clock[0])
    settings = protocol(window_seconds=10.)
    window = stopwatch(measured_pass(model, settings.images(), settings), settings)
    readings.clear()
    window()
    assert len(readings) <= 12                              # in 1,000 passes


def test_synchronisation_before_each_clock_reading(monkeypatch):
    events = []
    clock = time.perf_counter
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda device: events.append('synchronised'))
    monkeypatch.setattr(benchmark.time, 'perf_counter', lambda: events.append('clock') or clock())
    stopwatch(measured_pass(Recorder(), protocol().images(), pretend_cuda()), pretend_cuda())()
    before = [event for event, following in zip(events, events[1:]) if following == 'clock']
    assert len(before) >= 4 and set(before) == {'synchronised'}


def test_order_of_windows():
    calls = []
    slow, fast = paired_throughput([Recorder(calls, 'A', 0.004), Recorder(calls, 'B', 0.001)], 8, batch_size=2,
                                   window_seconds=0.01)
    turns = [call.name for call, before in zip(calls[1:], calls) if call.name != before.name]
    assert turns == ['B'] + ['A', 'B'] * 5                  # check and warm-up of A, then of B, then the windows
    assert fast.ratio_to(slow) > 1.5


def test_ratio_on_a_machine_that_slows_down():
    """In some windows, the machine is ten times slower."""
    ours, theirs = (Throughput(rates, protocol()) for rates in [(4., 4., .4, 2., .2), (2., 2., .2, 1., .1)])
    assert ours.ratio_to(theirs) == pytest.approx(2.)
    # The ratio of the medians would be 1.5
    assert Throughput((1., 8., 3.), protocol()).ratio_to(Throughput((1., 2., 3.), protocol())) == 1.


def test_printed_line():
    settings = protocol(batch_size=7, amp_dtype=torch.bfloat16, keep_rate=0.6, window_seconds=0.25)
    line = str(Throughput((10., 30., 20.), settings))
    assert line.startswith('20.0 [10.0–30.0] images/s; ') and '\n' not in line and line.isprintable()
    for word in ['batch 7', '32×32', 'bfloat16 autocast', 'keep rate 0.6', 'eager', 'cpu', f'torch {torch.__version__}',
                 '5 windows', '0.25 s', 'inference', 'eval', 'warm-up', 'synchronised', 'median']:
        assert word in line
    assert 'autocast' not in str(protocol()) and 'keep rate' not in str(protocol())
    for changes, word in ((dict(compiled=True), 'compiled'), (dict(gradients=True), 'with gradients'),
                          (dict(train=True), 'whole training steps'), (dict(channels_last=True), 'channels last')):
        assert word in str(protocol(**changes)) and word not in line


# --- The measured pass ----------------------------------------------------------------------------------------------

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


def test_modes_and_random_state_after_throughput():
    model = tiny().train()
    model.blocks[2].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    throughput(model, 32, **QUICK)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_mode_after_a_failure():
    model = Recorder()
    model.register_forward_hook(lambda *_: torch.full((2, 3), torch.nan))
    with pytest.raises(ValueError, match='not finite'):
        throughput(model, 32, **QUICK)
    assert model.training


@pytest.mark.parametrize('output, message', [
    (lambda x: torch.ones(len(x), 10), 'depend'),
    (lambda x: x.mean((2, 3)) * torch.inf, 'finite'),
    (lambda x: x.mean((2, 3)).index_fill(1, torch.tensor([1]), torch.nan), 'finite'),
], ids=['constant', 'infinite', 'one-nan'])
def test_output_of_a_fake_model(output, message):
    model = nn.Identity()
    model.forward = output
    with pytest.raises(ValueError, match=message):
        check_real(model, protocol().images(), protocol())


def test_output_of_a_real_model():
    model = tiny().train()
    check_real(model, protocol().images(), protocol(amp_dtype=torch.bfloat16))
    assert model.training


class Node(torch.autograd.Function):
    """The identity. It appends to `graphs` a weak reference to an object that lives as long as the graph."""

    @staticmethod
    def forward(ctx, x, graphs):
        ctx.token = set()
        graphs.append(weakref.ref(ctx.token))
        return x.clone()


@pytest.mark.parametrize('name, embedding, options', [
    ('resmlp_12_224', 'stem', {}), (TINY, 'patch_embed', {'weight_init': 'jax'}),
    ('deit_tiny_distilled_patch16_224', 'patch_embed', {'weight_init': 'jax'})])
def test_head_that_starts_at_zero(name, embedding, options):
    """The features show whether the model depends on its input; the head stays zero, for the training that follows."""
    model = timm.create_model(name, img_size=32, num_classes=5, **options)
    assert throughput(model, 32, windows=1, **QUICK).median > 0
    assert not model(torch.randn(1, 3, 32, 32))[0].any()
    model.get_submodule(embedding).proj.weight.data.zero_()
    with pytest.raises(ValueError, match='does not depend on the input'):
        throughput(model, 32, windows=1, **QUICK)


def test_graphs_of_the_check_with_gradients():
    """Each graph is freed before the next pass, so the check needs no more memory than one pass."""
    graphs, alive = [], []

    class Model(Recorder):
        def forward(self, x):
            alive.append(sum(graph() is not None for graph in graphs))
            return Node.apply(super().forward(x), graphs)

    check_real(Model(), protocol().images(), protocol(gradients=True))
    assert alive == [0, 0] and len(graphs) == 2
    kept = Model()(torch.zeros(1, 3, 8, 8))
    assert kept.requires_grad and graphs[-1]() is not None                         # a reference detects a live graph


@pytest.mark.parametrize('gradients', [False, True])
def test_output_with_and_without_gradients(gradients):
    model = tiny(num_classes=3).eval()
    logits = benchmark.forward(model, torch.zeros(1, 3, 32, 32), protocol(gradients=gradients))
    assert logits.requires_grad == gradients and logits.is_inference() != gradients


def test_images_in_channels_last():
    settings = protocol(channels_last=True)
    assert settings.images().is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(settings.images(), protocol().images()) and protocol().images().is_contiguous()


def test_images_of_a_cuda_graph(monkeypatch):
    """It reads weights and images where they are: every input of the graph is static, none is copied at a replay."""
    static = []

    def compiler(graph, inputs):
        static.append(torch._guards.TracingContext.get().fw_metadata.static_input_indices == [*range(len(inputs))])
        return make_boxed_func(graph)

    def compile(model, mode, **options):
        assert mode == 'reduce-overhead'
        return torch_compile(model, backend=aot_autograd(fw_compiler=compiler), **options)

    torch.compiler.reset()
    torch_compile = torch.compile
    monkeypatch.setattr(torch, 'compile', compile)
    model, images = tiny(depth=2, drop_loc=(0, 1), num_classes=3).eval(), protocol().images()
    settings = PretendCuda(**vars(protocol(device=torch.device('cuda'), compiled=True)))
    measured_pass(model, images, settings)()
    assert static == [True] and torch.equal(images, protocol().images())


@pytest.mark.parametrize('compiled_graphs', ['captured'], indirect=True)
def test_images_of_a_frozen_model(compiled_graphs):
    """On a CPU, the weights are constants of the graph and the images are its only input."""
    settings = protocol(compiled=True)
    measured_pass(tiny(depth=2, drop_loc=(0, 1), num_classes=3).eval(), settings.images(), settings)()
    graph, = compiled_graphs
    assert len(graph.graph.find_nodes(op='placeholder')) == 1


def test_two_training_steps():
    """Each step changes the weights and moves their average towards them by (1 − decay) of the distance."""
    model, settings = tiny(num_classes=3).eval(), protocol(train=True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    step = measured_pass(model, settings.images(), settings)
    assert model.training
    first = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert not torch.equal(parameter, first[name]) and not torch.equal(first[name], before[name])
        zero = before[name] == 0                            # elsewhere, rounding hides steps this small
        torch.testing.assert_close(step.model_ema.module.get_parameter(name)[zero],
                                   0.00004 * (first[name] + parameter)[zero], rtol=0.01, atol=1e-13)
    assert not before['head.bias'].any()


@pytest.mark.parametrize('compiled_graphs', ['captured'], indirect=True)
@pytest.mark.parametrize('train', [False, True], ids=['inference', 'training'])
def test_throughput_of_a_compiled_model(train, compiled_graphs):
    model = tiny(depth=2, drop_loc=(0, 1), num_classes=3)
    assert throughput(model, 32, train=train, **QUICK).median > 0 and not compiled_graphs
    assert throughput(model, 32, train=train, compiled=True, **QUICK).median > 0 and len(compiled_graphs) == 1


@pytest.mark.parametrize('train', [False, True], ids=['inference', 'training'])
def test_compiled_model_without_a_compiler(train, monkeypatch):
    monkeypatch.setenv('CXX', 'no_such_compiler -m64')
    with pytest.raises(InputError, match='C.. compiler'):
        measured_pass(tiny(), protocol().images(), protocol(compiled=True, train=train))
    monkeypatch.setenv('CXX', 'env g++')
    check_compiler(torch.device('cpu'))


def test_what_triton_needs_on_a_gpu(monkeypatch, tmp_path):
    """A C compiler and Python.h, neither of which a bare image has."""
    (tmp_path / 'Python.h').touch()
    monkeypatch.setattr('sysconfig.get_path', lambda name, scheme: str(tmp_path))
    monkeypatch.setenv('CC', 'no_such_compiler')
    with pytest.raises(InputError, match='needs a C compiler on a GPU; install gcc, or name another in CC'):
        check_compiler(torch.device('cuda'))
    monkeypatch.delenv('CC')
    for found, known in (('gcc', True), ('clang', True), ('tcc', False)):
        monkeypatch.setattr('shutil.which', lambda name: name == found)
        if known:
            check_compiler(torch.device('cuda'))
        else:
            with pytest.raises(InputError, match='C compiler'):
                check_compiler(torch.device('cuda'))
    monkeypatch.setattr('shutil.which', lambda name: name == 'gcc')
    (tmp_path / 'Python.h').unlink()
    with pytest.raises(InputError, match=r'needs .*Python\.h on a GPU'):
        check_compiler(torch.device('cuda'))


# --- Memory ---------------------------------------------------------------------------------------------------------

def test_peak_memory_beside_other_models(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'memory_allocated', lambda device: 100 * 2**20)
    monkeypatch.setattr(torch.cuda, 'reset_peak_memory_stats', lambda device: None)
    monkeypatch.setattr(torch.cuda, 'max_memory_allocated', lambda device: 130 * 2**20)
    model = nn.Identity()
    model.register_parameter('weight', nn.Parameter(torch.ones(2**20)))
    model.register_buffer('buffer', torch.ones(2**18))
    assert peak_memory(model, pretend_cuda()) == 30 + 4 + 1


def test_peak_memory_on_a_cpu():
    assert peak_memory(tiny(), protocol()) is None


@pytest.mark.parametrize('limit, expected', [(40, 32), (1000, 64), (1, 1)])
def test_largest_batch(limit, expected, monkeypatch):
    """A quarter of the memory is 100 MiB. An image takes 1 MiB. More than `limit` images do not fit."""
    def memory(model, settings):
        assert not settings.compiled
        if settings.batch_size > limit:
            raise torch.OutOfMemoryError
        return settings.batch_size

    monkeypatch.setattr(torch.cuda, 'get_device_properties',
                        lambda device: types.SimpleNamespace(total_memory=400 * 2**20))
    monkeypatch.setattr(benchmark, 'peak_memory', memory)
    assert largest_batch(None, protocol(batch_size=None, compiled=True)) == expected


# --- On a GPU -------------------------------------------------------------------------------------------------------

@pytest.mark.gpu
@pytest.mark.parametrize('train', [False, True], ids=['inference', 'training'])
def test_compiled_model_on_cuda(train):
    model = tiny(depth=4, drop_loc=(1, 2)).cuda()
    settings = protocol(device=torch.device('cuda'), amp_dtype=torch.bfloat16, compiled=True, train=train)
    assert peak_memory(model, settings) > 5
    torch._dynamo.utils.counters.clear()
    result = throughput(model, 32, amp_dtype=torch.bfloat16, compiled=True, train=train, **QUICK)
    assert result.median > 0
    assert torch._dynamo.utils.counters['inductor']['cudagraph_recorded_non_static_inputs'] == 0


@pytest.mark.gpu
def test_model_on_cuda():
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
