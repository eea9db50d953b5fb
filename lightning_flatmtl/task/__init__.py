"""Tasks: name, head, loss, metrics, how a missing label looks. One kind a file."""

from lightning_flatmtl.task._base import Task
from lightning_flatmtl.task.classification import ClassificationTask

__all__ = ["ClassificationTask", "Task"]
