"""Mean absolute and root mean square error over the labelled entries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_flatmtl.functional.class_counts import labelled

__all__ = ["RegressionError"]


class RegressionError(Metric):
    r"""Mean absolute error, or the root of the mean squared one, over all labelled entries.

    .. math::
        \frac{1}{|V|} \sum_{i \in V} |\hat y_i - y_i|, \qquad
        \sqrt{\frac{1}{|V|} \sum_{i \in V} (\hat y_i - y_i)^2}

    In the unit of the targets, over the whole epoch and all processes, summed in float64.

    Args:
        root_mean_square: Whether it is the second one.
        missing: Entries with this target are not counted; it may be NaN.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.metrics import RegressionError
        >>> metric = RegressionError(missing=float("nan"))
        >>> metric(torch.tensor([1.0, 2.0, 7.0]), torch.tensor([2.0, float("nan"), 4.0]))
        tensor(2., dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(
        self, root_mean_square: bool = False, missing: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.root_mean_square, self.missing = root_mean_square, missing
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.set_dtype(torch.float64)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add samples.

        Raises:
            ValueError: If the shapes differ.
        """
        if preds.shape != target.shape:
            raise ValueError(
                "`preds` must have the shape of the targets, got "
                f"{list(preds.shape)} and {list(target.shape)}."
            )
        there = labelled(target, self.missing)
        error = (preds.double() - target.double())[there]
        self.total = self.total + (error.square() if self.root_mean_square else error.abs()).sum()
        self.count = self.count + there.sum()

    def compute(self) -> Tensor:
        """The error, float64; NaN without a labelled entry."""
        mean = self.total / self.count
        return mean.sqrt() if self.root_mean_square else mean
