"""What the fault tests share: the undisturbed runs that all others are compared with, and the table of the results."""
import pytest

from runs import train

rows = pytest.StashKey()


def pytest_configure(config):
    config.stash[rows] = []


@pytest.fixture
def table(request):
    """table(faults, what): once a test has passed, add a row of README's table, so many faults tried, of which kind."""
    return lambda faults, what: request.config.stash[rows].append((faults, what))


def pytest_terminal_summary(terminalreporter, config):
    terminalreporter.write_line('\n| what is done to a run | faults tried | result |\n|---|---|---|')
    for faults, what in config.stash[rows]:
        terminalreporter.write_line(f'| {what} | {faults} | as it should be |')


@pytest.fixture(scope='session')
def undisturbed(tmp_path_factory):
    """undisturbed(processes) → the output folder of a run of so many processes that nothing happened to."""
    folders = {}

    def run(processes):
        if processes not in folders:
            folders[processes] = tmp_path_factory.mktemp(f'undisturbed{processes}')
            train(folders[processes], processes=processes)
        return folders[processes]

    return run
