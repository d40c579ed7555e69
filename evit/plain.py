"""EViT written the plain way: the baseline that benchmarks measure beside ours, the oracle of the tests."""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class PlainEViT(nn.Module):
    """An EViT with explicit attention: every block forms the (N, N) matrix; tokens to drop are sorted, then gathered.

    Args:
        model: an EViT; its weights and settings are shared, not copied.
    Raises:
        ValueError: it ranks or treats its tokens in a way that is not in the paper.
    """
    SERVED = {('class_attention', 'drop'), ('class_attention', 'fuse')}

    def __init__(self, model):
        super().__init__()
        settings = model.token_settings
        if (settings.score, settings.way) not in self.SERVED:
            raise ValueError(f'the plain EViT has no score {settings.score} with way {settings.way}')
        self.model = model

    def forward(self, x, keep_rate=None):
        """Images (B, 3, H, W) → logits (B, num_classes); `keep_rate` as in the model's own forward."""
        model, prefix = self.model, self.model.num_prefix_tokens
        fuse = model.token_settings.way == 'fuse'
        x = model._pos_embed(model.patch_embed(x))                                     # (B, P + N, C)
        for block, rate in zip(model.blocks, model.block_keep_rates(keep_rate)):
            output, attention = self.attend(block.attn, block.norm1(x))
            x = x + block.ls1(output)
            num_tokens = x.shape[1] - prefix
            k = math.ceil(rate * num_tokens)
            if k < num_tokens:
                scores = attention[:, :, 0, prefix:].mean(dim=1)                       # (B, N)
                x = torch.cat([x[:, :prefix], self.reorganize(x[:, prefix:], scores, k, fuse)], dim=1)
            mlp = block.mlp
            x = x + block.ls2(mlp.fc2(F.gelu(mlp.fc1(block.norm2(x)))))
        return model.forward_head(model.norm(x))

    @staticmethod
    def attend(attn, x):
        """Tokens (B, N, C) → output (B, N, C) and attention (B, H, N, N) of the attention module `attn`."""
        B, N, C = x.shape
        q, k, v = attn.qkv(x).reshape(B, N, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        attention = (attn.q_norm(q) @ attn.k_norm(k).transpose(-2, -1) * attn.scale).softmax(dim=-1)
        return attn.proj((attention @ v).transpose(1, 2).reshape(B, N, C)), attention

    @staticmethod
    def reorganize(tokens, scores, k, fuse):
        """Tokens (B, N, C), scores (B, N) → the k best tokens (B, k, C), with `fuse` a fused one last (B, k + 1, C)."""
        order = scores.argsort(dim=1, descending=True)
        tokens = tokens.gather(1, order.unsqueeze(-1).expand_as(tokens))
        if not fuse:
            return tokens[:, :k]
        weights = scores.gather(1, order[:, k:]).unsqueeze(-1)
        return torch.cat([tokens[:, :k], (weights * tokens[:, k:]).sum(dim=1, keepdim=True)], dim=1)
