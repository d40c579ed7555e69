import json
import os
import re
import subprocess
import sys

import torch

from conftest import ROOT, run_recipe
from outputs import checkpoint


def test_recipes_of_the_digits(tmp_path):
    small = ['--epochs', '1', '--input-size', '16']
    printed = run_recipe('run_code.sh', *small, '--warmup-epochs', '0', '--shrink_start_epoch', '0',
                         logdir=tmp_path / 'a')
    assert '304,970 parameters' in printed and 'on the 360 test images' in printed
    printed = run_recipe('finetune.sh', *small, '--lr', '0', '--min-lr', '0', logdir=tmp_path / 'b',
                         ckpt=tmp_path / 'a' / 'checkpoint.pth')
    first, second = (json.loads((tmp_path / name / 'log.txt').read_text().splitlines()[-1]) for name in 'ab')
    assert second['train_keep_rate'] == 0.5 and first['test_loss'] < 2.4
    assert abs(second['test_acc1'] - first['test_acc1']) < 15              # the same weights at another keep rate


def test_recipes_of_the_paper(image_folder, tmp_path):
    """With LV-ViT, whose own settings, such as MixToken, override some."""
    small = ['--epochs', '1', '--batch-size', '8', '--input-size', '32', '--num_workers', '0', '--model-kwargs',
             'depth=2', '--drop_loc', '0,1']
    run_recipe('run_code.sh', *small, datapath=image_folder, logdir=tmp_path / 'a', model='lvvit_t')
    run_recipe('finetune.sh', *small, datapath=image_folder, logdir=tmp_path / 'b', model='lvvit_t',
               ckpt=tmp_path / 'a' / 'checkpoint.pth')
    trained, finetuned = (checkpoint(tmp_path / name)['args'] for name in 'ab')
    assert trained['model'] == finetuned['model'] == 'lvvit_t' and trained['mixup'] == finetuned['mixup'] == 0
    assert (trained['lr'], trained['repeated_aug'], trained['base_keep_rate']) == (8e-4, False, 0.7)


def test_report_of_gpu_tests_with_failures(tmp_path):
    """Tests that fail, rows without figures and parts without rows do not stop the other parts."""
    stub = tmp_path / 'python'
    stub.write_text(f'''#!/bin/sh
        case "$*" in
            "- "*) exec {sys.executable} "$@";;
            *"-m pytest"*) echo 2 failed in 3 s; exit 1;;
            *--train*) exit 2;;
        esac
        for file; do :; done                           # the last argument
        printf 'model,median,min,max,ratio,memory_mib,failure\\na,20.4,10,30,1.5,604,\\nb,,,,,,x|y\\n' > "$file"''')
    stub.chmod(0o755)
    done = subprocess.run(['bash', str(ROOT / 'tests' / 'gpu.sh'), str(tmp_path / 'report'), '--dry-run'],
                          env={**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}'}, capture_output=True,
                          text=True)
    assert done.returncode == 1, done.stderr
    report = (tmp_path / 'report' / 'report.md').read_text()
    assert report in done.stdout and f'torch {torch.__version__}' in report and 'commit ' in report
    rows = [[cell.strip() for cell in line.split('|')[1:5]] for line in report.splitlines() if line.startswith('| ')]
    expected = [['part', 'result', 'ratio', 'memory, MiB'], ['tests', 'failed with status 1: 2 failed in 3 s', '', '']]
    for name in 'inference-compiled', 'inference-eager':
        expected += [[name, 'passed', '', ''], [f'{name}: a', '20 [10–30] images/s', '1.500', '604'],
                     [f'{name}: b', 'failed: x/y', '–', '–']]
    assert rows == expected + [[f'training-{mode}', 'failed with status 2', '', ''] for mode in ('compiled', 'eager')]


def test_flags_of_readme_and_docs():
    from run_with_submitit import \
        get_args_parser  # flags of main.py and some more
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
