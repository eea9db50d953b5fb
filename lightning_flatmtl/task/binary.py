"""A binary task with a linear head."""

from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_flatmtl.metrics.auroc import LogitAUROC
from lightning_flatmtl.metrics.error_rate import ErrorRate
from lightning_flatmtl.task._base import Task

__all__ = ["BinaryTask"]


class BinaryTask(Task):
    """A yes-or-no task: a linear head to one logit, binary cross-entropy, AUROC and error rate.

    Predictions are logits ``[batch]``, targets 0 or 1, ``[batch]``, of any type. The loss is the
    mean negative log-likelihood in nats.

    Args:
        name: Names the task in batches, logs and messages.
        in_features: Size of the encoder's features.
        metrics: Metrics of logits by name; by default ``auroc`` and ``error_rate``,
            :class:`~lightning_flatmtl.metrics.LogitAUROC` and
            :class:`~lightning_flatmtl.metrics.ErrorRate`.
        missing: How a missing label looks, see :class:`Task`.

    Example:
        >>> import torch
        >>> task = BinaryTask("income", in_features=64)
        >>> task.head(torch.zeros(5, 64)).shape, sorted(task.metrics)
        (torch.Size([5]), ['auroc', 'error_rate'])
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        metrics: dict[str, Metric] | MetricCollection | None = None,
        missing: float | None = None,
    ) -> None:
        super().__init__(
            name,
            head=nn.Sequential(nn.Linear(in_features, 1), nn.Flatten(0)),
            loss=_BinaryCrossEntropy(),
            metrics={"auroc": LogitAUROC(), "error_rate": ErrorRate()}
            if metrics is None
            else metrics,
            missing=missing,
        )


class _BinaryCrossEntropy(nn.Module):
    """Binary cross-entropy of logits, for labels of any type."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = nn.functional.binary_cross_entropy_with_logits(
            logits, target.to(logits.dtype)
        )
        return loss
