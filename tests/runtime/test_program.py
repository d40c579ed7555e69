"""How programs begin and end, as processes: Ctrl-C, consoles of another encoding, readers that go away."""
import importlib
import os
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT

# Also if pytest runs in the background, where a shell makes SIGINT ignored
HEEDS = {'preexec_fn': lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}

PROGRAMS = ('main.py', 'curve.py', 'export.py', 'speed_test.py', 'loader_benchmark.py', 'folder2lmdb.py',
            'run_with_submitit.py', 'docs/token_merging.py')


def process(folder, code, program=ROOT / 'main.py', arguments=(), **options):
    """Start a program with a stand-in for torch that runs `code` when it is imported; → CompletedProcess."""
    (folder / 'torch.py').write_text(code)
    environment = {**os.environ, 'PYTHONPATH': str(folder), **options.pop('env', {})}
    options = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True, 'timeout': 60} | HEEDS | options
    return subprocess.run([sys.executable, program, *arguments], env=environment, **options)


def script(folder, code):
    """A program whose function runs `code`, with stand-ins for what is heavy; → its path."""
    (folder / 'program_of_test.py').write_text(
        f'import sys\nsys.path.insert(1, {str(ROOT)!r})\n'
        'from runtime.failures import run_program\nfrom runtime.program import start\n'
        f'if __name__ == "__main__":\n    start("program_of_test")\n'
        f'def function():\n' + ''.join(f'    {line}\n' for line in code.splitlines()) +
        'def run():\n    run_program("program_of_test.py", function)\n')
    return folder / 'program_of_test.py'


# --- Ctrl-C ---------------------------------------------------------------------------------------------------------

INTERRUPT = 'import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n'


@pytest.mark.parametrize('program', PROGRAMS)
def test_interrupt_while_modules_are_imported(program, tmp_path):
    """The import may swallow the exception, or turn it into another."""
    code = 'import os\ntry:\n    os.kill(os.getpid(), 2)\nexcept BaseException:\n    raise ImportError'
    done = process(tmp_path, code, ROOT / program)
    assert (done.returncode, done.stdout, done.stderr) == (130, '', f'{program.split("/")[-1]}: interrupted\n')


@pytest.mark.parametrize('program', PROGRAMS)
def test_interrupt_of_each_program(program, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / 'docs')
    module = importlib.import_module(program.split('/')[-1].removesuffix('.py'))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, 'main', interrupted)
    if hasattr(module, 'parse_args'):
        monkeypatch.setattr(module, 'parse_args', lambda *_: None)
    with pytest.raises(SystemExit) as exit_:
        module.run([])
    assert exit_.value.code == 130 and capsys.readouterr() == ('', f'{program.split("/")[-1]}: interrupted\n')


@pytest.mark.parametrize('code', [
    'pass', 'raise ImportError', 'import time; time.sleep(30)', 'import os; os.kill(os.getpid(), 2)'],
    ids=['swallowed', 'another error', 'swallowed, then a second', 'a second at once'])
def test_interrupt_that_something_swallows(code, tmp_path):
    second = 'import os, threading, time\nthreading.Timer(1.5, os.kill, (os.getpid(), 2)).start()\n' * ('sleep' in code)
    program = script(tmp_path, f'{INTERRUPT.splitlines()[0]}\n{second}try:\n    {INTERRUPT.splitlines()[1]}\n'
                               f'except BaseException:\n    {code}')
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60, **HEEDS)
    assert (done.returncode, done.stderr) == (130, 'program_of_test.py: interrupted\n')


def test_interrupt_of_a_job_in_the_background(tmp_path):
    """A shell makes it ignore Ctrl-C, which is meant for the job in the foreground."""
    program = script(tmp_path, f'{INTERRUPT}print("done")')
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert (done.returncode, done.stdout, done.stderr) == (0, 'done\n', '')


def test_package_that_is_missing(tmp_path):
    done = process(tmp_path, 'import no_such_package')
    assert done.returncode == 2
    assert done.stderr == 'main.py: error: no_such_package is not installed; pip install -r requirements.txt\n'


# --- Consoles -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('encoding, shown', [
    ('utf-8', '3×4 [1–2] … é 語 \\udcff'), ('latin-1', '3×4 [1-2] ... é \\u8a9e \\udcff'),
    ('ascii', '3x4 [1-2] ... \\xe9 \\u8a9e \\udcff')])
def test_encoding_of_the_console(encoding, shown, tmp_path):
    code = 'for file in (sys.stdout, sys.stderr):\n    print("3×4 [1–2] … é 語 \\udcff", file=file)'
    done = subprocess.run([sys.executable, script(tmp_path, code)], capture_output=True,
                          env=os.environ | {'PYTHONIOENCODING': encoding}, timeout=60)
    assert (done.returncode, done.stdout.decode(encoding), done.stderr.decode(encoding)) == (0, *2 * [f'{shown}\n'])


def test_figures_on_a_machine_without_utf_8(tmp_path):
    """On the console and in files."""
    environment = os.environ | {'LC_ALL': 'C', 'PYTHONCOERCECLOCALE': '0', 'PYTHONUTF8': '0'}
    measured = ['--device', 'cpu', '--input-size', '32', '--batch-size', '2']
    for program, flags in (('main.py', ['--only-test-speed', '--model', 'test_vit2', '--output-dir', tmp_path]),
                           ('speed_test.py', ['--models', 'test_vit2', '--windows', '1', '--window-seconds', '0.01',
                                              '--csv', tmp_path / 'a.csv'])):
        done = subprocess.run([sys.executable, ROOT / program, *measured, *flags], capture_output=True, env=environment,
                              timeout=120)
        assert done.returncode == 0 and b'32x32' in done.stdout, done.stderr
    for name in 'speed_macs.txt', 'a.csv':
        assert '32×32' in (tmp_path / name).read_text(encoding='utf-8')


@pytest.mark.parametrize('unbuffered', ['', '1'])
def test_reader_that_goes_away(unbuffered, tmp_path):
    """The work goes on, and errors that have a reader are shown."""
    code = f'for i in range(20000):\n    print("a line")\nopen({str(tmp_path / "saved")!r}, "w").close()'
    with subprocess.Popen([sys.executable, script(tmp_path, code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env=os.environ | {'PYTHONUNBUFFERED': unbuffered}) as program:
        program.stdout.readline()
        program.stdout.close()
        assert program.stderr.read() == b''
    assert program.returncode == 0 and (tmp_path / 'saved').exists()


@pytest.mark.parametrize('code', ['print("figures")', 'print("figures", flush=True)'])
def test_console_on_a_full_disk(code, tmp_path):
    """Figures that are lost are an error."""
    with open('/dev/full', 'w') as full:
        done = subprocess.run([sys.executable, script(tmp_path, code)], stdout=full, stderr=subprocess.PIPE, text=True,
                              timeout=60)
    assert (done.returncode, done.stderr) == (1, 'program_of_test.py: error: [Errno 28] No space left on device\n')


def test_console_that_does_not_block(tmp_path):
    """Another program may have set the terminal or the pipe so."""
    program = script(tmp_path, 'import os\nos.set_blocking(1, False)\nprint(200000 * "1")')
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE) as done:
        time.sleep(0.5)
        assert done.stdout.read() == 200000 * b'1' + b'\n'
    assert done.returncode == 0


def test_closed_console(tmp_path):
    """No file that is opened later becomes the console."""
    code = f'import os\nopen({str(tmp_path / "file")!r}, "w")\nos.write(1, b"of C++")\nprint(1)\nsys.stdout.flush()'
    done = subprocess.run(f'{sys.executable} {script(tmp_path, code)} >&- 2>&-', shell=True, timeout=60)
    assert done.returncode == 0 and (tmp_path / 'file').read_bytes() == b''
