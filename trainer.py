"""A training run: the loop over epochs, which changes the state that a checkpoint holds."""
import datetime
import time
from functools import partial

import numpy as np
import torch
from timm.data.random_erasing import RandomErasing
from timm.optim import create_optimizer_v2, get_optimizer_info, optimizer_kwargs
from timm.scheduler import PlateauLRScheduler, create_scheduler
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel

from engine import check_weights, keep_rate_at, train_one_epoch
from evit.pictures import draw_sheets
from runtime.checkpoint import CheckpointWriter, checkpoints_of, load_weights
from runtime.compiled_model import CompiledModel
from runtime.distributed import StopSignal, Stopped, leave_process_group, log, rank, world_size
from runtime.failures import Failures
from runtime.logger import RunLog, make_output_folder
from runtime.utils import InputError, autocast

# What the flags set in an optimizer, and what the scheduler of --sched plateau has found out
HYPERPARAMETERS = {'lr', 'initial_lr', 'max_lr_snapshot', 'weight_decay', 'betas', 'beta1', 'betas_1d', 'eps',
                   'momentum', 'fused'}
PLATEAU_STATE = {'best', 'num_bad_epochs', 'cooldown_counter', 'last_epoch', '_last_lr'}

LONG_WAIT = 0.2                                        # share of an epoch that is worth a line


class Trainer:
    """A training run: the state that a checkpoint holds, and the loop over epochs that changes it.

    Random numbers are not part of the state: every draw is a function of seed, epoch and position
    (`runtime.utils.seed_all`).

    How a run continues within an epoch: `progress` is the state of the epoch's `Progress` after some update, with the
    step reached and the sums for the log, of all processes. `rescale_progress` finds the corresponding step if the
    length of the epoch has changed. `TrainSampler.set_epoch` leaves out the samples of the steps before it; the others
    keep their keys. `train_one_epoch` counts on from that step. If the epoch was finished but not evaluated, no step is
    left.

    Args:
        args: the flags of main.py.
        model: on the device.
        device: torch.device.
        amp_dtype: precision of autocast; torch.float32 for none.
        criterion: (images, outputs, labels) → loss.
        mixup, token_labeling: as in `train_one_epoch`.
        loader_train: a `DeviceLoader` with a TrainSampler.
        evaluate: `engine.evaluate` with the validation set and its settings.
        mask_loader: a loader of the images that TensorBoard shows with what the model keeps; None for none.
    """

    def __init__(self, args, model, device, amp_dtype, criterion=None, mixup=None, loader_train=None, evaluate=None,
                 mask_loader=None, token_labeling=None):
        self.model, self.device, self.amp_dtype = model, device, amp_dtype
        self.loader, self.evaluate, self.mask_loader = loader_train, evaluate, mask_loader
        self.optimizer = build_optimizer(args, model)
        self.lr_scheduler = build_scheduler(args, self.optimizer)
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
        self.model_ema = None
        if args.model_ema:
            self.model_ema = (EmaInMainMemory if args.model_ema_force_cpu else ModelEmaV3)(model, args.model_ema_decay)
        self.epoch, self.progress, self.best_acc1 = args.start_epoch, None, 0.

        self.args = vars(args)                         # for the checkpoint, as are the names of the classes
        self.classes = loader_train and loader_train.dataset.dataset.classes
        self.epochs, self.eval_interval, self.checkpoint_interval = (
            args.epochs, args.eval_interval, args.checkpoint_interval)
        self.batch_size, self.accum_steps = args.batch_size, args.accum_steps
        self.output_dir, self.is_resumed, self.compiled = args.output_dir, bool(args.resume), args.compile
        self.overwrites = args.overwrite
        self.is_finetuning, self.is_distilling = bool(args.finetune), args.distillation_type != 'none'
        erase = None
        if args.reprob:
            erase = RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, device=device)
        self.train_one_epoch = partial(
            train_one_epoch, criterion=criterion, optimizer=self.optimizer, device=device, scaler=self.scaler,
            amp_dtype=amp_dtype, seed=args.seed, erase=erase, mixup=mixup, token_labeling=token_labeling,
            model_ema=self.model_ema, clip_grad=args.clip_grad or None, accum_steps=args.accum_steps,
            skip_nonfinite=args.skip_nonfinite, print_freq=args.print_freq, epochs=args.epochs)
        self.keep_rate_at = None
        if args.base_keep_rate is not None and not args.token_counts:      # an EViT whose rate falls
            self.keep_rate_at = partial(keep_rate_at, start_epoch=args.shrink_start_epoch,
                                        shrink_epochs=args.shrink_epochs, base_keep_rate=args.base_keep_rate)

    # --- The loop ---------------------------------------------------------------------------------------------------

    def fit(self):
        """Train to the last epoch; evaluate, log and save after each. Raises Stopped if a signal ends the run."""
        model = CompiledModel(self.model, self.device) if self.compiled else self.model
        if torch.distributed.is_initialized():
            model = DistributedDataParallel(model, device_ids=[self.device] if self.device.type == 'cuda' else None,
                                            gradient_as_bucket_view=True)
        start = time.perf_counter()
        if self.epoch >= self.epochs:
            log(f'Nothing is left to train: {self.epoch} of {self.epochs} epochs are done; another run needs another '
                'output folder')
        folder = make_output_folder(self.output_dir) if self.output_dir else None      # if it fails, all processes end
        folder = folder if rank() == 0 else None
        for path in checkpoints_of(folder) if folder and self.overwrites else ():
            path.unlink()
        self.rescale_progress(len(self.loader))
        steps = self.epoch * len(self.loader) + self.start_step
        with (StopSignal(self.device) as self.stop, CheckpointWriter(folder) as self.writer,
              RunLog(folder, self.epoch, steps, self.is_resumed, self.overwrites, self.args) as self.run_log):
            if Failures.group:
                Failures.group.finish = self.writer.wait
            while self.epoch < self.epochs:
                epoch, best = self.epoch, False
                stats = self.train_epoch(model)
                if (epoch + 1) % self.eval_interval == 0 or epoch + 1 == self.epochs:
                    stats |= self.evaluate_epoch()
                    self.log_masks()
                    best = stats['test_acc1'] >= self.best_acc1
                    self.best_acc1 = max(self.best_acc1, stats['test_acc1'])
                    log(f'Max accuracy: {self.best_acc1:.2f}%')
                self.lr_scheduler.step(epoch, stats.get('test_acc1'))
                self.epoch, self.progress = epoch + 1, None
                self.run_log.log_epoch(epoch, stats, sum(p.numel() for p in self.model.parameters() if p.requires_grad))
                self.save_checkpoint(best)
        log(f'Training time {datetime.timedelta(seconds=round(time.perf_counter() - start))}')

    def train_epoch(self, model):
        """Train `model`, which runs `self.model`, for the rest of the epoch; → figures for the log."""
        num_steps = len(self.loader)

        def keep_rate(step):
            return self.keep_rate_at(self.epoch * num_steps + step, num_steps)

        def log_step(step, figures):
            self.run_log.log_step(self.epoch * num_steps + step, figures)

        self.set_training_mode()
        self.loader.sampler.set_epoch(self.epoch, self.start_step * self.batch_size)
        progress = self.train_one_epoch(model, loader=self.loader, epoch=self.epoch, state=self.progress,
                                        keep_rate=keep_rate if self.keep_rate_at else None,
                                        after_update=self.after_update, log_step=log_step)
        stats = progress.summary()
        if stats['loader_wait'] > LONG_WAIT:
            log(f'Epoch: [{self.epoch}] {stats["loader_wait"]:.0%} of the time was spent waiting for images; without '
                f'that, training would be {1 / max(1 - stats["loader_wait"], 0.01):.1f} times as fast. '
                '--fast-transforms (less than half the time per image), more --num-workers and LMDB (folder2lmdb.py, '
                '--use-lmdb) help; loader_benchmark.py measures by how much')
        self.progress = progress.state_dict()
        return {f'train_{key}': value for key, value in stats.items()}

    def set_training_mode(self):
        """Train mode; but eval mode while finetuning: the published recipe has no dropout and drop path there."""
        self.model.train(not self.is_finetuning)
        if self.is_distilling:
            # The flag of the model itself, not of its layers, makes timm's distilled models return both heads
            self.model.training = True
            self.model.set_distilled_training()

    @property
    def start_step(self):
        """The step of the epoch at which training starts or continues."""
        return self.progress['step'] if self.progress else 0

    def rescale_progress(self, num_steps):
        """Continue at the corresponding step if an epoch has another length now, or `accum_steps` has changed."""
        if not self.progress:
            return
        saved, of = self.progress['step'], self.progress['num_steps']
        step = num_steps if saved == of else saved * num_steps // of // self.accum_steps * self.accum_steps
        if (step, num_steps) != (saved, of):
            log(f'note: the checkpoint was saved at step {saved} of {of}, an epoch has {num_steps} now; training goes '
                f'on at step {step}')
            self.progress = {**self.progress, 'step': step, 'num_steps': num_steps}

    def after_update(self, progress):
        """Save at the interval, or save and stop if a signal asks for it."""
        signum = self.stop.agreed()
        if signum or progress.step // self.accum_steps % self.checkpoint_interval == 0:
            self.progress = progress.state_dict()
            check_weights(self.model, progress.title)
            self.save_checkpoint()
        if signum:
            self.leave(signum)

    def evaluate_epoch(self):
        """Evaluate the model and its moving average; → figures for the log."""
        average = self.model_ema and self.model_ema.module
        if average and next(average.parameters()).device != self.device:
            average = None
        if self.epoch + 1 < self.epochs:               # meanwhile, the workers load the first batches
            self.loader.sampler.set_epoch(self.epoch + 1)
            self.loader.prefetch()
        stats = self.evaluate(self.model, average=average, after_batch=self.stop_evaluation)
        return {f'test_{key}': value for key, value in stats.items() if not key.endswith('images')}

    def stop_evaluation(self):
        """Save and stop if a signal asks for it; the resumed run repeats the evaluation."""
        signum = self.stop.agreed()
        if signum:
            self.save_checkpoint()
            self.leave(signum)

    def save_checkpoint(self, best=False):
        """Start to write a checkpoint."""
        state = self.state_dict()
        self.writer.write(state, best)

    def leave(self, signum):
        """Stop all processes, once the first has written the checkpoint."""
        self.writer.wait()
        log('Stopped by a signal; '
            + ('the state is saved' if self.output_dir else 'nothing is saved without --output-dir'))
        leave_process_group()
        raise Stopped(signum)

    def log_masks(self):
        """Show TensorBoard what the model keeps of the same validation images each time."""
        if self.mask_loader:
            classes = self.mask_loader.dataset.dataset.classes             # of the data set behind the Subset
            mean, std = self.mask_loader.preprocessing[:2]
            with autocast(self.device, self.amp_dtype):
                grid, _ = draw_sheets(self.model, self.mask_loader, classes, mean=mean, std=std)
            self.run_log.log_image(self.epoch, 'masks', np.asarray(grid))

    # --- The state --------------------------------------------------------------------------------------------------

    def state_dict(self):
        """The checkpoint: all epochs before `self.epoch` are done, and `self.progress` of that one."""
        scheduler = self.lr_scheduler.state_dict()
        if isinstance(self.lr_scheduler, PlateauLRScheduler):              # which leaves out what it has found out
            scheduler |= {'inner': self.lr_scheduler.lr_scheduler.state_dict(),
                          'restore_lr': self.lr_scheduler.restore_lr}
        return {
            'model': self.model.state_dict(),
            'optimizer': self.optimizer.state_dict(),
            'lr_scheduler': scheduler,
            'epoch': self.epoch - 1,
            'progress': self.progress,
            'model_ema': self.model_ema.module.state_dict() if self.model_ema else None,
            'scaler': self.scaler.state_dict(),
            'best_acc1': self.best_acc1,
            'classes': self.classes,
            'args': self.args,
        }

    def resume(self, checkpoint, source):
        """Continue from a checkpoint; from one without an optimizer, only the weights are taken."""
        load_weights(self.model, checkpoint['model'], source)
        if self.model_ema and checkpoint.get('model_ema'):
            load_weights(self.model_ema.module, checkpoint['model_ema'], f'model_ema of {source}')
        elif self.model_ema:
            self.model_ema.set(self.model)
        if 'optimizer' not in checkpoint:
            log(f'{source} has no optimizer: training starts at epoch {self.epoch} with its weights')
            return
        try:
            self.epoch = checkpoint['epoch'] + 1
            self.load_optimizer(checkpoint['optimizer'], checkpoint['lr_scheduler'])
            if checkpoint.get('scaler'):
                self.scaler.load_state_dict(checkpoint['scaler'])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f'{source} lacks a part, or is of another optimizer: {error!r}') from None
        self.best_acc1, self.progress = checkpoint.get('best_acc1', 0.), checkpoint.get('progress')

    def load_optimizer(self, optimizer, scheduler):
        """Load the optimizer's moments; its hyperparameters come from the flags, the learning rate from the schedule.

        Only --sched plateau continues with the saved learning rate, which depends on the accuracies so far.
        """
        plateau = isinstance(self.lr_scheduler, PlateauLRScheduler)
        names = HYPERPARAMETERS - {'lr', 'initial_lr'} if plateau else HYPERPARAMETERS
        settings = [{name: group[name] for name in names & group.keys()} for group in self.optimizer.param_groups]
        # Before loading, because a fused optimizer keeps its step counts elsewhere; older checkpoints have no `fused`
        groups = [group | own for group, own in zip(optimizer['param_groups'], settings, strict=True)]
        self.optimizer.load_state_dict(optimizer | {'param_groups': groups})
        if plateau:
            found = scheduler.get('inner', scheduler)
            self.lr_scheduler.lr_scheduler.load_state_dict({name: found[name] for name in PLATEAU_STATE & found.keys()})
            self.lr_scheduler.restore_lr = scheduler.get('restore_lr')
        elif self.epoch:
            self.lr_scheduler.step(self.epoch - 1)


class EmaInMainMemory(ModelEmaV3):
    """timm's moving average, kept in main memory. An update waits once for the device, not for each tensor."""

    def __init__(self, model, decay):
        super().__init__(model, decay, device=torch.device('cpu'))
        self.staging = [torch.empty_like(value, pin_memory=torch.cuda.is_initialized())
                        for value in self.module.state_dict().values()]

    def apply_update_(self, model, decay):
        for value, new in zip(self.staging, model.state_dict().values()):
            value.copy_(new, non_blocking=True)
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        for average, new in zip(self.module.state_dict().values(), self.staging):
            if average.is_floating_point():
                average.lerp_(new, 1 - decay)
            else:
                average.copy_(new)


def build_optimizer(args, model):
    """timm's optimizer for the flags; the learning rate is scaled by the global batch size / 512."""
    lr = args.lr * args.batch_size * args.accum_steps * world_size() / 512
    fused = {'fused': True} if args.opt == 'adamw' else {}                 # one kernel for all tensors
    try:
        if get_optimizer_info(args.opt.removeprefix('lookahead_')).second_order:
            raise ValueError('it takes second derivatives, which this code does not compute')
        return create_optimizer_v2(model, **{**optimizer_kwargs(args), 'lr': lr, **fused})
    except (ValueError, AssertionError, IndexError, RuntimeError) as error:
        raise InputError(f'--opt {args.opt} cannot be used here: {error}') from None


def build_scheduler(args, optimizer):
    """timm's learning rate schedule for the flags, at --start-epoch."""
    try:
        scheduler, _ = create_scheduler(args, optimizer)
    except ValueError as error:
        raise InputError(f'--sched {args.sched} cannot be used here: {error}') from None
    if args.start_epoch:
        scheduler.step(args.start_epoch - 1)
    return scheduler
