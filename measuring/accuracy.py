"""Accuracy of a batch."""
import torch


def count_correct(logits, labels, loss):
    """The sums of a batch: right at 1, right at 5, loss, images → float64 (4,).

    Args:
        logits: (B, C).
        labels: (B,).
        loss: their mean loss.
    """
    correct = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)
    loss = loss.double() * len(labels)
    return torch.stack([correct[:, 0].sum().double(), correct.sum().double(), loss, torch.full_like(loss, len(labels))])
