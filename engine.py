"""One pass over a data set: an epoch of training, with its keep rate, or an evaluation."""
import contextlib
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

from evit.eval_mode import eval_mode
from measuring.accuracy import count_correct
from runtime.compiled_model import CompiledModel
from runtime.distributed import all_reduce, broadcast, log, rank, share_buffers
from runtime.logger import Progress
from runtime.utils import autocast, seed_all


def keep_rate_at(step, steps_per_epoch, start_epoch, shrink_epochs, base_keep_rate):
    """The keep rate at a training step, counted from the start of the run (§4.1, "warmup").

    It is 1 before `start_epoch`, falls along half a cosine over `shrink_epochs`, then stays at `base_keep_rate`.
    """
    start, length = start_epoch * steps_per_epoch, shrink_epochs * steps_per_epoch
    if step < start:
        return 1.
    if step >= start + length:
        return base_keep_rate
    return base_keep_rate + (1 - base_keep_rate) * (1 + math.cos(math.pi * (step - start) / length)) / 2


def train_one_epoch(model, criterion, loader, optimizer, epoch, *, device, scaler, amp_dtype, seed, keep_rate=None,
                    erase=None, mixup=None, token_labeling=None, model_ema=None, clip_grad=None, accum_steps=1,
                    skip_nonfinite=0, print_freq=50, state=None, after_update=None, epochs=1, log_step=None):
    """Train for one epoch, or the rest of it, in the mode (train or eval) that the model is in.

    Args:
        loader: yields the remaining batches (images, labels) on the device; the images are modified in place. With
            token labels, their maps and boxes follow.
        criterion: (images, outputs, labels) → loss.
        scaler: torch.amp.GradScaler, disabled unless amp_dtype is float16.
        keep_rate: step of the epoch → keep rate for the model; None for a model without one.
        erase, mixup: images → images; (images, labels) → (mixed images, soft labels).
        token_labeling: a `TokenLabeling`, for an LV-ViT; None for a criterion of the logits alone.
        model_ema: timm's ModelEmaV3.
        accum_steps: batches whose mean gradient makes one update; the last update of the epoch may have fewer.
        skip_nonfinite: consecutive updates with a non-finite loss to skip before failing. If it is not 0, each update
            waits for its loss. A skipped one leaves no trace in the running statistics of batch norm either.
        state: `Progress.state_dict` of the part of the epoch that is done.
        after_update: called with the Progress after each update but the last.
        epochs, log_step: how many the run has; called with step and figures, a dict, at each line on the console.
    Returns:
        The Progress of the epoch. Its summary has the mean loss and images_per_second over all processes, loader_wait,
        the means of the scalars (lr, keep_rate), and skipped_steps if there were any.
    Raises:
        FloatingPointError: a weight after the last step is not finite, or a loss, which without `skip_nonfinite` is
            noticed only where it is logged or saved, so that no step waits for the device.
    """
    progress = Progress(f'Epoch: [{epoch}/{epochs}]', len(loader), print_freq, device, True, state, log_step)
    guard = NonfiniteGuard(model, optimizer) if skip_nonfinite else None
    for step, (images, labels, *token_labels) in enumerate(progress.batches_of(loader), start=progress.step):
        # For erasing, mixup, MixToken, dropout, drop path. The 1 keeps these keys apart from those of TrainSampler
        seed_all(seed, epoch, step, 1 + rank())
        images, labels, options = augment(images, labels, token_labels, erase, mixup, token_labeling)
        rate = {} if keep_rate is None else {'keep_rate': keep_rate(step)}
        first = step - step % accum_steps                                  # first batch of this update
        batches = min(accum_steps, len(loader) - first)
        is_last = step + 1 == first + batches
        if guard and step == first:
            guard.start_update()
        with contextlib.nullcontext() if is_last or not hasattr(model, 'no_sync') else model.no_sync():
            with autocast(device, amp_dtype):
                loss = criterion(images, model(images, **rate, **options), labels)
            counts = guard is None or guard.accepts(loss)
            if counts:
                scaler.scale(loss / batches).backward()
        scalars = {'lr': optimizer.param_groups[0]['lr'], **rate}          # for console, log.txt and TensorBoard alike
        progress.add_batch(loss.detach(), len(images), counts=counts, **scalars)
        if not is_last:
            continue
        if counts:
            update_weights(model, optimizer, scaler, clip_grad, model_ema)
            progress.skipped_in_a_row = 0
        else:
            guard.undo_update()
            progress.skip(skip_nonfinite)
        if after_update is not None and progress.step < len(loader):
            after_update(progress)
    check_weights(model, progress.title)
    return progress


def augment(images, labels, token_labels, erase=None, mixup=None, token_labeling=None):
    """What happens to a batch on the device; → images, labels for the criterion, further arguments of the model.

    The arguments are those of `train_one_epoch`; `token_labels` follow images and labels in the loader's batches.
    """
    if erase is not None:
        images = erase(images)
    if mixup is not None:
        images, labels = mixup(images, labels)
    if token_labeling is None:
        return images, labels, {}
    targets, mixed = token_labeling(labels, *token_labels)
    return images, targets, {'mixed': mixed}


def update_weights(model, optimizer, scaler, clip_grad, model_ema):
    """One step of the optimizer, then of the moving average."""
    if clip_grad is not None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    if model_ema is not None:
        model_ema.update(model)


class NonfiniteGuard:
    """Lets an update be skipped, in all processes, from the first of its losses on that is not finite in any."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer

    def start_update(self):
        self.skips = False
        self.buffers = [buffer.clone() for buffer in self.model.buffers()]

    def accepts(self, loss):
        """Whether this and all earlier losses of the update are finite; waits for the device."""
        self.skips |= not all_reduce(loss.detach().isfinite().int(), dist.ReduceOp.MIN)
        return not self.skips

    def undo_update(self):
        """Drop the gradients; the buffers, such as running statistics of batch norm, become what they were."""
        self.optimizer.zero_grad()
        for buffer, before in zip(self.model.buffers(), self.buffers):
            buffer.copy_(before)


def check_weights(model, title):
    """Raise FloatingPointError unless all weights are finite."""
    if not torch.nn.utils.get_total_norm(model.parameters()).isfinite():
        raise FloatingPointError(f'{title} the last step left weights that are not finite; '
                                 'try a lower --lr, --clip-grad, or --amp-dtype float32')


@torch.no_grad()
def evaluate(model, loader, *, device, amp_dtype, compiled=False, sharded=False, print_freq=50, after_batch=None,
             average=None):
    """Accuracy and cross entropy of a model, in eval mode, over a whole data set; prints them.

    Args:
        compiled: whether to compile the model, see CompiledModel.
        sharded: the loader yields only this process's share, and the sums over all processes make the figures. If it
            is False, the figures of the first process count for all.
        after_batch: called after each batch, as long as every process has one.
        average: the moving average of the model, to evaluate on the same batches.
    Returns:
        Dict of acc1 and acc5 in percent, loss, and the number of images; with `average`, ema_acc1 and so on.
    """
    models = {'': model} if average is None else {'': model, 'ema_': average}
    runs = [CompiledModel(one, device) if compiled else one for one in models.values()]
    totals = torch.zeros(len(runs), 4, dtype=torch.float64, device=device)             # of each, see `count_correct`
    progress = Progress('Test:', len(loader), print_freq, device)
    if sharded:
        for one in models.values():
            share_buffers(one)
    common_batches = int(all_reduce(torch.tensor(len(loader), device=device), dist.ReduceOp.MIN))
    with eval_mode(*runs):
        for images, labels in loader:
            losses = []
            for run, sums in zip(runs, totals):
                with autocast(device, amp_dtype):
                    logits = run(images).float()                           # (B, C)
                losses.append(F.cross_entropy(logits, labels))
                sums += count_correct(logits, labels, losses[-1])
            progress.add_batch(losses[0], len(images))
            if after_batch is not None and progress.step <= common_batches:
                after_batch()
    stats = {}
    for prefix, sums in zip(models, (all_reduce(totals) if sharded else broadcast(totals)).tolist()):
        correct1, correct5, loss_sum, images = sums
        acc1, acc5, loss = 100 * correct1 / images, 100 * correct5 / images, loss_sum / images
        log(f'* Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} loss {loss:.3f}')
        log(f'Accuracy of the {prefix.upper().replace("_", " ")}network on the {int(images)} test images: {acc1:.2f}%')
        stats |= {f'{prefix}acc1': acc1, f'{prefix}acc5': acc5, f'{prefix}loss': loss, f'{prefix}images': int(images)}
    return stats
