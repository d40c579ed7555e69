"""The process group, from meeting to leaving."""
import contextlib
import datetime
import multiprocessing
import os
import signal
import subprocess
import threading
import time

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from runtime.failures import Failures
from runtime.utils import DataError, InputError

NCCL_MARGIN = datetime.timedelta(seconds=10)           # so that `Failures` gives a process up before NCCL aborts


def world_size():
    """Number of processes that train together, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def log(message):
    """Print on the first process only."""
    if rank() == 0:
        print(message, flush=True)


# --- Joining and leaving --------------------------------------------------------------------------------------------

def init_process_group(device, dist_url='env://', world_size=1, timeout=600):
    """Join the process group described by the environment variables of torchrun or srun, if there are any.

    Args:
        device: 'cuda' (NCCL) or 'cpu' (gloo), or one GPU such as 'cuda:1'. In a group, a process on 'cuda' takes the
            GPU of its LOCAL_RANK.
        dist_url: where the processes meet.
        world_size: number of processes if WORLD_SIZE is not set.
        timeout: seconds to wait for a process before giving it up.
    Returns:
        This process's torch.device.
    Raises:
        InputError: the device does not exist, a variable is missing or wrong, or the processes did not meet.
    """
    device = parse_device(device)
    adopt_slurm()
    rank, world_size = environment_number('RANK', None), environment_number('WORLD_SIZE', world_size)
    if world_size > 1 and rank is None:
        raise InputError(f'{world_size} processes need RANK in the environment; start with '
                         f'torchrun --nproc_per_node={world_size} main.py …')
    if device.type == 'cuda':
        device = cuda_device(device, rank is not None)
    if rank is None:
        return device
    if rank >= world_size:
        raise InputError(f'RANK={rank}, but WORLD_SIZE={world_size}; set WORLD_SIZE to the number of processes')
    missing = [name for name in ('MASTER_ADDR', 'MASTER_PORT') if not os.environ.get(name)]
    if missing and dist_url == 'env://':
        raise InputError(f'RANK is set, but {" and ".join(missing)} not; start with torchrun or srun, or set the '
                         'address of process 0')
    environment_number('MASTER_PORT', 0)
    meet(device, dist_url, rank, world_size, timeout)
    return device


def meet(device, dist_url, rank, world_size, timeout):
    """Meet the other processes and create the group and its side channel (`Failures`)."""
    limit = datetime.timedelta(seconds=timeout)
    try:
        store, rank, world_size = next(rendezvous(dist_url, rank, world_size, timeout=limit))
        if device.type == 'cuda':
            check_devices(dist.PrefixStore('devices', store), device, rank, world_size, limit)
        dist.init_process_group(
            'nccl' if device.type == 'cuda' else 'gloo', store=dist.PrefixStore('group', store), rank=rank,
            world_size=world_size, device_id=device if device.type == 'cuda' else None,
            timeout=limit if device.type == 'cpu' else limit + NCCL_MARGIN)
        Failures.group = Failures(dist.PrefixStore('failures', store), rank, world_size, timeout)
    except dist.DistBackendError as error:
        raise DataError(f'process {rank} of {world_size}: NCCL did not start: {" ".join(str(error).split())}') from None
    except (RuntimeError, ValueError) as error:
        where = dist_url if dist_url != 'env://' else ':'.join(
            os.environ[name] for name in ('MASTER_ADDR', 'MASTER_PORT'))
        raise DataError(f'process {rank} of {world_size} did not meet the others at {where} within {timeout:g} s: '
                        f'{str(error).splitlines()[0]}') from None


def check_devices(store, device, rank, world_size, limit):
    """Raise InputError if two processes have the same GPU, for which NCCL would only give an obscure reason."""
    store.set(str(rank), str(torch.cuda.get_device_properties(device).uuid))
    store.wait(list(map(str, range(world_size))), limit)
    devices = [store.get(str(process)) for process in range(world_size)]
    store.set(f'read {rank}', '')
    if len(set(devices)) == world_size:
        return
    if rank == 0:                                      # which may host the store
        with contextlib.suppress(RuntimeError):
            store.wait([f'read {process}' for process in range(world_size)], datetime.timedelta(seconds=5))
    twice = next(uuid for uuid in devices if devices.count(uuid) > 1)
    same = [str(process) for process in range(world_size) if devices[process] == twice]
    raise InputError(f'processes {", ".join(same)} have the same GPU; start one process for each GPU, and let each see '
                     'all of its machine, or only its own')


def parse_device(name):
    """'cpu', 'cuda' or 'cuda:N' → torch.device."""
    try:
        if name.split(':')[0] in ('cpu', 'cuda'):
            return torch.device(name)
    except RuntimeError:
        pass
    raise InputError(f'--device {name}: must be cpu, cuda or one GPU such as cuda:1')


def adopt_slurm():
    """Set the variables of torchrun from those of srun, if srun started this process and torchrun did not."""
    environment = os.environ
    if 'RANK' in environment:
        return
    if environment.get('SLURM_STEP_NUM_TASKS', '1') == '1':
        if environment.get('SLURM_NTASKS', '1') != '1':
            log(f'note: the job has {environment["SLURM_NTASKS"]} tasks, but this process is alone; start with srun')
        return
    for name, origin in (('RANK', 'SLURM_PROCID'), ('LOCAL_RANK', 'SLURM_LOCALID'),
                         ('WORLD_SIZE', 'SLURM_STEP_NUM_TASKS')):
        if origin not in environment:
            raise InputError(f'SLURM_STEP_NUM_TASKS is set, but {origin} not; start with srun, or unset SLURM_*')
        environment[name] = environment[origin]
    if 'MASTER_ADDR' not in environment:
        nodes = environment.get('SLURM_STEP_NODELIST') or environment.get('SLURM_JOB_NODELIST', '')
        try:
            hosts = subprocess.run(['scontrol', 'show', 'hostnames', nodes], capture_output=True, text=True, check=True)
            environment['MASTER_ADDR'] = hosts.stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            raise InputError(f'scontrol cannot expand the node list {nodes!r}; set MASTER_ADDR') from None
    job = environment_number('SLURM_JOB_ID', 0) + environment_number('SLURM_STEP_ID', 0)
    environment.setdefault('MASTER_PORT', str(15000 + job % 15000))        # below the ephemeral ports


def environment_number(name, default):
    """A non-negative number from the environment."""
    text = os.environ.get(name, '')
    if text and not text.isdecimal():
        raise InputError(f'{name}={text} in the environment is not a number; start with torchrun or srun')
    return int(text) if text else default


def cuda_device(device, in_group):
    """This process's GPU: the one of its local rank in a group, else the one that was named, else the first."""
    if not torch.cuda.is_available():
        raise InputError('--device cuda, but torch sees no CUDA device here; use --device cpu')
    count = torch.cuda.device_count()
    if in_group or device.index is None:
        device = torch.device('cuda', environment_number('LOCAL_RANK', 0) if count > 1 else 0)
    if device.index >= count:
        raise InputError(f'{device} is asked for, but torch sees {count} GPU(s) here; start one process for each')
    torch.cuda.set_device(device)
    return device


def cores_per_process():
    """How many cores of this machine each process on it may use, for the processes of torchrun or srun."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    cores = min(cores, environment_number('SLURM_CPUS_PER_TASK', cores))
    return max(1, cores // max(1, environment_number('LOCAL_WORLD_SIZE', 1)))


def leave_process_group():
    """Wait for the other processes, so that none finds its peers gone, and leave."""
    if dist.is_initialized():
        dist.barrier()
        Failures.group.leave()                         # not before: the first process may still write a checkpoint
        dist.destroy_process_group()


# --- Reductions -----------------------------------------------------------------------------------------------------

def all_reduce(tensor, operation=dist.ReduceOp.SUM):
    """Sum, or another operation, of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, operation)
    return tensor


def broadcast(tensor):
    """Copy a tensor from the first process to all others, in place."""
    if dist.is_initialized():
        dist.broadcast(tensor, 0)
    return tensor


def broadcast_object(value):
    """The first process's value, in all processes; it must pickle."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def share_buffers(model):
    """Copy the buffers of a model from the first process; DDP does so before each step, but not after the last."""
    for buffer in model.buffers():
        broadcast(buffer)


# --- Signals ----------------------------------------------------------------------------------------------------------

class Stopped(SystemExit):
    """The run stopped because of a signal; its state is saved.

    The exit status is 143 for the signals of schedulers, so that their scripts have one status to requeue at.
    """

    def __init__(self, signum):
        super().__init__(128 + (signum if signum in StopSignal.OF_TERMINALS else signal.SIGTERM))
        self.signum = signum


class StopSignal:
    """Turns the signals of schedulers and terminals into a request to stop that all processes agree on.

    Used as a context manager. A second signal ends the process at once. Signals within half a second count as one,
    because a launcher may forward what the process has received already. A thread watches for the second signal:
    Python runs no handler while the main thread waits inside torch for other processes.
    """
    OF_TERMINALS = signal.SIGINT, signal.SIGHUP        # Ctrl-C; the terminal was closed, or its connection lost
    SIGNALS = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, *OF_TERMINALS

    def __init__(self, device):
        self.device = device
        self.signum = 0
        self.latest = None

    def __enter__(self):
        self.handlers = {signum: signal.signal(signum, self._note) for signum in self.SIGNALS
                         # which nohup or a shell, for a job in the background, has set
                         if signum not in self.OF_TERMINALS or signal.getsignal(signum) is not signal.SIG_IGN}
        arrivals, self.pipe = os.pipe()
        os.set_blocking(self.pipe, False)
        signal.set_wakeup_fd(self.pipe)
        threading.Thread(target=self._end_at_second, args=(arrivals,), daemon=True).start()
        return self

    def __exit__(self, *_):
        signal.set_wakeup_fd(-1)
        os.close(self.pipe)
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)

    def _note(self, signum, frame):
        self.signum = self.signum or signum

    def _end_at_second(self, arrivals):
        first = None
        with open(arrivals, 'rb', buffering=0) as pipe:
            while number := pipe.read(1):                                  # one byte per signal that Python handles
                if number[0] in self.SIGNALS:
                    first = first or time.monotonic()
                    if Failures.group:
                        Failures.group.hurry()
                    if time.monotonic() - first > 0.5:
                        os._exit(128 + number[0])

    def agreed(self):
        """The signal that any process received, 0 if none. All processes call this and get the same answer.

        On a GPU the answer is that of the previous call, so that no process waits for the device.
        """
        if not dist.is_initialized():
            return self.signum
        signum = all_reduce(torch.full((), self.signum, device=self.device), dist.ReduceOp.MAX)
        if self.device.type != 'cuda':
            return int(signum)
        latest, arrived = torch.empty_like(signum, device='cpu', pin_memory=True), torch.cuda.Event()
        latest.copy_(signum, non_blocking=True)
        arrived.record()
        earlier, self.latest = self.latest, (latest, arrived)
        if earlier is None:
            return 0
        earlier[1].synchronize()
        return int(earlier[0])


def ignore_stop_signals(worker):
    """Make a DataLoader worker ignore signals that go to all processes of a job or a terminal, as the run needs it."""
    for signum in StopSignal.SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def kill_workers():
    """Kill the DataLoader workers that a failed run leaves: they ignore the SIGTERM of multiprocessing's exit hook.

    For the exit of the interpreter. Earlier, a worker may die with a lock that shutting down its DataLoader waits for.
    """
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)                      # torch's handler would report their death
    for worker in workers:
        worker.kill()
