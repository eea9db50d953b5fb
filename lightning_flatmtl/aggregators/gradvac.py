"""Gradient vaccine: surgery towards a moving-average cosine."""

from typing import Any, Literal, final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._base import GramAggregator
from lightning_flatmtl.aggregators._random import RandomAggregator
from lightning_flatmtl.engine import TaskGradients
from lightning_flatmtl.functional import gradvac_weights

__all__ = ["GradVac"]

Targets = dict[str, dict[str, float]]


@final
class GradVac(RandomAggregator, GramAggregator):
    r"""Gradient vaccine (Wang et al., 2021, `arXiv:2010.05874 <https://arxiv.org/abs/2010.05874>`_).

    Like :class:`PCGrad`, but every :math:`g_i` meets the others, in random order, with a target
    cosine for each pair, an exponential moving average of the cosines seen, and is moved along
    :math:`g_j` up to the target where it falls short of it. Loss part and flat part have targets of
    their own.

    If all :math:`g_i = g`, the direction is :math:`m\,g` (sum).

    Args:
        beta: Step of the moving average, in ``[0, 1]``; 0 keeps the targets at 0, which is PCGrad.
        reduction: ``"sum"`` or ``"mean"``.
        seed: Seed of the private generator of the orders, ``seed >= 0``.

    Raises:
        ValueError: If an argument is out of its bounds.

    Example:
        >>> import torch
        >>> GradVac()(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
        tensor([0.5000, 1.5000])
    """

    def __init__(
        self, beta: float = 0.01, reduction: Literal["sum", "mean"] = "sum", seed: int = 0
    ) -> None:
        super().__init__(seed)
        if not 0 <= beta <= 1:
            raise ValueError(f"`beta` must be in [0, 1], got {beta}.")
        if reduction not in {"sum", "mean"}:
            raise ValueError(f"`reduction` must be 'sum' or 'mean', got {reduction!r}.")
        self.beta = beta
        self.reduction = reduction
        self._targets: dict[str, Targets] = {}
        """By part, task and other task: the target cosine."""

    @property
    @override
    def needs_tasks(self) -> bool:
        return True

    @override
    def weights(self, gram: Tensor, gradients: TaskGradients) -> Tensor:
        m, names = len(gram), gradients.tasks
        known = self._targets.setdefault(gradients.part, {})
        targets = torch.tensor(
            [[known.get(i, {}).get(j, 0.0) for j in names] for i in names], dtype=torch.float64
        )
        order = torch.rand(m, m, generator=self._generator).argsort(dim=1)
        result = gradvac_weights(gram, order, targets, reduction=self.reduction)
        moved = torch.lerp(targets, result.cosines, self.beta).tolist()
        for i, row in zip(names, moved, strict=True):
            known.setdefault(i, {}).update(
                {j: v for j, v in zip(names, row, strict=True) if j != i}
            )
        return result.weights

    @override
    def reset(self) -> None:
        super().reset()
        self._targets.clear()

    @override
    def get_state(self) -> dict[str, Any]:
        targets = {p: {i: dict(r) for i, r in t.items()} for p, t in self._targets.items()}
        return {**super().get_state(), "targets": targets}

    @override
    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        self._targets = {p: {i: dict(r) for i, r in t.items()} for p, t in state["targets"].items()}
