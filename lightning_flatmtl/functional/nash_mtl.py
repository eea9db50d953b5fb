"""The Nash bargaining solution of multi-task learning."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from lightning_flatmtl.functional._barrier import solve_barrier
from lightning_flatmtl.functional._gram import semidefinite_unit_gram, to_tensor
from lightning_flatmtl.functional._shares import shares_of


def nash_weights(gram: Tensor, preference: Tensor | Sequence[float] | None = None) -> Tensor:
    r"""Weights of the Nash bargaining solution (Nash-MTL).

    .. math:: K \alpha = 1 / \alpha, \qquad \alpha > 0

    Navon et al., 2022, `arXiv:2202.01017 <https://arxiv.org/abs/2202.01017>`_, who approximate
    the solution by a sequence of convex programs; here it is exact, the minimiser of
    :math:`\tfrac12 \alpha^\top K \alpha - \sum_i \log \alpha_i` by Newton's method. The direction
    has norm :math:`\sqrt m` whatever the scales of the gradients; the published clip of its norm
    is left to the caller.

    Degenerate inputs:

    - Zero rows are left out of the bargain (weight 0).
    - Zero in the convex hull of the other gradients (exactly opposed rows, say), to within
      rounding: no direction improves all tasks, the equation has no finite solution, and the
      outcome of the bargain is its disagreement point, no update. All weights are 0.

    Args:
        gram: Gram matrix :math:`K = G G^\top` of the gradients, ``[m, m]``.
        preference: Bargaining powers :math:`p` ``[m]``, positive: the equation becomes
            :math:`K \alpha = p / \alpha`. All ones by default.

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
    unit = semidefinite_unit_gram(gram)
    powers = shares_of(preference, unit.size, otherwise=1.0, positive=True)
    if len(unit.rows) == 0:
        return to_tensor(np.zeros(unit.size))
    solution = solve_barrier(unit.cosines, np.log(powers[unit.rows]), 1.0)
    return to_tensor(np.zeros(unit.size) if solution is None else unit.weights(solution))
