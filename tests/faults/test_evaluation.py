"""--dist-eval: for any data set size and number of processes, the figures equal those of one process."""
import json

import pytest
import timm
import torch
from torch.utils.data import Subset

from datasets import build_dataset, build_loader
from engine import evaluate
from runs import Forked
from runtime.distributed import init_process_group, leave_process_group, rank, world_size
from runtime.utils import seed_all
from samplers import EvalSampler

SIZES = 1, 2, 3, 5, 97, 101, 360
BATCH = 8                                              # gives last batches of various sizes


def evaluate_all_sizes(path):
    """Evaluate the same model on subsets of the digits. The first process of the group writes the figures to `path`."""
    device = init_process_group('cpu')
    seed_all(0)
    model = timm.create_model('deit_tiny_patch16_shrink_base', num_classes=10, img_size=32, base_keep_rate=0.7)
    dataset = build_dataset(False, input_size=32)
    figures = []
    for size in SIZES:
        subset = Subset(dataset, range(size))
        loader = build_loader(subset, EvalSampler(subset, world_size(), rank()), BATCH, device)
        figures.append(evaluate(model, loader, device=device, amp_dtype=torch.float32, sharded=True))
    if rank() == 0:
        path.write_text(json.dumps(figures))
    leave_process_group()


def test_uneven_shares(tmp_path, table):
    figures = {}
    for processes in (1, 2, 3):
        path = tmp_path / f'{processes}.json'
        with Forked(lambda rank: evaluate_all_sizes(path), processes) as run:
            assert run.finish() == [0] * processes, str(run)
        figures[processes] = json.loads(path.read_text())
    for size, one, *others in zip(SIZES, *figures.values()):
        assert one['images'] == size and 0 < one['loss'] < 5
        for other in others:
            assert {**other, 'loss': None} == {**one, 'loss': None}
            assert other['loss'] == pytest.approx(one['loss'], rel=0, abs=1e-6)
    assert len({one['acc1'] for one in figures[1]}) > 3                                # figures depend on the size
    table(len(SIZES) * len(figures), f'evaluation of {", ".join(map(str, SIZES))} images by 1, 2 and 3 processes')
