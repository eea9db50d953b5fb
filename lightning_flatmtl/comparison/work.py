"""Runs what is left to be run, several at a time, and gives way to Ctrl-C."""

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

from lightning_flatmtl.comparison.display import Display
from lightning_flatmtl.comparison.jobs import Job, State
from lightning_flatmtl.comparison.launchers.base import Launcher
from lightning_flatmtl.comparison.record import RunRecord

__all__ = ["TICK", "end_all", "termination_as_interrupt", "work_off"]

TICK = 0.2
"""Seconds between two looks at what runs."""


def work_off(jobs: Sequence[Job], launcher: Launcher, display: Display) -> None:
    """Run all jobs that are not done; a job that fails does not stop the others.

    Args:
        jobs: In the order in which they are begun.
        launcher: What starts them.
        display: What shows them.

    Raises:
        KeyboardInterrupt: If it is interrupted; by then all processes have ended.
    """
    with termination_as_interrupt(), display:
        try:
            while _open(jobs):
                _begin(jobs, launcher)
                for job in jobs:
                    job.poll(RunRecord.ELSEWHERE)
                display.show(jobs)
                time.sleep(TICK)
        finally:
            end_all(jobs)
            display.show(jobs)


def _open(jobs: Sequence[Job]) -> bool:
    return any(job.state not in {State.DONE, State.FAILED} for job in jobs)


def _begin(jobs: Sequence[Job], launcher: Launcher) -> None:
    running = sum(job.state is State.RUNNING for job in jobs)
    for job in jobs:
        if job.state is State.ELSEWHERE:
            job.look()
        if job.state is not State.QUEUED or job.process or not launcher.has_room(running):
            continue
        job.look()  # another comparison may have come first
        if job.state is State.QUEUED:
            running += _started(job, launcher)


def _started(job: Job, launcher: Launcher) -> bool:
    try:
        job.start(launcher.start(job.folder))
    except OSError as error:  # a full disk, no more processes
        job.fail(f"{type(error).__name__}: {error}")
        return False
    return True


class _Ending(Protocol):
    def cancel(self) -> None: ...

    def stop(self) -> None: ...


def end_all(jobs: Sequence[_Ending]) -> None:
    """End all that runs, and wait for it."""
    # The last first: what waits for its turn is not to take the place of one that ends.
    for job in reversed(jobs):
        job.cancel()
    for job in jobs:
        job.stop()


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Let the end of a cluster's time slot be as orderly as Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
