"""Collects the gradients of the second pass, and exchanges their rows."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightning_flatmtl.engine.gradients.jacobian import Gradients
from lightning_flatmtl.engine.gradients.perturbation_gradients import PerturbationGradients
from lightning_flatmtl.engine.parameters.blocks import Blocks
from lightning_flatmtl.engine.sharpness import Sharpness

__all__ = ["RowSink", "SecondRows"]


class RowSink(Protocol):
    """Takes in the rows of the second pass one by one, and says which tasks have one."""

    @property
    def splits(self) -> bool:
        """Whether the clean gradients are to be taken off the rows."""

    @property
    def sums_with(self) -> Mapping[str, float] | None:
        """Weights by task, if one row will do: the gradient of the weighted sum of the losses."""

    def turn(self, blocks: Blocks, rows: bool) -> tuple[int, ...]:
        """The places of the tasks that have a second pass; ``rows``: whether they send a row."""

    def put(self, task: str, row: Tensor) -> None:
        """Take a row in, the sum over all processes; its memory is used again.

        Args:
            task: The task; none of them for the row of the weighted sum.
            row: Shape ``[width]``.
        """


class SecondRows:
    """Collects the gradients of the second pass, and exchanges their rows.

    For every task whose turn it is all processes bring the row to ascend along here and then send
    their parts of the row that was found there; one that has failed has to do both, too.

    Args:
        clean: The clean gradients.
        ascent: What is perturbed along.
        blocks: The parameters.
        sharpness: The perturbations.
        here: Whether the rows stay in this process for now.
        sink: Takes the rows, and says whose turn it is; ``None`` for a matrix of all tasks.
    """

    def __init__(
        self,
        clean: Gradients,
        ascent: PerturbationGradients,
        blocks: Blocks,
        sharpness: Sharpness,
        here: bool,
        sink: RowSink | None,
    ) -> None:
        self.heads = dict(clean.heads)
        self.at_shared: dict[str, Tensor] = {}
        self.at_heads: dict[str, Tensor] = {}
        self._clean, self._ascent, self._blocks, self._sink = clean, ascent, blocks, sink
        self._split = sharpness.splits if sink is None else sink.splits
        self._moves = sharpness.moves_shared
        self._begun = self._sent = 0
        m = len(blocks.tasks)
        self.turn = tuple(range(m)) if sink is None else sink.turn(blocks, rows=self._moves)
        """The tasks that have a second pass, by their place."""
        self.exchanges = self._moves and (sharpness.point == "joint" or bool(blocks.shared.params))
        """Whether rows are exchanged."""
        if self._moves and sink is None:
            self._rows = blocks.rows("second")
            self._sums = blocks.row_sums(self._rows, here)
        elif self._moves:
            self._row = blocks.row("scratch")
            self._row[blocks.shared.numel :].zero_()
        if self.exchanges:
            self._fetch(0)

    def row(self, i: int) -> Tensor:
        """The row to ascend along for task ``i``; the next one is under way then."""
        row = self._ascent.row(i)
        self._begun += 1
        self._fetch(self._begun)
        return row

    def _fetch(self, place: int) -> None:
        if place < len(self.turn):
            self._ascent.fetch(self.turn[place])

    def take(self, i: int, again: Tensor, joint: bool, retain_graph: bool = False) -> None:
        """Differentiate the loss of task ``i`` at its point.

        Args:
            i: The task's place.
            again: The loss of its source.
            joint: Whether the head's gradient is of this point, too.
            retain_graph: Whether the graph is needed again.
        """
        blocks, task = self._blocks, self._blocks.tasks[i]
        head = blocks.heads[task]
        layouts = [blocks.shared, head] if joint else [blocks.shared]
        found = blocks.differentiate(task, again, layouts, retain_graph)
        if joint:
            self.heads[task] = head.flatten(found[1])
        self._write(i, found[0])
        if blocks.source(task) == task:
            self.at_shared[task] = again.detach()

    def take_sum(self, losses: Mapping[str, Tensor], joint: bool) -> None:
        """Differentiate the weighted sum of the losses, at the point that they share."""
        blocks, sink = self._blocks, self._sink
        assert sink is not None
        weights = sink.sums_with
        assert weights is not None
        terms = [loss * weights[task] for task, loss in losses.items()]
        heads = [blocks.heads[task] for task in blocks.tasks] if joint else []
        total = torch.stack(terms).sum()
        found = blocks.differentiate(blocks.tasks[0], total, [blocks.shared, *heads])
        for task, head, of_head in zip(blocks.tasks, heads, found[1:], strict=False):
            weight = weights[task]  # which the gradient will be multiplied by once more
            self.heads[task] = head.flatten(of_head) / weight if weight else head.zeros()
        self._blocks.shared.write(found[0], self._row[: blocks.shared.numel])
        self._sent = self._begun = len(self.turn)
        self.at_shared.update({task: loss.detach() for task, loss in losses.items()})
        sink.put("", self._row)

    def _write(self, i: int, gradients: Sequence[Tensor | None]) -> None:
        shared = self._blocks.shared
        row = (self._rows[i] if self._sink is None else self._row)[: shared.numel]
        if self._split:
            shared.write_difference(gradients, self._clean.shared[i, : shared.numel], row)
        else:
            shared.write(gradients, row)

    def send(self, i: int, written: bool) -> None:
        """Send the row of task ``i``, zeros if nothing was written."""
        self._sent += 1
        row = self._rows[i] if self._sink is None else self._row
        if not written:
            row.zero_()
        if self._sink is None:
            self._sums.send(i)
            return
        processes = self._blocks.processes
        if processes.size > 1 and not processes.sharded:
            processes.sum(row)
        self._sink.put(self._blocks.tasks[i], row)

    def complete(self) -> None:
        """Take part in what is left of the exchanges."""
        for place in range(self._sent, len(self.turn) if self.exchanges else 0):
            if place >= self._begun:
                self.row(self.turn[place])
            self.send(self.turn[place], written=False)

    def gradients(self) -> Gradients:
        """What has been found; for a part that does not move, the clean gradients."""
        rows, sums = self._clean.shared, self._clean.sums
        if self._moves and self._sink is None:
            rows, sums = self._rows, self._sums
        return Gradients(
            rows,
            sums,
            self.heads,
            self._clean.reached,
            self.at_shared,
            self.at_heads,
            moved=self._moves,
        )
