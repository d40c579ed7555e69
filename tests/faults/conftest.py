"""Shared by the fault tests: undisturbed runs as references, and the printed table of faults."""
import os
import time

import pytest
import torch

from runs import train

SEED = os.environ.setdefault('FAULTS_SEED', str(int(time.time())))         # inherited by the workers of pytest -n


def pytest_configure(config):
    torch.set_num_threads(1)                           # a forked process would wait for threads that it lacks
    config.option.loadscopereorder = False             # pytest -n: keep the order of files set below


def pytest_report_header():
    return f'random moments follow from FAULTS_SEED={SEED}'


def pytest_collection_modifyitems(items):
    """Run the longest files first. With -n, a long file that starts last would run alone."""
    items.sort(key=lambda item: item.path.stem not in ('test_cluster', 'test_kills'))


@pytest.fixture(scope='session')
def seed():
    return SEED


@pytest.fixture
def table(record_property):
    """table(faults, what): if the test passes, add a row to the printed table: the number and the kind of faults."""
    return lambda faults, what: record_property('row', f'| {what} | {faults} | as it should be |')


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line('\n| what is done to a run | faults tried | result |\n|---|---|---|')
    for report in terminalreporter.stats.get('passed', []):
        for _, row in report.user_properties:
            terminalreporter.write_line(row)


@pytest.fixture(scope='session')
def undisturbed(tmp_path_factory):
    """undisturbed(processes) → the output folder of a run without faults, with that number of processes.

    The run is started as users do. The folder also contains its console output, console.txt.
    """
    folders = {}

    def run(processes):
        if processes not in folders:
            folders[processes] = tmp_path_factory.mktemp(f'undisturbed{processes}')
            console = train(folders[processes], processes=processes)
            (folders[processes] / 'console.txt').write_text(console)
        return folders[processes]

    return run
