"""Weights on the simplex that descend on the length of the direction, a step at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_flatmtl.functional._gram import gram_array, is_number, to_tensor
from lightning_flatmtl.functional._vectors import Vector, task_vector
from lightning_flatmtl.functional.simplex import project_on_simplex

__all__ = ["moco_weights", "modo_weights"]

_GREATEST = 1e300
"""Products are kept finite; so far out all weight goes to one task anyway."""


def moco_weights(weights: Vector, gram: Tensor, gamma: float = 0.1, rho: float = 0.0) -> Tensor:
    r"""Weights of multi-objective gradient correction (MoCo), one step on.

    .. math:: w^+ = \Pi_\Delta \bigl(w - \gamma (K w + \rho\, w)\bigr),

    a projected step down :math:`\tfrac12 \lVert \sum_i w_i y_i \rVert^2 + \tfrac\rho2 \lVert w
    \rVert^2` on the simplex. Fernando et al., 2023,
    `arXiv:2210.12624 <https://arxiv.org/abs/2210.12624>`_.

    Args:
        weights: w, ``[m]``, each in ``[0, inf)``.
        gram: Gram matrix :math:`K` of the tracked gradients :math:`y_i`, ``[m, m]``.
        gamma: Step size, in ``(0, inf)``.
        rho: Strength of the regularisation, in ``[0, inf)``.

    Returns:
        Weights ``[m]`` of sum 1, float64 on the CPU.

    Raises:
        ValueError: If an argument is not as described, or ``gram`` is not square, not finite, or
            has a negative diagonal.

    Example:
        >>> import torch
        >>> moco_weights([0.5, 0.5], torch.tensor([[1.0, 0.0], [0.0, 3.0]]), gamma=0.1)
        tensor([0.5500, 0.4500], dtype=torch.float64)
    """
    if not is_number(rho, 0, low_included=True):
        raise ValueError(f"`rho` must be in [0, inf), got {rho}.")
    products = to_tensor(gram_array(gram))
    return modo_weights(weights, products + rho * torch.eye(len(products)).double(), gamma)


def modo_weights(weights: Vector, products: Tensor, gamma: float = 0.1) -> Tensor:
    r"""Weights of multi-objective descent with double sampling (MoDo), one step on.

    .. math:: w^+ = \Pi_\Delta \bigl(w - \gamma\, G' G^\top w\bigr)

    with the task gradients of two batches: their product is an unbiased estimate of the Gram
    matrix, which that of one batch is not. Chen et al., 2023,
    `arXiv:2305.20057 <https://arxiv.org/abs/2305.20057>`_.

    Args:
        weights: w, ``[m]``, each in ``[0, inf)``.
        products: :math:`G' G^\top`, ``[m, m]``, finite.
        gamma: Step size, in ``(0, inf)``.

    Returns:
        Weights ``[m]`` of sum 1, float64 on the CPU.

    Raises:
        ValueError: If an argument is not as described.

    Example:
        >>> import torch
        >>> modo_weights([0.5, 0.5], torch.tensor([[1.0, 0.0], [-1.0, 3.0]]), gamma=0.1)
        tensor([0.5250, 0.4750], dtype=torch.float64)
    """
    if not is_number(gamma, 0, low_included=False):
        raise ValueError(f"`gamma` must be in (0, inf), got {gamma}.")
    w = task_vector("weights", weights, None, "[0, inf)")
    found = products.detach().to("cpu", torch.float64)
    if found.shape != (len(w), len(w)) or not found.isfinite().all():
        raise ValueError(
            f"`products` must be finite of shape [{len(w)}, {len(w)}], got {list(found.shape)}"
            f"{'' if found.isfinite().all() else ' with NaN or infinity'}."
        )
    slope = (found.clamp(-_GREATEST, _GREATEST) @ w).clamp(-_GREATEST, _GREATEST)
    return project_on_simplex(w - (gamma * slope).clamp(-_GREATEST, _GREATEST))
