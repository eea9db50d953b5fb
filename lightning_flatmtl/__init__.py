"""Multi-task learning in PyTorch Lightning, towards minima that are flat for every task.

What is named here is imported when it is first asked for, so that
:mod:`lightning_flatmtl.functional` and :mod:`lightning_flatmtl.engine` need no Lightning.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_flatmtl.comparison import compare, tune
    from lightning_flatmtl.module import MultiTaskModule
    from lightning_flatmtl.prediction import JointLabels, JointPrediction
    from lightning_flatmtl.sharpness import TaskSAM
    from lightning_flatmtl.task import (
        BinaryTask,
        ClassificationTask,
        DepthTask,
        MultiLabelTask,
        NormalsTask,
        RegressionTask,
        SegmentationTask,
        TaggingTask,
        Task,
    )
    from lightning_flatmtl.transfer import load_encoder

__all__ = [
    "BinaryTask",
    "ClassificationTask",
    "DepthTask",
    "JointLabels",
    "JointPrediction",
    "MultiLabelTask",
    "MultiTaskModule",
    "NormalsTask",
    "RegressionTask",
    "SegmentationTask",
    "TaggingTask",
    "Task",
    "TaskSAM",
    "__version__",
    "compare",
    "load_encoder",
    "tune",
]

__version__ = version("lightning-flatmtl")

_HOMES = {
    "BinaryTask": "task",
    "ClassificationTask": "task",
    "DepthTask": "task",
    "JointLabels": "prediction",
    "JointPrediction": "prediction",
    "MultiLabelTask": "task",
    "MultiTaskModule": "module",
    "NormalsTask": "task",
    "RegressionTask": "task",
    "SegmentationTask": "task",
    "TaggingTask": "task",
    "Task": "task",
    "TaskSAM": "sharpness",
    "compare": "comparison",
    "load_encoder": "transfer",
    "tune": "comparison",
}
_ROOMS = {
    "aggregators", "callbacks", "cli", "comparison", "data", "engine", "functional", "hosting",
    "metrics", "models", "module", "prediction", "sharpness", "takeover", "task", "transfer",
}  # fmt: skip


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one of these

    def __getattr__(name: str) -> object:
        if name in _HOMES:
            found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        elif name in _ROOMS:
            found = import_module(f"{__name__}.{name}")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_ROOMS})
