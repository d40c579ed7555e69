"""Submit a training run to Slurm: `python run_with_submitit.py --ngpus 8 --nodes 2 …`, with all flags of main.py.

After a preemption, the time limit or a node failure, the job is requeued and continues from its checkpoint.
"""
if __name__ == '__main__':                             # before the imports, which take seconds: see `start`
    from runtime.program import start
    start('run_with_submitit')

import shlex
import signal
import sys
from pathlib import Path

try:
    import submitit
except ImportError:                                    # `submit` reports it
    submitit = None

import main as program
from runtime.arguments import natural, positive
from runtime.failures import run_program
from runtime.utils import InputError, one_line

CODE = Path(__file__).resolve().parent
# Exit status 143: stopped by a signal, with its state saved; 140: stopped by SIGUSR2 before training began
REQUEUE = ['status=$?', 'if [ $status = 143 ] || [ $status = 140 ]; then scontrol requeue $SLURM_JOB_ID; fi',
           'exit $status']


def get_args_parser(folder='that of the job'):
    """The flags of main.py and of the job; `folder` is the default of --output-dir."""
    parser = program.get_args_parser()
    parser.description = 'EViT: training and evaluation as a job of Slurm'
    parser.set_defaults(output_dir=folder, num_workers=10)                 # of a node, not of this machine
    add = parser.add_argument_group('job').add_argument
    add('--ngpus', type=natural, default=8, help='GPUs and processes per node; 0: one process per node on the CPU')
    add('--nodes', type=positive(int), default=1, help='number of nodes')
    add('--timeout', type=positive(int), default=2880, help='time limit in minutes, after which the job is requeued')
    add('--job-dir', default='runs/submitit/%j',
        help='folder of the logs, and of the run without --output-dir, seen by all nodes; %%j: number of the job')
    add('--partition', help="None: the cluster's default")
    add('--comment', help='comment for the scheduler')
    add('--constraint', help='features that the nodes must have')
    return parser


class Job:
    """What each process of the job runs.

    Args:
        argv: the command line. Each process parses it: the machine that submits may have no GPU.
    """

    def __init__(self, argv):
        self.argv = argv

    def __call__(self):
        # submitit's handlers ignore SIGTERM, and requeue at SIGUSR2 before the state is saved
        for signum in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(signum, signal.SIG_DFL)
        folder = submitit.JobEnvironment().paths.folder
        program.run(self.argv, get_args_parser(str(folder)))


def submit(argv):
    """Submit a job for a command line → submitit's Job."""
    args = program.parse_args(argv, get_args_parser())
    if args.overwrite:
        raise InputError('--overwrite does not go with a job, which resumes when it is requeued; give another '
                         '--output-dir')
    if submitit is None:
        raise InputError('submitit is not installed; pip install -r requirements-submitit.txt')
    cpus = max(1, args.num_workers)
    executor = submitit.SlurmExecutor(args.job_dir)
    executor.update_parameters(
        job_name='evit', nodes=args.nodes, ntasks_per_node=max(1, args.ngpus), gpus_per_node=args.ngpus or None,
        cpus_per_task=cpus, time=args.timeout, partition=args.partition, comment=args.comment,
        constraint=args.constraint, additional_parameters={'requeue': True},
        setup=[f'export PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(str(CODE))}${{PYTHONPATH:+:$PYTHONPATH}}'],
        teardown=REQUEUE,
        # Since Slurm 22.05 srun does not inherit --cpus-per-task; and without a dead process the others would hang
        srun_args=[f'--cpus-per-task={cpus}', '--kill-on-bad-exit=1'])
    defaults = [f'--device={"cuda" if args.ngpus else "cpu"}', f'--num-workers={args.num_workers}', '--resume=auto']
    return executor.submit(Job([*defaults, *argv]))


def main(argv=None):
    """Submit the job, and print where its logs are."""
    try:
        job = submit(sys.argv[1:] if argv is None else argv)
    except (RuntimeError, OSError) as error:           # there is no Slurm, or it refuses the job
        raise InputError(one_line(error)) from None
    print(f'Submitted job {job.job_id}; its logs: {job.paths.stdout} and {job.paths.stderr}')


def run(argv=None):
    """The program, on a command line, by default that of the process."""
    run_program('run_with_submitit.py', main, argv)
