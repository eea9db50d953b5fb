"""A classification task with a linear head."""

from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_flatmtl.task._base import Task

__all__ = ["ClassificationTask"]


class ClassificationTask(Task):
    """A classification task with a linear head, cross-entropy and accuracy.

    Args:
        name: Names the task in batches, logs and messages.
        in_features: Size of the encoder's features.
        num_classes: Number of classes.
        label_smoothing: Smoothing of the targets, in ``[0, 1]``.
        missing: How a missing label looks, see :class:`Task`.

    Example:
        >>> task = ClassificationTask("left", in_features=64, num_classes=10)
        >>> task.head
        Linear(in_features=64, out_features=10, bias=True)
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        num_classes: int,
        label_smoothing: float = 0.0,
        missing: float | None = None,
    ) -> None:
        super().__init__(
            name,
            head=nn.Linear(in_features, num_classes),
            loss=nn.CrossEntropyLoss(label_smoothing=label_smoothing),
            metrics={"accuracy": MulticlassAccuracy(num_classes, average="micro")},
            missing=missing,
        )
