"""Errors of depth over the pixels of an epoch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_flatmtl.functional.depth import depth_error_sums

__all__ = ["DepthError"]


class DepthError(Metric):
    r"""Mean absolute or relative error of depth over all labelled pixels.

    .. math::
        \frac{1}{|V|} \sum_{x \in V} |p_x - t_x| \qquad\text{or}\qquad
        \frac{1}{|V|} \sum_{x \in V} \frac{|p_x - t_x|}{t_x},
        \qquad V = \{x : 0 < t_x < \infty\}

    Every pixel of the epoch weighs the same. The published code takes the mean of the batches'
    means, in which a pixel weighs the more, the fewer of its batch are labelled. The sums are
    float64. The relative error is a share, not percent.

    Args:
        relative: Whether to divide the error at each pixel by its depth.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.metrics import DepthError
        >>> predictions, target = torch.tensor([1.0, 2.0, 9.0]), torch.tensor([2.0, 4.0, 0.0])
        >>> DepthError()(predictions, target), DepthError(relative=True)(predictions, target)
        (tensor(1.5000, dtype=torch.float64), tensor(0.5000, dtype=torch.float64))
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    sums: Tensor

    def __init__(self, relative: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.relative = relative
        # Of both errors, so that a collection with both computes them once.
        self.add_state("sums", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add pixels: predictions and target of the same shape, such as ``[n, 1, height, width]``.

        Raises:
            ValueError: If the shapes differ.
        """
        self.sums = self.sums + depth_error_sums(preds.detach(), target)

    def compute(self) -> Tensor:
        """The mean over all labelled pixels, NaN if there is none."""
        return self.sums[2 if self.relative else 1] / self.sums[0]
