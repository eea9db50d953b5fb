"""How far a search is: a line for every trial that ends, and in a terminal those that run."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from lightning_flatmtl.comparison.display import duration
from lightning_flatmtl.comparison.live import LiveDrawing, escaped, is_live, progress_cells
from lightning_flatmtl.comparison.tuning.trial import Trial

__all__ = ["TrialDisplay", "make_display", "shown"]


class TrialDisplay:
    """A line for every trial that ends.

    Args:
        left: How many trials are still to be begun, by method.
        workers: How many run side by side.
    """

    def __init__(self, left: Callable[[], Mapping[str, int]], workers: int = 1) -> None:
        self._left, self._workers = left, workers
        self._took: dict[str, list[float]] = {}
        self._running: list[Trial] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        return None

    def begun(self, trial: Trial) -> None:
        """A trial begins."""
        self._running.append(trial)

    def ended(self, trial: Trial) -> None:
        """A trial has ended."""
        self._running.remove(trial)
        self._took.setdefault(trial.method, []).append(trial.seconds)
        values = f" ({shown(trial.values)})" if trial.values else ""
        self._print(f"{trial.name}{values}: {trial.said}  [{self._rest()}]")

    def show(self, running: Sequence[Trial]) -> None:
        """Show those that run."""

    def _print(self, text: str) -> None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    def _rest(self) -> str:
        """How many are left, and how long they will take if they take what the others took."""
        left = self._left()
        count = sum(left.values()) + len(self._running)
        if not count:
            return "the last"
        every = [seconds for each in self._took.values() for seconds in each]
        seconds = -sum(trial.seconds for trial in self._running)
        for method in [*(m for m, n in left.items() for _ in range(n)), *self._methods()]:
            like = self._took.get(method, every)
            seconds += sum(like) / len(like)
        return f"{count} left, about {duration(max(seconds, 0.0) / self._workers)}"

    def _methods(self) -> list[str]:
        return [trial.method for trial in self._running]


class LiveTrials(TrialDisplay):
    """In a terminal: the lines, and below them a table of rich with those that run."""

    def __init__(self, left: Callable[[], Mapping[str, int]], workers: int = 1) -> None:
        super().__init__(left, workers)
        self._drawing = LiveDrawing()

    def __enter__(self) -> Self:
        self._drawing.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._drawing.__exit__(*error)

    def show(self, running: Sequence[Trial]) -> None:
        self._drawing.draw(lambda: self._table(running), hurry=not running)

    def _print(self, text: str) -> None:
        self._drawing.print(text)

    def _table(self, running: Sequence[Trial]) -> Any:
        from rich.table import Table  # noqa: PLC0415

        table = Table()
        for column in ("method", "trial", "arguments", "epoch", "validation", "time"):
            table.add_column(column, justify="right" if column in {"trial", "time"} else "left")
        for trial in running:
            epoch, said = progress_cells(trial.job.progress)
            took = duration(trial.seconds)
            row = (trial.method, str(trial.number), shown(trial.values), epoch, said, took)
            table.add_row(*escaped(row))
        return table


def make_display(left: Callable[[], Mapping[str, int]], workers: int) -> TrialDisplay:
    """With a live table where there is a terminal and rich, else lines."""
    return LiveTrials(left, workers) if is_live() else TrialDisplay(left, workers)


def shown(values: Mapping[str, Any]) -> str:
    """Arguments in words.

    Example:
        >>> shown({"model.optimizer.lr": 0.00123456, "TaskSAM.adaptive": True})
        'model.optimizer.lr 0.001235, TaskSAM.adaptive True'
    """
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
    )
