"""Positive weights with the mean 1."""

from __future__ import annotations

from torch import Tensor

from lightning_flatmtl.functional._vectors import Vector, task_vector


def softmax_weights(scores: Vector) -> Tensor:
    r"""Weights of the losses, :math:`w = m\,\mathrm{softmax}(z)`.

    With normal random numbers z this is random loss weighting (Lin et al., 2022,
    `arXiv:2111.10603 <https://arxiv.org/abs/2111.10603>`_). GradNorm learns its z by
    :func:`gradnorm_gradient`; the z of ExcessMTL are sums of :func:`excess_risk`, each over the
    first of its task.

    Args:
        scores: z, ``[m]``, finite.

    Returns:
        Weights ``[m]`` of sum m, float64 on the CPU.

    Raises:
        ValueError: If ``scores`` is not as described.

    Example:
        >>> import torch
        >>> softmax_weights(torch.tensor([0.0, 3.0]).log1p())
        tensor([0.4000, 1.6000], dtype=torch.float64)
    """
    z = task_vector("scores", scores)
    return len(z) * z.softmax(dim=0)
