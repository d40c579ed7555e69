import contextlib
import copy
import math
import random
import types

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset, default_collate

from conftest import reference
from engine import evaluate, keep_rate_at, train_one_epoch
from outputs import assert_same, timeless

CPU = torch.device('cpu')


@pytest.mark.parametrize('row', reference('training.json')['keep_rate_schedule'], ids=lambda row: '-'.join(
    str(row[key]) for key in ('warmup_epochs', 'total_epochs', 'iters')))
def test_keep_rate_of_the_original(row):
    rate = keep_rate_at(row['iters'], row['iters_per_epoch'], row['warmup_epochs'],
                        row['total_epochs'] - row['warmup_epochs'], row['base_keep_rate'])
    assert rate == pytest.approx(row['keep_rate'], abs=1e-12)


class Logits(torch.nn.Module):
    """A model that takes logits as images and scales them."""

    def __init__(self, num_classes):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(num_classes))

    def forward(self, x):
        return x * self.scale


@pytest.mark.parametrize('num_classes', [3, 12])
def test_evaluate_against_a_naive_loop(num_classes):
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


def test_model_and_average_in_one_pass(capsys):
    generator = torch.Generator().manual_seed(0)
    dataset = TensorDataset(torch.randn(40, 3, generator=generator), torch.arange(40) % 3)
    model, average, batches = Logits(3), Logits(3), []
    average.scale.data = torch.tensor([1., -1., 0.5])
    options = dict(device=CPU, amp_dtype=torch.float32)
    loader = DataLoader(dataset, 16, collate_fn=lambda batch: batches.append(0) or default_collate(batch))
    both = evaluate(model, loader, average=average, **options)
    printed = capsys.readouterr().out.splitlines()
    one, other = (evaluate(single, DataLoader(dataset, 16), **options) for single in (model, average))
    assert len(batches) == 3 and both == one | {f'ema_{name}': value for name, value in other.items()}
    assert [line.partition(' on the 40')[0] for line in printed if line.startswith('Accuracy')] == [
        'Accuracy of the network', 'Accuracy of the EMA network']


@pytest.mark.parametrize('sharded', [False, True])
def test_figures_of_several_processes(sharded, monkeypatch):
    """With `sharded`, the figures are sums over all processes. Otherwise they are those of the first process."""
    def of_others(factor):
        return lambda tensor, *_: tensor.mul_(factor) if tensor.dtype == torch.float64 else tensor

    monkeypatch.setattr('engine.all_reduce', of_others(3))
    monkeypatch.setattr('engine.broadcast', of_others(2))
    loader = DataLoader(TensorDataset(torch.eye(4), torch.arange(4)), 2)
    models, shared = [Logits(4), Logits(4)], []        # the model, its average
    monkeypatch.setattr('engine.share_buffers', shared.append)
    stats = evaluate(models[0], loader, device=CPU, amp_dtype=torch.float32, sharded=sharded, average=models[1])
    assert stats['images'] == stats['ema_images'] == (12 if sharded else 8) and stats['acc1'] == 100
    assert shared == (models if sharded else [])       # which have drifted apart since the last step


def train_epoch(model, loader, seed=0, **kwargs):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return train_one_epoch(
        model, lambda images, outputs, labels: torch.nn.functional.cross_entropy(outputs, labels), loader, optimizer,
        epoch=0, device=CPU, scaler=torch.amp.GradScaler('cpu', enabled=False), amp_dtype=torch.float32, seed=seed,
        **kwargs).summary()


def test_gradient_descent_against_a_naive_loop():
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


def test_keep_rate_of_each_step():
    rates = []

    class Model(Logits):
        def forward(self, x, keep_rate=None):
            rates.append(keep_rate)
            return super().forward(x)

    loader = DataLoader(TensorDataset(torch.zeros(6, 3), torch.zeros(6, dtype=torch.long)), 2)
    stats = train_epoch(Model(3), loader, keep_rate=lambda step: 1 - step / 10)
    assert rates == [1, 0.9, 0.8] and stats['keep_rate'] == pytest.approx(0.9)             # the mean


def test_non_finite_loss():
    with pytest.raises(FloatingPointError, match=r'Epoch: \[0\].*loss of step 3 is not finite.*--lr'):
        train_epoch(Logits(3), broken_batches(10, {2, 5}))


def broken_batches(number, broken):
    """`number` batches of one image. Those whose index is in `broken` contain a NaN."""
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(1, 3, generator=generator), torch.tensor([i % 3])) for i in range(number)]
    for i in broken:
        batches[i][0][0, 1] = float('nan')
    return batches


@pytest.mark.parametrize('accum_steps, left_out', [(1, {2, 5}), (2, {2, 3, 4, 5})])
def test_skipped_updates(accum_steps, left_out, capsys):
    model, expected, batches = Logits(3), Logits(3), broken_batches(10, {2, 5})
    stats = train_epoch(model, batches, skip_nonfinite=2, accum_steps=accum_steps)
    kept = [batch for i, batch in enumerate(batches) if i not in left_out]
    train_epoch(expected, kept, accum_steps=accum_steps)
    assert torch.equal(model.scale, expected.scale) and stats['skipped_steps'] == 2 and math.isfinite(stats['loss'])
    assert f'step {2 + accum_steps} is left out' in capsys.readouterr().out


@pytest.mark.parametrize('accum_steps', [1, 2])
def test_running_statistics_of_skipped_updates(accum_steps):
    """Batch norm is as if their batches had not been there."""
    torch.manual_seed(0)
    batches = [(torch.randn(2, 3), torch.tensor([0, 1])) for _ in range(6)]
    models = [torch.nn.Sequential(torch.nn.BatchNorm1d(3)) for _ in range(2)]
    batches[3][0][0, 1] = float('nan')
    for model in models:
        model.train()
    train_epoch(models[0], batches, skip_nonfinite=1, accum_steps=accum_steps)
    train_epoch(models[1], batches[:3 // accum_steps * accum_steps] + batches[4:], accum_steps=accum_steps)
    assert_same(dict(models[0].state_dict()), dict(models[1].state_dict()))


def test_limit_of_skipped_updates():
    train_epoch(Logits(3), broken_batches(10, {2, 3, 5, 6}), skip_nonfinite=2)
    with pytest.raises(FloatingPointError, match='step 5 the loss is not finite 3 times in a row'):
        train_epoch(Logits(3), broken_batches(10, {2, 3, 4, 6}), skip_nonfinite=2)


def test_rest_of_an_epoch():
    batches, states = broken_batches(10, {3, 4, 8}), {}
    model, copies = Logits(3), {}

    def keep(progress):
        states[progress.step] = progress.state_dict()
        copies[progress.step] = copy.deepcopy(model)

    whole = train_epoch(model, batches, skip_nonfinite=2, accum_steps=2, after_update=keep)
    assert list(states) == [2, 4, 6, 8]
    for step, state in states.items():
        class Rest(list):
            def __len__(self):
                return len(batches)

        part = train_epoch(copies[step], Rest(batches[step:]), skip_nonfinite=2, accum_steps=2, state=state)
        assert torch.equal(copies[step].scale, model.scale)
        assert timeless(part) == timeless(whole)


def test_waiting_for_the_loader(monkeypatch, capsys):
    """A batch takes 3 s, a step 1 s; of the first batch, whose workers start, the time is not counted."""
    class Slow(list):
        def __iter__(self):
            for batch in super().__iter__():
                clock[0] += 3
                yield batch

    clock = [0.]
    monkeypatch.setattr('runtime.logger.time.perf_counter', lambda: clock[0])
    model = Logits(3)
    model.register_forward_hook(lambda *_: clock.append(clock.pop() + 1))
    stats = train_epoch(model, Slow(4 * [(torch.ones(2, 3), torch.tensor([0, 1]))]), print_freq=2)
    assert stats['loader_wait'] == pytest.approx(9 / 16)
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ['0.38', '0.56']


def test_non_finite_weight():
    """The loss of the last step is still finite, but the updated weights are not and must not be saved."""
    class Overflowing(Logits):
        def forward(self, x):
            return x * torch.sqrt(self.scale - 1)                                      # the gradient at 0 is infinite

    loader = DataLoader(TensorDataset(torch.ones(4, 3), torch.zeros(4, dtype=torch.long)), 4)
    with pytest.raises(FloatingPointError, match=r'Epoch: \[0\].*weights that are not finite.*--lr'):
        train_epoch(Overflowing(3), loader)


def test_erasing_before_mixup():
    """Erasing fills each batch with a random constant that depends on the seed. Mixup receives the erased images."""
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


def test_accumulated_steps():
    """With 5 batches and two per update, the last update has one batch. Processes synchronise only at updates."""
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
