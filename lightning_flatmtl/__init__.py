"""Multi-task learning in PyTorch Lightning, towards minima that are flat for every task."""

from importlib.metadata import version

from lightning_flatmtl.module import MultiTaskModule
from lightning_flatmtl.sharpness import TaskSAM
from lightning_flatmtl.task import ClassificationTask, Task

__all__ = ["ClassificationTask", "MultiTaskModule", "Task", "TaskSAM", "__version__"]

__version__ = version("lightning-flatmtl")
