"""Merging against a naive loop in float64, and the cost of its schedule."""
import math

import pytest
import timm
import torch

from evit.merging import merge_tokens, merging_blocks, merging_rate, size_bias
from evit_definition import Token, merge
from measuring.benchmark import macs
from models_evit import to_evit


@pytest.mark.parametrize('num_tokens', [2, 3, 13, 16])
@pytest.mark.parametrize('sized', [False, True])
def test_merging_against_a_naive_loop(num_tokens, sized):
    """Tokens, sizes, positions and what joined what, for every number of tokens that can stay."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, num_tokens, 5, generator=generator, dtype=torch.float64)
    sizes = torch.randint(1, 9, (2, num_tokens), generator=generator).double() if sized else None
    for k in range(1, num_tokens):
        merged, merged_sizes, idx, other_idx, nearest = merge_tokens(tokens, sizes, k)
        for b in range(2):
            naive = [Token(vector, i, sizes[b, i].item() if sized else 1) for i, vector in enumerate(tokens[b])]
            result, heirs = merge(naive, k)
            torch.testing.assert_close(merged[b], torch.stack([token.vector for token in result]))
            assert merged_sizes[b].tolist() == [token.size for token in result]
            assert idx[b].tolist() == [token.patch for token in result]
            assert sorted([*idx[b].tolist(), *other_idx[b].tolist()]) == list(range(num_tokens))
            for i, target in zip(other_idx[b].tolist(), nearest[b].tolist(), strict=True):
                assert heirs[i] is result[target]


def test_half_precision_chooses_the_same_tokens():
    tokens = torch.randn(2, 49, 32, dtype=torch.bfloat16)
    with torch.autocast('cpu', torch.bfloat16):
        merged, _, idx, _, _ = merge_tokens(tokens, None, 40)
    expected = merge_tokens(tokens.double(), None, 40)
    assert torch.equal(idx, expected[2]) and merged.dtype == torch.bfloat16
    torch.testing.assert_close(merged.double(), expected[0], rtol=1e-2, atol=1e-2)


def test_size_bias():
    """The logarithm of the sizes, 0 for prefix tokens, in rows that begin at multiples of 8 numbers."""
    sizes = torch.tensor([[1., 2., 5.], [3., 1., 4.]])
    bias = size_bias(sizes, 2, torch.float32)
    torch.testing.assert_close(bias[:, 0, 0], torch.tensor([[0, 0, *map(math.log, row)] for row in sizes.tolist()]))
    assert bias.stride(0) % 8 == 0


@pytest.mark.parametrize('name, depth', [('deit_small_patch16_224', 12), ('deit_tiny_patch16_224', 24),
                                         ('vit_small_patch14_reg4_dinov2', 12)])
def test_work_of_a_rate(name, depth):
    """Merging has the GMACs of fusing at the same rate, similarities included, or a little less."""
    model = timm.create_model(name, img_size=224, depth=depth).eval()
    for rate in (0.9, 0.7, 0.5, 0.3):
        fused = macs(to_evit(model, rate, way='fuse'), 224)
        assert 0.985 < macs(to_evit(model, rate, way='merge'), 224) / fused < 1.002


def test_blocks():
    assert merging_blocks(12) == (0, 1, 3, 5, 7, 9) and merging_blocks(24) == (0, *range(1, 19, 2))
    assert merging_blocks(1) == (0,) and merging_blocks(3) == (0, 1)
    assert 0.8 < merging_rate(12, 0.5, 196, 384) < merging_rate(12, 0.7, 196, 384) < 1
