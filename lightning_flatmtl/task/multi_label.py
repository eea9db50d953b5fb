"""Several yes-or-no questions in one task."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics import Metric, MetricCollection
from typing_extensions import override

from lightning_flatmtl.metrics.class_counts import LabelF1
from lightning_flatmtl.task._base import Task
from lightning_flatmtl.task._entries import filled, mean_by_sample

__all__ = ["MultiLabelTask"]


class MultiLabelTask(Task):
    r"""A multi-label task: a linear head to a logit for each label, binary cross-entropy, F1.

    Predictions are logits ``[n, num_labels]``, targets 0 or 1 of any type, ``[n, num_labels]``. The
    loss is the mean over the samples of the mean over a sample's labels, in nats. For questions
    that are to be tasks by themselves, with a gradient each, take a :class:`BinaryTask` for each.

    Args:
        name: Names the task in batches, logs and messages.
        in_features: Size of the encoder's features.
        num_labels: Number of labels, at least 1.
        missing: How a missing entry of a target looks, such as ``-1`` or NaN; it counts neither in
            the loss nor in the metric. A sample without any is left out as a whole. ``None`` if
            every entry is there.
        metrics: Metrics of logits by name; by default ``f1``,
            :class:`~lightning_flatmtl.metrics.LabelF1`.

    Raises:
        ValueError: If ``num_labels`` is below 1.

    Example:
        >>> from lightning_flatmtl.task import MultiLabelTask
        >>> MultiLabelTask("moods", in_features=64, num_labels=5).head
        Linear(in_features=64, out_features=5, bias=True)
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        num_labels: int,
        missing: float | None = None,
        metrics: dict[str, Metric] | MetricCollection | None = None,
    ) -> None:
        if num_labels < 1:
            raise ValueError(f"`num_labels` must be at least 1, got {num_labels}.")
        super().__init__(
            name,
            head=nn.Linear(in_features, num_labels),
            loss=_Loss(missing),
            metrics={"f1": LabelF1(num_labels, missing)} if metrics is None else metrics,
            missing=missing,
        )


class _Loss(nn.Module):
    """Binary cross-entropy of the labelled entries."""

    def __init__(self, missing: float | None) -> None:
        super().__init__()
        self.missing = missing

    @override
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        if logits.shape != target.shape:
            raise ValueError(
                "Targets of several labels must have the shape of the logits, got "
                f"{list(target.shape)} and {list(logits.shape)}."
            )
        target, there = filled(target, self.missing)
        wanted = target.to(logits.dtype)
        losses = binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        return mean_by_sample(losses, there)
