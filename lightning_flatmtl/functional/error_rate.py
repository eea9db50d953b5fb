"""Which predictions of classes are wrong."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["wrong_predictions"]


def wrong_predictions(logits: Tensor, target: Tensor) -> Tensor:
    r"""Which samples are put into another class than their own.

    .. math::
        e_i = [\arg\max_c z_{ic} \ne y_i] \quad\text{or, of a binary logit,}\quad
        e_i = [[z_i > 0] \ne y_i]

    Of equal logits the first class counts, of a binary logit 0 it is class 0. A sample with NaN
    among its logits is wrong.

    Args:
        logits: ``[n, classes, ...]`` of two or more classes, or binary ones, of the shape of the
            targets.
        target: Classes ``[n, ...]``, integers.

    Returns:
        Boolean, of the shape of the targets.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.functional import wrong_predictions
        >>> wrong_predictions(torch.tensor([1.5, -0.5, 2.0]), torch.tensor([1, 1, 0]))
        tensor([False,  True,  True])
    """
    if logits.shape == target.shape:
        return ((logits > 0) != (target == 1)) | logits.isnan()
    rest = logits.shape[:1] + logits.shape[2:]
    if logits.ndim != target.ndim + 1 or rest != target.shape or logits.shape[1] < 2:
        raise ValueError(
            "`logits` must be [n, classes, ...] of two or more classes with targets [n, ...], or "
            "binary, of the shape of the targets, got "
            f"{list(logits.shape)} and {list(target.shape)}."
        )
    return (_first_greatest(logits) != target) | logits.isnan().any(1)


def _first_greatest(logits: Tensor) -> Tensor:
    """The first of the greatest along axis 1; torch leaves open which one ``argmax`` is."""
    classes = torch.arange(logits.shape[1], device=logits.device)
    at = classes.view(-1, *[1] * (logits.ndim - 2))
    greatest = logits == logits.amax(1, keepdim=True)
    return torch.where(greatest, at, logits.shape[1]).amin(1)
