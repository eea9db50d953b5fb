"""Alpha-fair multi-task learning."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from lightning_flatmtl.functional._barrier import solve_barrier
from lightning_flatmtl.functional._gram import is_number, semidefinite_unit_gram, to_tensor
from lightning_flatmtl.functional._scale import without_scale


def fairgrad_weights(gram: Tensor, alpha: float = 2.0, normalize: bool = False) -> Tensor:
    r"""Weights of the alpha-fair direction (FairGrad).

    .. math:: K w = w^{-1/\alpha}, \qquad w > 0

    Ban and Ji, 2024, `arXiv:2402.15638 <https://arxiv.org/abs/2402.15638>`_, who minimise the
    squared residual by a general solver; here it is exact, the minimiser of a convex potential by
    Newton's method. ``alpha=1`` is Nash-MTL; the larger ``alpha``, the more the task that
    improves least counts.

    Degenerate inputs:

    - Zero rows are left out (weight 0).
    - Zero in the convex hull of the other gradients (exactly opposed rows, say), to within
      rounding: no direction improves all tasks, the equation has no finite solution, and all
      weights are 0.

    Args:
        gram: Gram matrix :math:`K = G G^\top` of the gradients, ``[m, m]``.
        alpha: Degree of fairness, in ``(0, inf)``.
        normalize: Solve for :math:`K / \lVert K \rVert_F`, so that the direction scales with the
            gradients.

    Returns:
        Weights ``[m]``, float64 on the CPU.

    Raises:
        ValueError: If ``alpha`` is out of bounds, or if ``gram`` is not square, not finite, or
            has a negative diagonal.

    Example:
        >>> import torch
        >>> fairgrad_weights(torch.tensor([[8.0, 0.0], [0.0, 1.0]]))
        tensor([0.2500, 1.0000], dtype=torch.float64)
    """
    if not is_number(alpha, 0, low_included=False):
        raise ValueError(f"`alpha` must be in (0, inf), got {alpha}.")
    unit = semidefinite_unit_gram(without_scale(gram) if normalize else gram)
    if len(unit.rows) == 0:
        return to_tensor(np.zeros(unit.size))
    # With w = z / norms the equation becomes C z = norms^(p - 1) z^-p. A common scale of the
    # norms scales z by its power (p - 1) / (p + 1), and is taken out.
    p, scale = 1 / alpha, float(np.median(unit.norms))
    solution = solve_barrier(unit.cosines, (p - 1) * np.log(unit.norms / scale), p)
    if solution is None:
        return to_tensor(np.zeros(unit.size))
    return to_tensor(unit.weights(solution * scale ** ((p - 1) / (p + 1))))
