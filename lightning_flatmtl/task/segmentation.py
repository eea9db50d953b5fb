"""Semantic segmentation: a class for every pixel."""

from functools import partial
from typing import Any

from torch import nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from lightning_flatmtl.functional import segmentation_loss
from lightning_flatmtl.task._base import Task
from lightning_flatmtl.task._dense import dense_head

__all__ = ["SegmentationTask"]


class SegmentationTask(Task):
    """Semantic segmentation with cross-entropy, mean IoU and pixel accuracy.

    Targets are int64 ``[n, height, width]``, logits ``[n, num_classes, height, width]``. Pixels
    with ``ignore_index`` count neither in the loss nor in the metrics. An image without any label
    is left out of its batch, as a sample without a label; a batch of nothing else leaves the task
    out of the step.

    ``miou`` is that of one confusion matrix over all pixels of the epoch. A class that is neither
    predicted nor labelled anywhere is left out of the mean; one that is predicted only, or labelled
    only, counts as 0. ``pixel_accuracy`` is the share of the labelled pixels that are right.

    Args:
        name: Names the task in batches, logs and messages.
        num_classes: Number of classes, at least 2.
        in_channels: Channels of the features, for a :class:`~lightning_flatmtl.models.DenseHead`.
        head: Maps features to logits, instead of ``in_channels``.
        ignore_index: The value of pixels that have no label.

    Raises:
        ValueError: If both or none of ``head`` and ``in_channels`` are given, or for fewer than 2
            classes.

    Example:
        >>> from lightning_flatmtl.task import SegmentationTask
        >>> task = SegmentationTask("segmentation", num_classes=13, in_channels=64)
        >>> sorted(task.metrics)
        ['miou', 'pixel_accuracy']
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        in_channels: int | None = None,
        head: nn.Module | None = None,
        ignore_index: int = -1,
    ) -> None:
        if num_classes < 2:
            raise ValueError(f"`num_classes` must be at least 2, got {num_classes}.")
        # Labels that are no class are refused anyway; torchmetrics' look at them sorts all pixels.
        settings: dict[str, Any] = {"ignore_index": ignore_index, "validate_args": False}
        super().__init__(
            name,
            head=dense_head(head, in_channels, num_classes),
            loss=partial(segmentation_loss, ignore_index=ignore_index),
            metrics={
                "miou": MulticlassJaccardIndex(num_classes, **settings),
                "pixel_accuracy": MulticlassAccuracy(num_classes, average="micro", **settings),
            },
            missing=ignore_index,
        )
