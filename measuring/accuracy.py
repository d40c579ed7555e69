"""Accuracy of a batch."""
import math

import torch


def count_correct(logits, labels, loss):
    """The sums of a batch: right at 1, right at 5, loss, images → float64 (4,).

    Args:
        logits: (B, C); -inf for a class that is not among the answers, even if there are fewer than 5.
        labels: (B,).
        loss: their mean loss.
    """
    values, classes = logits.topk(min(5, logits.shape[1]), dim=1)
    correct = (classes == labels.unsqueeze(1)) & (values != -math.inf)
    loss = loss.double() * len(labels)
    return torch.stack([correct[:, 0].sum().double(), correct.sum().double(), loss, torch.full_like(loss, len(labels))])
