"""How a run fails: every process ends, the cause is shown once."""
import contextlib
import errno
import itertools
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback

import torch
import torch.distributed as dist

from runtime import program
from runtime.utils import DataError, InputError, one_line


class Failures:
    """A side channel by which a failing process tells its peers why, as their collectives would only time out.

    A thread has a connection of its own to the store of the group, and works while the main thread waits inside a
    collective, which under NCCL may take for ever. It ends the process a moment after another one told a cause, or when
    another one no longer gives a sign of life. The first process watches all others, and they watch the first. A second
    thread ends the process if the store itself, which the first process may host, no longer answers.

    Args:
        store: of the group.
        rank, world_size: of this process; how many there are.
        timeout: seconds without a sign of life after which a process is given up.
    Attributes:
        finish: a function of a timeout in seconds that waits for what must not be cut short, such as a checkpoint.
    """
    group = None                                       # that of this process
    PERIOD = 0.5                                       # seconds between signs of life
    GRACE = 1.5                                        # seconds in which the main thread may report an error itself
    HURRY = 10.                                        # the timeout once the scheduler wants the process to end
    PATIENCE = 20.                                     # seconds for `finish`

    def __init__(self, store, rank, world_size, timeout):
        self.store, self.rank, self.world_size, self.timeout = store.clone(), rank, world_size, timeout
        self.watched = [0] if rank else list(range(1, world_size))
        self.signs = {process: (None, time.monotonic()) for process in self.watched}   # the last, and when it came
        self.ending, self.left = threading.Lock(), threading.Event()
        self.finish, self.heard, self.unanswered = None, None, 0
        for function in (self.watch, self.watch_store):
            threading.Thread(target=function, daemon=True).start()

    def leave(self):
        """Stop watching, because all processes have come to their end."""
        self.left.set()

    def hurry(self):
        """Give up a silent process sooner, because a scheduler asked this one to end, and will kill it."""
        self.timeout = min(self.timeout, self.HURRY)

    def watch(self):
        """Give signs of life, and end the process if another one failed."""
        for number in itertools.count():
            try:
                self.store.set(f'alive {self.rank}', str(number))
                found = self.told()
                if not found and (silent := self.silent(self.timeout)):
                    found = 1, self.describe(silent)
                    self.tell(*found)
            except RuntimeError:                       # the process that hosts the store is gone
                found = 1, self.describe([0])
            self.unanswered = 0
            if self.left.wait(self.GRACE if found else self.PERIOD):
                return
            if found:
                with contextlib.suppress(Exception):
                    if self.finish:
                        self.finish(self.PATIENCE)
                with self.ending:                      # the main thread has it if it reports an error of its own
                    self.end(*found)

    def watch_store(self):
        """End the process if the other thread has waited for the store too long.

        Periods are counted instead of looking at the clock, because this process itself may be stopped for a while.
        """
        while not self.left.wait(self.PERIOD):
            self.unanswered += 1
            if self.unanswered * self.PERIOD > self.timeout + 2 * self.GRACE + self.PATIENCE * bool(self.finish):
                self.end(1, self.describe([0]))

    def end(self, status, message):
        """End the process because of another one."""
        if self.rank == 0 or self.rank == 1 and message == self.describe([0]):
            print(f'{program.name}: error: {message}', file=sys.stderr)
        end_process(status)

    def silent(self, seconds):
        """The watched processes without a sign of life for so many seconds."""
        now = time.monotonic()
        for process, (sign, _) in self.signs.items():
            key = f'alive {process}'
            if self.store.check([key]) and (new := self.store.get(key)) != sign:
                self.signs[process] = new, now
        return [process for process, (sign, since) in self.signs.items() if sign and now - since > seconds]

    def describe(self, silent, error=None):
        return (f'process {", ".join(map(str, silent))} of {self.world_size} ended or no longer answers'
                + (f' (waited for as long as --dist-timeout says): {one_line(error)}' if error else ''))

    def tell(self, status, message):
        """Tell the others why this process fails and its exit status; the first cause stays."""
        with contextlib.suppress(RuntimeError):                            # process 0, which hosts the store, is gone
            text = message.encode(errors='backslashreplace').decode()      # the name of a file may be any bytes
            self.store.compare_set('cause', '', f'{status} {text}')

    def told(self):
        """The exit status and the message that a failing process told; None if there is none."""
        if not self.heard and self.store.check(['cause']):
            status, message = self.store.get('cause').decode().split(' ', maxsplit=1)
            self.heard = int(status), message          # kept, because the store may end with its process now
            self.store.set(f'noted {self.rank}', '')
        return self.heard

    def wait_until_noted(self):
        """Let the others read the cause before this process ends, which may host the store."""
        with contextlib.suppress(RuntimeError):
            for _ in range(30):
                if self.store.check([f'noted {process}' for process in self.watched]):
                    return
                time.sleep(self.PERIOD / 5)

    def cause(self, error):
        """Why a collective failed with `error`: exit status and one line; None if the error has another origin.

        This is what a failing process told, or else which processes are silent: those that have not reported within 5 s
        that their collective failed, too. Under NCCL healthy processes wait without an error; only signs of life count.
        """
        known = InputError, OSError, FloatingPointError                    # whose text may be anything
        if isinstance(error, known) or not (isinstance(error, dist.DistError) or re.search('gloo|NCCL', str(error))):
            return None
        try:
            if found := self.told():
                return found
            self.store.set(f'waits {self.rank}', '')
            silent = [process for process in range(self.world_size) if process != self.rank]
            for _ in range(50):
                if found := self.told():
                    return found
                silent = [process for process in silent if not self.store.check([f'waits {process}'])]
                if not silent:
                    break
                time.sleep(self.PERIOD / 5)
            if dist.get_backend() == 'nccl':
                silent = self.silent(10 * self.PERIOD)
        except RuntimeError:
            silent = [0]
        return 1, self.describe(silent, error) if silent else f'the processes lost contact: {one_line(error)}'


# --- Naming ---------------------------------------------------------------------------------------------------------

def lack(error):
    """What an error says that the machine lacks, and what to do, as one line; None if the error is another."""
    text, message = str(error), one_line(error)
    no_space = isinstance(error, OSError) and error.errno == errno.ENOSPC and not error.filename
    if (re.search('shared memory|</torch_', text)
            or no_space and os.path.isdir('/dev/shm') and shutil.disk_usage('/dev/shm').free < 2 ** 16):
        return (f'/dev/shm, through which DataLoader workers pass images, is full ({message.rstrip(".")}); enlarge it '
                '(docker run --shm-size 8g), or give --num-workers 0')
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return f'out of memory; lower --batch-size: {message}'
    if text.startswith('Too many open files'):         # of a DataLoader
        return message
    if isinstance(error, ConnectionResetError) or text.startswith('DataLoader worker'):
        # Depending on the moment at which a worker dies, torch reports its death, or only the pipe to it breaks
        prefix = 'a DataLoader worker died: ' if isinstance(error, ConnectionResetError) else ''
        return f'{prefix}{message} It may have run out of memory: lower --num-workers or --batch-size'
    return None


# --- Ending ---------------------------------------------------------------------------------------------------------

def run_program(name, function, *arguments):
    """Call function(*arguments), and exit if it returns a status other than 0 or None, or fails.

    Args:
        name: of the program, for messages.
    """
    program.name = name
    try:
        status = function(*arguments)
        sys.stdout.flush()                             # raises what Python would ignore at the exit
        if program.interrupted:
            raise KeyboardInterrupt                    # something has swallowed it
    except (Exception, KeyboardInterrupt) as error:
        exit_failed(name, KeyboardInterrupt() if program.interrupted else error)
    if status:
        sys.exit(status)


def end_process(status):
    """End without leaving the group, which would wait for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def exit_failed(name, error):
    """End a process that failed: say why, also to the other processes, and do not wait for them.

    An expected failure is one line, printed once; any other error is a traceback. The exit status is 2 for wrong input,
    130 for Ctrl-C.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)      # torch's handler would raise if one more worker died here
    sys.unraisablehook = lambda _: None                # what is half made may fail again when it is taken down
    group = Failures.group
    if group:
        group.ending.acquire()                         # for ever
    found = group.cause(error) if group else None
    status, message, shown, kind = 1, one_line(error), True, 'error: '
    if found:
        (status, message), shown = found, group.rank == 0
    elif isinstance(error, KeyboardInterrupt):
        status, message, kind = program.INTERRUPTED, 'interrupted', ''
        shown = os.environ.get('LOCAL_RANK', '0') == '0'
    elif found := lack(error):
        message = found
    elif isinstance(error, (InputError, FloatingPointError, OSError)):
        status = 2 if isinstance(error, InputError) else 1
        shown = os.environ.get('LOCAL_RANK', '0') == '0' or isinstance(error, (DataError, OSError))
    else:
        traceback.print_exc()
        shown = False
    if shown:
        print(f'{name}: {kind}{message}', file=sys.stderr)
    if not group:
        sys.exit(status)
    group.tell(status, message if found else f'process {group.rank}: {message}')
    if group.rank == 0:
        group.wait_until_noted()
    end_process(status)
