"""run_with_submitit.py without a cluster: the requests to submitit, and the job."""
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

import main
import run_with_submitit
from conftest import ROOT
from run_with_submitit import Job, run
from runtime.distributed import StopSignal, Stopped
from runtime.utils import InputError

FLAGS = ['--epochs', '3', '--num_workers', '2', '--lr', '1e-3']


@pytest.fixture
def submitit(monkeypatch, tmp_path):
    """A stand-in for submitit that records the requests."""
    asked = SimpleNamespace(JobEnvironment=lambda: SimpleNamespace(paths=SimpleNamespace(folder=tmp_path)))

    class SlurmExecutor:
        def __init__(self, folder):
            asked.folder = folder

        def update_parameters(self, **parameters):
            asked.parameters = {name: value for name, value in parameters.items() if value is not None}

        def submit(self, job):
            asked.job = job
            return SimpleNamespace(job_id='7', paths=SimpleNamespace(stdout='job/out', stderr='job/err'))

    asked.SlurmExecutor = SlurmExecutor
    monkeypatch.setattr(run_with_submitit, 'submitit', asked)
    handlers = {signum: signal.getsignal(signum) for signum in StopSignal.SIGNALS}
    yield asked
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def test_submission(submitit, capsys):
    run([*FLAGS, '--ngpus', '4', '--nodes', '2', '--timeout', '90', '--job_dir', 'job', '--partition', 'long',
         '--comment', 'a b', '--constraint', 'fast'])
    out = capsys.readouterr().out
    assert 'job 7' in out and 'job/out' in out and 'job/err' in out
    assert submitit.folder == 'job'
    expected = dict(nodes=2, ntasks_per_node=4, gpus_per_node=4, cpus_per_task=2, time=90, partition='long',
                    comment='a b', constraint='fast')
    assert expected.items() <= submitit.parameters.items()


def test_no_setting_of_a_particular_site(submitit):
    run(FLAGS)
    assert not {'partition', 'comment', 'constraint', 'account', 'mem'} & submitit.parameters.keys()
    assert submitit.folder == 'runs/submitit/%j'


def test_overwrite(submitit, capsys):
    """Each time that it is requeued, the job would begin anew."""
    with pytest.raises(SystemExit):
        run([*FLAGS, '--overwrite'])
    assert 'does not go with a job' in capsys.readouterr().err and not hasattr(submitit, 'job')


def test_without_gpus(submitit):
    run([*FLAGS, '--ngpus', '0'])
    assert submitit.parameters['ntasks_per_node'] == 1 and 'gpus_per_node' not in submitit.parameters


@pytest.mark.parametrize('flags, expected', [
    ([], dict(device='cuda', resume='auto', num_workers=2, output_dir='JOB')),
    (['--ngpus', '0'], dict(device='cpu')),
    (['--resume', 'a.pth', '--output_dir', 'out', '--device', 'cpu'],
     dict(resume='a.pth', output_dir='out', device='cpu'))])
def test_command_of_a_job(submitit, monkeypatch, tmp_path, flags, expected):
    run([*FLAGS, *flags])
    seen = []
    monkeypatch.setattr(main, 'main', seen.append)
    submitit.job()
    expected = {name: str(tmp_path) if value == 'JOB' else value for name, value in expected.items()}
    assert expected.items() <= vars(seen[0]).items() and seen[0].epochs == 3
    assert submitit.job.argv[-len(FLAGS + flags):] == FLAGS + flags


@pytest.mark.parametrize('error, status', [
    (Stopped(signal.SIGUSR2), 143), (Stopped(signal.SIGTERM), 143), (Stopped(signal.SIGINT), 130), (InputError('wrong'), 2)])
def test_exit_status_of_a_job(submitit, monkeypatch, error, status):
    def stop(args):
        assert signal.getsignal(signal.SIGUSR2) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        raise error

    monkeypatch.setattr(main, 'main', stop)
    with pytest.raises(SystemExit) as exit:
        Job(FLAGS)()
    assert exit.value.code == status


@pytest.mark.parametrize('flags', [['--epochs', '0'], ['--nodes', '0'], ['--no-such-flag'], ['--data-set', 'IMNET'],
                                   ['--eval']])
def test_wrong_flags(submitit, capsys, flags):
    with pytest.raises(SystemExit) as exit:
        run(flags)
    assert exit.value.code == 2 and not hasattr(submitit, 'job')
    assert capsys.readouterr().err.count('\n') == 1


def test_without_submitit(tmp_path):
    """One line, but --help has no need of it."""
    (tmp_path / 'submitit.py').write_text('raise ImportError')
    for flags, status in (([], 2), (['--help'], 0)):
        done = subprocess.run([sys.executable, ROOT / 'run_with_submitit.py', *flags], capture_output=True, text=True,
                              env=os.environ | {'PYTHONPATH': str(tmp_path)})
        assert done.returncode == status, done.stderr
        assert done.stderr == '' if flags else (
            done.stderr.count('\n') == 1 and 'pip install -r requirements-submitit.txt' in done.stderr)


def test_without_slurm(submitit, monkeypatch, capsys):
    def no_slurm(*_, **__):
        raise RuntimeError('first\nCould not detect "srun"')

    monkeypatch.setattr(submitit, 'SlurmExecutor', no_slurm)
    with pytest.raises(SystemExit) as exit:
        run(FLAGS)
    assert exit.value.code == 2
    assert capsys.readouterr().err == 'run_with_submitit.py: error: Could not detect "srun"\n'
