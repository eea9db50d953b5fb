"""The step where the losses alone decide: one backward pass of their weighted sum."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_flatmtl.engine.aggregation import Aggregation
from lightning_flatmtl.engine.checks import Finite
from lightning_flatmtl.engine.gradients.combination import bounded_factor, refuse_infinite_weights
from lightning_flatmtl.engine.gradients.penalty import Penalty, check_penalty
from lightning_flatmtl.engine.gradients.surrogate import surrogate_loss
from lightning_flatmtl.engine.parameters.blocks import Setting, share_of
from lightning_flatmtl.engine.partition import reached_parameters
from lightning_flatmtl.engine.result import StepResult

__all__ = ["means_of", "weighted_sum"]


def weighted_sum(
    losses: Mapping[str, Tensor],
    setting: Setting,
    aggregation: Aggregation,
    penalty: Penalty | None = None,
) -> StepResult:
    """Differentiate nothing here: the weighted sum of the losses has the right gradient itself.

    Args:
        losses: The losses that this process has, with their graphs.
        setting: What is known of the step.
        aggregation: Gives the weights.
        penalty: Added to the sum as it is.

    Raises:
        NonFiniteError: If a loss is NaN or infinite, without loss scaling, or a weight is.
        ScaledOverflowError: The same, with it.
    """
    shares, processes = setting.shares, setting.processes
    values = _values(losses, setting)
    Finite(tuple(shares), scaled=setting.scale is not None)(values, "loss")
    check_penalty(penalty, {}, processes, setting.failure, scaled=setting.scale is not None)
    weights = aggregation.loss_weights(tuple(shares), values)
    refuse_infinite_weights(weights, tuple(shares), aggregation)
    factors = [1.0] * len(shares) if weights is None else weights.tolist()
    total: Tensor | None = None
    for (task, share), factor in zip(shares.items(), factors, strict=True):
        if task in losses:
            loss = losses[task]
            term = share_of(
                loss, bounded_factor(factor * share * processes.ddp_mean_correction, loss.dtype)
            )
            total = term if total is None else total + term
    terms = list(losses.values())
    if penalty is not None and penalty.term is not None:
        term = share_of(penalty.term, penalty.weight)
        total = term if total is None else total + term
        terms.append(penalty.term)
    detached = {task: loss.detach() for task, loss in losses.items()}
    zero = tuple(task for task, v in zip(shares, values.tolist(), strict=True) if v == 0.0)
    added = None if penalty is None else penalty.value
    if processes.size == 1:
        assert total is not None
        return StepResult(total, detached, penalty=added, zero=zero)
    # Data-parallel training waits for a gradient of every parameter.
    zeros = _zeros_for(terms, setting)
    untouched = setting.partition.untouched(setting.trainable, shares)
    if penalty is not None:
        untouched = [p for p in untouched if p not in setting.partition.penalised]
    return StepResult(
        loss=zeros if total is None else total + zeros.to(total),
        losses=means_of(detached, tuple(shares), values),
        untouched=untouched,
        penalty=added,
        zero=zero,
    )


def means_of(
    losses: Mapping[str, Tensor], tasks: Sequence[str], values: Tensor
) -> dict[str, Tensor]:
    """The losses over all processes, like those of this one.

    Args:
        losses: Those of this process.
        tasks: All tasks of the step.
        values: Their losses, ``[m]``.
    """
    like = next(iter(losses.values()), values)
    return {task: like.new_tensor(v) for task, v in zip(tasks, values.tolist(), strict=True)}


def _values(losses: Mapping[str, Tensor], setting: Setting) -> Tensor:
    """The losses over all processes, ``[m]``, float64 on the CPU, fetched in one transfer."""
    device = next((loss.device for loss in losses.values()), torch.device("cpu"))
    zero = torch.zeros((), dtype=torch.float64, device=device)
    mine = [
        share_of(losses[task].detach().to(torch.float64), share) if task in losses else zero
        for task, share in setting.shares.items()
    ]
    return setting.processes.sum_on_host(torch.stack(mine).cpu())


def _zeros_for(terms: Sequence[Tensor], setting: Setting) -> Tensor:
    """A loss with gradients of zero for the parameters that the terms of this process miss."""
    reached = reached_parameters(terms)
    others = [p for p in setting.trainable if p not in reached]
    zero = torch.zeros((), device=setting.trainable[0].device)
    return surrogate_loss(zero, others, [torch.zeros_like(p) for p in others])
