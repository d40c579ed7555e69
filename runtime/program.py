"""How every program begins.

Nothing heavy is imported here, so that Ctrl-C is heeded from the first moment.
"""
import codecs
import errno
import importlib
import io
import os
import select
import signal
import sys

INTERRUPTED = 128 + signal.SIGINT
ASCII = {'–': '-', '×': 'x', '·': '*', '→': '->', '…': '...', '“': '"', '”': '"', '’': "'"}
GONE = errno.EPIPE, errno.EIO                          # the reader of a pipe has ended, the terminal is closed
name = 'main.py'                                       # that of the program, for messages
interrupted = False                                    # whether Ctrl-C was pressed


def start(module):
    """Run a program as a script: import its module, call its `run()`, and exit.

    The module is imported here, as Ctrl-C or a missing package would otherwise end the imports with a traceback.
    """
    program = f'{module}.py'

    def end(signum, frame):
        os.write(2, f'{program}: interrupted\n'.encode())
        os._exit(INTERRUPTED)

    def interrupt(signum, frame):
        global interrupted
        if interrupted:                                # something holds the exception up, or has swallowed it
            end(signum, frame)
        interrupted = True
        raise KeyboardInterrupt

    heeds = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN          # as shells set it for background jobs
    for number, stream in ((1, 'stdout'), (2, 'stderr')):
        setattr(sys, stream, open_console(number, getattr(sys, stream)))
    if heeds:
        signal.signal(signal.SIGINT, end)              # an import might swallow the exception, and has nothing to save
    try:
        run = importlib.import_module(module).run
    except ModuleNotFoundError as error:
        print(f'{program}: error: {error.name} is not installed; pip install -r requirements.txt', file=sys.stderr)
        sys.exit(2)
    if heeds:
        signal.signal(signal.SIGINT, interrupt)
    run()
    sys.exit()


# --- Console --------------------------------------------------------------------------------------------------------

class Console(io.FileIO):
    """The file of a console. If its reader goes away, the work goes on; what is written then is dropped.

    Another error, such as a full disk, is raised once.
    """
    broken = False

    def write(self, data):
        try:
            while not self.broken and (written := super().write(data)) is None:        # it was made non-blocking
                select.select([], [self], [])
        except OSError as error:
            self.broken = True
            if error.errno not in GONE:
                raise
        return len(data) if self.broken else written


def open_console(number, stream):
    """A text stream for file number 1 or 2 that shows any text in the encoding of `stream`, Python's own.

    `stream` is None if the file is closed; then what is written is dropped.
    """
    if stream is None:
        null = os.open(os.devnull, os.O_WRONLY)
        if null != number:                             # or else the next file that is opened would be the console
            os.dup2(null, number)
            os.close(null)
    codecs.register_error('ascii', replace)
    return io.TextIOWrapper(
        io.BufferedWriter(Console(number, 'w', closefd=False)), getattr(stream, 'encoding', 'utf-8'), 'ascii',
        line_buffering=getattr(stream, 'line_buffering', True), write_through=getattr(stream, 'write_through', False))


def replace(error):
    """An error handler of codecs: what an encoding lacks becomes similar ASCII, or else \\xNN or \\uNNNN."""
    text = error.object[error.start:error.end]
    return ''.join(ASCII.get(char) or char.encode('ascii', 'backslashreplace').decode() for char in text), error.end
