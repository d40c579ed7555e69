import json
import os
import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def run_recipe(script, *flags, **variables):
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()},
                   'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}'}
    done = subprocess.run(['bash', str(ROOT / script), '--device', 'cpu', *flags], capture_output=True, text=True,
                          env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_recipes_of_the_digits(tmp_path):
    printed = run_recipe('run_code.sh', '--epochs', '1', '--warmup-epochs', '0', '--shrink_start_epoch', '0',
                         logdir=tmp_path / 'a')
    assert '308,042 parameters' in printed and 'on the 360 test images' in printed
    printed = run_recipe('finetune.sh', '--epochs', '1', '--lr', '0', '--min-lr', '0', logdir=tmp_path / 'b',
                         ckpt=tmp_path / 'a' / 'checkpoint.pth')
    first, second = (json.loads((tmp_path / name / 'log.txt').read_text().splitlines()[-1]) for name in 'ab')
    assert second['train_keep_rate'] == 0.5 and first['test_loss'] < 2.4
    assert abs(second['test_acc1'] - first['test_acc1']) < 15              # the same weights at another keep rate


def test_recipes_of_the_paper(image_folder, tmp_path):
    small = ['--epochs', '1', '--batch-size', '8', '--model', 'deit_tiny_patch16_shrink_base', '--input-size', '32',
             '--num_workers', '0']
    run_recipe('run_code.sh', *small, datapath=image_folder, logdir=tmp_path / 'a')
    run_recipe('finetune.sh', *small, datapath=image_folder, logdir=tmp_path / 'b',
               ckpt=tmp_path / 'a' / 'checkpoint.pth')
    assert (tmp_path / 'b' / 'checkpoint.pth').is_file()


def test_flags_of_readme_and_docs():
    from run_with_submitit import get_args_parser                         # flags of main.py and some more
    known = set(get_args_parser()._option_string_actions)
    files = [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md'), *ROOT.glob('*.sh')]
    text = '\n'.join(path.read_text() for path in files)
    program = re.compile(r'main\.py|(?:run_code|finetune|slurm)\.sh|run_with_submitit\.py|^        (?=--)')
    lines = [program.split(line, maxsplit=1)[1] for line in text.replace('\\\n', ' ').splitlines()
             if program.search(line)]
    flags = {flag.replace('_', '-') for line in lines for flag in re.findall(r'(?<!\S)`?(--[a-z][\w-]+)', line)}
    assert len(flags) > 40
    assert flags <= known, flags - known


def test_links_of_readme_and_docs():
    for path in (ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')):
        for link in re.findall(r'\]\(([^)#]+)\)', path.read_text()):
            assert link.startswith('https://') or (path.parent / link).is_file(), f'{path}: {link}'
    assert (ROOT / 'README.md').read_text().count('\n') <= 250
