"""What an error over labels leaves out: whose they are, and how to say that they are missing."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lightning_flatmtl.engine import NonFiniteError
from lightning_flatmtl.hosting.batches import task_target
from lightning_flatmtl.task import Task

__all__ = ["noted_labels", "noted_nan"]


@contextmanager
def noted_labels(task: Task, target: Any) -> Iterator[None]:
    """Around loss and metrics of a task: an error is told with the task and its labels.

    Nothing is looked at unless there is an error, and then only what lies on the CPU: after an
    assertion on an accelerator nothing can be read from there.
    """
    try:
        yield
    except Exception as error:
        error.add_note(
            f"This was task '{task}', with targets {_described(target)}. {_way_out(task, '-1')}"
        )
        raise


@contextmanager
def noted_nan(batch: Any, tasks: Sequence[Task]) -> Iterator[None]:
    """Around a step: where a loss is not finite, tell which tasks have NaN among their targets."""
    try:
        yield
    except NonFiniteError as error:
        for task in tasks:
            target = task_target(batch, task.name)
            if task.missing is None and isinstance(target, Tensor) and bool(target.isnan().any()):
                words = _way_out(task, "float('nan')")
                error.add_note(f"Task '{task}' has NaN among its targets. {words}")
        raise


def _way_out(task: Task, value: str) -> str:
    if task.missing is not None:
        return f"(Labels of {task.missing} are left out already, by `missing`.)"
    return (
        f"If a value stands for a missing label, say which: Task('{task}', ..., missing={value})."
    )


def _described(target: Any) -> str:
    if not isinstance(target, Tensor):
        return f"of type {type(target).__name__}"
    words = f"of shape {list(target.shape)} and type {target.dtype}"
    if target.device.type != "cpu" or not target.numel() or target.is_complex():
        return words
    return f"{words} from {target.min().item():g} to {target.max().item():g}"
