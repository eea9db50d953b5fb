"""Depth: a distance, or its inverse, for every pixel."""

from torch import nn

from lightning_flatmtl.functional import depth_loss
from lightning_flatmtl.metrics import DepthError
from lightning_flatmtl.task._base import Task
from lightning_flatmtl.task._dense import dense_head

__all__ = ["DepthTask"]


class DepthTask(Task):
    """Depth with the mean absolute error as its loss, and absolute and relative error.

    Targets and predictions are ``[n, 1, height, width]``. Pixels whose target is 0 have no label,
    see :func:`~lightning_flatmtl.functional.depth_loss`. An image without any is left out of its
    batch, as a sample without a label; a batch of nothing else leaves the task out of the step.

    The metrics ``abs_err`` and ``rel_err`` are :class:`~lightning_flatmtl.metrics.DepthError`.

    Args:
        name: Names the task in batches, logs and messages.
        in_channels: Channels of the features, for a :class:`~lightning_flatmtl.models.DenseHead`.
        head: Maps features to depth, instead of ``in_channels``.

    Raises:
        ValueError: If both or none of ``head`` and ``in_channels`` are given.

    Example:
        >>> from lightning_flatmtl.task import DepthTask
        >>> sorted(DepthTask("depth", in_channels=64).metrics)
        ['abs_err', 'rel_err']
    """

    def __init__(
        self, name: str, in_channels: int | None = None, head: nn.Module | None = None
    ) -> None:
        super().__init__(
            name,
            head=dense_head(head, in_channels, 1),
            loss=depth_loss,
            metrics={"abs_err": DepthError(), "rel_err": DepthError(relative=True)},
            missing=0.0,
        )
