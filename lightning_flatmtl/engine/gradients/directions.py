"""From task gradients to the loss whose gradient is the step: aggregation and surrogate."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_flatmtl.engine.aggregation import Aggregation, Part, TaskGradients
from lightning_flatmtl.engine.gradients.combination import (
    refuse_infinite_direction,
    scaled,
    weighted_rows,
)
from lightning_flatmtl.engine.gradients.jacobian import Gradients
from lightning_flatmtl.engine.gradients.penalty import add_penalty
from lightning_flatmtl.engine.gradients.stats import GradientStats
from lightning_flatmtl.engine.gradients.surrogate import surrogate_loss
from lightning_flatmtl.engine.parameters.blocks import Blocks, Setting
from lightning_flatmtl.engine.result import StepResult
from lightning_flatmtl.engine.sharpness import Sharpness

__all__ = ["aggregate_onto", "parts_of", "shared_gradients", "surrogate", "to_be_skipped"]

SharedGradients = tuple[list[Tensor], list[Tensor | None]]


def parts_of(
    clean: Gradients,
    second: Gradients,
    second_gram: Tensor | None,
    measures: GradientStats,
    blocks: Blocks,
    sharpness: Sharpness | None,
    weights: Tensor | None,
    looked_at: bool = True,
) -> list[tuple[TaskGradients, Gradients]]:
    """The matrices to aggregate: loss part, and flat part or SAM gradients if they have moved.

    Args:
        clean: The clean gradients.
        second: Those of the second pass, or the clean ones.
        second_gram: Inner products of the second rows, ``None`` without a second pass.
        measures: What was measured of the clean ones.
        blocks: The parameters.
        sharpness: Says whether to split.
        weights: The weights of the losses.
        looked_at: Whether the aggregator looks at more than inner products.

    Returns:
        What the aggregator is shown, each with the rows that this process has of it.
    """

    def part(gradients: Gradients, gram: Tensor, kind: Part) -> tuple[TaskGradients, Gradients]:
        columns = gradients.columns(blocks, looked_at)
        shown = TaskGradients(columns, gram, blocks.tasks, measures.losses, weights, kind)
        return shown, gradients

    loss_part = part(clean, measures.gram, "loss")
    if second_gram is None or not second.moved:
        return [loss_part]
    if sharpness is not None and not sharpness.splits:
        return [part(second, second_gram, "loss")]
    return [loss_part, part(second, second_gram, "flat")]


def aggregate_onto(
    direction: Tensor,
    part: TaskGradients,
    gradients: Gradients,
    aggregation: Aggregation,
    blocks: Blocks,
    empty: bool = False,
) -> None:
    """Add the direction of one part to ``direction``, or this process's share of it.

    The mean of what all processes add is the direction: that is what the backward pass of
    data-parallel training makes of it.

    Args:
        direction: Shape ``[width]``.
        part: What the aggregator is shown.
        gradients: The rows of this process.
        aggregation: The aggregator.
        blocks: The parameters.
        empty: Whether what ``direction`` holds is undefined and stands for zeros.

    Raises:
        ValueError: If the aggregator looks at more than the processes can bring together.
        NonFiniteError: If the direction is NaN or infinite.
        ProcessError: If the aggregator has failed on the columns of another process.
    """
    processes, columns = blocks.processes, blocks.shared.numel
    requires = "matrix" if processes.size == 1 else aggregation.requires
    apart = processes.sharded or blocks.of_samples  # columns of any width
    if apart and processes.size > 1 and requires != "gram":
        raise ValueError(
            "With sharded parameters, or several processes and `gradients='features'`, an "
            f"aggregator must look at the Gram matrix only, got {aggregation!r}. Use another "
            "aggregator, or `gradients='parameters'` with strategy='ddp'."
        )
    if requires == "columns":
        kept = processes.columns(blocks.width)
        part = replace(part, columns=kept, width=columns)
        found = torch.zeros_like(direction[kept])
        with blocks.failure.kept(meeting=False):
            found = aggregation.aggregate(part) * processes.size
        mine = torch.tensor(
            [float(not found.isfinite().all()), blocks.failure.flag], dtype=torch.float64
        )
        infinite, failed = processes.sum_on_host(mine).tolist()
        blocks.failure.tell(failed)
        refuse_infinite_direction(not infinite, part, aggregation)
        if empty:
            direction.zero_()
        direction[kept] += found
        return
    if requires == "matrix" and processes.size > 1:
        part = replace(part, jacobian=processes.gather(part.jacobian))
    names = blocks.shared_names() if aggregation.requires == "matrix" else None
    part = replace(part, jacobian=part.jacobian[:, :columns], parameters=names)
    weights = aggregation.row_weights(part)
    if weights is not None:
        rows, gain = gradients.shared, processes.ddp_mean_correction
        if gradients.flat is not None:
            gradients.flat.add_weighted(weights, part, aggregation, blocks, direction)
        else:
            weighted_rows(weights, part, aggregation, rows, onto=direction, gain=gain, empty=empty)
    else:
        found = aggregation.aggregate(part)
        refuse_infinite_direction(bool(found.isfinite().all()), part, aggregation)
        if empty:
            direction.zero_()
        direction[:columns] += found


def to_be_skipped(
    losses: Mapping[str, Tensor],
    setting: Setting,
    features: Sequence[Tensor] | None,
    overflow: str,
) -> StepResult:
    """Infinite gradients: the scaler sees them, skips the step and lowers the scale.

    Args:
        losses: The losses that this process has.
        setting: What is known of the step.
        features: The features, if the task Jacobian is taken there.
        overflow: What was not finite, in words.
    """
    params: list[Tensor] = [*setting.trainable, *(features or ())]
    gradients = [torch.full_like(p, math.inf) for p in params]
    nan = torch.full((), math.nan, device=params[0].device)
    detached = {task: losses[task].detach() if task in losses else nan for task in setting.shares}
    loss = surrogate_loss(torch.stack([*detached.values(), nan]).nansum(), params, gradients)
    return StepResult(loss, detached, overflow=overflow)


def shared_gradients(direction: Tensor, reached: Sequence[bool], blocks: Blocks) -> SharedGradients:
    """The parameters that the aggregated row concerns, and the gradient of each.

    Args:
        direction: The direction of the shared block, ``[width]``.
        reached: For each entry of it whether any loss reaches it.
        blocks: The parameters; where they need a backward pass an error in it is told.

    Raises:
        ProcessError: If another process has failed in that.
    """
    if not blocks.of_samples:
        return blocks.shared_gradients(direction, reached)
    found: SharedGradients = [], []
    with blocks.failure.kept():
        found = blocks.shared_gradients(direction, reached)
    blocks.failure.meet()
    return found


def surrogate(
    losses: Mapping[str, Tensor],
    blocks: Blocks,
    of_shared: SharedGradients,
    heads: Mapping[str, Tensor],
    weights: Tensor | None,
    of_penalty: Mapping[Tensor, Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """The loss whose gradient is the step, and the parameters that it gives zeros only.

    Args:
        losses: Their sum is its value.
        blocks: The parameters.
        of_shared: Those that the aggregated row concerns, and the gradient of each.
        heads: The gradient of every head.
        weights: The weights of the losses.
        of_penalty: The gradient of the penalty by parameter, added as it is.
    """
    params, gradients = of_shared
    processes = blocks.processes
    for i, (task, head) in enumerate(blocks.heads.items()):
        factor = processes.ddp_mean_correction * (1.0 if weights is None else weights[i].item())
        params += head.params
        gradients += head.views(heads[task] if factor == 1.0 else scaled(heads[task], factor))
    if of_penalty:
        params, gradients = add_penalty(params, gradients, of_penalty)
    untouched: list[Tensor] = []
    if processes.size > 1 and not processes.sharded:
        # Data-parallel training waits for a gradient of every parameter.
        given = {p for p, g in zip(params, gradients, strict=True) if g is not None}
        untouched = [p for p in blocks.trainable if p not in given]
        params += untouched
        gradients += [torch.zeros_like(p) for p in untouched]
    total = torch.stack(list(losses.values())).sum()
    return surrogate_loss(total, params, gradients), untouched
