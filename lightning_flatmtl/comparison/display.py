"""How far the runs are: a live table in a terminal, a line for every change elsewhere."""

import sys
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from lightning_flatmtl.comparison.jobs import Job, State, seconds_left
from lightning_flatmtl.comparison.live import LiveDrawing, escaped, is_live, progress_cells

__all__ = ["Display", "duration", "make_display"]


class Display:
    """Shows nothing."""

    def __init__(self, workers: int = 1) -> None:
        self._workers = workers

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def show(self, jobs: Sequence[Job]) -> None:
        """Show where the jobs are."""


class Lines(Display):
    """A line whenever a run begins or ends, for logs."""

    def __init__(self, workers: int = 1) -> None:
        super().__init__(workers)
        self._shown: dict[int, State] = {}

    def show(self, jobs: Sequence[Job]) -> None:
        first = not self._shown
        for index, job in enumerate(jobs):
            before = self._shown.get(index)
            self._shown[index] = job.state
            if job.state is before or job.state is State.QUEUED:
                continue
            if first and job.state is State.DONE:
                continue  # of an earlier time; they are in the count
            said = f"{job.run.name}: {job.state.value}"
            if job.state is State.DONE and job.seconds is not None:
                said += f" after {duration(job.seconds)}"
            if job.state is State.FAILED:
                said += f": {job.error}"
            sys.stdout.write(f"{said}  ({_counts(jobs, self._workers)})\n")
        sys.stdout.flush()


class LiveTable(Display):
    """A table of rich that is drawn anew twice a second."""

    def __init__(self, workers: int = 1) -> None:
        super().__init__(workers)
        self._drawing = LiveDrawing()

    def __enter__(self) -> Self:
        self._drawing.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._drawing.__exit__(*error)

    def show(self, jobs: Sequence[Job]) -> None:
        last = not any(job.process for job in jobs)
        self._drawing.draw(lambda: self._table(jobs), hurry=last)

    def _table(self, jobs: Sequence[Job]) -> Any:
        from rich.table import Table  # noqa: PLC0415

        table = Table(title=_counts(jobs, self._workers), title_justify="left")
        for column in ("method", "seed", "state", "epoch", "validation", "time"):
            right = column in {"seed", "epoch", "time"}
            table.add_column(column, justify="right" if right else "left")
        for job in _most_telling(jobs, self._drawing.height - 6):
            table.add_row(*escaped(_cells(job)), style=_STYLES[job.state])
        return table


_STYLES = {
    State.QUEUED: "dim",
    State.RUNNING: "bold",
    State.ELSEWHERE: "",
    State.DONE: "green",
    State.FAILED: "red",
}
_ORDER = (State.RUNNING, State.ELSEWHERE, State.FAILED, State.QUEUED, State.DONE)


def make_display(workers: int) -> Display:
    """A live table where there is a terminal and rich, else lines."""
    return LiveTable(workers) if is_live() else Lines(workers)


def duration(seconds: float) -> str:
    """Seconds in words.

    Example:
        >>> duration(7.4), duration(100), duration(7300)
        ('7 s', '1 min 40 s', '2 h 2 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _counts(jobs: Sequence[Job], workers: int) -> str:
    counts = Counter(job.state for job in jobs)
    said = [f"{counts[state]} {state.value}" for state in reversed(_ORDER) if counts[state]]
    left = seconds_left(jobs, workers)
    if left is not None and (counts[State.QUEUED] or counts[State.RUNNING]):
        said.append(f"about {duration(left)} left")
    return ", ".join(said)


def _most_telling(jobs: Sequence[Job], room: int) -> list[Job]:
    """As many jobs as there is room for, in their order; those that go on first."""
    if len(jobs) <= room:
        return list(jobs)
    ranked = sorted(range(len(jobs)), key=lambda index: _ORDER.index(jobs[index].state))
    return [jobs[index] for index in sorted(ranked[: max(room, 1)])]


def _cells(job: Job) -> tuple[str, ...]:
    epoch, shown = progress_cells(job.progress)
    if job.state is State.FAILED:
        shown = (job.error or "")[:60]
    took = "" if job.elapsed is None else duration(job.elapsed)
    name = f"{job.run.method} {job.run.task}" if job.run.task else job.run.method
    return name, str(job.run.seed), job.state.value, epoch, shown, took
