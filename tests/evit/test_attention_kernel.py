import pytest
import timm
import torch

import models_evit
from evit import attention_kernel
from evit.attention_kernel import ROUNDS, attention, fused, plain


@pytest.fixture
def choices(monkeypatch):
    """The measured choices, none so far."""
    monkeypatch.setattr(attention_kernel, 'CHOICES', {})
    return lambda: attention_kernel.CHOICES


def qkv(batch=6, tokens=50, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, batch, 3, tokens, 64, generator=generator).to(dtype)


def small(name='deit_tiny_patch16_shrink_base', **settings):
    torch.manual_seed(0)
    return timm.create_model(name, img_size=64, depth=4, **settings).eval(), torch.randn(6, 3, 64, 64)


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_both_forms(masked, dtype, tolerance):
    q, k, v = qkv(dtype=dtype)
    mask = torch.linspace(0, 3, 50).to(dtype)[None, None, None] if masked else None
    torch.testing.assert_close(plain(q[:, :, :2], k, v, mask), fused(q[:, :, :2], k, v, mask), atol=tolerance,
                               rtol=tolerance)
    assert not masked or not torch.allclose(plain(q, k, v), plain(q, k, v, mask), atol=tolerance)


@pytest.mark.parametrize('settings', [{'base_keep_rate': 1.}, {'way': 'fuse'}, {'way': 'merge'}],
                         ids=['rate 1', 'fuse', 'merge'])
def test_forced_choice_in_a_model(settings, choices, monkeypatch):
    """Every block takes the form that measured faster; the logits are the same up to rounding."""
    model, images = small(drop_loc=(1, 2), **settings)
    logits = []
    for form in fused, plain:
        calls = []
        monkeypatch.setattr(attention_kernel, 'CHOICES', {})
        monkeypatch.setattr(attention_kernel, 'faster',
                            lambda *tensors: lambda *tensors: calls.append(1) or form(*tensors))
        with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16):
            logits.append(model(images))
        assert len(calls) == 4
    torch.testing.assert_close(*logits, atol=0.03, rtol=0.03)


def test_choice_once_for_each_shape(choices, monkeypatch):
    """Of several numbers of images, the first is measured."""
    forms = iter([plain, fused, plain])
    monkeypatch.setattr(attention_kernel, 'faster', lambda *tensors: next(forms))
    with torch.inference_mode():
        for tokens, batch in ((50, 6), (40, 6), (50, 2), (50, 1)):
            q, k, v = qkv(batch, tokens)
            attention(q, k, v)
        attention(q, k, v, torch.zeros(1, 1, 1, 50, dtype=q.dtype))
    assert list(choices().values()) == [plain, fused, plain]


def test_faster_form(monkeypatch):
    """It is the one with the best round, on a few images."""
    q, k, v = qkv()
    seconds, now, images = {'slow': [5] * ROUNDS, 'fast': [9, 9, 2, *[9] * ROUNDS]}, [0], []
    monkeypatch.setattr(attention_kernel.time, 'perf_counter', lambda: now[0])

    def form(name):
        def run(q, k, v, mask):
            images.append(len(q))
            now[0] += seconds[name].pop(0)
        return run

    slow, fast = form('slow'), form('fast')
    for pair in (slow, fast), (fast, slow):
        seconds = {'slow': [5] * ROUNDS, 'fast': [9, 9, 2, *[9] * ROUNDS]}
        monkeypatch.setattr(attention_kernel, 'fused', pair[0])
        monkeypatch.setattr(attention_kernel, 'plain', pair[1])
        assert attention_kernel.faster(q, k, v, None) is fast
    assert set(images) == {4}


@pytest.mark.parametrize('name', ['deit_tiny_patch16_shrink_base', 'lvvit_t_shrink_base'])
def test_fused_form_where_bits_repeat(name, choices, monkeypatch, compiled_graphs):
    """In float32, without inference mode, in deterministic runs, in graphs."""
    def fail(*tensors):
        raise AssertionError('a choice by measuring')

    monkeypatch.setattr(attention_kernel, 'faster', fail)
    model, images = small(name, drop_loc=(1,), way='merge')
    with torch.inference_mode():
        model(images)
    with torch.autocast('cpu', torch.bfloat16):
        model(images).sum().backward()
        with torch.no_grad():
            model(images)
        with torch.inference_mode():
            torch.compile(model, fullgraph=True)(images)
            with monkeypatch.context() as deterministic:
                deterministic.setattr(torch, 'are_deterministic_algorithms_enabled', lambda: True)
                model(images)
    exported = torch.export.export(model.to(torch.bfloat16), (images.to(torch.bfloat16),))
    assert 'scaled_dot_product' in str(exported.graph) and not choices()


@pytest.mark.parametrize('name', ['eva02_tiny_patch14_224', 'vit_small_patch16_dinov3'])
def test_choice_with_rotary_positions(name, choices):
    model = models_evit.to_evit(timm.create_model(name, depth=2, img_size=112), 0.7, drop_loc=(1,)).eval()
    images = torch.randn(2, 3, 112, 112)
    with torch.autocast('cpu', torch.bfloat16):
        with torch.no_grad():
            expected = model(images)
        with torch.inference_mode():
            torch.testing.assert_close(model(images), expected, atol=0.05, rtol=0.05)
    assert len(choices()) == 1                         # both blocks attend before tokens are dropped
