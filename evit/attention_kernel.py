"""The faster form of attention on this processor, chosen by measuring."""
import time

import torch
import torch.nn.functional as F

ROUNDS, IMAGES = 8, 4                                  # of a measurement: for a DeiT-S, 10 to 60 ms on one thread
CHOICES = {}                                           # the faster form for each (heads, lengths, width, dtype, …)


def fused(q, k, v, mask=None, dropout=0.):
    """PyTorch's kernel, which never forms the (N, N) matrix. Arguments as in `attention`."""
    return F.scaled_dot_product_attention(q, k, v, mask, dropout)


def plain(q, k, v, mask=None):
    """Two products and a softmax. Arguments as in `attention`."""
    q = q * q.shape[-1] ** -0.5
    if mask is not None:                               # one channel more costs less than adding it to the logits
        q = F.pad(q, (0, 1), value=1.)
        k = torch.cat([k, mask.transpose(-2, -1).to(k.dtype).expand(*k.shape[:-1], 1)], dim=-1)
    return (q @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def attention(q, k, v, mask=None, dropout=0.):
    """Attention by the faster form where `is_chosen` allows a choice, by the fused one elsewhere.

    Args:
        q: (B, H, N, D).
        k, v: (B, H, M, D).
        mask: (B or 1, 1, 1, M), added to the logits, or None.
        dropout: probability of leaving an attention weight out.
    Returns:
        (B, H, N, D).
    """
    if dropout or not is_chosen(q):
        return fused(q, k, v, mask, dropout)
    key = *q.shape[1:], k.shape[2], q.dtype, mask is not None, torch.get_num_threads()
    if key not in CHOICES:
        CHOICES[key] = faster(q, k, v, mask)
    return CHOICES[key](q, k, v, mask)


def is_chosen(x):
    """Whether attention in tokens x is by the faster form: on a CPU, in 16 bits, in `torch.inference_mode()`.

    A choice by the clock may change the last bits from one process to the next. So there is none where bits are to
    repeat: in float32, where models with the fused form are faster than plain code anyway (`docs/speed.md`); in
    training and in its evaluations, which run in `torch.no_grad()`; with `torch.use_deterministic_algorithms`.
    Compiled and exported graphs have the fused form.
    """
    if torch.compiler.is_compiling() or x.device.type != 'cpu' or not torch.is_inference_mode_enabled():
        return False
    dtype = torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else x.dtype
    return dtype in (torch.bfloat16, torch.float16) and not torch.are_deterministic_algorithms_enabled()


def faster(q, k, v, mask):
    """`fused` or `plain`, whichever took less time in its best of some rounds, on the first few images."""
    q, k, v = (x[:IMAGES] for x in (q, k, v))
    mask = mask if mask is None or len(mask) == 1 else mask[:IMAGES]
    seconds = {fused: [], plain: []}
    for _ in range(ROUNDS):                            # in turn; other programs can only slow a round down
        for form, times in seconds.items():
            start = time.perf_counter()
            form(q, k, v, mask)
            times.append(time.perf_counter() - start)
    return min(seconds, key=lambda form: min(seconds[form]))
