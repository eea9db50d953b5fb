"""Control of the discrepancy between the losses."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_flatmtl.functional._gram import is_number
from lightning_flatmtl.functional._vectors import Vector, task_vector

Compared = Literal["weighted", "plain"]


def ldc_mtl_weights(
    scores: Vector, losses: Vector, lam: float = 0.1, compared: Compared = "weighted"
) -> Tensor:
    r"""Weights of the losses under control of their discrepancy (LDC-MTL).

    .. math:: F = \frac{\sum_i \sigma_i L_i}{[\sum_i \sigma_i]}
        + \lambda \sum_{i=1}^{m-1} \lvert \tau_i L_i - \tau_{i+1} L_{i+1} \rvert, \qquad
        w_i = \frac{\partial F}{\partial L_i}

    with :math:`\sigma = \mathrm{sigmoid}(s)`, and :math:`\tau = \sigma` or 1. Xiao et al., 2025,
    `arXiv:2502.08585 <https://arxiv.org/abs/2502.08585>`_, in their single-loop first-order form;
    the scores descend on the same objective, see :func:`ldc_mtl_gradient`. What stands in brackets
    counts as constant. Neighbours in the order of the tasks are compared. Where two are equal, the
    absolute value has the slope 0.

    Args:
        scores: s, ``[m]``, finite.
        losses: L, ``[m]``, finite.
        lam: :math:`\lambda`, in ``[0, inf)``.
        compared: Whether the ``"weighted"`` losses are compared, or the ``"plain"`` ones.

    Returns:
        Weights ``[m]``, float64 on the CPU; with a large ``lam`` some are negative.

    Raises:
        ValueError: If an argument is not as described.

    Example:
        >>> import torch
        >>> ldc_mtl_weights(torch.zeros(2), torch.tensor([1.0, 3.0]), lam=0.5)
        tensor([0.2500, 0.7500], dtype=torch.float64)
    """
    sigma, values, tau = _parts(scores, losses, lam, compared)
    return sigma / sigma.sum() + lam * tau * _slopes(tau * values)


def ldc_mtl_gradient(
    scores: Vector, losses: Vector, lam: float = 0.1, compared: Compared = "weighted"
) -> Tensor:
    r"""Gradient of the objective of :func:`ldc_mtl_weights` by the scores.

    Args:
        scores: s, ``[m]``, finite.
        losses: L, ``[m]``, finite.
        lam: :math:`\lambda`, in ``[0, inf)``.
        compared: Whether the ``"weighted"`` losses are compared, or the ``"plain"`` ones.

    Returns:
        The gradient ``[m]``, float64 on the CPU.

    Raises:
        ValueError: If an argument is not as described.

    Example:
        >>> import torch
        >>> ldc_mtl_gradient(torch.zeros(2), torch.tensor([1.0, 3.0]), lam=0.0)
        tensor([0.2500, 0.7500], dtype=torch.float64)
    """
    sigma, values, tau = _parts(scores, losses, lam, compared)
    by_sigma = values / sigma.sum()
    if compared == "weighted":
        by_sigma = by_sigma + lam * values * _slopes(tau * values)
    return sigma * (1 - sigma) * by_sigma


def _parts(
    scores: Vector, losses: Vector, lam: float, compared: Compared
) -> tuple[Tensor, Tensor, Tensor]:
    if not is_number(lam, 0, low_included=True):
        raise ValueError(f"`lam` must be in [0, inf), got {lam}.")
    if compared not in get_args(Compared):
        raise ValueError(f"`compared` must be 'weighted' or 'plain', got {compared!r}.")
    sigma = task_vector("scores", scores).sigmoid()
    values = task_vector("losses", losses, len(sigma))
    return sigma, values, sigma if compared == "weighted" else torch.ones_like(sigma)


def _slopes(values: Tensor) -> Tensor:
    """The gradient of the sum of the distances between neighbours."""
    signs = (values[:-1] - values[1:]).sign()
    nothing = signs.new_zeros(1)
    return torch.cat([signs, nothing]) - torch.cat([nothing, signs])
