"""Many nodes, and what happens to them: rows 4 and 5 of the table."""
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
        except FileNotFoundError:                                          # also for a moment while it is replaced
            return 0

    def wait(self):
        """Wait until a checkpoint is saved."""
        before = self.time()
        wait_for(lambda: self.time() > before, 180, f'a new {self.path}')


@contextlib.contextmanager
def logs_of(folder):
    """Print the logs that a run has left in a folder if it fails."""
    try:
        yield
    except BaseException:
        for path in sorted(folder.rglob('*')):
            if path.suffix in ('.out', '.err'):
                print(f'--- {path}\n{path.read_text()}')
        raise


# --- Two hosts ------------------------------------------------------------------------------------------------------

def start_agents(start, folder):
    """torchrun on both hosts → {host: process id of torchrun}."""
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
    """Process id of the worker of a host's torchrun, None where it has none."""
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
    table(len(victims), 'torchrun on two hosts: a worker is killed with -9, and the job recovers by itself')


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
    """Bring the end of the job so near that Slurm, which looks every 30 s, sends it its signal.

    Until then a stopped process holds the others up; Slurm wakes it before it sends the signal.
    """
    os.kill(step_process(job, 1), signal.SIGSTOP)
    minutes = int(cluster.job(job)['RunTime'].split(':')[1]) + 2
    cluster('scontrol', 'update', f'JobId={job}', f'TimeLimit={minutes}')
    cluster.wait_until(job, JobState='PENDING')
    cluster('scontrol', 'update', f'JobId={job}', 'TimeLimit=60')


def step_process(job, rank):
    """Process id of a process that srun has started; its data loaders' have its environment, and later ids."""
    words = {f'SLURM_JOB_ID={job}', 'SLURM_STEP_ID=0', f'SLURM_PROCID={rank}'}
    found = []
    for path in Path('/proc').glob('[0-9]*/environ'):
        with contextlib.suppress(OSError):
            if words <= set(path.read_text(errors='replace').split('\0')):
                found.append(int(path.parent.name))
    return min(found)


def preempt(cluster, job):
    """Have a job of a higher partition take the nodes for a moment."""
    cluster('sbatch', '--partition=high', '--nodes=2', '--exclusive', '--output=/dev/null', '--wrap', 'sleep 1')


def lose_node(cluster, job):
    """Take a node out of service; it returns by itself."""
    cluster('scontrol', 'update', 'NodeName=n2', 'State=DOWN', 'Reason=test')


@pytest.mark.parametrize('submit', [submit_srun, submit_submitit])
def test_slurm(cluster, tmp_path, undisturbed, table, submit):
    progress, faults = Progress(tmp_path), (preempt, reach_time_limit, preempt, lose_node)
    with logs_of(tmp_path):
        job = submit(cluster, tmp_path)
        for restarts, fault in enumerate(faults):
            cluster.wait_until(job, Restarts=str(restarts), JobState='RUNNING')
            if restarts:                                                   # the first comes before training has begun
                progress.wait()
            fault(cluster, job)
        cluster.wait_until(job, Restarts=str(len(faults)), JobState='COMPLETED')
    assert_same(result(tmp_path), result(undisturbed(2)))
    way = 'srun' if submit is submit_srun else 'submitit'
    table(len(faults), f'Slurm, two nodes, {way}: preemption (once before training), time limit, a node that goes down')
