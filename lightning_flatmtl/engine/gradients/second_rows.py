"""Collects the gradients of the second pass, and exchanges their rows."""

from collections.abc import Sequence

from torch import Tensor

from lightning_flatmtl.engine.gradients.flat_parts import FlatParts
from lightning_flatmtl.engine.gradients.jacobian import Gradients
from lightning_flatmtl.engine.gradients.perturbation_gradients import PerturbationGradients
from lightning_flatmtl.engine.parameters.blocks import Blocks
from lightning_flatmtl.engine.sharpness import Sharpness

__all__ = ["SecondRows"]


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
        flat: Keeps the rows, if they are to be kept, and says whose turn it is.
    """

    def __init__(
        self,
        clean: Gradients,
        ascent: PerturbationGradients,
        blocks: Blocks,
        sharpness: Sharpness,
        here: bool,
        flat: FlatParts | None,
    ) -> None:
        self.heads = dict(clean.heads)
        self.at_shared: dict[str, Tensor] = {}
        self.at_heads: dict[str, Tensor] = {}
        self._clean, self._ascent, self._blocks, self._flat = clean, ascent, blocks, flat
        self._split = sharpness.splits
        self._moves = sharpness.moves_shared
        self._begun = self._sent = 0
        m = len(blocks.tasks)
        self.turn = tuple(range(m)) if flat is None else flat.turn(blocks, rows=self._moves)
        """The tasks that have a second pass, by their place."""
        self.exchanges = self._moves and (sharpness.point == "joint" or bool(blocks.shared.params))
        """Whether rows are exchanged."""
        if self._moves and flat is None:
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

    def _write(self, i: int, gradients: Sequence[Tensor | None]) -> None:
        shared = self._blocks.shared
        row = (self._rows[i] if self._flat is None else self._row)[: shared.numel]
        if self._split:
            shared.write_difference(gradients, self._clean.shared[i, : shared.numel], row)
        else:
            shared.write(gradients, row)

    def send(self, i: int, written: bool) -> None:
        """Send the row of task ``i``, zeros if nothing was written."""
        self._sent += 1
        row = self._rows[i] if self._flat is None else self._row
        if not written:
            row.zero_()
        if self._flat is None:
            self._sums.send(i)
            return
        processes = self._blocks.processes
        if processes.size > 1 and not processes.sharded:
            processes.sum(row)
        self._flat.put(self._blocks.tasks[i], row)

    def complete(self) -> None:
        """Take part in what is left of the exchanges."""
        for place in range(self._sent, len(self.turn) if self.exchanges else 0):
            if place >= self._begun:
                self.row(self.turn[place])
            self.send(self.turn[place], written=False)

    def gradients(self) -> Gradients:
        """What has been found; for a part that does not move, the clean gradients."""
        rows, sums = self._clean.shared, self._clean.sums
        if self._moves and self._flat is None:
            rows, sums = self._rows, self._sums
        return Gradients(
            rows,
            sums,
            self.heads,
            self._clean.reached,
            self.at_shared,
            self.at_heads,
            moved=self._moves,
            flat=self._flat if self._moves else None,
        )
