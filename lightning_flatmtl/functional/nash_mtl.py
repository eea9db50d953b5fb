"""The Nash bargaining solution of multi-task learning."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from lightning_flatmtl.functional._barrier import solve_barrier
from lightning_flatmtl.functional._gram import (
    gram_array,
    is_number,
    semidefinite_unit_gram,
    to_tensor,
)
from lightning_flatmtl.functional._scale import without_scale
from lightning_flatmtl.functional._shares import shares_of
from lightning_flatmtl.functional._vectors import Vector, task_vector


def nash_weights(gram: Tensor, preference: Vector | None = None, normalize: bool = False) -> Tensor:
    r"""Weights of the Nash bargaining solution (Nash-MTL).

    .. math:: K \alpha = 1 / \alpha, \qquad \alpha > 0

    Navon et al., 2022, `arXiv:2202.01017 <https://arxiv.org/abs/2202.01017>`_, who approximate
    the solution by a sequence of convex programs; here it is exact, the minimiser of
    :math:`\tfrac12 \alpha^\top K \alpha - \sum_i \log \alpha_i` by Newton's method. The direction
    has norm :math:`\sqrt m` whatever the scales of the gradients; the published clip of its norm
    is :func:`clip_weights`.

    Degenerate inputs:

    - Zero rows are left out of the bargain (weight 0).
    - Zero in the convex hull of the other gradients (exactly opposed rows, say), to within
      rounding: no direction improves all tasks, the equation has no finite solution, and the
      outcome of the bargain is its disagreement point, no update. All weights are 0.

    Args:
        gram: Gram matrix :math:`K = G G^\top` of the gradients, ``[m, m]``.
        preference: Bargaining powers :math:`p` ``[m]``, positive: the equation becomes
            :math:`K \alpha = p / \alpha`. All ones by default.
        normalize: Solve for :math:`K / \lVert K \rVert_F`, so that the direction scales with the
            gradients.

    Returns:
        Weights ``[m]``, float64 on the CPU.

    Raises:
        ValueError: If ``gram`` is not square, not finite, or has a negative diagonal, or a power
            is not positive.

    Example:
        >>> import torch
        >>> nash_weights(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    unit = semidefinite_unit_gram(without_scale(gram) if normalize else gram)
    powers = shares_of(preference, unit.size, otherwise=1.0, positive=True)
    if len(unit.rows) == 0:
        return to_tensor(np.zeros(unit.size))
    solution = solve_barrier(unit.cosines, np.log(powers[unit.rows]), 1.0)
    return to_tensor(np.zeros(unit.size) if solution is None else unit.weights(solution))


def clip_weights(weights: Vector, gram: Tensor, max_norm: float) -> Tensor:
    r"""Weights of the same direction, no longer than a bound.

    .. math:: w \min\Bigl(1, \frac{c}{\lVert d \rVert}\Bigr), \qquad
        \lVert d \rVert^2 = w^\top K w

    Args:
        weights: w, ``[m]``, finite.
        gram: Gram matrix :math:`K = G G^\top` of the gradients, ``[m, m]``.
        max_norm: The bound c, in ``(0, inf)``.

    Returns:
        Weights ``[m]``, float64 on the CPU.

    Raises:
        ValueError: If an argument is out of bounds, or if ``gram`` is not square, not finite, or
            has a negative diagonal.

    Example:
        >>> import torch
        >>> clip_weights(torch.tensor([1.0, 1.0]), torch.tensor([[9.0, 0.0], [0.0, 16.0]]), 1.0)
        tensor([0.2000, 0.2000], dtype=torch.float64)
    """
    if not is_number(max_norm, 0, low_included=False):
        raise ValueError(f"`max_norm` must be in (0, inf), got {max_norm}.")
    K = to_tensor(gram_array(gram))
    w = task_vector("weights", weights, len(K))
    norm = math.sqrt(max(0.0, (w @ K @ w).item()))
    return w * (max_norm / norm) if norm > max_norm else w
