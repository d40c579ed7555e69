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
from distributed import kill_workers

ROOT = Path(__file__).resolve().parent.parent.parent

# 2 epochs of 20 steps, or of 10 in 2 processes, with everything that draws random numbers. In the second, 2 of 4
# patches and then 1 are kept, by the first blocks, so that a step takes 0.2 s of a slow core.
FLAGS = ['--model', 'deit_tiny_patch16_shrink_base', '--fuse_token', '--base_keep_rate', '0.3', '--drop_loc', '0,1,2',
         '--input-size', '32', '--batch-size', '64', '--device', 'cpu', '--num_workers', '1', '--warmup-epochs', '0',
         '--shrink_start_epoch', '0', '--shrink_epochs', '1', '--epochs', '2', '--lr', '2.4e-3', '--clip-grad', '1',
         '--dist-eval', '--print-freq', '1', '--resume', 'auto', '--checkpoint-interval', '5']
SAVES = {1: 8, 2: 4}                                   # by number of processes
fork = multiprocessing.get_context('fork')


# --- By the command that users type ---------------------------------------------------------------------------------

def train(folder, processes=1):
    """A run to its end; fails where it does not end well. → its console."""
    launch = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}'] if processes > 1 else []
    done = subprocess.run([sys.executable, *launch, str(ROOT / 'main.py'), *FLAGS, '--output_dir', str(folder)],
                          env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- Without the 10 s in which a slow core reads torch and timm ------------------------------------------------------

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
    """Processes of a group that each call function(rank), forked from this one, which has imported main.py already.

    Each leads a process group of its own, with its DataLoader workers in it. Whatever lives is killed in the end.
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
        """What a process has written so far, name: 'out' or 'err'."""
        path = self._console(rank, name)
        return path.read_text() if path.exists() else ''

    def wait_for(self, condition, timeout=120):
        """Until condition() is true; fails where the run ends before it is, or takes too long."""
        limit = time.monotonic() + timeout
        while not condition():
            assert any(process.is_alive() for process in self.processes) and time.monotonic() < limit, str(self)
            time.sleep(0.002)

    def wait_for_line(self, text, rank=0):
        self.wait_for(lambda: text in self.read('out', rank))

    def finish(self, timeout=120):
        """Wait for the processes → their exit statuses, that of a killed one being minus the signal."""
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
    """A run of main.py with the FLAGS above and others.

    Args:
        folder: --output_dir.
        before: called as before(rank) in each process before main.py begins.
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
        """The one line that the first process ends with, and no process a traceback; → it."""
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
