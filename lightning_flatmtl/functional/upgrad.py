"""Unconflicting projection of gradients."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_flatmtl.functional._gram import semidefinite_unit_gram, to_tensor
from lightning_flatmtl.functional._nonnegative import solve_nonnegative_many
from lightning_flatmtl.functional._shares import shares_of


def upgrad_weights(gram: Tensor, preference: Tensor | Sequence[float] | None = None) -> Tensor:
    r"""Weights of the combined projections of all gradients on the dual cone (UPGrad).

    .. math:: d = \sum_i p_i \, \pi(g_i), \qquad
        \pi(x) = \operatorname*{arg\,min}_{d:\, G d \ge 0} \lVert d - x \rVert

    Quinton and Rey, 2024, `arXiv:2406.16232 <https://arxiv.org/abs/2406.16232>`_. Each projection
    is :math:`g_i + G^\top v` with :math:`v \ge 0`, an exact nonnegative quadratic program; all m
    are solved together. The direction harms no task.

    Zero rows constrain nothing and project to zero; exactly opposed rows leave nothing of the
    line they span.

    Args:
        gram: Gram matrix :math:`K = G G^\top` of the gradients, ``[m, m]``.
        preference: Nonnegative weights ``[m]`` of the projections; by default 1/m each, the mean.

    Returns:
        Weights ``[m]``, float64 on the CPU, nonnegative.

    Raises:
        ValueError: If ``preference`` is not as described, or if ``gram`` is not square, not
            finite, or has a negative diagonal.

    Example:
        >>> import torch
        >>> upgrad_weights(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]))
        tensor([0.7500, 0.7500], dtype=torch.float64)
    """
    unit = semidefinite_unit_gram(gram)
    shares = shares_of(preference, unit.size, otherwise=1 / unit.size)
    amounts = shares[unit.rows] * unit.norms
    v = solve_nonnegative_many(unit.cosines, -unit.cosines)
    return to_tensor(unit.weights(amounts + amounts @ v))
