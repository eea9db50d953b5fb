"""A run on its way: queued, running, done, failed, or done by another comparison."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from lightning_flatmtl.comparison.folder import RunFolder
from lightning_flatmtl.comparison.launchers.base import Process
from lightning_flatmtl.comparison.plan import Run
from lightning_flatmtl.comparison.reasons import reason

__all__ = ["Job", "State", "seconds_left"]


class State(StrEnum):
    """Where a run is."""

    QUEUED = "queued"
    RUNNING = "running"
    ELSEWHERE = "running elsewhere"
    DONE = "done"
    FAILED = "failed"


@dataclass
class Job:
    """A run, its folder and its process.

    Args:
        run: The run.
        folder: Its folder.
    """

    run: Run
    folder: RunFolder
    state: State = State.QUEUED
    error: str | None = None
    seconds: float | None = None
    process: Process | None = field(default=None, repr=False)
    began: float = 0.0

    def look(self) -> None:
        """Find out whether the run is done, or another comparison is at it."""
        if self.state in {State.DONE, State.FAILED} or self.process is not None:
            return
        if self.folder.result is not None:
            self.state = State.DONE
        else:
            self.state = State.ELSEWHERE if self.folder.claimed else State.QUEUED

    def recall(self) -> None:
        """Show that it failed an earlier time, where it is not to be run again."""
        error = self.folder.failure if self.state is State.QUEUED else None
        if error is not None:
            self.state, self.error = State.FAILED, error

    def start(self, process: Process) -> None:
        """The run was started; it may have to wait for its turn."""
        self.process, self.began = process, time.monotonic()
        self._follow(process)
        self.folder.failure = None

    def poll(self, elsewhere: int) -> bool:
        """See whether the process has ended, and with what; returns whether it has.

        Args:
            elsewhere: What a process returns that finds another one at its run.
        """
        status = None if self.process is None else self.process.status()
        if status is None:
            if self.process is not None:
                self._follow(self.process)
            return False
        self.process = None
        self.seconds = time.monotonic() - self.began
        if self.folder.result is not None:
            self.state = State.DONE
        elif status == elsewhere:
            self.state, self.seconds = State.QUEUED, None
        else:
            self.fail(self.folder.failure or reason(self.folder.log, status))
        return True

    def _follow(self, process: Process) -> None:
        state = State.RUNNING if process.begun else State.QUEUED
        if state is State.RUNNING and self.state is not state:
            self.began = time.monotonic()
        self.state = state

    def fail(self, error: str) -> None:
        """Note why the run has failed."""
        self.state, self.error = State.FAILED, error
        self.folder.failure = error

    def cancel(self) -> None:
        """Ask the process to end."""
        if self.process is not None:
            self.process.cancel()

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.stop()
            self.process = None
            self.state = State.DONE if self.folder.result is not None else State.QUEUED

    @property
    def progress(self) -> dict[str, Any]:
        """Where the training is."""
        return self.folder.progress if self.state in {State.RUNNING, State.ELSEWHERE} else {}

    @property
    def elapsed(self) -> float | None:
        """Seconds since it began, or that it took."""
        return time.monotonic() - self.began if self.state is State.RUNNING else self.seconds


def seconds_left(jobs: Iterable[Job], workers: int) -> float | None:
    """An estimate of the time until all are done; ``None`` before anything is known.

    A method takes what its finished runs took, or else what the others took; one that runs alone so
    far, what its epochs promise.
    """
    jobs = list(jobs)
    took: dict[str, list[float]] = {}
    for job in jobs:
        expected = job.seconds if job.state is State.DONE else _promised(job)
        if expected is not None:
            took.setdefault(job.run.method, []).append(expected)
    every = [seconds for each in took.values() for seconds in each]
    if not every:
        return None
    left = 0.0
    for job in jobs:
        if job.state in {State.QUEUED, State.RUNNING}:
            like = took.get(job.run.method, every)
            left += max(sum(like) / len(like) - (job.elapsed or 0.0), 0.0)
    running = sum(job.state is State.RUNNING for job in jobs)
    return left / max(1, workers, running)  # a cluster runs what it has room for


def _promised(job: Job) -> float | None:
    progress = job.progress if job.state is State.RUNNING else {}
    epoch, epochs = progress.get("epoch") or 0, progress.get("epochs") or 0
    if not epoch or epochs < 1 or job.elapsed is None:
        return None
    return job.elapsed * epochs / epoch
