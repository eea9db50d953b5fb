"""What an aggregator is shown: the task gradients of one part of a step."""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

__all__ = ["Aggregation", "Part", "SumOfLosses", "TaskGradients"]

Part = Literal["loss", "flat"]


@dataclass(frozen=True)
class TaskGradients:
    """The task Jacobian of one part, with what is known about its rows.

    Args:
        jacobian: Shape ``[m, d]``, row i the gradient of task i's unweighted loss.
        gram: Inner products of the rows, ``[m, m]``, float64 on the CPU.
        tasks: The names of the rows, in their order.
        losses: The tasks' clean losses, shape ``[m]``, float64 on the CPU; ``None`` if unknown.
        loss_weights: Weights ``[m]`` of the whole losses, float64 on the CPU; ``None`` is all ones.
        part: ``"loss"`` for the clean gradients (and the SAM gradients of the direct arm),
            ``"flat"`` for what the perturbation adds to them.
    """

    jacobian: Tensor
    gram: Tensor
    tasks: tuple[str, ...]
    losses: Tensor | None = None
    loss_weights: Tensor | None = None
    part: Part = "loss"


class Aggregation(Protocol):
    """What the engine asks of an aggregator."""

    @property
    def needs_gradients(self) -> bool:
        """Whether the task gradients matter, or the losses alone give the weights."""

    def aggregate(self, gradients: TaskGradients) -> Tensor:
        """The direction ``[d]`` of the shared parameters for ``[m, d]`` task gradients.

        The rows are gradients of the unweighted losses; the weights come beside them.
        """

    def loss_weights(self, tasks: tuple[str, ...], losses: Tensor | None) -> Tensor | None:
        """Weights ``[m]`` of the whole losses, heads included; ``None`` for all ones.

        Asked once a step, so that a random or learned weight is the same in all parts of it.
        """


class SumOfLosses:
    """The aggregation when no aggregator is given: the plain sum of the losses."""

    needs_gradients = False

    def aggregate(self, gradients: TaskGradients) -> Tensor:
        """The sum of the rows."""
        return torch.sum(gradients.jacobian, dim=0)

    def loss_weights(self, tasks: tuple[str, ...], losses: Tensor | None) -> None:
        """No weights."""
