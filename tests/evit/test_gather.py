import pytest
import timm
import torch

import models_evit                                     # noqa: F401, registers its models
from evit import gather
from evit.gather import gather_rows, take


def rows_and_gradient(function, tokens, idx):
    """Rows, and the gradient of the tokens for random gradients of the rows."""
    tokens = tokens.clone().requires_grad_()
    rows = function(tokens, idx)
    rows.backward(torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)).to(rows))
    return rows, tokens.grad


def example(k=5, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(3, 9, 4, dtype=dtype), torch.rand(3, 9).topk(k, sorted=False).indices


@pytest.mark.parametrize('k', [1, 5, 9])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_gradients_as_of_gather(k, dtype):
    tokens, idx = example(k, dtype)
    for ours, theirs in zip(rows_and_gradient(gather_rows, tokens, idx), rows_and_gradient(take, tokens, idx)):
        assert torch.equal(ours, theirs) and ours.dtype == dtype


def test_first_and_second_derivatives():
    tokens, idx = example(dtype=torch.float64)
    tokens.requires_grad_()
    assert torch.autograd.gradcheck(gather_rows, (tokens, idx))
    assert torch.autograd.gradgradcheck(gather_rows, (tokens, idx))


def test_gradient_for_each_sample():
    tokens, idx = example()
    found = torch.func.vmap(torch.func.grad(lambda t, i: gather_rows(t[None], i[None]).square().sum()))(tokens, idx)
    taken = torch.zeros(3, 9).scatter(1, idx, 1.).unsqueeze(-1)
    assert torch.equal(found, 2 * tokens * taken)


@pytest.mark.parametrize('dynamic', [False, True])
def test_compiled_as_one_graph(dynamic, compiled_graphs):
    compiled = torch.compile(gather_rows, fullgraph=True, dynamic=dynamic)
    for k in 5, 3, 4:
        tokens, idx = example(k)
        for ours, theirs in zip(rows_and_gradient(compiled, tokens, idx), rows_and_gradient(take, tokens, idx)):
            assert torch.equal(ours, theirs)
    assert len(compiled_graphs) == (1 if dynamic else 3)


@pytest.mark.parametrize('way', ['drop', 'fuse', 'merge'])
def test_backward_pass_of_a_model(way, monkeypatch):
    """It adds nothing up, and all gradients are those of PyTorch's own gather, bit for bit."""
    model = timm.create_model('deit_tiny_patch16_shrink_base', img_size=64, depth=4, drop_loc=(1, 2), way=way,
                              base_keep_rate=0.6)
    gradients = []
    for by_default in (False, True):
        monkeypatch.setattr(gather, 'BY_DEFAULT', by_default)
        torch.manual_seed(0)
        model.zero_grad()
        loss = model(torch.randn(2, 3, 64, 64)).square().sum()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            loss.backward()
        assert any('scatter_add' in event.key for event in profile.key_averages()) == by_default
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_exported_training_graph():
    """torch.export with gradients has the gather as an operator that every runtime knows."""
    model = timm.create_model('deit_tiny_patch16_shrink_base', img_size=64, depth=2, drop_loc=(0,), base_keep_rate=0.6)
    images = torch.randn(2, 3, 64, 64)
    program = torch.export.export(model.eval(), (images,))
    assert 'aten.gather' in str(program.graph)
    torch.testing.assert_close(program.module()(images), model(images))
