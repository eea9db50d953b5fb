"""Angles of surface normals over the pixels of an epoch."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_flatmtl.functional.normals import (
    BINS_PER_DEGREE,
    angle_histogram,
    histogram_median,
    normal_angles,
)

__all__ = ["NormalAngle", "NormalsWithin"]


class _Angles(Metric):
    """Sum and histogram of the angles of all labelled pixels.

    All metrics have both, so that a MetricCollection computes the angles of a batch once for all.
    """

    is_differentiable = False
    full_state_update = False

    total: Tensor
    histogram: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        empty = torch.zeros(180 * BINS_PER_DEGREE, dtype=torch.int64)
        self.add_state("histogram", empty, dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add pixels: predictions and target ``[n, 3, ...]``, of any length but 0.

        Raises:
            ValueError: If the shapes differ, or if they do not have three components.
        """
        angles = normal_angles(preds.detach(), target)
        self.histogram = self.histogram + angle_histogram(angles)
        self.total = self.total + angles.sum()

    def _unless_nan(self, value: Tensor) -> Tensor:
        """NaN once a prediction was not finite: no bin counts it."""
        return torch.where(self.total.isnan(), torch.nan, value)


class NormalAngle(_Angles):
    r"""Mean or median angle between predicted and true normals, in degrees.

    Over all labelled pixels of the epoch, see :func:`lightning_flatmtl.functional.normal_angles`;
    each weighs the same. The published code takes the mean of the batches' means and of the
    batches' medians; the mean of medians is not the median of all.

    The mean is that of float64 sums. The median is read off a histogram of hundredths of a degree
    and off by 0.005 degrees at most: exact medians would need all angles, 72 million for the
    validation images of NYUv2, and could not be added up over processes.

    Args:
        statistic: ``"mean"`` or ``"median"``.

    Raises:
        ValueError: If there is no such statistic.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.metrics import NormalAngle
        >>> predictions = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        >>> NormalAngle()(predictions, torch.tensor([1.0, 0.0, 0.0]).expand(3, 3))
        tensor(30., dtype=torch.float64)
    """

    higher_is_better = False

    def __init__(self, statistic: Literal["mean", "median"] = "mean", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if statistic not in {"mean", "median"}:
            raise ValueError(f"`statistic` must be 'mean' or 'median', got {statistic!r}.")
        self.statistic = statistic

    def compute(self) -> Tensor:
        """The angle in degrees, NaN if there is no labelled pixel."""
        if self.statistic == "mean":
            return self.total / self.histogram.sum()
        return self._unless_nan(histogram_median(self.histogram))


class NormalsWithin(_Angles):
    r"""Share of the labelled pixels whose angle is below a bound.

    See :func:`lightning_flatmtl.functional.normal_angles`. The count is exact: the bound is an
    edge of the histogram's bins.

    Args:
        degrees: The bound, in (0, 180], a multiple of 0.01 degrees; published are 11.25, 22.5, 30.

    Raises:
        ValueError: If the bound is none of these.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.metrics import NormalsWithin
        >>> predictions = torch.tensor([[1.0, 0.1, 0.0], [1.0, 0.5, 0.0]])  # 5.7 and 26.6 degrees
        >>> target = torch.tensor([1.0, 0.0, 0.0]).expand(2, 3)
        >>> NormalsWithin(11.25)(predictions, target), NormalsWithin(30)(predictions, target)
        (tensor(0.5000, dtype=torch.float64), tensor(1., dtype=torch.float64))
    """

    higher_is_better = True

    def __init__(self, degrees: float = 11.25, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        fits = 0 < degrees <= 180
        if not fits or round(degrees * BINS_PER_DEGREE) / BINS_PER_DEGREE != degrees:
            raise ValueError(
                f"`degrees` must be in (0, 180] and a multiple of 0.01, got {degrees!r}."
            )
        self.degrees = degrees

    def compute(self) -> Tensor:
        """The share in [0, 1], NaN if there is no labelled pixel."""
        below = self.histogram[: round(self.degrees * BINS_PER_DEGREE)].sum()
        return self._unless_nan(below.double() / self.histogram.sum())
