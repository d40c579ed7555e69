"""What the fault tests share: the undisturbed runs that others are compared with, and the table of what was tried."""
import os
import time

import pytest
import torch

from runs import train

SEED = os.environ.setdefault('FAULTS_SEED', str(int(time.time())))         # which pytest's own workers inherit


def pytest_configure(config):
    torch.set_num_threads(1)                           # or a forked process would wait for threads it does not have
    config.option.loadscopereorder = False             # pytest -n: files in the order that they have below


def pytest_report_header():
    return f'random moments follow from FAULTS_SEED={SEED}'


def pytest_collection_modifyitems(items):
    """The longest files first, so that with -n none is left over when all others are done."""
    items.sort(key=lambda item: item.path.stem not in ('test_cluster', 'test_kills'))


@pytest.fixture(scope='session')
def seed():
    return SEED


@pytest.fixture
def table(record_property):
    """table(faults, what): once a test has passed, add its row of README's table: so many faults, of which kind."""
    return lambda faults, what: record_property('row', f'| {what} | {faults} | as it should be |')


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line('\n| what is done to a run | faults tried | result |\n|---|---|---|')
    for report in terminalreporter.stats.get('passed', []):
        for _, row in report.user_properties:
            terminalreporter.write_line(row)


@pytest.fixture(scope='session')
def undisturbed(tmp_path_factory):
    """undisturbed(processes) → the output folder of a run of so many processes that nothing happened to.

    The user's command makes it, and its console is kept there.
    """
    folders = {}

    def run(processes):
        if processes not in folders:
            folders[processes] = tmp_path_factory.mktemp(f'undisturbed{processes}')
            console = train(folders[processes], processes=processes)
            (folders[processes] / 'console.txt').write_text(console)
        return folders[processes]

    return run
