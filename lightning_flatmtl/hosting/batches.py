"""The forms of a batch, read into one: for every task that it has, inputs and targets."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_flatmtl.hosting.names import nearest
from lightning_flatmtl.task import Task

__all__ = ["batch_size", "is_pair", "per_task", "target_names", "task_target"]


def per_task(batch: Any, tasks: Sequence[Task], own_form: bool) -> dict[Task, Any]:
    """The batch of every task that is present.

    Args:
        batch: ``(inputs, {task: target})``, or ``{task: (inputs, target)}`` with a data set per
            task; the latter becomes one ``(inputs, {task: target})`` for each task. A data set with
            several tasks has a name of its own there: ``{name: (inputs, {task: target})}``.
        tasks: The tasks of the module.
        own_form: Whether the module reads batches itself; then one of another form goes to every
            task as it is.

    Raises:
        ValueError: If the batch has another form and the module does not read it itself, a data
            set in it is that of no task, or a task is in two of them.
    """
    if is_pair(batch):
        return {task: batch for task in tasks if batch[1].get(task.name) is not None}
    if _is_split(batch, tasks):
        return _of_data_sets(batch, tasks, own_form)
    if own_form:
        return dict.fromkeys(tasks, batch)
    got = (
        f"a mapping with the keys {list(batch)}" if isinstance(batch, Mapping) else _describe(batch)
    )
    raise ValueError(
        "A batch must be `(inputs, {task: target})`, or `{task: (inputs, target)}` with a data set "
        f"per task (of several tasks `{{name: (inputs, {{task: target}})}}`), got {got}. Change "
        "the data set, or override `encode` and `task_loss`. (A mapping of validation loaders is "
        "read one loader after the other: return "
        "`CombinedLoader({task: loader, ...}, 'max_size')` instead.)"
    )


def _of_data_sets(
    batch: Mapping[Any, Any], tasks: Sequence[Task], own_form: bool
) -> dict[Task, Any]:
    """The batch of every task in one of several data sets, each under its name."""
    names = [task.name for task in tasks]
    found: dict[Task, tuple[str, Any]] = {}
    for key, part in batch.items():
        if part is None:  # at its end
            continue
        if key in names:
            own = (part[0], {key: part[1]})  # which may be a mapping itself
        elif is_pair(part):
            own = part
        elif own_form:
            continue
        else:
            raise ValueError(
                "The keys of a batch of several data sets must be tasks, or lead to `(inputs, "
                f"{{task: target}})`, got '{key}' beside the tasks {names}. "
                f"{nearest(key, names)}Give the data set the name of its task."
            )
        for task in tasks:
            if own[1].get(task.name) is None:
                continue
            if task in found:
                raise ValueError(
                    f"Task '{task}' must be in one data set of a batch, got it in "
                    f"'{found[task][0]}' and in '{key}'. Take its targets out of one of them."
                )
            found[task] = key, own
    return {task: found[task][1] for task in tasks if task in found}


def target_names(batch: Any) -> set[str]:
    """The names of the targets of a batch, as far as they can be read."""
    if is_pair(batch):
        return {name for name, target in batch[1].items() if target is not None}
    if not isinstance(batch, Mapping):
        return set()
    found: set[str] = set()
    for key, part in batch.items():
        if _is_any_pair(part):
            found |= {key, *(target_names(part) if is_pair(part) else ())}
    return found


def task_target(batch: Any, task: str) -> Any:
    """The target of one task, ``None`` if it cannot be found."""
    if isinstance(batch, Mapping):
        if _is_any_pair(batch.get(task)):
            return batch[task][1]
        batch = _part_of(batch, task)
    return batch[1].get(task) if is_pair(batch) else None


def is_pair(batch: Any) -> bool:
    """Whether the batch is ``(inputs, {task: target})``."""
    return isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Mapping)


def batch_size(batch: Any, task: str | None = None) -> int:
    """How many samples a batch, or one task's part of it, holds: the length of the first tensor.

    It weighs a batch in the mean over an epoch; 1 where there is no tensor.
    """
    if task is not None and isinstance(batch, Mapping):
        batch = _part_of(batch, task)
    size = _first_length(batch)
    return 1 if size is None else size


def _part_of(batch: Mapping[Any, Any], task: str) -> Any:
    """The data set of a task among several; the whole batch if there is none."""
    if _is_any_pair(batch.get(task)):
        return batch[task]
    parts = (p for p in batch.values() if is_pair(p) and p[1].get(task) is not None)
    return next(parts, batch)


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
    names = {task.name for task in tasks}
    values = [batch[name] for name in names if name in batch]
    sets = [v for key, v in batch.items() if key not in names and is_pair(v)]
    known = bool(values or sets)
    return known and all(v is None or _is_any_pair(v) for v in values)


def _is_any_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2


def _describe(batch: Any) -> str:
    if isinstance(batch, tuple | list):
        return f"a {type(batch).__name__} of {[type(item).__name__ for item in batch]}"
    return type(batch).__name__
