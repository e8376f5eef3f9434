"""Plugin of pytest that updates a table of all tests after each test: ``pytest -p benchmarks.gpu.pytest_page``.

If pytest is killed, the table has the results so far, and lists the remaining tests as not run.
"""

import shlex
import sys
from pathlib import Path

import torch

from benchmarks.pages import machine, write_page

NOT_RUN = 'not run'


def pytest_addoption(parser):
    parser.addoption('--page', type=Path, metavar='FILE.md', help='write a table of the tests to this file')


def pytest_configure(config):
    if config.getoption('--page'):
        config.pluginmanager.register(Page(config.getoption('--page')))


class Page:
    """Results of the tests by name, and the page with their table."""

    def __init__(self, page: Path):
        self.page = page
        self.results, self.seconds = {}, {}
        self.where = machine('cuda' if torch.cuda.is_available() else 'cpu', torch.get_num_threads())

    def pytest_collection_finish(self, session):
        self.results = dict.fromkeys((short_name(item.nodeid) for item in session.items), NOT_RUN)
        self.write()

    def pytest_runtest_logreport(self, report):
        name = short_name(report.nodeid)
        self.seconds[name] = self.seconds.get(name, 0) + report.duration
        if report.when == 'call' or not report.passed:
            self.results[name] = report.outcome
            if report.skipped:
                self.results[name] += f': {report.longrepr[2].removeprefix("Skipped: ")}'
            elif report.failed:
                self.results[name] += f': {cause(report)}'
            self.write()

    def write(self):
        rows = [
            dict(test=name, result=result, seconds=f'{self.seconds[name]:.1f}' if name in self.seconds else '')
            for name, result in self.results.items()
        ]
        text = 'Tests marked `gpu`.'
        command = shlex.join(['python', '-m', 'pytest', *sys.argv[1:]])
        write_page(self.page, 'Tests on a GPU', text, command, self.where, rows or [dict(test='none', result='')])


def short_name(nodeid: str) -> str:
    return nodeid.split('::')[-1]


def cause(report) -> str:
    """Return the first line of a failed test's error."""
    crash = getattr(report.longrepr, 'reprcrash', None)
    text = crash.message if crash else str(report.longrepr)
    return text.strip().splitlines()[0].replace('|', ' ')[:120]
