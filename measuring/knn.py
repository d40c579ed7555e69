"""Weighted k-nearest-neighbour classification of features, for backbones without a trained head."""
import math

import torch
import torch.nn.functional as F

from runtime.distributed import all_reduce, rank, world_size
from runtime.logger import Progress
from runtime.utils import autocast

TEMPERATURE = 0.07                                     # of the votes' weights, as in the protocol of DINO (ICCV 2021)
LEAST_SHARE = 1e-8                                     # of the votes, in the loss
CHUNK = 2 ** 16                                        # features of the bank that are compared at once


def nearest_votes(queries, bank, labels, k, num_classes):
    """The shares of the classes in the votes of the k most similar features (cosine), with weights exp(cosine / 0.07).

    The search is exact, up to the rounding of matrix products; the bank is compared in chunks.

    Args:
        queries: (B, C), normalised.
        bank: (N, C), normalised, N at least k.
        labels: (N,), integers.
    Returns:
        (B, num_classes), float32; each row sums to 1.
    """
    similarities, classes = queries.new_empty(len(queries), 0), labels.new_empty(len(queries), 0)
    for features, their_labels in zip(bank.split(CHUNK), labels.split(CHUNK)):
        similarities = torch.cat([similarities, queries @ features.T], dim=1)
        classes = torch.cat([classes, their_labels.expand(len(queries), -1)], dim=1)
        similarities, places = similarities.topk(min(k, similarities.shape[1]), dim=1)
        classes = classes.gather(1, places)                                            # (B, k)
    weights = (similarities / TEMPERATURE).softmax(dim=1)
    return weights.new_zeros(len(queries), num_classes).scatter_add_(1, classes, weights)      # (B, num_classes)


class Neighbours:
    """A bank of the class token's features of the training images, for each keep rate or for the full model alone.

    Args:
        k: number of neighbours.
        own: whether a row is classified by features of its own way and rate, instead of the full model's.
    """

    def __init__(self, k, own):
        self.k, self.own, self.banks, self.labels = k, own, {}, None

    def key(self, way, rate):
        return (way, rate) if self.own or rate == 1 else ('full', 1.)

    @torch.no_grad()
    def fill(self, models, rows, loader, num_classes, device, amp_dtype, print_freq=50):
        """Compute the features.

        Args:
            models: {way: EViT}, in eval mode.
            rows: [(way, rate)] that will be classified.
            loader: of the training images, without augmentation; each process has its share of them (`EvalSampler`).
        """
        self.num_classes, size = num_classes, len(loader.dataset)
        self.labels = torch.zeros(size, dtype=torch.int64, device=device)
        keys = dict.fromkeys(self.key(*row) for row in rows)               # in the same order in all processes
        self.banks = {key: torch.zeros(size, models[key[0]].embed_dim, device=device) for key in keys}
        progress = Progress('Bank:', len(loader), print_freq, device)
        start = rank()
        for images, labels in loader:
            stop = start + world_size() * len(images)
            self.labels[start:stop:world_size()] = labels
            for (way, rate), bank in self.banks.items():
                with autocast(device, amp_dtype):
                    features = models[way].forward_features(images, rate)[:, 0]        # (B, C)
                bank[start:stop:world_size()] = F.normalize(features.float(), dim=1)
            progress.add_batch(None, len(images))
            start = stop
        for tensor in (self.labels, *self.banks.values()):
            all_reduce(tensor)                         # the others' rows are zero

    def vote(self, features, way, rate):
        """Features (B, C) of images → logits (B, classes): log shares of the neighbours' votes, -inf without a vote."""
        queries, bank = F.normalize(features.float(), dim=1), self.banks[self.key(way, rate)]
        votes = nearest_votes(queries, bank, self.labels, self.k, self.num_classes)
        return votes.clamp(min=LEAST_SHARE).log().masked_fill(votes == 0, -math.inf)


def finite_loss(logits, labels):
    """The mean cross entropy of logits (B, classes), in which a class without a vote has the share 1e-8."""
    return F.cross_entropy(logits.masked_fill(logits == -math.inf, math.log(LEAST_SHARE)), labels)
