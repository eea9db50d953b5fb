"""Weights on the simplex that a method moves step by step, and the rows that it needs for it."""

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._base import Aggregator
from lightning_flatmtl.aggregators._rows import KeptRows
from lightning_flatmtl.engine import TaskGradients
from lightning_flatmtl.engine.aggregation import Requires
from lightning_flatmtl.engine.gradients.combination import weighted_rows

__all__ = ["SimplexWeights"]


class SimplexWeights(Aggregator):
    """A method with weights on the simplex that move a little every step, equal at first.

    Kept for every task is its weight relative to equal ones, so that those of the tasks of a batch
    that lacks others still sum to 1; a task that comes later begins with what equal ones are.

    Args:
        gamma: Step size of the weights, in ``(0, inf)``.

    Raises:
        ValueError: If ``gamma`` is out of its bounds.
    """

    def __init__(self, gamma: float) -> None:
        if not 0 < gamma < math.inf:
            raise ValueError(f"`gamma` must be in (0, inf), got {gamma}.")
        self.gamma = gamma
        self._rows = KeptRows()
        self._weights: dict[str, dict[str, float]] = {}
        """By part and task."""

    @property
    @override
    def requires(self) -> Requires:
        return "matrix"  # whole rows are kept

    @abstractmethod
    def rows_and_weights(self, gradients: TaskGradients) -> tuple[TaskGradients, Tensor]:
        """What is combined in this step, and with which weights; moves what is learned."""

    @override
    def aggregate(self, gradients: TaskGradients) -> Tensor:
        shown, weights = self.rows_and_weights(gradients)
        return weighted_rows(weights, shown, self).to(gradients.jacobian.dtype)

    def _present(self, part: str, tasks: tuple[str, ...]) -> Tensor:
        """The weights ``[m]`` of the tasks of a batch, of sum 1."""
        kept = self._weights.get(part, {})
        weights = torch.tensor([kept.get(task, 1.0) for task in tasks], dtype=torch.float64)
        total = weights.sum()
        return weights / total if total > 0 else torch.full_like(weights, 1 / len(tasks))

    def _keep(self, part: str, tasks: tuple[str, ...], weights: Tensor) -> None:
        """Keep the weights of the tasks of a batch; those of the others stay what they are."""
        kept = self._weights.setdefault(part, {})
        total = sum(kept.get(task, 1.0) for task in tasks) or float(len(tasks))
        for task, weight in zip(tasks, (weights * total).tolist(), strict=True):
            kept[task] = weight

    @override
    def reset(self) -> None:
        super().reset()
        self._rows.clear()
        self._weights.clear()

    @override
    def get_state(self) -> dict[str, Any]:
        if not self._weights:
            return {}
        weights = {part: dict(kept) for part, kept in self._weights.items()}
        return {"weights": weights, "rows": self._rows.state_dict()}

    @override
    def set_state(self, state: dict[str, Any]) -> None:
        self._weights = {part: dict(kept) for part, kept in state.get("weights", {}).items()}
        self._rows.load_state_dict(state.get("rows", {}))
