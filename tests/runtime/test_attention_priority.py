import pytest
import torch

import main
import speed_test
from conftest import PLAIN
from runtime import attention_priority
from runtime.attention_priority import flash_first


def state():
    """The order in which kernels are tried, and which may be."""
    cuda = torch.backends.cuda
    return (list(torch._C._get_sdp_priority_order()), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(),
            cuda.cudnn_sdp_enabled(), cuda.math_sdp_enabled())


def test_order_for_a_gpu_only():
    """Flash, memory-efficient, cuDNN, math; restored afterwards, after an error, too."""
    before = state()
    with flash_first(torch.device('cpu')):
        assert state() == before
    with pytest.raises(KeyError), flash_first(torch.device('cuda')):
        order, *enabled = state()
        assert order[:4] == [int(backend) for backend in attention_priority.ORDER] and all(enabled)
        assert order[0] == int(torch.nn.attention.SDPBackend.FLASH_ATTENTION)
        raise KeyError
    assert state() == before


def test_order_in_forward_backward_and_compilation(compiled_graphs):
    """Autograd's threads see it, and one graph without breaks stays one."""
    layer = torch.nn.Linear(8, 8)
    orders = []

    def forward(x):
        x = layer(x)
        return torch.nn.functional.scaled_dot_product_attention(x, x, x).sum()

    with flash_first(torch.device('cuda')):
        x = torch.randn(2, 3, 4, 8, requires_grad=True)
        x.register_hook(lambda grad: orders.append(state()[0]))
        compiled = torch.compile(forward, fullgraph=True)
        compiled(x).backward()
        compiled(x).backward()
        expected = state()[0]
    assert orders == 2 * [expected] and len(compiled_graphs) == 1


def test_priority_by_default(monkeypatch):
    monkeypatch.setattr(attention_priority, 'BY_DEFAULT', True)
    before = state()
    with flash_first(torch.device('cuda')):
        assert state() == before


@pytest.mark.parametrize('program', ['main', 'speed_test'])
def test_programs(program, monkeypatch, tmp_path):
    """They run inside the context of their device."""
    entered = []

    class Context:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device.type)

        def __exit__(self, *error):
            entered.append('left')

    def stop(*args, **kwargs):
        assert entered == ['cpu']
        raise KeyError

    module, function = {'main': (main, 'build_loaders'), 'speed_test': (speed_test, 'compare')}[program]
    monkeypatch.setattr(module, 'flash_first', Context)
    monkeypatch.setattr(module, function, stop)
    with pytest.raises(KeyError):
        if program == 'main':
            main.main(main.parse_args([*PLAIN, '--output_dir', str(tmp_path)]))
        else:
            speed_test.main(['--models', 'deit_tiny_patch16_224', '--device', 'cpu'])
    assert entered == ['cpu', 'left']
