"""Weights of groups of tasks that learn alike."""

import math
from typing import Any, final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._base import LossWeighting
from lightning_flatmtl.aggregators._losses import positive
from lightning_flatmtl.functional import go4align_weights

__all__ = ["GO4Align"]


@final
class GO4Align(LossWeighting):
    r"""Group optimization for multi-task alignment (GO4Align; Shen et al., 2024).

    `arXiv:2404.06486 <https://arxiv.org/abs/2404.06486>`_: every task has an indicator
    :math:`\gamma_i = p_i \sum_j L_j / L_i` of the size of its loss and of its history,
    :math:`p = \mathrm{softmax}(-\eta R)` with the sums :math:`R` of its losses so far. The tasks
    are parted into groups by k-means of the indicators, anew in every step, and weigh as much as
    their group's mean, heads included. The losses must be positive.

    If all :math:`g_i = g` and all losses have been equal, the direction is :math:`m\,g`.

    Args:
        num_groups: How many groups, at least 1. One gives equal weights; as many as there are tasks
            gives each task its own.
        step_size: :math:`\eta`, in ``[0, inf)``; 0 forgets the history.

    Raises:
        ValueError: If an argument is out of its bounds, or a loss is missing or not positive.

    Example:
        >>> import torch
        >>> GO4Align(num_groups=2, step_size=0.0)(torch.eye(3), losses=[1.0, 1.0, 4.0])
        tensor([2.0000, 2.0000, 0.5000])
    """

    def __init__(self, num_groups: int = 2, step_size: float = 1e-4) -> None:
        if isinstance(num_groups, bool) or not isinstance(num_groups, int) or num_groups < 1:
            raise ValueError(f"`num_groups` must be an integer >= 1, got {num_groups!r}.")
        if not 0 <= step_size < math.inf:
            raise ValueError(f"`step_size` must be in [0, inf), got {step_size}.")
        self.num_groups = num_groups
        self.step_size = step_size
        self._risks: dict[str, float] = {}
        """By task: the sum of its losses so far."""

    @override
    def loss_weights(self, tasks: tuple[str, ...], losses: Tensor | None) -> Tensor:
        values = positive(self, tasks, losses)
        for task, loss in zip(tasks, values.tolist(), strict=True):
            self._risks[task] = self._risks.get(task, 0.0) + loss
        risks = torch.tensor([self._risks[task] for task in tasks], dtype=torch.float64)
        return go4align_weights(values, risks, self.num_groups, self.step_size)

    @override
    def reset(self) -> None:
        super().reset()
        self._risks.clear()

    @override
    def get_state(self) -> dict[str, Any]:
        return {"risks": dict(self._risks)}

    @override
    def set_state(self, state: dict[str, Any]) -> None:
        self._risks = dict(state["risks"])
