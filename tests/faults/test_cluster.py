"""Faults of runs on several nodes, with torchrun and with Slurm."""
import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import children, slurm, two_hosts, wait_for
from outputs import assert_same, result
from runs import FLAGS, ROOT


class Progress:
    """Waits for checkpoints of a run."""

    def __init__(self, folder):
        self.path = Path(folder, 'checkpoint.pth')

    def time(self):
        try:
            return self.path.stat().st_mtime_ns
        except FileNotFoundError:                                          # also briefly while it is replaced
            return 0

    def wait(self):
        """Wait until a new checkpoint is saved."""
        before = self.time()
        wait_for(lambda: self.time() > before, 180, f'a new {self.path}')


@contextlib.contextmanager
def logs_of(folder):
    """Print the logs of a run if it fails."""
    try:
        yield
    except BaseException:
        for path in sorted(folder.rglob('*')):
            if path.suffix in ('.out', '.err'):
                print(f'--- {path}\n{path.read_text()}')
        raise


# --- Two hosts ------------------------------------------------------------------------------------------------------

def start_agents(start, folder):
    """Start torchrun on both hosts. Return {host: Popen of the parent process of torchrun}."""
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'}
    command = [sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', '--nproc-per-node=1', '--max-restarts=3',
               '--rdzv-backend=c10d', '--rdzv-endpoint=nodea:29501', '--rdzv-id=evit', str(ROOT / 'main.py'), *FLAGS,
               '--output_dir', str(folder)]
    agents = {}
    for host in ('nodea', 'nodeb'):
        with open(folder / f'{host}.out', 'w') as log:
            agents[host] = start(host, *command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    return agents


def worker(agent):
    """Process id of the worker of a host's torchrun, or None if it has none."""
    for torchrun in children(agent.pid):
        for child in children(torchrun):
            if b'main.py' in Path(f'/proc/{child}/cmdline').read_bytes():
                return child


def test_worker_killed_on_two_hosts(tmp_path, undisturbed, table):
    progress, victims = Progress(tmp_path), ('nodea', 'nodeb')
    with logs_of(tmp_path), two_hosts() as start:
        agents = start_agents(start, tmp_path)
        for victim in victims:
            progress.wait()
            os.kill(wait_for(lambda: worker(agents[victim])), signal.SIGKILL)
        for agent in agents.values():
            assert agent.wait(timeout=180) == 0
    assert_same(result(tmp_path), result(undisturbed(2)))
    table(len(victims), 'torchrun on two hosts: SIGKILL to a worker; the job recovers by itself')


# --- Slurm ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def cluster():
    with slurm() as cluster:
        yield cluster


def submit_srun(cluster, folder):
    return cluster('sbatch', '--parsable', '--nodes=2', '--ntasks-per-node=1', '--time=60', f'--chdir={ROOT}',
                   f'--output={folder}/job.out', ROOT / 'slurm.sh', *FLAGS, '--output_dir', folder)


def submit_submitit(cluster, folder):
    out = cluster(sys.executable, ROOT / 'run_with_submitit.py', '--ngpus', '0', '--nodes', '2', '--timeout', '60',
                  '--job_dir', folder / 'job', *FLAGS, '--output_dir', folder)
    return re.search(r'job (\d+)', out)[1]


def reach_time_limit(cluster, job):
    """Shorten the time limit of the job so that Slurm, which checks it every 30 s, sends the signal.

    Until then, a stopped process blocks the others. Slurm continues it before it sends the signal.
    """
    os.kill(step_process(job, 1), signal.SIGSTOP)
    minutes = int(cluster.job(job)['RunTime'].split(':')[1]) + 2
    cluster('scontrol', 'update', f'JobId={job}', f'TimeLimit={minutes}')
    cluster.wait_until(job, JobState='PENDING')
    cluster('scontrol', 'update', f'JobId={job}', 'TimeLimit=60')


def step_process(job, rank):
    """Process id of a process started by srun. Its DataLoader workers have the same environment, but higher ids."""
    words = {f'SLURM_JOB_ID={job}', 'SLURM_STEP_ID=0', f'SLURM_PROCID={rank}'}
    found = []
    for path in Path('/proc').glob('[0-9]*/environ'):
        with contextlib.suppress(OSError):
            if words <= set(path.read_text(errors='replace').split('\0')):
                found.append(int(path.parent.name))
    return min(found)


def preempt(cluster, job):
    """Submit a short job to the high partition, which preempts the running one."""
    cluster('sbatch', '--partition=high', '--nodes=2', '--exclusive', '--output=/dev/null', '--wrap', 'sleep 1')


def lose_node(cluster, job):
    """Set a node to DOWN. It returns to service by itself."""
    cluster('scontrol', 'update', 'NodeName=n2', 'State=DOWN', 'Reason=test')


@pytest.mark.parametrize('submit', [submit_srun, submit_submitit])
def test_slurm(cluster, tmp_path, undisturbed, table, submit):
    progress, faults = Progress(tmp_path), (preempt, reach_time_limit, preempt, lose_node)
    with logs_of(tmp_path):
        job = submit(cluster, tmp_path)
        for restarts, fault in enumerate(faults):
            cluster.wait_until(job, Restarts=str(restarts), JobState='RUNNING')
            if restarts:                                                   # the first fault precedes training
                progress.wait()
            fault(cluster, job)
        cluster.wait_until(job, Restarts=str(len(faults)), JobState='COMPLETED')
    assert_same(result(tmp_path), result(undisturbed(2)))
    way = 'srun' if submit is submit_srun else 'submitit'
    table(len(faults), f'Slurm, two nodes, {way}: preemption (once before training), time limit, a node that goes down')
