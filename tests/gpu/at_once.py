"""A pytest plugin that prints a failure when it happens: a run that a time limit ends has shown what it found."""

import sys

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        print(f"\n{report.nodeid} ({report.when})\n{report.longreprtext[-6000:]}", file=sys.stderr, flush=True)
