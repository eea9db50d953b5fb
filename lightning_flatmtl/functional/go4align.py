"""Weights of groups of tasks that learn alike."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from lightning_flatmtl.functional._gram import Array, Indices, is_number, to_tensor
from lightning_flatmtl.functional._vectors import LEAST_LOSS, Vector, positive_losses, task_vector


def go4align_weights(
    losses: Vector, risks: Vector, num_groups: int = 2, step_size: float = 1e-4
) -> Tensor:
    r"""Weights of the losses by groups of tasks that learn alike (GO4Align).

    .. math:: \gamma_i = \frac{\sum_j L_j}{L_i}\, p_i, \qquad
        p = \mathrm{softmax}(-\eta R)

    with :math:`R_i` the sum of all losses of the task so far, the present one included. The
    indicators :math:`\gamma_i` are parted into groups by k-means, and the weight of a task is the
    mean of its group. Shen et al., 2024, `arXiv:2404.06486 <https://arxiv.org/abs/2404.06486>`_.
    The groups are the best ones, not those that random starts lead to: on a line they are found
    exactly.

    Args:
        losses: L, ``[m]``, positive; they count as at least 1e-300 of the largest.
        risks: R, ``[m]``, finite.
        num_groups: How many groups, at least 1; with as many as there are tasks each is its own.
        step_size: :math:`\eta`, in ``[0, inf)``.

    Returns:
        Weights ``[m]``, float64 on the CPU.

    Raises:
        ValueError: If an argument is not as described.

    Example:
        >>> import torch
        >>> go4align_weights([1.0, 1.0, 4.0], [0.0, 0.0, 0.0], num_groups=2)
        tensor([2.0000, 2.0000, 0.5000], dtype=torch.float64)
    """
    if isinstance(num_groups, bool) or not isinstance(num_groups, int) or num_groups < 1:
        raise ValueError(f"`num_groups` must be an integer >= 1, got {num_groups!r}.")
    if not is_number(step_size, 0, low_included=True):
        raise ValueError(f"`step_size` must be in [0, inf), got {step_size}.")
    values = positive_losses(losses)
    sums = task_vector("risks", risks, len(values))
    shares = (values / values.max()).clamp(min=LEAST_LOSS)
    chances = (-step_size * (sums - sums.min())).softmax(dim=0)
    indicators = shares.sum() / shares * chances
    return to_tensor(_group_means(indicators.numpy(), num_groups))


def _group_means(values: Array, groups: int) -> Array:
    """Every value replaced by the mean of its group; the groups are those of optimal k-means."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    means = np.empty_like(values)
    for members in np.split(order, _first_members(ordered, min(groups, len(values)))):
        means[members] = values[members].mean()
    return means


def _first_members(ordered: Array, groups: int) -> Indices:
    """Where the second, third, ... group begins in sorted values (Wang and Song, 2011).

    Groups of k-means on a line are segments of the sorted values, so dynamic programming finds
    the best.
    """
    spread = _spreads(ordered / ordered[-1] if ordered[-1] > 0 else ordered)
    m = len(ordered)
    best, begins = spread[0], []
    for _ in range(groups - 1):
        # The best of the first values in one group fewer, and the segment from j to i.
        before = np.concatenate([[np.inf], best[:-1]])
        costs = before[:, None] + spread
        begins.append(costs.argmin(axis=0))
        best = costs[begins[-1], np.arange(m)]
    found, last = np.empty(groups - 1, dtype=np.intp), m - 1
    for group in range(groups - 2, -1, -1):
        found[group] = begins[group][last]
        last = found[group] - 1
    return found


def _spreads(ordered: Array) -> Array:
    """Sums of squared distances to their mean of all segments ``[first, last]``; else inf."""
    m = len(ordered)
    spread = np.full((m, m), np.inf)
    mean, total = ordered.copy(), np.zeros(m)
    for width in range(m):
        first = np.arange(m - width)
        last = first + width
        if width:
            # Welford's update by the segment's new last value; differences of squares would cancel.
            change = ordered[last] - mean[first]
            mean[first] += change / (width + 1)
            total[first] += change * (ordered[last] - mean[first])
        spread[first, last] = total[first]
    return spread
