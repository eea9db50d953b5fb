"""A term of the loss that belongs to no task: its gradient is added to the step as it is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_flatmtl.engine.errors import NonFiniteError, ScaledOverflowError
from lightning_flatmtl.engine.gradients.gram import squared_norms
from lightning_flatmtl.engine.parameters.blocks import Blocks
from lightning_flatmtl.engine.partition import Partition, reached_parameters
from lightning_flatmtl.engine.passes.buffers import statistics_put_back
from lightning_flatmtl.engine.processes.base import Processes
from lightning_flatmtl.engine.processes.failure import Failure

__all__ = [
    "PENALTY",
    "Penalty",
    "add_penalty",
    "check_penalty",
    "checked_penalty",
    "gradient_of",
    "note_reached",
    "penalty_gradients",
]

PENALTY = "\0penalty"
"""What processes call it among the tasks when they agree on what a step has."""


@dataclass(frozen=True)
class Penalty:
    """The penalty of a step that has one, in this process or in another.

    With several processes it is the mean of those that have one, as data-parallel training makes of
    a term that is added to the loss.

    Args:
        term: That of this process, a scalar with its graph; ``None`` if it has none.
        weight: What its gradient is multiplied by on the way to the parameters.
    """

    term: Tensor | None
    weight: float

    @property
    def value(self) -> Tensor | None:
        """The value in this process, without its graph."""
        return None if self.term is None else self.term.detach()


def checked_penalty(given: Any, processes: Processes) -> Tensor | None:
    """A penalty that can be added to a step, ``None`` if there is none.

    Raises:
        ValueError: If it is no scalar, or the parameters are sharded.
    """
    if given is None or (isinstance(given, int | float) and not isinstance(given, bool)):
        return None  # a number has no gradient
    if not isinstance(given, Tensor) or given.ndim != 0:
        tensor = isinstance(given, Tensor)
        got = f"a tensor of shape {list(given.shape)}" if tensor else type(given).__name__
        advice = " Reduce it, for example with `.sum()`." if tensor else ""
        raise ValueError(f"The penalty must be a scalar tensor or None, got {got}.{advice}")
    if processes.sharded:
        raise ValueError(
            "A penalty is not supported with sharded parameters, got one. Add it to the loss of a "
            "task, use `weight_decay` of the optimizer, or strategy='ddp'."
        )
    return given


def note_reached(penalty: Tensor | None, partition: Partition, processes: Processes) -> None:
    """Note which parameters the penalty reaches, where that has to be known.

    Data-parallel training must know it of every step; else it only keeps a parameter that nothing
    but the penalty reaches from being called spare, for which the first one is enough.
    """
    if penalty is not None and (processes.size > 1 or not partition.penalised):
        partition.penalise(reached_parameters([penalty]))


def gradient_of(
    penalty: Penalty | None, blocks: Blocks, partition: Partition
) -> dict[Tensor, Tensor]:
    """The gradient of what belongs to no task, taken while the graph is there."""
    if penalty is None:
        return {}
    found: dict[Tensor, Tensor] = {}
    with blocks.failure.kept(), statistics_put_back(blocks.module):
        found = penalty_gradients(penalty, blocks, partition)
    check_penalty(penalty, found, blocks.processes, blocks.failure, scaled=blocks.scaled)
    return found


def penalty_gradients(
    penalty: Penalty, blocks: Blocks, partition: Partition
) -> dict[Tensor, Tensor]:
    """The gradient of the penalty by parameter; the graph stays for the losses.

    With several processes all have an entry for the same parameters.
    """
    found: dict[Tensor, Tensor] = {}
    if penalty.term is not None and penalty.term.requires_grad:
        gradients = blocks.differentiate_term(penalty.term)
        found = {
            p: g if penalty.weight == 1.0 else g * penalty.weight
            for p, g in zip(blocks.trainable, gradients, strict=True)
            if g is not None
        }
    if blocks.processes.size > 1:
        for p in blocks.trainable:
            if p in partition.penalised and p not in found:
                found[p] = torch.zeros_like(p)
    return found


def add_penalty(
    params: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    of_penalty: Mapping[Tensor, Tensor],
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The gradients of the tasks' step with those of the penalty added."""
    rest = dict(of_penalty)
    summed: list[Tensor | None] = []
    for p, g in zip(params, gradients, strict=True):
        extra = rest.pop(p, None)
        summed.append(g if extra is None else extra if g is None else g + extra.to(g.dtype))
    return [*params, *rest], [*summed, *rest.values()]


@torch.no_grad()
def check_penalty(
    penalty: Penalty | None,
    of_penalty: Mapping[Tensor, Tensor],
    processes: Processes,
    failure: Failure,
    scaled: bool,
) -> None:
    """Stop at a penalty, or a gradient of it, that is NaN or infinite in any process.

    Raises:
        NonFiniteError: If there is one, without loss scaling.
        ScaledOverflowError: The same, with it.
        ProcessError: If another process has failed.
    """
    if penalty is None:
        return
    looked_at = [*of_penalty.values(), *(() if penalty.value is None else (penalty.value,))]
    parts = [squared_norms(tensor.reshape(1, -1)) for tensor in looked_at]
    seen = torch.cat(parts).sum().cpu() if parts else torch.zeros(())
    mine = torch.tensor([float(seen), failure.flag], dtype=torch.float64)
    total, failed = processes.sum_on_host(mine).tolist()
    failure.tell(failed)
    if math.isfinite(total):
        return
    if scaled:
        raise ScaledOverflowError("the penalty or its gradient")
    raise NonFiniteError(
        "The penalty and its gradient must be finite, got NaN or infinity. Look at the penalty, or "
        "lower its weight or the learning rate."
    )
