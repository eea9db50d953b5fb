"""Projecting conflicting gradients: gradient surgery in Gram space."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_flatmtl.functional._gram import (
    Array,
    Indices,
    refuse_unreadable,
    to_tensor,
    unit_gram,
)

Reduction = Literal["sum", "mean"]


def pcgrad_weights(gram: Tensor, order: Tensor, reduction: Reduction = "sum") -> Tensor:
    r"""Weights of the sum of the projected gradients (PCGrad).

    Starting from :math:`g_i' = g_i`, for every :math:`j \ne i` in the order of task i:

    .. math:: g_i' \leftarrow g_i' - \frac{\min(g_i'^\top g_j, 0)}{\lVert g_j \rVert^2}\, g_j,
        \qquad d = \sum_i g_i'

    Yu et al., 2020, `arXiv:2001.06782 <https://arxiv.org/abs/2001.06782>`_. All tasks take their
    k-th projection together, so m steps of vectorised arithmetic do the work.

    A zero row conflicts with nothing, and an exactly opposed pair cancels to zero.

    Args:
        gram: Gram matrix :math:`K = G G^\top` of the gradients, ``[m, m]``.
        order: Integers ``[m, m]``; row i is the permutation of ``range(m)`` in which task i meets
            the others. The entry i itself is skipped.
        reduction: ``"sum"``, or ``"mean"`` to divide the sum by m.

    Returns:
        Weights ``[m]``, float64 on the CPU.

    Raises:
        ValueError: If ``order`` or ``reduction`` is not as described, or if ``gram`` is not
            square, not finite, or has a negative diagonal.

    Example:
        >>> import torch
        >>> order = torch.tensor([[0, 1], [0, 1]])
        >>> pcgrad_weights(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]), order)
        tensor([1.5000, 1.5000], dtype=torch.float64)
    """
    unit = unit_gram(gram)
    others = others_in_order(order, unit.size)
    # A zero row keeps its place in the order with cosines of 0, so it is never projected on.
    cosines, norms = unit.padded()
    total = norms + _projections(norms, cosines, others)
    return to_tensor(reduced(unit.weights(total[unit.rows], zero_rows=1.0), reduction))


def _projections(norms: Array, cosines: Array, others: Indices) -> Array:
    """How much of every unit row all projections together add."""
    products = norms[:, None] * cosines  # row i: the current g_i' times every unit row
    tasks = np.arange(len(norms))
    added = np.empty(others.shape)
    for step, partner in enumerate(others):
        amount = np.maximum(-products[tasks, partner], 0.0)
        products += amount[:, None] * cosines[partner]
        added[step] = amount
    totals: Array = np.bincount(others.ravel(), added.ravel(), len(norms)).astype(np.float64)
    return totals


def others_in_order(order: Tensor, size: int) -> Indices:
    """The partners of every task, ``[m - 1, m]``: column i is row i of ``order`` without i."""
    refuse_unreadable("order", order)
    if order.shape != (size, size):
        raise ValueError(f"`order` must have shape [{size}, {size}], got {list(order.shape)}.")
    if order.is_floating_point() or order.dtype == torch.bool:
        raise ValueError(f"`order` must hold integers, got {order.dtype}.")
    array = order.detach().to("cpu", torch.int64).numpy()
    tasks = np.arange(size)
    wrong = (np.sort(array, axis=1) != tasks).any(axis=1)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"`order` must hold a permutation of range({size}) in every row, "
            f"got {array[row].tolist()} in row {row}."
        )
    return np.ascontiguousarray(array[array != tasks[:, None]].reshape(size, size - 1).T)


def reduced(weights: Array, reduction: Reduction) -> Array:
    """``weights`` of the sum, or of the mean of the tasks' gradients."""
    if reduction not in ("sum", "mean"):
        raise ValueError(f'`reduction` must be "sum" or "mean", got {reduction!r}.')
    return weights / len(weights) if reduction == "mean" else weights
