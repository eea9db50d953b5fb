"""Impartial multi-task learning: weights of gradients, scales of losses."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from lightning_flatmtl.functional._gram import (
    EPS,
    Array,
    Mask,
    rounding,
    semidefinite_part,
    to_tensor,
    unit_gram,
)
from lightning_flatmtl.functional._vectors import Vector, task_vector


def imtl_g_weights(gram: Tensor) -> Tensor:
    r"""Weights of the direction with equal projections on all gradients (IMTL-G).

    With the unit gradients :math:`u_i = g_i / \lVert g_i \rVert`:

    .. math:: d = w^\top G, \qquad u_i^\top d = u_j^\top d \;\; \forall i, j,
        \qquad \mathbf 1^\top w = 1

    Liu et al., 2021, `OpenReview IMPnRXEWpvr <https://openreview.net/forum?id=IMPnRXEWpvr>`_. In
    the variables :math:`y_i = w_i \lVert g_i \rVert` and the cosines :math:`C` this is
    :math:`C y = \kappa \mathbf 1`, scaled so that :math:`\sum_i y_i / \lVert g_i \rVert = 1`.

    Degenerate inputs:

    - Zero rows are left out (weight 0). If all rows are zero, the weights are 1/m.
    - Linearly dependent rows: :math:`y` is the limit of
      :math:`(C + \varepsilon I)^{-1} \mathbf 1` for :math:`\varepsilon \to 0` before it is
      scaled. It treats parallel rows alike, and an exactly opposed pair gets the zero direction,
      as the closed formula does by continuity.
    - If the weights with equal projections sum to zero they cannot be scaled to sum 1, and all
      weights are 0.

    Args:
        gram: Gram matrix :math:`K = G G^\top` of the gradients, ``[m, m]``.

    Returns:
        Weights ``[m]``, float64 on the CPU; they may be negative.

    Raises:
        ValueError: If ``gram`` is not square, not finite, or has a negative diagonal.

    Example:
        >>> import torch
        >>> imtl_g_weights(torch.tensor([[1.0, 0.0], [0.0, 9.0]]))
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    unit = unit_gram(gram)
    if len(unit.rows) == 0:
        return to_tensor(np.full(unit.size, 1.0 / unit.size))
    y = equal_projections(unit.cosines)
    shares = unit.norms.min() / unit.norms
    total = float(shares @ y)
    if abs(total) <= rounding(len(y)) * float(shares @ np.abs(y)):
        return to_tensor(np.zeros(unit.size))
    return to_tensor(unit.weights(y * (unit.norms.min() / total)))


def equal_projections(cosines: Array) -> Array:
    """A positive multiple of the limit of ``(cosines + eps I)^-1 1`` for eps to 0."""
    y = solve_ones(cosines)
    if y is not None:
        return y
    values, vectors, kernel = eigenpairs(cosines)
    parts = vectors.sum(axis=0)
    # The kernel's share grows without bound as eps vanishes, so if there is one it is the limit.
    # Eigenvectors of clustered eigenvalues keep only half the digits, hence the square root.
    if np.linalg.norm(parts[kernel]) > EPS**0.5 * len(parts) ** 0.5:
        limit: Array = vectors[:, kernel] @ parts[kernel]
    else:
        limit = vectors[:, ~kernel] @ (parts[~kernel] / values[~kernel])
    return limit


def solve_ones(cosines: Array) -> Array | None:
    """The solution of ``cosines y = 1``; None if the rows may depend on each other."""
    try:
        inverse = np.linalg.inv(cosines)
    except np.linalg.LinAlgError:
        return None
    # Pivots do not tell: that of a dependent row is the rounding error times the growth of all
    # steps before it. The norm of the inverse does, whatever the order of the rows.
    if not np.abs(inverse).sum(axis=1).max() * EPS**0.5 < 1:
        return None
    y: Array = np.linalg.solve(cosines, np.ones(len(cosines))).astype(np.float64, copy=False)
    return y


def eigenpairs(cosines: Array) -> tuple[Array, Array, Mask]:
    """Eigenvalues, eigenvectors, and which eigenvalues are zero to rounding."""
    # Rounding may have made a singular matrix indefinite.
    values, vectors = np.linalg.eigh(semidefinite_part(cosines))
    return values, vectors, values <= rounding(len(values)) * values[-1]


def imtl_l_weights(log_scales: Vector) -> Tensor:
    r"""Weights of the losses that make the scaled losses equal (IMTL-L).

    .. math:: \min_{\theta, s} \sum_i e^{s_i} L_i(\theta) - s_i, \qquad w_i = e^{s_i}

    Liu et al., 2021, `OpenReview IMPnRXEWpvr <https://openreview.net/forum?id=IMPnRXEWpvr>`_. The
    s descend on the same objective, see :func:`imtl_l_gradient`, and :math:`e^{s_i} L_i = 1` where
    they come to rest.

    Args:
        log_scales: s, ``[m]``, finite.

    Returns:
        Weights ``[m]``, float64 on the CPU.

    Raises:
        ValueError: If ``log_scales`` is not as described.

    Example:
        >>> import torch
        >>> imtl_l_weights(torch.tensor([0.0, 3.0]).log1p())
        tensor([1.0000, 4.0000], dtype=torch.float64)
    """
    return task_vector("log_scales", log_scales).exp()


def imtl_l_gradient(log_scales: Vector, losses: Vector) -> Tensor:
    r"""Gradient of the objective of :func:`imtl_l_weights` by s, :math:`e^{s_i} L_i - 1`.

    Args:
        log_scales: s, ``[m]``, finite.
        losses: L, ``[m]``, finite.

    Returns:
        The gradient ``[m]``, float64 on the CPU.

    Raises:
        ValueError: If an argument is not as described.

    Example:
        >>> import torch
        >>> imtl_l_gradient(torch.zeros(2), torch.tensor([1.0, 4.0]))
        tensor([0., 3.], dtype=torch.float64)
    """
    weights = imtl_l_weights(log_scales)
    return weights * task_vector("losses", losses, len(weights)) - 1.0
