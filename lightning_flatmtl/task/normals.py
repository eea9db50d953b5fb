"""Surface normals: a direction for every pixel."""

from torch import nn

from lightning_flatmtl.functional import normals_loss
from lightning_flatmtl.metrics import NormalAngle, NormalsWithin
from lightning_flatmtl.models.dense_head import UnitLength
from lightning_flatmtl.task._base import Task
from lightning_flatmtl.task._dense import dense_head

__all__ = ["NormalsTask"]


class NormalsTask(Task):
    """Surface normals with 1 - cosine as their loss, and the five published metrics of the angles.

    Targets are ``[n, 3, height, width]``; predictions as well, of length 1: that is the last layer
    of the head. Pixels whose target is the zero vector have no label, see
    :func:`~lightning_flatmtl.functional.normals_loss`. An image without any is left out of its
    batch, as a sample without a label; a batch of nothing else leaves the task out of the step.

    The metrics are ``mean`` and ``median`` (:class:`~lightning_flatmtl.metrics.NormalAngle`, in
    degrees) and ``within_11``, ``within_22``, ``within_30``
    (:class:`~lightning_flatmtl.metrics.NormalsWithin`, of 11.25, 22.5 and 30 degrees).

    Args:
        name: Names the task in batches, logs and messages.
        in_channels: Channels of the features, for a :class:`~lightning_flatmtl.models.DenseHead`.
        head: Maps features to vectors of any length, instead of ``in_channels``.

    Raises:
        ValueError: If both or none of ``head`` and ``in_channels`` are given.

    Example:
        >>> from lightning_flatmtl.task import NormalsTask
        >>> list(NormalsTask("normals", in_channels=64).metrics)
        ['mean', 'median', 'within_11', 'within_22', 'within_30']
    """

    def __init__(
        self, name: str, in_channels: int | None = None, head: nn.Module | None = None
    ) -> None:
        super().__init__(
            name,
            head=nn.Sequential(dense_head(head, in_channels, 3), UnitLength()),
            loss=normals_loss,
            metrics={
                "mean": NormalAngle("mean"),
                "median": NormalAngle("median"),
                "within_11": NormalsWithin(11.25),
                "within_22": NormalsWithin(22.5),
                "within_30": NormalsWithin(30.0),
            },
            missing=0.0,
        )
