"""Learned task uncertainties."""

from __future__ import annotations

from torch import Tensor

from lightning_flatmtl.functional._vectors import Vector, task_vector


def uncertainty_weights(log_variances: Vector, half: bool = False) -> Tensor:
    r"""Weights of the losses under learned uncertainties (UW).

    .. math:: \min_{\theta, s} \sum_i e^{-s_i} L_i(\theta) + s_i, \qquad w_i = e^{-s_i}

    Kendall et al., 2018, `arXiv:1705.07115 <https://arxiv.org/abs/1705.07115>`_. The s descend on
    the same objective, see :func:`uncertainty_gradient`.

    Args:
        log_variances: s, ``[m]``, finite.
        half: Divide the objective by two, as the derivation for regression does.

    Returns:
        Weights ``[m]``, float64 on the CPU.

    Raises:
        ValueError: If ``log_variances`` is not as described.

    Example:
        >>> import torch
        >>> uncertainty_weights(torch.tensor([0.0, 3.0]).log1p())
        tensor([1.0000, 0.2500], dtype=torch.float64)
    """
    return _factor(half) * (-task_vector("log_variances", log_variances)).exp()


def uncertainty_gradient(log_variances: Vector, losses: Vector, half: bool = False) -> Tensor:
    r"""Gradient of the objective of :func:`uncertainty_weights` by s, :math:`1 - e^{-s_i} L_i`.

    Args:
        log_variances: s, ``[m]``, finite.
        losses: L, ``[m]``, finite.
        half: Divide the objective by two.

    Returns:
        The gradient ``[m]``, float64 on the CPU.

    Raises:
        ValueError: If an argument is not as described.

    Example:
        >>> import torch
        >>> uncertainty_gradient(torch.zeros(2), torch.tensor([1.0, 4.0]))
        tensor([ 0., -3.], dtype=torch.float64)
    """
    weights = uncertainty_weights(log_variances, half)
    return _factor(half) - weights * task_vector("losses", losses, len(weights))


def _factor(half: bool) -> float:
    return 0.5 if half else 1.0
