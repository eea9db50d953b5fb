"""Weights from estimates of the excess risk."""

import math
from typing import Any, final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._base import Aggregator
from lightning_flatmtl.engine import TaskGradients
from lightning_flatmtl.engine.gradients.combination import weighted_rows
from lightning_flatmtl.functional import excess_risk, softmax_weights

__all__ = ["ExcessMTL"]


@final
class ExcessMTL(Aggregator):
    r"""Robust multi-task learning with excess risks (ExcessMTL; He et al., 2024).

    `arXiv:2402.02009 <https://arxiv.org/abs/2402.02009>`_: the excess risk of a task is estimated
    by :math:`e_i = \sum_k g_{ik}^2 / \sqrt{h_{ik}}` with the sums :math:`h_i` of squared gradients
    so far, relative to its first estimate, and the loss weights, heads included, are multiplied by
    :math:`\exp(\eta\, e_i)` and scaled to the sum m. Tasks that are far from what they could reach
    count more, noisy labels do not. The weights of a step are those learned up to the step before
    (the published code updates first). Keeps another ``[tasks, parameters]`` matrix.

    If all :math:`g_i = g` and the weights have not moved, the direction is :math:`m\,g`.

    Args:
        step_size: :math:`\eta`, in ``[0, inf)``.

    Raises:
        ValueError: If ``step_size`` is out of its bounds.

    Example:
        >>> import torch
        >>> ExcessMTL()(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        tensor([1., 2.])
    """

    def __init__(self, step_size: float = 1e-2) -> None:
        if not 0 <= step_size < math.inf:
            raise ValueError(f"`step_size` must be in [0, inf), got {step_size}.")
        self.step_size = step_size
        self._log_weights: dict[str, float] = {}
        self._first: dict[str, float] = {}
        """By task: the first estimate of its excess risk."""
        self._roots: dict[str, Tensor] = {}
        """By task: the roots of the sums of squared gradients; the sums may leave float32."""

    @override
    def loss_weights(self, tasks: tuple[str, ...], losses: Tensor | None) -> Tensor:
        return softmax_weights([self._log_weights.get(task, 0.0) for task in tasks])

    @override
    def row_weights(self, gradients: TaskGradients) -> Tensor:
        assert gradients.loss_weights is not None
        if gradients.part == "loss":
            self._learn(gradients)
        return gradients.loss_weights

    @override
    def aggregate(self, gradients: TaskGradients) -> Tensor:
        return weighted_rows(self.row_weights(gradients), gradients, self)

    def _learn(self, gradients: TaskGradients) -> None:
        pairs = zip(gradients.tasks, gradients.jacobian, strict=True)
        excess = torch.stack([self._excess(task, row) for task, row in pairs])
        for task, value in zip(gradients.tasks, excess.tolist(), strict=True):
            if not self._first.get(task):
                self._first[task] = value
            elif value > 0:
                step = self.step_size * value / self._first[task]
                self._log_weights[task] = self._log_weights.get(task, 0.0) + step

    def _excess(self, task: str, row: Tensor) -> Tensor:
        kept = self._roots.get(task)
        # Roots of another length belong to other trainable parameters: begin anew.
        same = kept is not None and kept.shape == row.shape
        risk, self._roots[task] = excess_risk(row, kept if same else None)
        return risk

    @override
    def reset(self) -> None:
        super().reset()
        self._log_weights.clear()
        self._first.clear()
        self._roots.clear()

    @override
    def get_state(self) -> dict[str, Any]:
        return {
            "log_weights": dict(self._log_weights),
            "first": dict(self._first),
            "roots": {task: kept.clone() for task, kept in self._roots.items()},
        }

    @override
    def set_state(self, state: dict[str, Any]) -> None:
        self._log_weights, self._first = dict(state["log_weights"]), dict(state["first"])
        self._roots = {task: kept.clone() for task, kept in state["roots"].items()}
