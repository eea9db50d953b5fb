"""Weights that make the gradient norms follow the training rates."""

import math
from typing import Any, final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._learned import LearnedWeights
from lightning_flatmtl.aggregators._losses import positive
from lightning_flatmtl.engine import TaskGradients
from lightning_flatmtl.engine.aggregation import Requires
from lightning_flatmtl.engine.gradients.combination import weighted_rows
from lightning_flatmtl.functional import gradnorm_gradient, softmax_weights

__all__ = ["GradNorm"]


@final
class GradNorm(LearnedWeights):
    r"""GradNorm (Chen et al., 2018, `arXiv:1711.02257 <https://arxiv.org/abs/1711.02257>`_).

    Loss weights :math:`w`, heads included, learned so that the norms :math:`n_i = w_i \lVert g_i
    \rVert` of the shared gradients approach :math:`\bar n\, r_i^\alpha`, where :math:`\bar n` is
    their mean and :math:`r_i` the task's inverse training rate, :math:`L_i / L_i(0)` over its mean:
    :math:`w` descends on :math:`\sum_i \lvert n_i - \bar n\, r_i^\alpha \rvert`, the targets held
    constant. Where the paper renormalises weights after each step, they are
    :math:`w = m\,\mathrm{softmax}(z)` here, which keeps them positive; :math:`z` has an Adam of its
    own. Norms are those of all shared parameters, the paper's those of the last shared layer.

    If all :math:`g_i = g` and the weights have not moved, the direction is :math:`m\,g`.

    Args:
        alpha: Strength of the restoring force, in ``[0, inf)``.
        lr: Learning rate of :math:`z`, in ``(0, inf)``.

    Raises:
        ValueError: If an argument is out of its bounds, or the losses are missing or not positive.

    Example:
        >>> import torch
        >>> GradNorm()(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), losses=[0.5, 4.0])
        tensor([1., 2.])
    """

    def __init__(self, alpha: float = 1.5, lr: float = 1e-3) -> None:
        if not 0 <= alpha < math.inf:
            raise ValueError(f"`alpha` must be in [0, inf), got {alpha}.")
        super().__init__(lr)
        self.alpha = alpha
        self._first: dict[str, float] = {}
        """By task: its first loss."""

    @override
    def loss_weights(self, tasks: tuple[str, ...], losses: Tensor | None) -> Tensor:
        for task, loss in zip(tasks, positive(self, tasks, losses).tolist(), strict=True):
            self._first.setdefault(task, loss)
        return softmax_weights(self._scalars.values(tasks))

    @override
    def row_weights(self, gradients: TaskGradients) -> Tensor:
        weights = gradients.loss_weights
        assert weights is not None
        if gradients.part == "loss":
            assert gradients.losses is not None
            first = torch.tensor([self._first[t] for t in gradients.tasks], dtype=torch.float64)
            progress = gradients.losses / first
            gradient = gradnorm_gradient(gradients.gram, weights, progress, self.alpha)
            self._scalars.accumulate(gradients.tasks, gradient)
        return weights

    @property
    @override
    def requires(self) -> Requires:
        return "gram"

    @override
    def aggregate(self, gradients: TaskGradients) -> Tensor:
        return weighted_rows(self.row_weights(gradients), gradients, self)

    @override
    def reset(self) -> None:
        super().reset()
        self._first.clear()

    @override
    def get_state(self) -> dict[str, Any]:
        return {**super().get_state(), "first": dict(self._first)}

    @override
    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        self._first = dict(state["first"])
