"""The F-step of an aggregation that weighs losses: what linearity gives for nothing is not paid."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_flatmtl.engine.aggregation import Aggregation
from lightning_flatmtl.engine.checks import Finite
from lightning_flatmtl.engine.gradients.between_steps import BetweenSteps
from lightning_flatmtl.engine.gradients.combination import (
    bounded_factor,
    refuse_infinite_weights,
)
from lightning_flatmtl.engine.gradients.directions import surrogate
from lightning_flatmtl.engine.gradients.gram import squared_norms
from lightning_flatmtl.engine.gradients.jacobian import task_gradients
from lightning_flatmtl.engine.gradients.mean_gradient import mean_gradient, needs_the_mean_only
from lightning_flatmtl.engine.gradients.perturbation_gradients import PerturbationGradients
from lightning_flatmtl.engine.gradients.second_pass import sam_gradients
from lightning_flatmtl.engine.gradients.stats import measure
from lightning_flatmtl.engine.parameters.blocks import Blocks
from lightning_flatmtl.engine.passes.base import Passes
from lightning_flatmtl.engine.result import PerturbedLosses, StepResult
from lightning_flatmtl.engine.sharpness import Sharpness

__all__ = ["is_linear", "linear_step"]


def is_linear(aggregation: Aggregation, sharpness: Sharpness | None, blocks: Blocks) -> bool:
    r"""Whether :func:`linear_step` gives what Algorithm 1 does.

    With weights w that depend on no gradient :math:`A(g) + A(s - g) = A(s) = \sum_i w_i s_i`: no
    flat parts, no second matrix and no Gram matrix are needed.
    """
    if sharpness is None or aggregation.needs_gradients or blocks.processes.size > 1:
        return False
    return sharpness.moves_shared and not (sharpness.nests or sharpness.keeps)


def linear_step(
    losses: dict[str, Tensor],
    blocks: Blocks,
    passes: Passes,
    aggregation: Aggregation,
    sharpness: Sharpness,
    of_penalty: Mapping[Tensor, Tensor],
    between: BetweenSteps,
) -> StepResult:
    """Algorithm 1 with a weighted sum of losses.

    Args:
        losses: The losses; their graphs go.
        blocks: The parameters.
        passes: Computes the losses again.
        aggregation: Gives the weights.
        sharpness: The perturbations.
        of_penalty: The gradient of what belongs to no task.
        between: What the second passes remember.
    """
    if needs_the_mean_only(blocks, sharpness, linear=True):
        clean, measures = mean_gradient(losses, blocks, sharpness.adaptive)
        ascent = PerturbationGradients(clean, blocks, sharpness)
    else:
        clean = task_gradients(losses, blocks)
        ascent = PerturbationGradients(clean, blocks, sharpness)
        measures = measure(clean, ascent, losses, blocks, crossed=False)
        measures.check(blocks)
    for task, loss in losses.items():
        losses[task] = loss.detach()
    weights = aggregation.loss_weights(blocks.tasks, measures.losses)
    refuse_infinite_weights(weights, blocks.tasks, aggregation)
    summed = WeightedSum(blocks, weights, at_once=sharpness.perturbation == "common")
    second = sam_gradients(clean, ascent, measures, blocks, passes, sharpness, between, sink=summed)
    summed.check(second.at_shared, second.heads, blocks.scaled)
    of_shared = blocks.shared_gradients(summed.row, measures.reached)
    heads = second.heads
    loss, untouched = surrogate(losses, blocks, of_shared, heads, weights, of_penalty)
    perturbed = PerturbedLosses(dict(losses), second.at_shared, second.at_heads, blocks.shares)
    return StepResult(
        loss=loss,
        losses=losses,
        dead=measures.dead,
        untouched=untouched,
        zero=measures.zero(blocks.tasks),
        perturbed=perturbed,
    )


class WeightedSum:
    """Takes the rows of the second pass in as they come, and keeps their weighted sum.

    Args:
        blocks: The parameters.
        weights: Of the losses, ``[m]``; ``None`` for ones.
        at_once: Whether all rows may come as one, their weighted sum.
    """

    splits = False

    def __init__(self, blocks: Blocks, weights: Tensor | None, at_once: bool) -> None:
        given = [1.0] * len(blocks.tasks) if weights is None else weights.tolist()
        bounded = (bounded_factor(weight, blocks.shared.dtype) for weight in given)
        self._weights = dict(zip(blocks.tasks, bounded, strict=True))
        self.sums_with = self._weights if at_once else None
        self.row = blocks.row("direction").zero_()
        """The sum, ``[width]``."""
        self._squares: dict[str, Tensor] = {}

    def turn(self, blocks: Blocks, rows: bool) -> tuple[int, ...]:
        """All tasks."""
        return tuple(range(len(blocks.tasks)))

    @torch.no_grad()
    def put(self, task: str, row: Tensor) -> None:
        """Add a row."""
        self._squares[task] = squared_norms(row[None])
        self.row.add_(row, alpha=self._weights.get(task, 1.0))

    def check(
        self, losses: Mapping[str, Tensor], heads: Mapping[str, Tensor], scaled: bool
    ) -> None:
        """Stop at what is not finite at the perturbed point.

        Args:
            losses: The losses there.
            heads: The gradients of the heads.
            scaled: Whether there is a loss scale.
        """
        at = "at the perturbed point"
        of_heads = [squared_norms(head[None]) for head in heads.values()]
        of_losses = [loss.detach().double().reshape(1) for loss in losses.values()]
        parts = [*of_losses, *of_heads, *self._squares.values()]
        numbers = torch.cat([part.to(self.row.device) for part in parts]).cpu()
        sizes = [len(of_losses), len(of_heads), len(self._squares)]
        for_losses, for_heads, for_rows = torch.split(numbers, sizes)
        Finite(tuple(losses), scaled)(for_losses, f"loss {at}")
        Finite(tuple(heads), scaled)(for_heads, f"head's gradient {at}")
        names = tuple(task or "all tasks together" for task in self._squares)
        Finite(names, scaled)(for_rows, f"gradient {at}")
