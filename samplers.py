"""Which sample each process sees at which position."""
from itertools import islice

from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DistributedSampler, Sampler


class TrainSampler(Sampler):
    """A process's share of an epoch; yields (index, key) for a `SeededDataset`.

    The key is (seed, epoch, position in the epoch over all processes). A single process is the case num_replicas = 1.

    Args:
        dataset: only its length is read.
        num_replicas, rank: number of processes, and number of this one.
        seed: seed of the run.
        repeated_aug: each image three times per epoch, which covers a third of the images, with the copies spread over
            the processes (repeated augmentation, as in DeiT); otherwise each image once.
    """

    def __init__(self, dataset, num_replicas, rank, seed=0, repeated_aug=False):
        if repeated_aug:
            # DeiT rounds an epoch down to a multiple of 256 images, which would be 0 for a small data set
            selected_round = 256 if len(dataset) >= 256 else 0
            self.order = RepeatAugSampler(dataset, num_replicas, rank, selected_round=selected_round)
        else:
            self.order = DistributedSampler(dataset, num_replicas, rank)
        self.num_replicas, self.rank, self.seed = num_replicas, rank, seed
        self.set_epoch(0)

    def set_epoch(self, epoch, start=0):
        """Start an epoch without this process's first `start` samples, which it has seen before (see `Trainer`)."""
        self.epoch, self.start = epoch, start
        self.order.set_epoch(self.seed + epoch)

    def __iter__(self):
        for i, index in islice(enumerate(self.order), self.start, None):
            yield index, (self.seed, self.epoch, i * self.num_replicas + self.rank)

    def __len__(self):
        return len(self.order)


class EvalSampler(Sampler):
    """A process's share of a data set; every sample is in exactly one share.

    (torch's DistributedSampler repeats samples to make the shares equal.)
    """

    def __init__(self, dataset, num_replicas, rank):
        self.indices = range(rank, len(dataset), num_replicas)

    def skip(self, samples):
        """Leave out the first samples of this share."""
        self.indices = self.indices[samples:]

    def __iter__(self):
        return iter(self.indices)

    def __len__(self):
        return len(self.indices)
