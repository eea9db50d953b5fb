"""Tasks: name, head, loss, metrics, how a missing label looks. One kind a file."""

from lightning_flatmtl.task._base import Task
from lightning_flatmtl.task.binary import BinaryTask
from lightning_flatmtl.task.classification import ClassificationTask
from lightning_flatmtl.task.depth import DepthTask
from lightning_flatmtl.task.multi_label import MultiLabelTask
from lightning_flatmtl.task.normals import NormalsTask
from lightning_flatmtl.task.regression import RegressionTask
from lightning_flatmtl.task.segmentation import SegmentationTask
from lightning_flatmtl.task.tagging import TaggingTask

__all__ = [
    "BinaryTask",
    "ClassificationTask",
    "DepthTask",
    "MultiLabelTask",
    "NormalsTask",
    "RegressionTask",
    "SegmentationTask",
    "TaggingTask",
    "Task",
]
