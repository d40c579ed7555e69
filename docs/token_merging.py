"""Token Merging (Bolya et al., ICLR 2023) with the same weights, as a yardstick for `merge_token`.

    python docs/token_merging.py --resume CHECKPOINT --keep-rates 0.9 0.7 0.5 … (the flags of curve.py)

For each keep rate, every block merges as many tokens as make the GMACs those of `merge_token` at this rate. The
images/s of both are measured with windows in turn.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if __name__ == '__main__':                             # before the imports, which take seconds: see `start`
    from runtime.program import start
    start('token_merging')

import torch
import torch.nn as nn
import torch.nn.functional as F

import curve
from engine import evaluate
from evit.merging import size_bias
from measuring.accuracy_curve import with_way
from measuring.benchmark import macs, paired_throughput
from models_evit import EViT, to_evit
from runtime.distributed import init_process_group
from runtime.failures import run_program
from runtime.utils import InputError, choose_amp_dtype


class TokenMerging(nn.Module):
    """A `VisionTransformer` that merges `reductions[i]` tokens in block i.

    Args:
        model: an EViT, of which only the layers are used.
        reductions: number of tokens to merge in each block.
    """

    def __init__(self, model, reductions):
        super().__init__()
        self.model, self.reductions = model, reductions

    def forward(self, images):
        """Images (B, 3, H, W) → logits (B, classes)."""
        model, prefix = self.model, self.model.num_prefix_tokens
        x, _ = model.embed(images)
        sizes = x.new_ones(x.shape[0], x.shape[1] - prefix)
        for block, r in zip(model.blocks, self.reductions):
            q, k, v = block.attn.project(block.norm1(x))                               # (B, H, P + N, D) each
            out = F.scaled_dot_product_attention(q, k, v, size_bias(sizes, prefix, x.dtype))
            x = x + block.ls1(block.attn.proj(block.attn.norm(out.transpose(1, 2).flatten(2))))
            tokens, sizes = merge_pairs(x[:, prefix:], k.mean(dim=1)[:, prefix:], sizes, r)
            x = block.feed_forward(torch.cat([x[:, :prefix], tokens], dim=1))
        return model.forward_head(model.norm(x))


def merge_pairs(tokens, keys, sizes, r):
    """Bipartite soft matching (§3): the r tokens at even places that are most similar to one at an odd place join it.

    Args:
        tokens: (B, N, C).
        keys: (B, N, D), whose cosines are the similarities.
        sizes: (B, N), how many patches each token stands for.
    Returns:
        tokens (B, N − r, C) and sizes (B, N − r).
    """
    if r == 0 or tokens.shape[1] == 1:
        return tokens, sizes
    keys = F.normalize(keys, dim=-1)
    best, target = (keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)).max(dim=-1)          # (B, N / 2) each
    order = best.argsort(dim=1, descending=True)
    merged, kept = order[:, :r], order[:, r:]

    def rows(values, idx):
        return values.gather(1, idx.unsqueeze(-1).expand(-1, -1, values.shape[-1]))

    weighted = torch.cat([tokens * sizes.unsqueeze(-1), sizes.unsqueeze(-1)], dim=-1)  # sums, and their weights
    even, odd = weighted[:, ::2], weighted[:, 1::2]
    idx = target.gather(1, merged).unsqueeze(-1).expand(-1, -1, weighted.shape[-1])
    odd = odd.scatter_add(1, idx, rows(even, merged))
    result = torch.cat([rows(even, kept), odd], dim=1)
    return result[..., :-1] / result[..., -1:], result[..., -1]


def reductions_of(model, gmacs, input_size):
    """As many merges in each block, give or take one, as make at most so many GMACs."""
    depth = len(model.blocks)
    for total in range(2 * model.patch_embed.num_patches):        # a block merges at most half of its tokens
        reductions = [total * (i + 1) // depth - total * i // depth for i in range(depth)]
        if macs(TokenMerging(model, reductions), input_size) <= gmacs:
            return reductions
    raise InputError(f'no schedule has {gmacs} GMACs')


def main(argv=None):
    args = curve.parse_args(sys.argv[1:] if argv is None else argv)
    if not (args.keep_rates and args.resume):
        raise InputError('give --resume CHECKPOINT and --keep-rates')
    device = init_process_group(args.device)
    loader, _ = curve.build_loaders(args, device)
    model = curve.build_model(args, loader.dataset, device)
    if not isinstance(model, EViT):
        raise InputError(f'{args.model} is no VisionTransformer of timm, which alone is served here')
    model, amp_dtype = with_way(model, 'merge'), choose_amp_dtype(args.amp_dtype, device)
    for rate in args.keep_rates:
        to_evit(model, rate)
        gmacs = macs(model, args.input_size)
        merging = TokenMerging(model, reductions_of(model, gmacs, args.input_size))
        theirs, ours = paired_throughput([merging, model], args.input_size, args.batch_size, device, amp_dtype,
                                         windows=15, window_seconds=0.3)
        print(f'keep rate {rate}: {gmacs:.4f} GMACs; Token Merging {merging.reductions}: '
              f'{macs(merging, args.input_size):.4f} GMACs, {theirs.ratio_to(ours):.3f} times the images/s', flush=True)
        evaluate(merging, loader, device=device, amp_dtype=amp_dtype, print_freq=args.print_freq)


def run(argv=None):
    """The program, on a command line, by default that of the process."""
    run_program('token_merging.py', main, argv)
