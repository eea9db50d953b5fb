"""Smooth Tchebycheff scalarization."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_flatmtl.functional._gram import is_number
from lightning_flatmtl.functional._vectors import Vector, positive_losses, task_vector


def stch_weights(
    losses: Vector,
    reference: Vector,
    mu: float = 1.0,
    preference: Vector | None = None,
) -> Tensor:
    r"""Weights of the losses in the gradient of their smooth maximum (STCH).

    .. math:: w_i = \frac{\partial}{\partial L_i}\;
        m \mu \log \sum_j \exp \frac{p_j \log(L_j / z_j)}{\mu}

    Lin et al., 2024, `arXiv:2402.19078 <https://arxiv.org/abs/2402.19078>`_, on the logarithms of
    the losses as in the published multi-task experiments.

    Args:
        losses: L, ``[m]``, positive; those below 1e-300 count as that.
        reference: z, ``[m]``, losses from the beginning of the training, positive.
        mu: Smoothness, in ``(0, inf)``; small is close to the maximum.
        preference: Exponents p, ``[m]``, each in ``[0, inf)``; all ones by default.

    Returns:
        Weights ``[m]``, float64 on the CPU.

    Raises:
        ValueError: If an argument is not as described.

    Example:
        >>> import torch
        >>> stch_weights(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]), mu=0.5)
        tensor([0.4000, 0.8000], dtype=torch.float64)
    """
    if not is_number(mu, 0, low_included=False):
        raise ValueError(f"`mu` must be in (0, inf), got {mu}.")
    values = positive_losses(losses)
    m = len(values)
    start = positive_losses(reference, m, "reference")
    powers = torch.ones(m) if preference is None else preference
    powers = task_vector("preference", powers, m, "[0, inf)")
    share = (powers * (values.log() - start.log()) / mu).softmax(dim=0)
    return m * powers * share / values
