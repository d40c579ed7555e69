"""Images/s of the forms in which attention can take the size bias of merged tokens.

    python -m measuring.size_bias --device cuda

A mask rules out FlashAttention on a GPU, and the memory-efficient kernel copies one whose rows do not begin at
multiples of 8 numbers. One channel more in queries and keys needs no mask. Attention alone is measured, forward and
backward.
"""
import csv
from pathlib import Path

import torch
import torch.nn.functional as F

from evit.merging import size_bias
from measuring.benchmark import Protocol, add_protocol_arguments, device_name, stopwatch, time_in_turn
from runtime.arguments import ArgumentParser, positive
from runtime.attention_priority import flash_first


def without_bias(q, k, v, sizes):
    """Queries, keys, values (B, H, N, D), sizes (B, N − 1) without the class token's → (B, H, N, D)."""
    return F.scaled_dot_product_attention(q, k, v)


def as_mask(q, k, v, sizes):
    """With the bias as a mask of its own length."""
    return F.scaled_dot_product_attention(q, k, v, size_bias(sizes, 1, q.dtype).contiguous())


def as_padded_mask(q, k, v, sizes):
    """With the bias as `size_bias` gives it: the slice of a mask whose rows begin at multiples of 8."""
    return F.scaled_dot_product_attention(q, k, v, size_bias(sizes, 1, q.dtype))


def as_channel(q, k, v, sizes):
    """With the bias as one more channel of the keys, and of the queries its factor; 8 for the alignment of the rows."""
    width = q.shape[-1]
    bias = size_bias(sizes, 1, k.dtype).transpose(-2, -1).expand(-1, k.shape[1], -1, 1)            # (B, H, N, 1)
    q = F.pad(F.pad(q, (0, 1), value=width ** 0.5), (0, 7))
    k = F.pad(torch.cat([k, bias], dim=-1), (0, 7))
    return F.scaled_dot_product_attention(q, k, F.pad(v, (0, 8)), scale=width ** -0.5)[..., :width]


FORMS = {'mask': as_mask, 'padded mask': as_padded_mask, 'channel': as_channel, 'no bias': without_bias}


def pass_of(form, length, protocol, heads=6, width=64):
    """A function without arguments that runs attention over `length` tokens forward and backward, and its results.

    It returns the output and the gradients of queries, keys and values.
    """
    generator = torch.Generator(protocol.device).manual_seed(0)
    options = dict(generator=generator, device=protocol.device)
    x = torch.randn(3, protocol.batch_size, length, heads, width, **options).to(protocol.amp_dtype)
    leaves = [part.transpose(1, 2).requires_grad_() for part in x]                     # (B, H, N, D) each
    sizes = torch.randint(1, 9, (protocol.batch_size, length - 1), **options).float()
    grad = torch.randn(x.shape[1:], **options).to(x).transpose(1, 2)
    attend = torch.compile(form, fullgraph=True, dynamic=False) if protocol.compiled else form

    def run():
        output = attend(*leaves, sizes)
        return output, *torch.autograd.grad(output, leaves, grad)

    return run


def main(argv=None):
    parser = ArgumentParser(description='Compare the forms of the size bias.')
    parser.add_argument('--batch-size', type=positive(int), default=256, help='(default: %(default)s)')
    parser.add_argument('--lengths', nargs='+', type=positive(int), default=[139, 98, 69], help='numbers of tokens '
                        '(default: %(default)s)')
    parser.add_argument('--compile', action='store_true', help='compile them')
    parser.add_argument('--csv', type=Path, metavar='FILE', help='write the table as CSV')
    add_protocol_arguments(parser)
    args = parser.parse_args(argv)
    protocol = Protocol(None, args.batch_size, args.device, torch.bfloat16, None, args.windows, args.window_seconds,
                        args.compile, train=True)
    print(f'attention alone, forward and backward: batch {args.batch_size}, bfloat16, {device_name(args.device)}, '
          f'torch {torch.__version__}; median [min–max] of {args.windows} windows', flush=True)
    rows = []
    for length in args.lengths:
        with flash_first(args.device):
            speeds = time_in_turn([stopwatch(pass_of(form, length, protocol), protocol) for form in FORMS.values()],
                                  len(FORMS) * [protocol])
        for name, speed in zip(FORMS, speeds):
            rows.append({'model': f'{name}, {length} tokens', 'median': speed.median, 'min': speed.min,
                         'max': speed.max, 'ratio': speed.ratio_to(speeds[-1]), 'memory_mib': '', 'failure': ''})
            print(f'{rows[-1]["model"]:24} {speed.span} images/s, {rows[-1]["ratio"]:.3f} of no bias', flush=True)
    if args.csv:
        with open(args.csv, 'w', newline='') as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == '__main__':
    main()
