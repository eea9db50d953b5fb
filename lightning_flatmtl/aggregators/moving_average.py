"""The moving average of any method's weights."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._base import Aggregator
from lightning_flatmtl.aggregators._wrapping import Wrapping, checked_aggregator
from lightning_flatmtl.engine import TaskGradients
from lightning_flatmtl.engine.gradients.combination import weighted_rows

__all__ = ["MovingAverage"]


@final
class MovingAverage(Wrapping):
    r"""The moving average of another method's weights (CR-MOGM; Zhou et al., 2022).

    Paper: `On the Convergence of Stochastic Multi-Objective Gradient Manipulation and Beyond
    <https://papers.neurips.cc/paper_files/paper/2022/hash/f91bd64a3620aad8e70a27ad9cb3ca57-Abstract-Conference.html>`_.

    Where a method combines the task gradients with weights :math:`\hat w_t`, the direction is
    :math:`d_t = \sum_i w_{t,i}\, g_i` with :math:`w_t = \beta\, w_{t-1} + (1 - \beta)\, \hat w_t`.
    Weights found on one mini-batch are correlated with its gradients, which biases the direction;
    the average is less so. The first weights of a task are taken as they come. Weights of whole
    losses, which the heads follow, are averaged likewise.

    With :class:`~lightning_flatmtl.TaskSAM` loss part and flat part have an average each.

    Args:
        aggregator: A method whose direction is a weighted sum of the task gradients: not
            :class:`GradDrop`, for example.
        beta: Share of the old average, in ``[0, 1)``; 0 is the method itself.

    Raises:
        TypeError: If ``aggregator`` is none.
        ValueError: If ``beta`` is out of its bounds, or the method's direction is no weighted sum
            of the task gradients.

    Example:
        >>> import torch
        >>> method = MovingAverage(MGDA(), beta=0.5)
        >>> method(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))  # weights 1/2, 1/2
        tensor([0.5000, 0.5000])
        >>> method(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))  # MGDA: 9/10, 1/10
        tensor([0.7000, 0.9000])
    """

    def __init__(self, aggregator: Aggregator, beta: float = 0.9) -> None:
        if not 0 <= beta < 1:
            raise ValueError(f"`beta` must be in [0, 1), got {beta}.")
        self.aggregator = checked_aggregator("aggregator", aggregator)
        if type(aggregator).row_weights is Aggregator.row_weights:
            raise self._no_weights()
        self.beta = beta
        self._averages: dict[str, dict[str, float]] = {}
        """By what they weigh (losses, loss part, flat part) and task."""
        self._own: Tensor | None = None
        """Of the present step: the weights of the losses that are not averaged yet."""

    @property
    @override
    def parts(self) -> Mapping[str, Aggregator]:
        return {"aggregator": self.aggregator}

    @property
    @override
    def needs_gradients(self) -> bool:
        return self.aggregator.needs_gradients

    @property
    @override
    def weighs_losses(self) -> bool:
        return self.aggregator.weighs_losses

    @override
    def loss_weights(self, tasks: tuple[str, ...], losses: Tensor | None) -> Tensor | None:
        self._own = self.aggregator.loss_weights(tasks, losses)
        return None if self._own is None else self._moved("losses", tasks, self._own)

    @override
    def row_weights(self, gradients: TaskGradients) -> Tensor:
        if not self.needs_gradients:  # then the weights of the losses are those of the rows
            weights = gradients.loss_weights
            ones = torch.ones(len(gradients.tasks), dtype=torch.float64)
            return ones if weights is None else weights
        found = self.aggregator.row_weights(replace(gradients, loss_weights=self._own))
        if found is None:
            raise self._no_weights()
        return self._moved(gradients.part, gradients.tasks, found)

    @override
    def aggregate(self, gradients: TaskGradients) -> Tensor:
        return weighted_rows(self.row_weights(gradients), gradients, self)

    def _moved(self, what: str, tasks: tuple[str, ...], weights: Tensor) -> Tensor:
        kept = self._averages.setdefault(what, {})
        for task, new in zip(tasks, weights.tolist(), strict=True):
            kept[task] = self.beta * kept[task] + (1 - self.beta) * new if task in kept else new
        return torch.tensor([kept[task] for task in tasks], dtype=torch.float64)

    def _no_weights(self) -> ValueError:
        return ValueError(
            "`aggregator` must be a method whose direction is a weighted sum of the task "
            f"gradients, got {self.aggregator!r}, whose is not. Use another method."
        )

    @override
    def reset(self) -> None:
        super().reset()
        self._averages.clear()
        self._own = None

    @override
    def get_state(self) -> dict[str, Any]:
        if not self._averages:
            return super().get_state()
        averages = {what: dict(kept) for what, kept in self._averages.items()}
        return {"averages": averages, **super().get_state()}

    @override
    def set_state(self, state: dict[str, Any]) -> None:
        self._averages = {what: dict(kept) for what, kept in state.get("averages", {}).items()}
        if "parts" in state:
            super().set_state(state)
