import contextlib
import random
import types

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from conftest import reference
from engine import evaluate, keep_rate_at, train_one_epoch

CPU = torch.device('cpu')


@pytest.mark.parametrize('row', reference('training.json')['keep_rate_schedule'], ids=lambda row: '-'.join(
    str(row[key]) for key in ('warmup_epochs', 'total_epochs', 'iters')))
def test_keep_rate_is_the_originals(row):
    rate = keep_rate_at(row['iters'], row['iters_per_epoch'], row['warmup_epochs'],
                        row['total_epochs'] - row['warmup_epochs'], row['base_keep_rate'])
    assert rate == pytest.approx(row['keep_rate'], abs=1e-12)


class Logits(torch.nn.Module):
    """A model whose images are its logits."""

    def __init__(self, num_classes):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(num_classes))

    def forward(self, x):
        return x * self.scale


@pytest.mark.parametrize('num_classes', [3, 12])
def test_evaluate_against_a_loop(num_classes):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(101, num_classes, generator=generator)
    labels = torch.randint(num_classes, (101,), generator=generator)
    model = Logits(num_classes).train()
    stats = evaluate(model, DataLoader(TensorDataset(logits, labels), 16), device=CPU, amp_dtype=torch.float32)
    ranks = [int((row > row[label]).sum()) for row, label in zip(logits, labels)]
    assert stats['acc1'] == pytest.approx(100 * sum(rank < 1 for rank in ranks) / 101)
    assert stats['acc5'] == pytest.approx(100 * sum(rank < 5 for rank in ranks) / 101)
    loss = sum(row.logsumexp(0) - row[label] for row, label in zip(logits.double(), labels)) / 101
    assert stats['loss'] == pytest.approx(loss.item(), rel=1e-6)
    assert stats['images'] == 101 and model.training


def train_epoch(model, loader, seed=0, **kwargs):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return train_one_epoch(
        model, lambda images, outputs, labels: torch.nn.functional.cross_entropy(outputs, labels), loader, optimizer,
        epoch=0, device=CPU, scaler=torch.amp.GradScaler('cpu', enabled=False), amp_dtype=torch.float32, seed=seed,
        **kwargs)


def test_train_one_epoch_is_plain_gradient_descent():
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(8, 3, generator=generator), torch.arange(8) % 3
    model, expected = Logits(3), torch.ones(3, requires_grad=True)
    stats = train_epoch(model, DataLoader(TensorDataset(images, labels), 4), clip_grad=0.05)
    losses = []
    for x, y in zip(images.split(4), labels.split(4)):
        loss = torch.nn.functional.cross_entropy(x * expected, y)
        gradient, = torch.autograd.grad(loss, expected)
        gradient *= min(1, 0.05 / (gradient.norm() + 1e-6))
        expected = (expected - 0.1 * gradient).detach().requires_grad_()
        losses.append(loss.item())
    torch.testing.assert_close(model.scale, expected)
    assert stats['loss'] == pytest.approx(sum(losses) / 2) and stats['lr'] == 0.1


def test_keep_rate_of_each_step_reaches_the_model():
    rates = []

    class Model(Logits):
        def forward(self, x, keep_rate=None):
            rates.append(keep_rate)
            return super().forward(x)

    loader = DataLoader(TensorDataset(torch.zeros(6, 3), torch.zeros(6, dtype=torch.long)), 2)
    stats = train_epoch(Model(3), loader, keep_rate=lambda step: 1 - step / 10)
    assert rates == [1, 0.9, 0.8] and stats['keep_rate'] == 0.8


def test_a_loss_that_is_not_finite_stops_the_run():
    loader = DataLoader(TensorDataset(torch.full((4, 3), float('nan')), torch.zeros(4, dtype=torch.long)), 2)
    with pytest.raises(FloatingPointError, match=r'Epoch: \[0\].*nan by step 2.*--lr'):
        train_epoch(Logits(3), loader)


def test_a_weight_that_is_not_finite_stops_the_run():
    """Where the last step's loss was still finite, and the state would be saved."""
    class Overflowing(Logits):
        def forward(self, x):
            return x * torch.sqrt(self.scale - 1)                                      # the gradient at 0 is infinite

    loader = DataLoader(TensorDataset(torch.ones(4, 3), torch.zeros(4, dtype=torch.long)), 4)
    with pytest.raises(FloatingPointError, match=r'Epoch: \[0\].*weights that are not finite.*--lr'):
        train_epoch(Overflowing(3), loader)


def test_erasing_comes_first_and_is_drawn_from_the_step():
    """A constant, so that the learning of a step depends on nothing else; mixup sees what erasing made."""
    def run(seed):
        drawn = []

        def erase(images):
            drawn.append(random.random())
            return torch.full_like(images, drawn[-1])

        def mixup(images, labels):
            assert (images == drawn[-1]).all()
            return images + 1, labels

        model = Logits(3)
        model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0, 0].item()))
        seen = []
        loader = DataLoader(TensorDataset(torch.zeros(6, 3), torch.zeros(6, dtype=torch.long)), 2)
        train_epoch(model, loader, erase=erase, mixup=mixup, seed=seed)
        assert seen == pytest.approx([1 + value for value in drawn])
        return drawn

    assert run(0) == run(0) and len(set(run(0) + run(1))) == 6


def test_accumulated_steps_are_one_step_of_a_larger_batch():
    """Of 5 batches of 2, two make an update, and the last one alone; processes meet only where there is one."""
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(10, 3, generator=generator), torch.arange(10) % 3)
    model, expected, apart = Logits(3), Logits(3), []

    @contextlib.contextmanager
    def no_sync():
        apart.append(True)
        yield

    model.no_sync = no_sync
    averages = types.SimpleNamespace(calls=0)
    averages.update = lambda _: setattr(averages, 'calls', averages.calls + 1)
    stats = train_epoch(model, DataLoader(data, 2), accum_steps=2, clip_grad=0.3, model_ema=averages)
    for batch in (slice(0, 4), slice(4, 8), slice(8, 10)):
        train_epoch(expected, [data[batch]], clip_grad=0.3)
    torch.testing.assert_close(model.scale, expected.scale)
    assert len(apart) == 2 and averages.calls == 3 and stats['images_per_second'] > 0
