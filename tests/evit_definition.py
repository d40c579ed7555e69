"""EViT by definition: one image, one head, one token at a time, with the weights of a model of timm.

Nothing of evit/ is used. From timm come the layers that EViT leaves alone: patch and position
embedding, normalisation, linear layers, MLP and head. Slow; it is run in float64.
"""
import math

import torch


class Token:
    """A vector (C,), the patch that it began as (None: a prefix token or a fused one), and how many patches it counts
    as in the attention and in an average."""

    def __init__(self, vector, patch=None, size=1, counted=1):
        self.vector, self.patch, self.size, self.counted = vector, patch, size, counted


def definition(model, images, keep_rate, drop_loc, way, norm=False):
    """
    Args:
        model: a model of timm, in evaluation mode.
        way: what becomes of the other tokens: 'drop', 'fuse' or 'merge'.
        norm: whether to normalise the maps.
    Returns:
        logits (B, num_classes), maps of each block [(B, C, H, W)], and the patches kept in the last block, [set] * B.
    """
    x = model._pos_embed(model.patch_embed(images))
    x, rope = x if isinstance(x, tuple) else (x, None)
    x = model.norm_pre(x)
    features, tokens, maps = zip(*(one_image(model, one, rope, keep_rate, drop_loc, way, norm) for one in x))
    logits = [head(model, *one) for one in zip(features, tokens)]
    kept = [{token.patch for token in one} - {None} for one in tokens]
    grid = model.patch_embed.dynamic_feat_size(images.shape[-2:])
    return torch.stack(logits), [torch.stack(level).transpose(1, 2).unflatten(2, grid) for level in zip(*maps)], kept


def one_image(model, vectors, rope, keep_rate, drop_loc, way, norm=False):
    """→ the normalised features of all tokens at the end (P + n, C), the n `Token`s, and the maps."""
    num_prefix = model.num_prefix_tokens
    prefix = [Token(vector) for vector in vectors[:num_prefix]]
    tokens = [Token(vector, patch) for patch, vector in enumerate(vectors[num_prefix:])]
    grid = [[token, 0.] for token in tokens]           # of each patch, its token and what it differs from it by
    maps = []
    for i, block in enumerate(model.blocks):
        table = None if rope is None else rope[i] if getattr(model, 'rope_mixed', False) else rope
        post_norm = type(block).__name__ == 'EvaBlockPostNorm'
        both = prefix + tokens
        x = torch.stack([token.vector for token in both])
        branch, attention = attend(block.attn, x if post_norm else block.norm1(x), both, table)
        for token, change in zip(both, scale(block, 1, block.norm1(branch) if post_norm else branch)):
            token.vector = token.vector + change
        if i in drop_loc:
            before, (tokens, heirs) = tokens, reorganize(tokens, attention[num_prefix:], keep_rate, way)
            for patch in grid:
                heir = heirs[before.index(patch[0])]
                patch[:] = heir, patch[1] + patch[0].vector - heir.vector
            for token, heir in zip(before, heirs):     # a kept token goes on with its vector
                assert way == 'merge' or token.patch != heir.patch or token is heir
        both = prefix + tokens
        x = torch.stack([token.vector for token in both])
        branch = block.norm2(block.mlp(x)) if post_norm else block.mlp(block.norm2(x))
        for token, change in zip(both, scale(block, 2, branch)):
            token.vector = token.vector + change
        vectors = [token.vector + delta for token, delta in grid]
        maps.append(torch.stack([model.norm(vector) for vector in vectors] if norm else vectors))
    features = model.norm(torch.stack([token.vector for token in prefix + tokens]))
    return features, tokens, maps


def attend(attn, x, tokens, table):
    """→ the attention's output (n, C), and the class token's attention to each token (n,), the mean over heads."""
    heads, (q, k, v) = attn.num_heads, projections(attn, x)
    head_dim = q.shape[1] // heads
    outputs, rows = [], []
    for h in range(heads):
        own, shared = slice(h * head_dim, (h + 1) * head_dim), h * k.shape[1] // q.shape[1]
        shared = slice(shared * head_dim, (shared + 1) * head_dim)
        queries, keys = attn.q_norm(q[:, own]), attn.k_norm(k[:, shared])
        if table is not None:
            rows_of_head = table if table.ndim == 2 else table[h]
            queries, keys = (torch.stack([
                vector if token.patch is None else rotated(vector, rows_of_head[token.patch], attn.rotate_half)
                for vector, token in zip(vectors, tokens)]) for vectors in (queries, keys))
        # A merged token counts as often as it has patches: e^(l + log s) = s · e^l
        logits = queries @ keys.T / math.sqrt(head_dim) + x.new_tensor([math.log(token.size) for token in tokens])
        weights = torch.softmax(logits, dim=1)
        outputs.append(weights @ v[:, shared])
        rows.append(weights[0])
    return attn.proj(attn.norm(torch.cat(outputs, dim=1))), sum(rows) / heads


def projections(attn, x):
    if attn.qkv is None:
        return attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    q, k, v = (x @ weight.T for weight in attn.qkv.weight.chunk(3))
    if attn.qkv.bias is not None:
        biases = attn.qkv.bias.chunk(3)
    elif getattr(attn, 'q_bias', None) is not None:
        biases = attn.q_bias, 0, attn.v_bias
    else:
        biases = 0, 0, 0
    return q + biases[0], k + biases[1], v + biases[2]


def rotated(vector, row, halves):
    """Turn each pair of components by the pair's angle; a pair is (i, i + D/2) or (2i, 2i + 1)."""
    dim = len(vector)
    sines, cosines = row[:dim], row[dim:]
    result = [None] * dim
    for i in range(dim // 2):
        a, b = (i, i + dim // 2) if halves else (2 * i, 2 * i + 1)
        result[a] = vector[a] * cosines[a] - vector[b] * sines[a]
        result[b] = vector[b] * cosines[b] + vector[a] * sines[b]
    return torch.stack(result)


def scale(block, number, branch):
    """LayerScale, whatever its name, or the constant of an LV-ViT."""
    layer = getattr(block, f'ls{number}', None)
    if hasattr(layer, 'factor'):
        return branch * layer.factor
    gamma = getattr(block, f'gamma_{number}', None) if layer is None else getattr(layer, 'gamma', None)
    return branch if gamma is None else branch * gamma


def reorganize(tokens, scores, keep_rate, way):
    """→ the tokens that go on, and for each of the given ones that which stands for it from now on."""
    k = math.ceil(keep_rate * len(tokens))
    if way == 'merge':
        return merge(tokens, k)
    best_first = sorted(range(len(tokens)), key=lambda i: -scores[i].item())
    kept, others = best_first[:k], best_first[k:]
    result = [tokens[i] for i in kept]
    heirs = [token if i in kept else max(result, key=lambda one: cosine(one, token)) for i, token in enumerate(tokens)]
    if way == 'fuse' and others:
        result.append(Token(sum(scores[i] * tokens[i].vector for i in others),
                            counted=sum(tokens[i].counted for i in others)))
    return result, heirs


def merge(tokens, k):
    """Every second token looks for its nearest among the rest, or all but k for one of k; the most similar leave."""
    N, T = len(tokens), min(k, len(tokens) // 2)
    targets = [(2 * i + 1) * N // (2 * T) for i in range(T)]
    nearest = {i: max(targets, key=lambda j: cosine(tokens[i], tokens[j])) for i in range(N) if i not in targets}
    least_similar_first = sorted(nearest, key=lambda i: cosine(tokens[i], tokens[nearest[i]]))
    staying, leaving = least_similar_first[:k - T], least_similar_first[k - T:]
    heirs = {i: tokens[i] for i in staying}
    for j in targets:
        parts = [tokens[j], *(tokens[i] for i in leaving if nearest[i] == j)]
        size = sum(part.size for part in parts)
        heirs[j] = Token(sum(part.size * part.vector for part in parts) / size, tokens[j].patch, size, size)
    result = [heirs[i] for i in [*staying, *targets]]
    return result, [heirs[nearest[i] if i in leaving else i] for i in range(N)]


def cosine(one, other):
    return torch.cosine_similarity(one.vector, other.vector, dim=0).item()


def head(model, features, tokens):
    num_prefix = model.num_prefix_tokens
    if hasattr(model, 'head_dist'):
        return (model.head(features[0]) + model.head_dist(features[1])) / 2
    if getattr(model, 'attn_pool', None) is not None:  # in which a merged token counts as often as it has patches
        repeats = torch.tensor(num_prefix * [1] + [token.size for token in tokens])
        return model.forward_head(features.repeat_interleave(repeats, dim=0)[None])[0]
    if model.global_pool != 'avg':
        return model.forward_head(features[None])[0]
    counted = num_prefix * [1] + [token.counted for token in tokens]
    first = 0 if getattr(model, 'pool_include_prefix', False) else num_prefix
    mean = sum(n * vector for n, vector in zip(counted[first:], features[first:])) / sum(counted[first:])
    return model.head(model.fc_norm(mean))
