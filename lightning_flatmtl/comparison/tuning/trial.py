"""A trial on its way: its runs, a seed each, and what Optuna is told in the end."""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lightning_flatmtl.comparison.curves import read_curves
from lightning_flatmtl.comparison.display import duration
from lightning_flatmtl.comparison.jobs import Job, State
from lightning_flatmtl.comparison.launchers.base import Launcher
from lightning_flatmtl.comparison.record import RunRecord
from lightning_flatmtl.comparison.selection import Selection
from lightning_flatmtl.comparison.tuning.named import optuna
from lightning_flatmtl.comparison.tuning.report import PRUNED
from lightning_flatmtl.comparison.tuning.values import value_of

__all__ = ["ERROR", "EXHAUSTED", "FOLDER", "SECONDS", "SURPLUS", "Trial", "claim", "slug"]

FOLDER, SECONDS, ERROR, SURPLUS = "folder", "seconds", "error", "surplus"
"""Attributes of a trial of Optuna: where it runs, how long it took, why it failed."""

EXHAUSTED = "exhausted"
"""The attribute of a study whose sampler has no more values to try."""


class Trial:
    """A trial of a method that this process is at.

    Args:
        method: The name of the method.
        trial: The trial of Optuna.
        values: Its arguments.
        metric: The figure that decides.
        select: At which epochs.
        jobs: Its runs, a seed each.
        lock: What keeps other processes away.
    """

    def __init__(
        self,
        method: str,
        trial: Any,
        values: dict[str, Any],
        metric: str,
        select: Selection,
        jobs: Sequence[Job],
        lock: FileLock,
    ) -> None:
        self.method, self.values, self.metric, self.jobs = method, values, metric, list(jobs)
        self.said: str | None = None
        """How it has ended."""
        self._trial, self._select, self._lock = trial, select, lock
        self._began = time.monotonic()
        self._before = float(trial.user_attrs.get(SECONDS, 0.0))

    @property
    def number(self) -> int:
        """Its number in the study."""
        found: int = self._trial.number
        return found

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return f"{self.method}, trial {self.number}"

    @property
    def seconds(self) -> float:
        """How long it has taken, in earlier sessions too."""
        return self._before + time.monotonic() - self._began

    @property
    def job(self) -> Job:
        """The run that is on its way."""
        return next((job for job in self.jobs if job.state is not State.DONE), self.jobs[-1])

    def poll(self, launcher: Launcher) -> None:
        """Start what is to be started, see what has ended."""
        job = self.job
        if job.process is None:
            job.look()
            if job.state is State.QUEUED:
                self._start(job, launcher)
        else:
            job.poll(RunRecord.ELSEWHERE)
        if job.state is State.FAILED:
            self._fail(job.error or "it failed")
        elif job.state is State.DONE:
            self._go_on(job)

    def stop(self) -> None:
        """End its process; the trial goes on next time."""
        for job in self.jobs:
            job.stop()
        if self.said is None:
            self._trial.set_user_attr(SECONDS, round(self.seconds, 3))
        self._lock.release()

    def cancel(self) -> None:
        """Ask its process to end."""
        for job in self.jobs:
            job.cancel()

    def _start(self, job: Job, launcher: Launcher) -> None:
        try:
            job.folder.prepare(job.run)
            job.start(launcher.start(job.folder))
        except OSError as error:  # a full disk, no more processes
            job.fail(f"{type(error).__name__}: {error}")

    def _go_on(self, job: Job) -> None:
        pruned = _frozen(self._trial).user_attrs.get(PRUNED)
        if pruned is not None and job is self.jobs[0]:
            self._tell("PRUNED", f"pruned after epoch {pruned}")
        elif all(each.state is State.DONE for each in self.jobs):
            try:
                curves = [read_curves(each.folder.curves) for each in self.jobs]
                value = value_of(curves, self.metric, self._select)
            except ValueError as error:
                self._fail(str(error))
                return
            self._tell("COMPLETE", f"{self.metric} {value:.4g}", value)

    def _fail(self, error: str) -> None:
        self._trial.set_user_attr(ERROR, error)
        self._tell("FAIL", f"failed: {error}")

    def _tell(self, state: str, said: str, value: float | None = None) -> None:
        self._trial.set_user_attr(SECONDS, round(self.seconds, 3))
        told(self._trial.study, self.number, state, value)
        self.said = f"{said}, {duration(self.seconds)}"
        self._lock.release()


def told(study: Any, number: int, state: str, value: float | None = None) -> None:
    """End a trial of Optuna."""
    try:
        study.tell(number, value, state=getattr(optuna().trial.TrialState, state))
    except RuntimeError as error:
        if "Study.stop" not in str(error):
            raise
        # A sampler over a grid asks `Study.optimize` to stop; the trial is kept by then.
        study.set_user_attr(EXHAUSTED, True)


def claim(folder: Path, method: str, number: int) -> FileLock | None:
    """Take a trial for this process, until it ends; ``None`` if another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{slug(method)}-{number}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


def slug(name: str) -> str:
    """A name for files."""
    return re.sub(r"[^\w.+-]+", "_", name)


def _frozen(trial: Any) -> Any:
    return trial.study.get_trials(deepcopy=False)[trial.number]
