"""Arms that aggregate directions once more, both parts of every task in one problem."""

import torch
from torch import Tensor

from lightning_flatmtl.engine.aggregation import Aggregation, Requires, TaskGradients
from lightning_flatmtl.engine.gradients.combination import refuse_infinite_direction
from lightning_flatmtl.engine.gradients.jacobian import Gradients
from lightning_flatmtl.engine.sharpness import Arm, Sharpness

__all__ = ["Nested", "refuse_unfit_to_nest"]


class Nested:
    r"""An aggregation :math:`A` of directions that :math:`A` itself has found.

    With the matrix :math:`H = [g_1; \dots; g_m; f_1; \dots; f_m]` of loss and flat parts, each
    inner direction is a weighted sum of its rows, :math:`p_k^\top H`:

    - ``"second"``: two of them, :math:`A(g_1, \dots, g_m)` and :math:`A(f_1, \dots, f_m)`;
    - ``"each"``: one for every task, :math:`A(g_i, f_i)`.

    With :math:`P = [p_1; \dots]` the outer problem has the Gram matrix :math:`P H H^\top P^\top`,
    and with its weights w the direction is :math:`w^\top P H`. So all of it happens on inner
    products, no row is built or sent for it. As an aggregation of the loss part, and then of the
    flat part, this answers with the halves of :math:`w^\top P`.

    Args:
        aggregation: :math:`A`, which needs no tasks.
        arm: ``"second"`` or ``"each"``.
        cross: Inner products of the loss parts (down) and the flat parts (across), ``[m, m]``.
        parts: Loss part and flat part.
    """

    needs_gradients = True
    needs_tasks = True
    requires: Requires = "gram"

    def __init__(
        self,
        aggregation: Aggregation,
        arm: Arm,
        cross: Tensor,
        parts: list[tuple[TaskGradients, Gradients]],
    ) -> None:
        self._inner = aggregation
        self._find = {"second": self._of_parts, "each": self._of_tasks}[arm]
        (self._loss, _), (self._flat, _) = parts
        self._gram = torch.cat(
            [torch.cat([self._loss.gram, cross], 1), torch.cat([cross.T, self._flat.gram], 1)]
        )
        self._found: dict[str, Tensor] = {}

    def row_weights(self, gradients: TaskGradients) -> Tensor:
        """Its half of the weights of all rows."""
        if not self._found:
            directions, names = self._find()
            weights = self._weights(directions, names) @ directions
            self._found = dict(zip(("loss", "flat"), weights.chunk(2), strict=True))
        return self._found[gradients.part]

    def aggregate(self, gradients: TaskGradients) -> Tensor:
        """The weighted sum of the rows."""
        jacobian = gradients.jacobian
        return self.row_weights(gradients).to(jacobian) @ jacobian

    def loss_weights(self, tasks: tuple[str, ...], losses: Tensor | None) -> None:
        """No weights: an aggregation with weights of the losses needs tasks."""

    def __repr__(self) -> str:
        return repr(self._inner)

    def _of_parts(self) -> tuple[Tensor, tuple[str, ...]]:
        loss, flat = self._asked(self._loss), self._asked(self._flat)
        nothing = torch.zeros_like(loss)
        directions = [torch.cat([loss, nothing]), torch.cat([nothing, flat])]
        return torch.stack(directions), ("loss part", "flat part")

    def _of_tasks(self) -> tuple[Tensor, tuple[str, ...]]:
        tasks = self._loss.tasks
        single = torch.eye(len(self._gram), dtype=self._gram.dtype)
        directions = []
        for i, task in enumerate(tasks):
            pair = single[[i, len(tasks) + i]]
            names = f"{task}, loss part", f"{task}, flat part"
            directions.append(self._weights(pair, names) @ pair)
        return torch.stack(directions), tasks

    def _weights(self, directions: Tensor, names: tuple[str, ...]) -> Tensor:
        """Weights of directions that are given by their weights of all rows."""
        gram = directions @ self._gram @ directions.T
        gram = (gram + gram.T) / 2
        gram.diagonal().clamp_(min=0.0)  # a direction of nearly nothing is the rest of a difference
        refuse_infinite_direction(bool(gram.isfinite().all()), self._loss, self._inner)
        return self._asked(TaskGradients(gram.new_empty(len(gram), 0), gram, names))

    def _asked(self, shown: TaskGradients) -> Tensor:
        weights = self._inner.row_weights(shown)
        assert weights is not None  # it looks at the Gram matrix only
        return weights


def refuse_unfit_to_nest(aggregation: Aggregation | None, sharpness: Sharpness | None) -> None:
    """Refuse an aggregation of tasks only where it is to aggregate directions.

    Args:
        aggregation: The aggregation; ``None`` for the plain sum.
        sharpness: The perturbations; ``None`` for none.

    Raises:
        ValueError: If so.
    """
    if aggregation is None or sharpness is None or not (sharpness.active and sharpness.nests):
        return
    if aggregation.needs_tasks:
        raise ValueError(
            f"TaskSAM(aggregate={sharpness.aggregate!r}) aggregates directions, which belong to no "
            "task: expected an aggregator that decides by inner products alone, got "
            f"{aggregation!r}, which weighs losses, knows tasks by name or looks at the entries of "
            "gradients. Use aggregate='split' or 'direct', or another aggregator, such as CAGrad()."
        )
