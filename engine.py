"""One epoch of training, one evaluation, and the schedule of the keep rate."""
import contextlib
import math

import torch
import torch.nn.functional as F

from utils import Progress, all_reduce_sum, autocast, eval_mode, log, rank, seed_all


def keep_rate_at(step, steps_per_epoch, start_epoch, shrink_epochs, base_keep_rate):
    """The keep rate of training at a step, counted over the whole run (§4.1, "warmup").

    1 before `start_epoch`, then half a cosine down over `shrink_epochs`, then `base_keep_rate`.
    """
    start, length = start_epoch * steps_per_epoch, shrink_epochs * steps_per_epoch
    if step < start:
        return 1.
    if step >= start + length:
        return base_keep_rate
    return base_keep_rate + (1 - base_keep_rate) * (1 + math.cos(math.pi * (step - start) / length)) / 2


def train_one_epoch(model, criterion, loader, optimizer, epoch, *, device, scaler, amp_dtype, seed, keep_rate=None,
                    erase=None, mixup=None, model_ema=None, clip_grad=None, accum_steps=1, print_freq=50):
    """Train for one epoch, in the mode (train or eval) that the model is in.

    Args:
        loader: of (images, labels) on the device; the images are changed in place.
        criterion: (images, outputs, labels) → loss.
        scaler: torch.amp.GradScaler; disabled unless amp_dtype is float16.
        keep_rate: step of the epoch → the rate passed to the model; None for a model that takes none.
        erase: images → images, random erasing.
        mixup: (images, labels) → (mixed images, soft labels).
        model_ema: timm's ModelEmaV3.
        accum_steps: batches whose mean gradient makes an update; of the last update of the epoch maybe fewer.
    Returns:
        Dict of the epoch's mean loss and images_per_second over all processes, last lr and keep_rate.
    Raises:
        FloatingPointError: the loss is not finite; noticed where it is logged, so that no step waits for the device.
            Or a weight, after the last step.
    """
    progress = Progress(f'Epoch: [{epoch}]', len(loader), print_freq, device, lockstep=True)
    for step, (images, labels) in enumerate(loader):
        # Of erasing, mixup, dropout and drop path; never 0 at the end, so this is no key of a sample (see TrainSampler)
        seed_all(seed, epoch, step, 1 + rank())
        if erase is not None:
            images = erase(images)
        if mixup is not None:
            images, labels = mixup(images, labels)
        rate = {} if keep_rate is None else {'keep_rate': keep_rate(step)}
        first = step - step % accum_steps                                  # batch of this update
        batches = min(accum_steps, len(loader) - first)
        updates = step + 1 == first + batches
        with contextlib.nullcontext() if updates or not hasattr(model, 'no_sync') else model.no_sync():
            with autocast(device, amp_dtype):
                loss = criterion(images, model(images, **rate), labels)
            scaler.scale(loss / batches).backward()
        if updates:
            if clip_grad is not None:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if model_ema is not None:
                model_ema.update(model)
        progress.update(loss.detach(), len(images), lr=optimizer.param_groups[0]['lr'], **rate)
    if not torch.nn.utils.get_total_norm(model.parameters()).isfinite():
        raise FloatingPointError(f'Epoch: [{epoch}] the last step left weights that are not finite; '
                                 'try a lower --lr, --clip-grad, or --amp-dtype float32')
    return progress.summary()


@torch.no_grad()
def evaluate(model, loader, *, device, amp_dtype, sharded=False, print_freq=50):
    """Accuracy and cross entropy of a model, in eval mode, over a whole data set.

    Args:
        sharded: the loader holds this process's share only, so the sums of all processes make the figures.
    Returns:
        Dict of acc1 and acc5 in percent, loss, and the number of images they are over.
    """
    totals = torch.zeros(4, dtype=torch.float64, device=device)            # correct at 1, correct at 5, loss, images
    progress = Progress('Test:', len(loader), print_freq, device)
    with eval_mode(model):
        for images, labels in loader:
            with autocast(device, amp_dtype):
                logits = model(images).float()                             # (B, C)
            loss = F.cross_entropy(logits, labels)
            correct = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)
            totals += torch.stack([correct[:, 0].sum().double(), correct.sum().double(), loss.double() * len(images),
                                   torch.full_like(totals[3], len(images))])
            progress.update(loss, len(images))
    correct1, correct5, loss_sum, num_images = (all_reduce_sum(totals) if sharded else totals).tolist()
    acc1, acc5, loss = 100 * correct1 / num_images, 100 * correct5 / num_images, loss_sum / num_images
    log(f'* Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} loss {loss:.3f}')
    return {'acc1': acc1, 'acc5': acc5, 'loss': loss, 'images': int(num_images)}
