"""Gradient norms that follow the training rates."""

from __future__ import annotations

from torch import Tensor

from lightning_flatmtl.functional._gram import gram_array, is_number, to_tensor
from lightning_flatmtl.functional._vectors import Vector, task_vector


def gradnorm_gradient(
    gram: Tensor,
    weights: Vector,
    progress: Vector,
    alpha: float = 1.5,
) -> Tensor:
    r"""Gradient of GradNorm's objective by the z of the weights :math:`m\,\mathrm{softmax}(z)`.

    .. math:: \sum_i \lvert n_i - \bar n\, r_i^\alpha \rvert, \qquad
        n_i = w_i \lVert g_i \rVert, \qquad r_i = q_i / \bar q, \qquad q_i = L_i / L_i(0)

    with the means :math:`\bar n, \bar q`; the targets :math:`\bar n\, r_i^\alpha` are held
    constant. Chen et al., 2018, `arXiv:1711.02257 <https://arxiv.org/abs/1711.02257>`_, who
    renormalise the weights after each step where they are a softmax here, see
    :func:`softmax_weights`.

    Args:
        gram: Gram matrix :math:`K = G G^\top` of the gradients, ``[m, m]``.
        weights: w, ``[m]``, each in ``[0, inf)``.
        progress: q, ``[m]``, positive.
        alpha: Strength of the restoring force, in ``[0, inf)``.

    Returns:
        The gradient ``[m]``, float64 on the CPU.

    Raises:
        ValueError: If an argument is not as described, or if ``gram`` is not square, not finite,
            or has a negative diagonal.

    Example:
        >>> import torch
        >>> K = torch.tensor([[1.0, 0.0], [0.0, 9.0]])
        >>> gradnorm_gradient(K, torch.ones(2), torch.ones(2))  # the second is to weigh less
        tensor([-2.,  2.], dtype=torch.float64)
    """
    if not is_number(alpha, 0, low_included=True):
        raise ValueError(f"`alpha` must be in [0, inf), got {alpha}.")
    norms = to_tensor(gram_array(gram)).diagonal().sqrt()
    m = len(norms)
    w = task_vector("weights", weights, m, "[0, inf)")
    ratios = task_vector("progress", progress, m, "(0, inf)")
    target = (w * norms).mean() * (ratios / ratios.mean()) ** alpha
    of_weights = norms * (w * norms - target).sign()
    # Through w = m softmax(z): dw_i/dz_k = w_i ([i = k] - w_k / m).
    return w * (of_weights - (w * of_weights).sum() / m)
