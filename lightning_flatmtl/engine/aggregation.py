"""What an aggregator is shown: the task gradients of one part of a step."""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

__all__ = ["Aggregation", "Part", "Requires", "SumOfLosses", "TaskGradients"]

Part = Literal["loss", "flat"]
Requires = Literal["gram", "columns", "matrix"]


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
        columns: Which columns of the whole matrix ``jacobian`` holds, for a method that works
            column by column; ``None`` for all of them.
        width: The number of columns of the whole matrix, if ``columns`` is given.
        parameters: Name and size of every parameter whose columns these are, in their order; given
            to a method that requires the whole ``"matrix"``, ``None`` if the columns are of
            something else.
    """

    jacobian: Tensor
    gram: Tensor
    tasks: tuple[str, ...]
    losses: Tensor | None = None
    loss_weights: Tensor | None = None
    part: Part = "loss"
    columns: slice | None = None
    width: int = 0
    parameters: tuple[tuple[str, int], ...] | None = None


class Aggregation(Protocol):
    """What the engine asks of an aggregator."""

    @property
    def requires(self) -> Requires:
        """What of the Jacobian it looks at; decides what several processes send each other.

        ``"gram"``: its Gram matrix only, ``jacobian`` may be any part of the columns.
        ``"columns"``: every column by itself, ``jacobian`` may hold ``columns`` only.
        ``"matrix"``: all of it.
        """

    @property
    def needs_gradients(self) -> bool:
        """Whether the task gradients matter, or the losses alone give the weights."""

    @property
    def needs_tasks(self) -> bool:
        """Whether the rows must be tasks', of which it knows more than their gradients.

        If not, their Gram matrix alone decides, and the rows may be directions, too. Asked only
        where directions are aggregated.
        """

    def row_weights(self, gradients: TaskGradients) -> Tensor | None:
        """Weights ``[m]`` of the rows, if the direction is a weighted sum of them, else ``None``.

        The rows are gradients of the unweighted losses; the weights of the losses come beside them
        and are contained in the answer.
        """

    def aggregate(self, gradients: TaskGradients) -> Tensor:
        """The direction ``[d]``; asked where there are no :meth:`row_weights`."""

    def loss_weights(self, tasks: tuple[str, ...], losses: Tensor | None) -> Tensor | None:
        """Weights ``[m]`` of the whole losses, heads included; ``None`` for all ones.

        Asked once a step, so that a random or learned weight is the same in all parts of it.
        """


class SumOfLosses:
    """The aggregation when no aggregator is given: the plain sum of the losses."""

    needs_gradients = False
    needs_tasks = False
    requires: Requires = "gram"

    def row_weights(self, gradients: TaskGradients) -> Tensor:
        """All ones."""
        return torch.ones(len(gradients.tasks), dtype=torch.float64)

    def aggregate(self, gradients: TaskGradients) -> Tensor:
        """The sum of the rows."""
        return gradients.jacobian.sum(dim=0)

    def loss_weights(self, tasks: tuple[str, ...], losses: Tensor | None) -> None:
        """No weights."""
