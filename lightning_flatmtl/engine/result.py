"""What one step found out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["PerturbedLosses", "StepResult"]


@dataclass(frozen=True)
class PerturbedLosses:
    """The losses of this process in the passes of a step, detached, where they lie.

    Args:
        clean: By task, at the parameters themselves.
        shared: Where the shared parameters are perturbed; at the joint point the head, too.
        heads: Where the head alone is perturbed.
        shares: For every task of the step the share of its samples that lies in this process; the
            tasks are the same in all processes.
    """

    clean: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]
    heads: Mapping[str, Tensor]
    shares: Mapping[str, float]


@dataclass(frozen=True)
class StepResult:
    """What one step found out.

    Args:
        loss: The scalar to call ``backward`` on; its gradient is what the step decided. ``None``
            for a batch that is accumulated: the update comes with a later one.
        losses: The clean losses of the batch by task, detached; of accumulated batches those of
            this process.
        gram: Inner products of the clean task gradients ``[m, m]``, float64 on the CPU; ``None``
            when the step did not need them.
        flat_gram: The same for the flat parts; ``None`` without a split second pass.
        cross_gram: Inner products of the clean task gradients (rows) with the flat parts (columns);
            ``None`` unless the step was :attr:`~lightning_flatmtl.engine.MultiTaskStep.watched` or
            its arm asks for them.
        dead: Whether every task gradient was exactly zero.
        overflow: What was not finite under loss scaling, in words; then the gradients are infinite,
            so that the scaler skips the step.
        untouched: Parameters that no process's losses reach: with several processes they get
            gradients of zero, which the host takes away again after the backward pass.
        accumulated: The clean losses of all batches of the update, each the mean over its samples,
            if it is that of several.
        perturbed: The losses of the second pass, of this batch; ``None`` without one.
        skipped: Whether no process had a loss of the batch at hand: the update is that of batches
            before it.
        zero: Tasks whose loss is exactly zero, and whose gradient is, where it is known.
        penalty: What was added to the losses and belongs to no task, detached; ``None`` without.
    """

    loss: Tensor | None
    losses: dict[str, Tensor]
    gram: Tensor | None = None
    flat_gram: Tensor | None = None
    cross_gram: Tensor | None = None
    dead: bool = False
    overflow: str | None = None
    untouched: Sequence[Tensor] = ()
    penalty: Tensor | None = None
    zero: tuple[str, ...] = ()
    accumulated: dict[str, Tensor] | None = None
    skipped: bool = False
    perturbed: PerturbedLosses | None = None

    @property
    def update_losses(self) -> dict[str, Tensor]:
        """The clean losses by task that the update is made of."""
        return self.losses if self.accumulated is None else self.accumulated

    @property
    def total(self) -> Tensor:
        """The unweighted sum of the losses, detached."""
        losses = list((self.losses or self.update_losses).values())
        return torch.stack(losses).sum() if losses else torch.zeros(())

    def detached(self) -> "StepResult":
        """The same without the graph and the gradients that ``loss`` holds on to."""
        return replace(self, loss=None if self.loss is None else self.loss.detach())
