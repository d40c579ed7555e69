"""Runs of main.py on the digits as real processes."""
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import main
from runtime.distributed import kill_workers

ROOT = Path(__file__).resolve().parent.parent.parent

# 2 epochs of 20 steps, or of 10 with 2 processes, with all random operations. In the second epoch, the first blocks
# keep 2 of 4 patches, then 1, so that a step takes 0.2 s on a slow core.
FLAGS = ['--model', 'deit_tiny_patch16_shrink_base', '--fuse_token', '--base_keep_rate', '0.3', '--drop_loc', '0,1,2',
         '--input-size', '32', '--batch-size', '64', '--device', 'cpu', '--num_workers', '1', '--warmup-epochs', '0',
         '--shrink_start_epoch', '0', '--shrink_epochs', '1', '--epochs', '2', '--lr', '2.4e-3', '--clip-grad', '1',
         '--dist-eval', '--print-freq', '1', '--resume', 'auto', '--checkpoint-interval', '5']
SAVES = {1: 8, 2: 4}                                   # checkpoints saved, by number of processes
fork = multiprocessing.get_context('fork')


# --- Runs started as users do ---------------------------------------------------------------------------------------

def train(folder, processes=1):
    """Train to the end and return the console output. Fail if the exit status is not 0."""
    launch = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}'] if processes > 1 else []
    done = subprocess.run([sys.executable, *launch, str(ROOT / 'main.py'), *FLAGS, '--output_dir', str(folder)],
                          env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- Forked runs: no import of torch and timm, which takes 10 s on a slow core --------------------------------------

def group(processes):
    """The environment of each process of a group, as torchrun would set it."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    return [{'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(processes),
             'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port} for rank in range(processes)]


class Forked:
    """Processes of a group that each call function(rank), forked from this one, which has already imported main.py.

    Each leads its own process group, which includes its DataLoader workers. On exit, all that still run are killed.
    """

    def __init__(self, function, processes=1):
        self.consoles = tempfile.TemporaryDirectory()
        self.processes = [fork.Process(target=self._call, args=(function, rank, member))
                          for rank, member in enumerate(group(processes))]
        for process in self.processes:
            process.start()
        self.pids = [process.pid for process in self.processes]

    def _call(self, function, rank, environment):
        os.setsid()
        os.environ.update(environment)
        torch.set_num_threads(1)
        for number, name in ((1, 'out'), (2, 'err')):
            os.dup2(os.open(self._console(rank, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = (open(number, 'w', buffering=1, closefd=False) for number in (1, 2))
        try:
            function(rank)
        finally:
            kill_workers()

    def _console(self, rank, name):
        return Path(self.consoles.name) / f'{rank}.{name}'

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.join()
        self.consoles.cleanup()

    def read(self, name, rank=0):
        """What a process has written so far. `name` is 'out' or 'err'."""
        path = self._console(rank, name)
        return path.read_text() if path.exists() else ''

    def wait_for(self, condition, timeout=120):
        """Wait until condition() is true. Fail if the run ends first or the timeout expires."""
        limit = time.monotonic() + timeout
        while not condition():
            assert any(process.is_alive() for process in self.processes) and time.monotonic() < limit, str(self)
            time.sleep(0.002)

    def wait_for_line(self, text, rank=0):
        self.wait_for(lambda: text in self.read('out', rank))

    def finish(self, timeout=120):
        """Wait for the processes and return their exit statuses. The status of a killed process is minus the signal."""
        limit = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, limit - time.monotonic()))
        statuses = [process.exitcode for process in self.processes]
        assert None not in statuses, f'no end within {timeout} s: {statuses}\n{self}'
        return statuses

    def __str__(self):
        return '\n'.join(f'--- {name} of {rank} ---\n{self.read(name, rank)}'
                         for rank in range(len(self.processes)) for name in ('out', 'err'))


class Run(Forked):
    """A run of main.py with FLAGS and `flags`.

    Args:
        folder: --output_dir.
        before: called as before(rank) in each process before main.py starts.
        of_rank: rank → flags for that process only.
    """

    def __init__(self, folder, *flags, processes=1, before=None, of_rank=lambda rank: []):
        def run(rank):
            sys.argv = [str(text) for text in ('main.py', *FLAGS, *flags, *of_rank(rank), '--output_dir', folder)]
            if before:
                before(rank)
            main.run()

        super().__init__(run, processes)

    def ends_well(self):
        assert set(self.finish()) == {0}, str(self)

    def error(self):
        """Return the only error line of the first process. Fail if any process prints a traceback."""
        assert not any('Traceback' in self.read('err', rank) for rank in range(len(self.processes))), str(self)
        line, = [line for line in self.read('err').splitlines() if line.startswith('main.py: error: ')]
        return line


def at_file_operation(folder, act, is_it):
    """Call act() before this process's first operation on a file in `folder` for which is_it(event, name) is true."""
    def hook(event, arguments):
        if event in ('open', 'os.rename', 'os.link', 'os.remove') and str(arguments[0]).startswith(str(folder)):
            if is_it(event, os.path.basename(str(arguments[0]))):
                act()

    sys.addaudithook(hook)
