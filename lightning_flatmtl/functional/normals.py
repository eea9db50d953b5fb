"""Surface normals: the loss, and angles between what is predicted and what is there."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "BINS_PER_DEGREE",
    "angle_histogram",
    "histogram_median",
    "normal_angles",
    "normals_loss",
]

BINS_PER_DEGREE = 100
"""Bins of :func:`angle_histogram` for each degree."""


def normals_loss(predictions: Tensor, target: Tensor) -> Tensor:
    r"""One minus the mean cosine over the labelled pixels.

    .. math::
        L = 1 - \frac{1}{|V|} \sum_{x \in V} \frac{p_x^\top t_x}{\|p_x\| \|t_x\|},
        \qquad V = \{x : t_x \ne 0\}

    Lengths do not matter. The published code takes the inner product of unit predictions with the
    targets as they are, and leaves out targets whose three components *sum up* to 0; the
    difference lies in pixels at which a scaled image is interpolated, and in such targets. A
    prediction of exactly 0 has the cosine 0, and a gradient of 0. Without any labelled pixel the
    loss is 0, and so is its gradient.

    Args:
        predictions: ``[n, 3, ...]``.
        target: The same shape; a pixel of zeros, or with a value that is not finite, has no label.

    Returns:
        A scalar in [0, 2], in float32 at least.

    Raises:
        ValueError: If the shapes differ, or if they do not have three components.

    Example:
        >>> import torch
        >>> up = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1)
        >>> normals_loss(5 * up, up), normals_loss(-up, up), normals_loss(up, 0 * up)
        (tensor(0.), tensor(2.), tensor(0.))
    """
    labelled = _labelled(predictions, target)
    dtype = torch.promote_types(predictions.dtype, torch.float32)
    p, t = predictions.to(dtype), torch.where(labelled[:, None], target, 0.0).to(dtype)
    lengths = p.square().sum(1) * t.square().sum(1)
    known = lengths > 0
    # Chosen before and after the root: the gradient at 0 is 0, not the NaN of 0 times infinity.
    cosines = (p * t).sum(1) * torch.where(known, lengths, 1.0).rsqrt()
    total = torch.where(labelled, 1 - torch.where(known, cosines, 0.0), 0.0).sum()
    return total / labelled.sum().clamp(min=1)


def normal_angles(predictions: Tensor, target: Tensor) -> Tensor:
    r"""Angles between predicted and true normals at the labelled pixels.

    :math:`\mathrm{atan2}(\|p \times t\|, p^\top t)` in degrees, which is the arc cosine of the
    cosine, but as exact for small angles as for large ones, and for vectors of any length. A
    prediction of exactly 0 points nowhere: its angle is 90 degrees, the mean over all directions.
    A prediction that is not finite has the angle NaN.

    Args:
        predictions: ``[n, 3, ...]``.
        target: The same shape; a pixel of zeros, or with a value that is not finite, has no label.

    Returns:
        ``[labelled pixels]`` in [0, 180], float64.

    Raises:
        ValueError: If the shapes differ, or if they do not have three components.

    Example:
        >>> import torch
        >>> predictions = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
        >>> normal_angles(predictions, torch.tensor([1.0, 0.0, 0.0]).expand(3, 3))
        tensor([ 0., 90., 90.], dtype=torch.float64)
    """
    labelled = _labelled(predictions, target)
    p, t = (v.movedim(1, -1)[labelled].double() for v in (predictions, target))
    sines = torch.linalg.vector_norm(torch.linalg.cross(p, t), dim=1)
    angles = torch.atan2(sines, (p * t).sum(1)).rad2deg()
    return torch.where((p == 0).all(1), 90.0, angles)


def angle_histogram(angles: Tensor) -> Tensor:
    """How many angles lie in each hundredth of a degree from 0 to 180.

    Bin b holds the angles in [b / 100, (b + 1) / 100) degrees, the last one that of 180 as well.
    The histograms of several batches are added up; 144 KB whatever the number of pixels.

    Args:
        angles: In degrees, ``[n]``; NaN is not counted.

    Returns:
        int64 ``[18000]``.

    Example:
        >>> import torch
        >>> angle_histogram(torch.tensor([0.005, 0.015, 180.0]))[[0, 1, -1]]
        tensor([1, 1, 1])
    """
    edges = torch.arange(1, 180 * BINS_PER_DEGREE, dtype=torch.float64, device=angles.device)
    angles = angles[~angles.isnan()].double()
    # By comparison with the edges: a product could round an angle into the next bin.
    which = torch.bucketize(angles, edges / BINS_PER_DEGREE, right=True)
    return torch.bincount(which, minlength=180 * BINS_PER_DEGREE)


def histogram_median(histogram: Tensor) -> Tensor:
    """Median of the angles of a histogram, off by 0.005 degrees at most.

    The mean of the middles of the bins that hold the two angles (or the one) in the middle of all.

    Args:
        histogram: What :func:`angle_histogram` returned, or a sum of such.

    Returns:
        A scalar in degrees, float64; NaN if the histogram is empty.

    Example:
        >>> import torch
        >>> histogram_median(angle_histogram(torch.tensor([10.003, 20.001, 170.0])))
        tensor(20.0050, dtype=torch.float64)
    """
    count = histogram.sum()
    ranks = torch.stack([(count - 1) // 2, count // 2])
    bins = torch.searchsorted(histogram.cumsum(0), ranks, right=True).double()
    middle = ((bins + 0.5) / BINS_PER_DEGREE).mean()
    return torch.where(count > 0, middle, torch.nan)


def _labelled(predictions: Tensor, target: Tensor) -> Tensor:
    """The pixels that have a normal, ``[n, ...]``."""
    shape = predictions.shape
    if shape != target.shape or len(shape) < 2 or shape[1] != 3:
        raise ValueError(
            "`predictions` and `target` must have the same shape [n, 3, ...], got "
            f"{list(shape)} and {list(target.shape)}."
        )
    return target.isfinite().all(1) & (target != 0).any(1)
