"""Which sample a process sees, when."""
from itertools import islice

from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DistributedSampler, Sampler


class TrainSampler(Sampler):
    """A process's share of one epoch, each sample with the key that its augmentation is drawn from.

    Yields (index, key) with key = (seed, epoch, position in the epoch over all processes), for a `SeededDataset`.
    A single process is the case num_replicas = 1.

    Args:
        dataset: of which only the length is read.
        num_replicas, rank: number of processes, and of this one.
        seed: of the run.
        repeated_aug: each image three times in an epoch a third as varied, the copies spread over the processes
            (repeated augmentation, as DeiT has it); else each image once.
    """

    def __init__(self, dataset, num_replicas, rank, seed=0, repeated_aug=False):
        if repeated_aug:
            # DeiT rounds an epoch down to a multiple of 256 images, which would leave a small data set none
            selected_round = 256 if len(dataset) >= 256 else 0
            self.order = RepeatAugSampler(dataset, num_replicas, rank, selected_round=selected_round)
        else:
            self.order = DistributedSampler(dataset, num_replicas, rank)
        self.num_replicas, self.rank, self.seed = num_replicas, rank, seed
        self.set_epoch(0)

    def set_epoch(self, epoch, start=0):
        """Go over to an epoch, of which this process's first `start` samples are left out, because it had them."""
        self.epoch, self.start = epoch, start
        self.order.set_epoch(self.seed + epoch)

    def __iter__(self):
        for i, index in islice(enumerate(self.order), self.start, None):
            yield index, (self.seed, self.epoch, i * self.num_replicas + self.rank)

    def __len__(self):
        return len(self.order)


class EvalSampler(Sampler):
    """A process's share of a data set, every sample in one process only, whatever the sizes.

    (torch's DistributedSampler evens the shares out by counting samples twice.)
    """

    def __init__(self, dataset, num_replicas, rank):
        self.indices = range(rank, len(dataset), num_replicas)

    def __iter__(self):
        return iter(self.indices)

    def __len__(self):
        return len(self.indices)
