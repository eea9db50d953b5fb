"""Tests in a forked process, which has all modules and tests loaded already."""

import os
import resource
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

MEMORY = 6 << 30  # bytes that a fault may take beyond what is taken already
CPU_SECONDS = 20.0  # that one test may take; on a busy machine that may be minutes
TIMEOUT = -signal.SIGPROF


class Failures:
    """A plugin that remembers which tests have failed, or have not passed."""

    def __init__(self) -> None:
        self.failed: set[str] = set()
        self.not_passed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid)
        if not report.passed:
            self.not_passed.add(report.nodeid)


def run(items: Sequence[pytest.Item], failures: Failures) -> int:
    """Run tests until one fails: 1, else 0. One that sleeps is ended by pytest's own limit."""
    for item, following in zip(items, [*items[1:], None], strict=True):
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # nothing handles it: the process ends
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if failures.failed:
            return 1
    return 0


def control(items: Sequence[pytest.Item], failures: Failures, file: Path) -> int:
    """Run all tests as :func:`run` runs them; the file gets the names of those that fail."""
    failed: set[str] = set()
    rest = list(items)
    while rest and run(rest, failures):
        failed |= failures.failed
        last = max(i for i, item in enumerate(rest) if item.nodeid in failures.failed)
        rest = rest[last + 1 :]
        failures.failed.clear()
    file.write_text("\n".join(sorted(failed)), "utf-8")
    return 0


def forked(work: Callable[[], int]) -> int:
    """The exit status of ``work`` in a process of its own; negative if a signal ended it."""
    child = os.fork()
    if child == 0:
        _work(work)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _work(work: Callable[[], int]) -> None:
    status = 1  # what a fault raises where no test catches it is noticed too
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
        most = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        status = work()
    finally:
        os._exit(status)
