"""Features by task, computed when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.utils import _pytree as pytree
from typing_extensions import override

__all__ = ["TaskFeatures", "checked_tasks"]


class _Model(Protocol):
    """What computes them: a module with parts by task."""

    @property
    def tasks(self) -> tuple[str, ...]: ...

    def features(self, task: str, shared: Any) -> Tensor: ...


class TaskFeatures(Mapping[str, Tensor]):
    """The features of each task, computed when they are asked for, each time anew.

    So they belong to the task's own pass: a perturbed pass of one task runs the parts of that task
    alone, the head's pass at the separate point does not run what is shared again, and a task that
    is missing from a batch costs nothing.

    Args:
        model: Whose ``features(task, shared)`` computes them; ``model.tasks`` are their names.
        shared: What all tasks share, tensors in any structure of tuples, lists and dictionaries.
    """

    complete = True
    """There are features for no other task: a head is not to get the mapping itself."""

    def __init__(self, model: _Model, shared: Any) -> None:
        self._model, self._shared = model, shared

    @override
    def __getitem__(self, task: str) -> Tensor:
        if task not in self._model.tasks:
            known = list(self._model.tasks)
            raise KeyError(f"The encoder has features of the tasks {known}, got '{task}'.")
        return self._model.features(task, self._shared)

    @override
    def __contains__(self, task: object) -> bool:
        return task in self._model.tasks

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._model.tasks)

    @override
    def __len__(self) -> int:
        return len(self._model.tasks)


# The tensors of it are what all tasks share: who cuts the graph there, or asks what they depend on,
# finds the shared parts and none of a single task's.
pytree.register_pytree_node(
    TaskFeatures,
    lambda features: ([features._shared], features._model),
    lambda children, model: TaskFeatures(model, *children),
)


def checked_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """The names of the tasks.

    Raises:
        ValueError: If there is none, or one twice.
    """
    if isinstance(tasks, str) or len(tasks) == 0 or len(set(tasks)) < len(tasks):
        raise ValueError(f"`tasks` must be different names, at least one, got {tasks!r}.")
    return tuple(tasks)
