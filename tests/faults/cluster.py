"""A cluster on one machine: two hosts with a network between them, and Slurm with two nodes.

Both need root. They run in their own namespaces and change nothing outside them. All daemons and jobs end with the
namespaces.
"""
import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PACKAGES = 'slurm-wlm munge iproute2 util-linux'
# When its first process ends, all others are killed
NAMESPACE = ['unshare', '--mount', '--pid', '--fork', '--kill-child', '--mount-proc']

# A requeued job waits for cred_expire, 2 minutes by default. The intervals are as short as possible. The high partition
# preempts jobs of the low one. Before they are preempted, they receive the signal that they requested.
SLURM_CONF = '''
ClusterName=evit
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=100000
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000
PartitionName=low Nodes=n[1-2] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 MaxTime=60
PartitionName=high Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF MaxTime=60
'''

DAEMONS = '''
mount --bind {folder}/hosts /etc/hosts
munged -F --key-file={folder}/munge.key --socket={folder}/munge.sock --pid-file={folder}/munged.pid \
    --log-file={folder}/munged.log --seed-file={folder}/munged.seed &
until [ -S {folder}/munge.sock ]; do sleep 0.05; done
slurmctld -D -i &
slurmd -D -N n1 &
slurmd -D -N n2 &
wait
'''


def need(*programs):
    """Raise a RuntimeError that names what this machine lacks, if it lacks root or one of the programs."""
    missing = ['root'] * (os.geteuid() != 0) + [program for program in programs if not shutil.which(program)]
    if missing:
        raise RuntimeError(f'there is no {", no ".join(missing)}; this test is for root, after '
                           f'apt-get install -y --no-install-recommends {PACKAGES}')


def wait_for(condition, seconds=120, what=''):
    """Wait until condition() is true and return its value. Fail after `seconds`."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f'{seconds} s have passed without {what or condition}'
        time.sleep(0.1)
    return value


def free_ports(number):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(('127.0.0.1', 0))
        return [one.getsockname()[1] for one in sockets]


def children(pid):
    """Process ids of a process's children."""
    return [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


# --- Two hosts ------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def two_hosts():
    """Hosts nodea and nodeb, each with its own network, name and processes. Yield start(host, *command, **options).

    `start` starts a command on a host. It returns the Popen of the command's parent process.
    """
    need('ip', 'nsenter', 'unshare')
    spaces = {host: f'{host}-{os.getpid()}' for host in ('nodea', 'nodeb')}
    (a, b), started = spaces.values(), []

    def ip(*words):
        subprocess.run(['ip', *words], check=True)

    def start(host, *command, **options):
        inside = f'hostname {host}; mount --bind {folder}/hosts /etc/hosts; exec {shlex.join(command)}'
        started.append(subprocess.Popen(
            ['nsenter', f'--net=/run/netns/{spaces[host]}', *NAMESPACE, '--uts', 'sh', '-c', inside], **options))
        return started[-1]

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, 'hosts').write_text('127.0.0.1 localhost\n10.77.0.1 nodea\n10.77.0.2 nodeb\n')
        try:
            for space in (a, b):
                ip('netns', 'add', space)
            ip('link', 'add', 'v0', 'netns', a, 'type', 'veth', 'peer', 'name', 'v0', 'netns', b)
            for number, space in enumerate((a, b), 1):
                ip('-n', space, 'addr', 'add', f'10.77.0.{number}/24', 'dev', 'v0')
                for link in ('lo', 'v0'):
                    ip('-n', space, 'link', 'set', link, 'up')
            yield start
        finally:
            for process in started:
                process.kill()
                process.wait()
            for space in (a, b):
                subprocess.run(['ip', 'netns', 'delete', space])


# --- Slurm ----------------------------------------------------------------------------------------------------------

class Slurm:
    """A running cluster, for users and administrators.

    Args:
        environment: environment variables of the commands that access it.
    """

    def __init__(self, environment):
        self.environment = environment

    def __call__(self, *command):
        """Run a command of Slurm, or another command that uses Slurm. Return its output."""
        done = subprocess.run([*map(str, command)], env=self.environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def job(self, number):
        """The fields of a job, such as JobState and Restarts."""
        words = self('scontrol', '--oneliner', 'show', 'job', number).split()
        return dict(word.split('=', 1) for word in words if '=' in word)

    def wait_until(self, number, seconds=180, **fields):
        """Wait until a job's fields have these values."""
        wait_for(lambda: fields.items() <= self.job(number).items(), seconds, f'job {number} at {fields}')


@contextlib.contextmanager
def slurm():
    """Start Slurm with the nodes n1 and n2, each with two cores. Yield a Slurm."""
    need('slurmctld', 'slurmd', 'munged', 'unshare', 'srun', 'sbatch', 'scontrol')
    with tempfile.TemporaryDirectory() as folder:
        for name in ('state', 'spool.n1', 'spool.n2'):
            Path(folder, name).mkdir()
        Path(folder, 'munge.key').write_bytes(os.urandom(128))
        Path(folder, 'munge.key').chmod(0o400)
        Path(folder, 'hosts').write_text(f'127.0.0.1 localhost n1 n2 {socket.gethostname()}\n')
        Path(folder).chmod(0o755)                                          # munged needs a folder open to all users
        conf = Path(folder, 'slurm.conf')
        conf.write_text(SLURM_CONF.format(folder=folder, ports=free_ports(3)))
        environment = {**os.environ, 'SLURM_CONF': str(conf), 'OMP_NUM_THREADS': '1',
                       'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}'}
        with open(f'{folder}/daemons.log', 'w') as log:
            daemons = subprocess.Popen([*NAMESPACE, 'sh', '-c', DAEMONS.format(folder=folder)], env=environment,
                                       stdout=log, stderr=log)
        try:
            wait_for(lambda: 'n[1-2] idle' in subprocess.run(
                ['sinfo', '--noheader', '--partition=low', '--format=%N %T'], env=environment, capture_output=True,
                text=True).stdout, 30, 'two idle nodes')
            yield Slurm(environment)
        except BaseException:
            print(Path(folder, 'daemons.log').read_text())
            raise
        finally:
            daemons.send_signal(signal.SIGKILL)
            daemons.wait()
