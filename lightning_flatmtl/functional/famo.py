"""Weights learned from how much each loss fell."""

from __future__ import annotations

from torch import Tensor

from lightning_flatmtl.functional._vectors import Vector, positive_losses, task_vector


def famo_weights(scores: Vector, losses: Vector) -> Tensor:
    r"""Weights of the losses of fast adaptive multitask optimization (FAMO).

    .. math:: w_i = c\, z_i / L_i, \qquad z = \mathrm{softmax}(\xi), \qquad
        c = \Bigl(\sum_j z_j / L_j\Bigr)^{-1}

    Liu et al., 2023, `arXiv:2306.03792 <https://arxiv.org/abs/2306.03792>`_.

    Args:
        scores: :math:`\xi`, ``[m]``, finite, moved by :func:`famo_gradient`.
        losses: L, ``[m]``, positive; those below 1e-300 count as that.

    Returns:
        Weights ``[m]`` of sum 1, float64 on the CPU.

    Raises:
        ValueError: If an argument is not as described.

    Example:
        >>> import torch
        >>> famo_weights(torch.zeros(2), torch.tensor([1.0, 3.0]))
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    values = positive_losses(losses)
    share = task_vector("scores", scores, len(values)).softmax(dim=0) / values
    return share / share.sum()


def famo_gradient(
    scores: Vector,
    before: Vector,
    after: Vector,
) -> Tensor:
    r"""The direction that :math:`\xi` descends along after a step of the model.

    .. math:: z_i \Bigl(\delta_i - \sum_j z_j \delta_j\Bigr), \qquad
        \delta = \log L^{\mathrm{before}} - \log L^{\mathrm{after}},

    the gradient of :math:`\sum_i z_i \delta_i`, so that a task whose loss fell less counts more.

    Args:
        scores: :math:`\xi`, ``[m]``, finite.
        before: The losses of a batch before the step, ``[m]``, positive.
        after: Those of the same batch after it, ``[m]``, positive.

    Returns:
        The gradient ``[m]``, float64 on the CPU.

    Raises:
        ValueError: If an argument is not as described.

    Example:
        >>> import torch
        >>> famo_gradient(torch.zeros(2), torch.ones(2), torch.tensor([1.0, 0.5])).sign()
        tensor([-1.,  1.], dtype=torch.float64)
    """
    z = task_vector("scores", scores).softmax(dim=0)
    old = positive_losses(before, len(z), "before")
    fall = old.log() - positive_losses(after, len(z), "after").log()
    return z * (fall - (z * fall).sum())
