"""Depth: the loss and the errors over the pixels that have a depth."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["depth_error_sums", "depth_loss"]


def depth_loss(predictions: Tensor, target: Tensor) -> Tensor:
    r"""Mean absolute error over the labelled pixels.

    .. math::
        L = \frac{1}{|V|} \sum_{x \in V} |p_x - t_x|, \qquad V = \{x : 0 < t_x < \infty\}

    The published code takes all pixels that are not 0. That is the same where depths (or
    disparities) are positive and 0 says that there is none. Without any labelled pixel the loss is
    0, and so is its gradient.

    Args:
        predictions: Any shape, such as ``[n, 1, height, width]``.
        target: The same shape.

    Returns:
        A scalar, in float32 at least.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> import torch
        >>> depth_loss(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([2.0, 4.0, 0.0]))
        tensor(1.5000)
    """
    labelled = _labelled(predictions, target)
    errors = torch.where(labelled, predictions - target, 0.0).abs()
    total = errors.sum(dtype=torch.promote_types(errors.dtype, torch.float32))
    return total / labelled.sum().clamp(min=1)


def depth_error_sums(predictions: Tensor, target: Tensor) -> Tensor:
    r"""Sums that absolute and relative error are quotients of.

    Over the labelled pixels of :func:`depth_loss`: their number, the sum of :math:`|p - t|` and the
    sum of :math:`|p - t| / t`. The sums of several batches are added up.

    Args:
        predictions: Any shape, such as ``[n, 1, height, width]``.
        target: The same shape.

    Returns:
        ``[3]`` in float64 on the device of the predictions.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> import torch
        >>> depth_error_sums(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([2.0, 4.0, 0.0]))
        tensor([2., 3., 1.], dtype=torch.float64)
    """
    labelled = _labelled(predictions, target)
    p, t = predictions[labelled].double(), target[labelled].double()
    errors = (p - t).abs()
    return torch.stack([labelled.sum().double(), errors.sum(), (errors / t).sum()])


def _labelled(predictions: Tensor, target: Tensor) -> Tensor:
    if predictions.shape != target.shape:
        raise ValueError(
            "`predictions` and `target` must have the same shape, such as [n, 1, height, width], "
            f"got {list(predictions.shape)} and {list(target.shape)}."
        )
    return (target > 0) & (target < torch.inf)
