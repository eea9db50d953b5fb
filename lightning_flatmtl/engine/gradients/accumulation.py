"""The task gradients of several batches, as those of one batch that holds all their samples."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_flatmtl.engine.gradients.gram import wide_type
from lightning_flatmtl.engine.gradients.jacobian import Gradients
from lightning_flatmtl.engine.parameters.blocks import Blocks
from lightning_flatmtl.engine.parameters.flat_parameters import FlatParameters

__all__ = ["ALONE", "Accumulation", "Place"]


class Place(NamedTuple):
    """The place of a batch among those that make one update.

    Args:
        first: Whether it is the first of them.
        last: Whether it is the last of them.
    """

    first: bool
    last: bool


ALONE = Place(first=True, last=True)
"""The place of a batch that makes an update by itself."""


class Accumulation:
    r"""Means over the samples of several batches: of the losses, and of the task gradients.

    A batch b with :math:`n_{bi}` samples of task i has the loss :math:`L_{bi}`, the gradient
    :math:`g_{bi}` and, at parameters perturbed along that gradient, :math:`s_{bi}`. Kept are the
    means :math:`\sum_b n_{bi}\, g_{bi} / \sum_b n_{bi}`, likewise of :math:`L` and of what the
    second pass gave. With several processes each keeps the means of its own shares.

    One object lasts for one update.

    Args:
        tasks: Tasks that may come, in the order of the rows; others go behind them.
    """

    def __init__(self, tasks: Sequence[str] = ()) -> None:
        self.samples: dict[str, float] = dict.fromkeys(tasks, 0.0)
        """By task: the samples of all batches and processes."""
        self.overflow: str | None = None
        """What was not finite in one of the batches, under loss scaling."""
        self._losses: dict[str, Tensor] = {}
        self._clean = _Means("accumulated")
        self._second: _Means | None = None
        self._rows_move = False
        self._reached: set[Tensor] = set()
        self._penalties: dict[Tensor, Tensor] = {}
        self._penalised = 0

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that have had a sample."""
        return tuple(task for task, n in self.samples.items() if n > 0)

    @property
    def losses(self) -> dict[str, Tensor]:
        """The mean losses; with several processes the shares whose sums over them are the means."""
        return {task: self._losses[task] for task in self.tasks}

    @torch.no_grad()
    def add(
        self,
        blocks: Blocks,
        losses: Mapping[str, Tensor],
        samples: Mapping[str, float],
        clean: Gradients,
        second: Gradients | None,
    ) -> None:
        """Take in the gradients of a batch.

        Args:
            blocks: The parameters, and the tasks of the batch.
            losses: This process's losses, detached.
            samples: For every task of the batch the samples behind its loss, in all processes.
            clean: The clean gradients.
            second: Those of the second pass, as the aggregation wants them; ``None`` without one.
        """
        weights = {task: self._weight(task, samples[task]) for task in blocks.tasks}
        for task, weight in weights.items():
            self._add_loss(task, losses.get(task), blocks.shares[task], weight)
        known = tuple(self.samples)
        self._clean.add(clean, blocks, known, weights)
        if second is not None:
            self._second = self._second or _Means("accumulated second")
            self._rows_move = second.moved and second.flat is None
            self._second.add(second, blocks, known, weights, rows=self._rows_move)
        reached = zip(blocks.shared.params, clean.reached, strict=True)
        self._reached.update(p for p, of_any in reached if of_any)

    def _weight(self, task: str, samples: float) -> float:
        """The weight of a batch in the mean so far."""
        self.samples[task] = self.samples.get(task, 0.0) + samples
        return samples / self.samples[task]

    def _add_loss(self, task: str, loss: Tensor | None, share: float, weight: float) -> None:
        before = self._losses.get(task)
        if loss is None:
            loss = torch.zeros(()) if before is None else torch.zeros_like(before)
        loss = loss.to(wide_type(loss.device)) * share
        self._losses[task] = loss if before is None else before.to(loss).lerp(loss, weight)

    @torch.no_grad()
    def add_penalty(self, of_penalty: Mapping[Tensor, Tensor]) -> None:
        """Take in the gradient of what belongs to no task; the mean over the batches counts."""
        self._penalised += 1
        for p, gradient in of_penalty.items():
            before = self._penalties.get(p)
            self._penalties[p] = gradient.clone() if before is None else before.add_(gradient)

    @torch.no_grad()
    def gradients(self, blocks: Blocks) -> tuple[Gradients, Gradients | None]:
        """The mean clean gradients and those of the second pass; their sums are on the way.

        Args:
            blocks: The parameters and all :attr:`tasks`.
        """
        known = tuple(self.samples)
        reached = [p in self._reached for p in blocks.shared.params]
        rows, heads = self._clean.of(blocks, known)
        clean = Gradients(rows, blocks.sent(rows), heads, reached)
        if self._second is None:
            return clean, None
        rows, heads = self._second.of(blocks, known)
        if not self._rows_move:
            return clean, replace(clean, heads=heads)
        return clean, Gradients(rows, blocks.sent(rows), heads, reached)

    def of_penalty(self) -> dict[Tensor, Tensor]:
        """The mean gradient of what belongs to no task."""
        return {p: gradient / self._penalised for p, gradient in self._penalties.items()}


class _Means:
    """The mean gradients of one point: rows of the shared block, and a vector for every head.

    The rows lie in memory that is used again for every update. Which parameters are shared may
    still be found out while batches come in: what is there is then laid out anew.

    Args:
        name: That of the memory.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: tuple[str, ...] = ()
        self._rows = torch.empty(0, 0)
        self._shared: FlatParameters | None = None
        self._heads: dict[str, Tensor] = {}
        self._layouts: dict[str, FlatParameters] = {}

    def add(
        self,
        gradients: Gradients,
        blocks: Blocks,
        known: tuple[str, ...],
        weights: Mapping[str, float],
        rows: bool = True,
    ) -> None:
        """Move the means of the batch's tasks towards its gradients, by a weight each."""
        self._lay(blocks, known)
        for i, (task, weight) in enumerate(weights.items()):
            new = task not in self._heads
            self._layouts[task] = blocks.heads[task]
            if new:
                self._heads[task] = gradients.heads[task].clone()
            else:
                self._heads[task].lerp_(gradients.heads[task], weight)
            row = self._rows[known.index(task)]
            if rows and new:
                row.copy_(gradients.shared[i])
            elif rows:
                row.lerp_(gradients.shared[i], weight)

    def of(self, blocks: Blocks, known: tuple[str, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """The rows ``[m, width]`` and the heads' vectors of the tasks of ``blocks``."""
        self._lay(blocks, known)
        heads = {task: self._heads[task] for task in blocks.tasks}
        if known == blocks.tasks:
            return self._rows, heads
        return self._rows[[known.index(task) for task in blocks.tasks]], heads

    def _lay(self, blocks: Blocks, known: tuple[str, ...]) -> None:
        """Make room for the tasks ``known`` in the layout of ``blocks``."""
        heads = blocks.heads_of(self._layouts)
        shared = self._shared
        fits = known == self._tasks and shared is not None and shared.same_as(blocks.shared)
        if fits and all(heads[task].same_as(at) for task, at in self._layouts.items()):
            return
        pieces = {task: self._pieces(task) for task in self._heads}
        self._shared, self._tasks, self._layouts = blocks.shared, known, heads
        self._rows = blocks.rows(self._name, len(known))
        for task, found in pieces.items():
            row = self._rows[known.index(task), : blocks.shared.numel]
            blocks.shared.write([found.get(p) for p in blocks.shared.params], row)
            self._heads[task] = heads[task].flatten([found.get(p) for p in heads[task].params])

    def _pieces(self, task: str) -> dict[Tensor, Tensor]:
        """What there is of a task by parameter, copied out of the memory."""
        assert self._shared is not None
        row = self._rows[self._tasks.index(task), : self._shared.numel].clone()
        head = self._layouts[task]
        return {
            **dict(zip(self._shared.params, self._shared.views(row), strict=True)),
            **dict(zip(head.params, head.views(self._heads[task]), strict=True)),
        }
