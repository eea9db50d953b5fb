"""The two forms of a batch, read into one: for every task that it has, inputs and targets."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_flatmtl.task import Task

__all__ = ["batch_size", "per_task", "target_names"]


def per_task(batch: Any, tasks: Sequence[Task], own_form: bool) -> dict[Task, Any]:
    """The batch of every task that is present.

    Args:
        batch: ``(inputs, {task: target})``, or ``{task: (inputs, target)}`` with a data set per
            task; the latter becomes one ``(inputs, {task: target})`` for each task.
        tasks: The tasks of the module.
        own_form: Whether the module reads batches itself; then one of another form goes to every
            task as it is.

    Raises:
        ValueError: If the batch has another form and the module does not read it itself.
    """
    if is_pair(batch):
        return {task: batch for task in tasks if batch[1].get(task.name) is not None}
    if _is_split(batch, tasks):
        found = {task: batch[task.name] for task in tasks if batch.get(task.name) is not None}
        return {task: (pair[0], {task.name: pair[1]}) for task, pair in found.items()}
    if own_form:
        return dict.fromkeys(tasks, batch)
    got = (
        f"a mapping with the keys {list(batch)}" if isinstance(batch, Mapping) else _describe(batch)
    )
    raise ValueError(
        "A batch must be `(inputs, {task: target})`, or `{task: (inputs, target)}` with a data set "
        f"per task, got {got}. Change the data set, or override `encode` and `task_loss`. (A "
        "mapping of validation loaders is read one loader after the other: return "
        "`CombinedLoader({task: loader, ...}, 'max_size')` instead.)"
    )


def target_names(batch: Any) -> list[str] | None:
    """The names of the targets of a batch, ``None`` if it has another form."""
    if is_pair(batch):
        return list(batch[1])
    if isinstance(batch, Mapping) and all(v is None or _is_any_pair(v) for v in batch.values()):
        return list(batch)
    return None


def is_pair(batch: Any) -> bool:
    """Whether the batch is ``(inputs, {task: target})``."""
    return isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Mapping)


def batch_size(batch: Any, task: str | None = None) -> int:
    """How many samples a batch, or one task's part of it, holds: the length of the first tensor.

    It weighs a batch in the mean over an epoch; 1 where there is no tensor.
    """
    if task is not None and isinstance(batch, Mapping) and _is_any_pair(batch.get(task)):
        batch = batch[task]
    size = _first_length(batch)
    return 1 if size is None else size


def _first_length(batch: Any) -> int | None:
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    if isinstance(batch, str) or not isinstance(batch, Iterable):
        return None
    items = batch.values() if isinstance(batch, Mapping) else batch
    return next((size for item in items if (size := _first_length(item)) is not None), None)


def _is_split(batch: Any, tasks: Sequence[Task]) -> bool:
    if not isinstance(batch, Mapping):
        return False
    values = [batch[task.name] for task in tasks if task.name in batch]
    return bool(values) and all(v is None or _is_any_pair(v) for v in values)


def _is_any_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2


def _describe(batch: Any) -> str:
    if isinstance(batch, tuple | list):
        return f"a {type(batch).__name__} of {[type(item).__name__ for item in batch]}"
    return type(batch).__name__
