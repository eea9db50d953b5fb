"""A classification task with a linear head."""

from typing import Literal

from torch import nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_flatmtl.metrics.error_rate import ErrorRate
from lightning_flatmtl.task._base import Task

__all__ = ["ClassificationTask"]


class ClassificationTask(Task):
    """A classification task with a linear head, cross-entropy and accuracy or error rate.

    Args:
        name: Names the task in batches, logs and messages.
        in_features: Size of the encoder's features.
        num_classes: Number of classes.
        label_smoothing: Smoothing of the targets, in ``[0, 1]``.
        missing: How a missing label looks, see :class:`Task`.
        metric: What is logged beside the loss: ``"accuracy"`` or ``"error_rate"``, one minus it.
        metrics: Metrics of logits by name, instead of that one.

    Raises:
        ValueError: If ``metric`` is neither.

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
        metric: Literal["accuracy", "error_rate"] = "accuracy",
        metrics: dict[str, Metric] | MetricCollection | None = None,
    ) -> None:
        if metric not in {"accuracy", "error_rate"}:
            raise ValueError(f"`metric` must be 'accuracy' or 'error_rate', got {metric!r}.")
        logged: Metric = ErrorRate()
        if metric == "accuracy":
            logged = MulticlassAccuracy(num_classes, average="micro")
        super().__init__(
            name,
            head=nn.Linear(in_features, num_classes),
            loss=nn.CrossEntropyLoss(label_smoothing=label_smoothing),
            metrics={metric: logged} if metrics is None else metrics,
            missing=missing,
        )
