"""Gradient vaccine: gradient surgery towards target cosines."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_flatmtl.functional._gram import (
    Array,
    Indices,
    refuse_unreadable,
    rounding,
    to_tensor,
    unit_gram,
)
from lightning_flatmtl.functional.pcgrad import Reduction, others_in_order, reduced


class GradVacResult(NamedTuple):
    """What :func:`gradvac_weights` returns.

    Attributes:
        weights: Weights ``[m]`` of the direction.
        cosines: Cosines ``[m, m]``: entry ij is that of :math:`g_i'` and :math:`g_j` when task i
            met task j, before the change. Where none is defined (the diagonal, zero gradients) it
            is the target, so that a moving average over the result stays put there.
    """

    weights: Tensor
    cosines: Tensor


def gradvac_weights(
    gram: Tensor, order: Tensor, targets: Tensor, reduction: Reduction = "sum"
) -> GradVacResult:
    r"""Weights of the sum of the vaccinated gradients (GradVac).

    Starting from :math:`g_i' = g_i`, for every :math:`j \ne i` in the order of task i, with the
    cosine :math:`\varphi` of :math:`g_i'` and :math:`g_j` and the target :math:`\hat\varphi`: if
    :math:`\varphi < \hat\varphi`, :math:`g_i'` moves along :math:`g_j` to the target,

    .. math:: g_i' \leftarrow g_i' + \frac{\lVert g_i' \rVert
        (\hat\varphi \sqrt{1 - \varphi^2} - \varphi \sqrt{1 - \hat\varphi^2})}
        {\lVert g_j \rVert \sqrt{1 - \hat\varphi^2}}\, g_j,
        \qquad d = \sum_i g_i'

    Wang et al., 2021, `arXiv:2010.05874 <https://arxiv.org/abs/2010.05874>`_. With all targets 0
    it is PCGrad. The caller keeps the targets, moving averages of the returned cosines.

    Degenerate inputs: a zero gradient, or a :math:`g_i'` that cancelled to zero, has no cosine and
    is left alone, and so is a pair whose target is exactly 1, which no finite step can reach.
    Cosines that miss their target by a rounding error count as on target.

    Args:
        gram: Gram matrix :math:`K = G G^\top` of the gradients, ``[m, m]``.
        order: Integers ``[m, m]``; row i is the permutation of ``range(m)`` in which task i meets
            the others. The entry i itself is skipped.
        targets: Target cosines ``[m, m]`` in ``[-1, 1]``; the diagonal is not used.
        reduction: ``"sum"``, or ``"mean"`` to divide the sum by m.

    Returns:
        The weights and the cosines, float64 on the CPU.

    Raises:
        ValueError: If ``order``, ``targets`` or ``reduction`` is not as described, or if ``gram``
            is not square, not finite, or has a negative diagonal.

    Example:
        >>> import torch
        >>> order, targets = torch.tensor([[0, 1], [0, 1]]), torch.zeros(2, 2)
        >>> gradvac_weights(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]), order, targets).weights
        tensor([1.5000, 1.5000], dtype=torch.float64)
    """
    unit = unit_gram(gram)
    others, wanted = others_in_order(order, unit.size), _checked(targets, unit.size)
    cosines, norms = unit.padded()
    added, met = _vaccinate(cosines, norms, others, wanted)
    weights = unit.weights((norms + added)[unit.rows], zero_rows=1.0)
    return GradVacResult(to_tensor(reduced(weights, reduction)), to_tensor(met))


def _vaccinate(
    cosines: Array, norms: Array, others: Indices, targets: Array
) -> tuple[Array, Array]:
    """How much of every unit row is added in total, and the cosines met."""
    tasks, noise = np.arange(len(norms)), rounding(len(norms))
    products, lengths = norms[:, None] * cosines, norms  # of the current g_i'
    met, added = targets.copy(), np.empty(others.shape)
    for step, partner in enumerate(others):
        along, target = products[tasks, partner], targets[tasks, partner]
        # A length within the rounding error of the original gradient is a zero length.
        defined = (lengths > noise * norms) & (norms[partner] > 0)
        cosine = np.divide(along, lengths, out=target.copy(), where=defined)
        cosine = np.minimum(np.maximum(cosine, -1.0), 1.0)
        met[tasks, partner] = cosine
        moves = (target - cosine > noise) & (target < 1)
        if not moves.any():
            added[step] = 0.0
            continue
        sine, target_sine = _sine(cosine, noise), np.where(moves, _sine(target, 0.0), 1.0)
        # Moving along g_j keeps the part across it, lengths * sine.
        amount = np.where(moves, lengths * sine * (target / target_sine) - along, 0.0)
        lengths = np.where(moves, lengths * sine / target_sine, lengths)
        products += amount[:, None] * cosines[partner]
        added[step] = amount
    totals: Array = np.bincount(others.ravel(), added.ravel(), len(norms)).astype(np.float64)
    return totals, met


def _sine(cosine: Array, noise: float) -> Array:
    """Sine of the angle, where its square is not just the rounding error of the cosine."""
    squared = (1 - cosine) * (1 + cosine)
    sine: Array = np.sqrt(np.where(squared > noise, squared, 0.0))
    return sine


def _checked(targets: Tensor, size: int) -> Array:
    refuse_unreadable("targets", targets)
    if targets.shape != (size, size):
        raise ValueError(f"`targets` must have shape [{size}, {size}], got {list(targets.shape)}.")
    array: Array = targets.detach().to("cpu", torch.float64).numpy()
    wrong = ~((array >= -1) & (array <= 1))
    if wrong.any():
        row, column = (int(index) for index in np.argwhere(wrong)[0])
        raise ValueError(
            f"`targets` must be in [-1, 1], got {array[row, column]} at [{row}, {column}]."
        )
    return array
