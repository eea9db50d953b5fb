"""The tasks that a loaded state is about, and those that the training brings."""

from collections.abc import Iterable, Sequence

from lightning.pytorch.utilities import rank_zero_warn

__all__ = ["LoadedTasks"]

_WAY_OUT = "Load it with the same tasks, or begin a new run from the weights alone."


class LoadedTasks:
    """The tasks that a loaded state is about, to be compared with those of the fit.

    Args:
        owner: Whose state it is, for messages.
        tasks: The tasks that were known when it was saved.
        whole: Whether those were all there are; else later ones may be new.
    """

    def __init__(self, owner: str, tasks: Sequence[str], *, whole: bool) -> None:
        self._owner = owner
        self._tasks = list(tasks)
        self._whole = whole
        self._told = False

    def refuse_others(self, tasks: Sequence[str] | None) -> None:
        """Refuse another list of tasks than the saved one, if both are known.

        Raises:
            ValueError: If they differ.
        """
        if self._tasks and self._whole and tasks and sorted(self._tasks) != sorted(tasks):
            raise ValueError(f"{self._saved}, got the tasks {list(tasks)}. {_WAY_OUT}")

    def admit(self, tasks: Iterable[str]) -> None:
        """Refuse tasks of a batch that are not among the saved ones.

        Raises:
            ValueError: If there are any, and all tasks were known then.
        """
        present = list(tasks)
        new = [task for task in present if task not in self._tasks]
        if not new or not self._tasks:
            return
        if self._whole:
            raise ValueError(f"{self._saved}, got a batch with {new}. {_WAY_OUT}")
        if not self._told and not set(self._tasks) <= set(present):
            self._told = True
            rank_zero_warn(
                f"{self._saved}, got a batch with {new}. If a task has been renamed, the state "
                f"goes on without it. {_WAY_OUT}",
                category=UserWarning,
            )

    def tell_missing(self, tasks: Iterable[str]) -> None:
        """Say once which of the saved tasks an epoch did not have."""
        missing = [task for task in self._tasks if task not in set(tasks)]
        if missing and not self._told:
            self._told = True
            rank_zero_warn(
                f"{self._saved}, got an epoch without {missing}. {_WAY_OUT}", category=UserWarning
            )

    @property
    def _saved(self) -> str:
        return f"The saved state of {self._owner} is that of the tasks {self._tasks}"
