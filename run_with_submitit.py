"""Train as a job of Slurm: `python run_with_submitit.py --ngpus 8 --nodes 2 …`, and all flags of main.py.

The job goes back to the queue at preemption, at its time limit and when a node fails, and on from its checkpoint.
"""
import shlex
import signal
import sys
from pathlib import Path

try:
    import submitit
except ImportError:                                    # run says how to get it
    submitit = None

import main
import utils

CODE = Path(__file__).resolve().parent
# The status says: a signal came, and the state is saved (143), or SIGUSR2 came before training began (140)
REQUEUE = ['status=$?', 'if [ $status = 143 ] || [ $status = 140 ]; then scontrol requeue $SLURM_JOB_ID; fi',
           'exit $status']


def get_args_parser(folder='that of the job'):
    """main.py's flags and the job's; `folder` is where main.py saves unless --output-dir is given."""
    parser = main.get_args_parser()
    parser.description = 'EViT: training and evaluation as a job of Slurm'
    parser.set_defaults(output_dir=folder)
    add = parser.add_argument_group('job').add_argument
    add('--ngpus', type=main.count, default=8, help='GPUs, and so processes, a node; 0: one process, on the CPU')
    add('--nodes', type=main.positive_int, default=1)
    add('--timeout', type=main.positive_int, default=2880, help='minutes after which the job goes back to the queue')
    add('--job-dir', default='runs/submitit/%j',
        help="of the logs, and of what main.py saves unless --output-dir is given; all nodes see it; %%j: job's number")
    add('--partition', help="None: the cluster's default")
    add('--comment', help='for the scheduler')
    add('--constraint', help='features that nodes must have')
    return parser


class Job:
    """What each process of the job does.

    Args:
        argv: the command line, parsed again by each process: a machine that submits may have no GPU.
    """

    def __init__(self, argv):
        self.argv = argv

    def __call__(self):
        # submitit's handlers would ignore the one signal, and requeue at the other before anything is saved
        for signum in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(signum, signal.SIG_DFL)
        folder = submitit.JobEnvironment().paths.folder
        main.run(self.argv, get_args_parser(str(folder)))


def submit(argv):
    """Submit a job with the flags of a command line → submitit's Job."""
    args = main.parse_args(argv, get_args_parser())
    cpus = max(1, args.num_workers)
    executor = submitit.SlurmExecutor(args.job_dir)
    executor.update_parameters(
        job_name='evit', nodes=args.nodes, ntasks_per_node=max(1, args.ngpus), gpus_per_node=args.ngpus or None,
        cpus_per_task=cpus, time=args.timeout, partition=args.partition, comment=args.comment,
        constraint=args.constraint, additional_parameters={'requeue': True},
        setup=[f'export PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(str(CODE))}${{PYTHONPATH:+:$PYTHONPATH}}'],
        teardown=REQUEUE,
        # Since Slurm 22.05 srun does not take the cores from the job; and when a process dies, the others wait in vain
        srun_args=[f'--cpus-per-task={cpus}', '--kill-on-bad-exit=1'])
    defaults = [f'--device={"cuda" if args.ngpus else "cpu"}', f'--num-workers={args.num_workers}', '--resume=auto']
    return executor.submit(Job([*defaults, *argv]))


def run(argv=None):
    """The program: what is wrong is one line, and the exit status 2."""
    try:
        if submitit is None:
            raise RuntimeError('submitit is not installed; pip install -r requirements-submitit.txt')
        job = submit(sys.argv[1:] if argv is None else argv)
    except (RuntimeError, OSError) as error:           # or there is no Slurm here, or it refuses the job
        print(f'run_with_submitit.py: error: {utils.one_line(error)}', file=sys.stderr)
        sys.exit(2)
    print(f'Submitted job {job.job_id}; its logs: {job.paths.stdout} and {job.paths.stderr}')


if __name__ == '__main__':
    run()
