"""Rows of tokens by distinct positions, with a backward pass that adds nothing up."""
import os

import torch
import torch.nn.functional as F

# To measure what it brings: EVIT_DEFAULT_KERNELS='gather' leaves the backward pass to PyTorch
BY_DEFAULT = 'gather' in os.environ.get('EVIT_DEFAULT_KERNELS', '').split()


def gather_rows(tokens, idx):
    """The rows of tokens (B, N, C) at distinct positions idx (B, k) → (B, k, C); for others, use `take`."""
    if BY_DEFAULT or not torch.is_grad_enabled():
        return take(tokens, idx)
    return GatherRows.apply(tokens, idx)


def take(tokens, idx):
    """`gather_rows` by PyTorch, whose backward pass adds up with atomics on a GPU, because positions may repeat."""
    return tokens.gather(1, idx.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


class GatherRows(torch.autograd.Function):
    """`take`, whose backward pass is a gather, too: of the gradient by the inverse permutation."""
    generate_vmap_rule = True

    @staticmethod
    def forward(tokens, idx):
        return take(tokens, idx)

    @staticmethod
    def setup_context(ctx, inputs, output):
        tokens, idx = inputs
        ctx.save_for_backward(idx)
        ctx.num_tokens = tokens.shape[1]

    @staticmethod
    def backward(ctx, grad):
        """The gradient of the rows (B, k, C) → that of the tokens (B, N, C)."""
        idx, = ctx.saved_tensors
        k = idx.shape[1]
        places = torch.arange(k, device=idx.device).expand_as(idx)                     # (B, k)
        inverse = idx.new_full((len(idx), ctx.num_tokens), k).scatter(1, idx, places)  # (B, N), k for rows not taken
        return take(F.pad(grad, (0, 0, 0, 1)), inverse), None
