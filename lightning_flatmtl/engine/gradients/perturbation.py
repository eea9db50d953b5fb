"""The second pass: every task's gradients at its own perturbed parameters."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from lightning_flatmtl.engine.gradients.jacobian import Gradients
from lightning_flatmtl.engine.gradients.perturbation_gradients import PerturbationGradients
from lightning_flatmtl.engine.gradients.radius import Move, move_along
from lightning_flatmtl.engine.gradients.stats import GradientStats
from lightning_flatmtl.engine.parameters.blocks import Blocks
from lightning_flatmtl.engine.parameters.flat_parameters import FlatParameters
from lightning_flatmtl.engine.passes.base import Passes
from lightning_flatmtl.engine.sharpness import Sharpness

__all__ = ["moved", "sam_gradients"]


@contextmanager
def moved(layout: FlatParameters, saved: Tensor, move: Move) -> Iterator[None]:
    """Run the block at the perturbed parameters, then put the exact old values back.

    Args:
        layout: The parameters to move.
        saved: Their present values.
        move: By what they move.
    """
    try:
        layout.add(*move)
        # Autocast may hold copies of the weights from before the move.
        torch.clear_autocast_cache()
        yield
    finally:
        layout.restore(saved)
        torch.clear_autocast_cache()


def sam_gradients(
    clean: Gradients,
    ascent: PerturbationGradients,
    measures: GradientStats,
    blocks: Blocks,
    passes: Passes,
    sharpness: Sharpness,
    here: bool = False,
) -> Gradients:
    """SAM gradients of all tasks; those of the shared block less the clean ones if split.

    Args:
        clean: The clean gradients; they are left as they are.
        ascent: What to perturb along.
        measures: Its norms.
        blocks: The parameters.
        passes: Computes the losses again.
        sharpness: Radii and point.
        here: Whether the rows stay in this process for now.

    Returns:
        New gradients; for a part that does not move, the clean ones. With several processes an
        error is kept for the next sum, and they mean nothing.
    """
    second = _Second(clean, ascent, blocks, sharpness, here)
    run = _joint if sharpness.point == "joint" else _separate
    with blocks.failure.kept(), passes.repeating():
        run(second, _Perturbed(ascent, measures, blocks, sharpness), blocks, passes)
    second.complete()
    return second.gradients()


def _joint(second: "_Second", perturbed: "_Perturbed", blocks: Blocks, passes: Passes) -> None:
    """Both gradients of a task at the point where both its parts are perturbed."""
    for i, task in enumerate(blocks.tasks):
        source, head = blocks.source(task), blocks.heads[task]
        with perturbed.shared(i, second.row(i)), perturbed.head(i):
            if source is not None:
                again = passes.again(source)
                of_shared, of_head = blocks.differentiate(task, again, [blocks.shared, head])
                second.heads[task] = head.flatten(of_head)
                second.write(i, of_shared)
                if source == task:
                    second.at_shared[task] = again.detach()
        second.send(i, source is not None)


def _separate(second: "_Second", perturbed: "_Perturbed", blocks: Blocks, passes: Passes) -> None:
    """The gradient of each part where it alone is perturbed."""
    # The heads come first, while what the clean pass has left behind is still there.
    for i, task in enumerate(blocks.tasks if perturbed.moves_heads else ()):
        source, head = blocks.source(task), blocks.heads[task]
        if head.params and source is not None:
            with perturbed.head(i):
                again = passes.head_again(source, head.params)
                if source == task:
                    (of_head,) = blocks.differentiate(task, again, [head])
                    second.heads[task] = head.flatten(of_head)
                    second.at_heads[task] = again.detach()
    for i, task in enumerate(blocks.tasks if second.exchanges else ()):
        source = blocks.source(task)
        with perturbed.shared(i, second.row(i)):
            if source is not None:
                again = passes.again(source)
                (of_shared,) = blocks.differentiate(task, again, [blocks.shared])
                second.write(i, of_shared)
                if source == task:
                    second.at_shared[task] = again.detach()
        second.send(i, source is not None)


class _Perturbed:
    """The parameters at each task's own perturbed point."""

    def __init__(
        self,
        ascent: PerturbationGradients,
        measures: GradientStats,
        blocks: Blocks,
        sharpness: Sharpness,
    ) -> None:
        self._ascent, self._measures, self._blocks = ascent, measures, blocks
        self._sharpness = sharpness
        self.moves_heads = sharpness.moves_heads
        self._saved = blocks.shared.save(blocks.vector("saved"))
        adaptive = sharpness.adaptive
        self._squares = (
            torch.square(self._saved, out=blocks.vector("squares")) if adaptive else None
        )

    def shared(self, i: int, row: Tensor) -> AbstractContextManager[None]:
        squared, rho = self._measures.shared_squares[i], self._sharpness.rho_shared
        return self._moved(self._blocks.shared, row, rho, squared, self._saved, self._squares)

    def head(self, i: int) -> AbstractContextManager[None]:
        task = self._blocks.tasks[i]
        head = self._blocks.heads[task]
        squared, saved = self._measures.head_squares[i], head.values()
        row, rho = self._ascent.heads[task], self._sharpness.rho_heads
        squares = saved.square() if self._sharpness.adaptive else None
        return self._moved(head, row, rho, squared, saved, squares)

    def _moved(
        self,
        layout: FlatParameters,
        row: Tensor,
        rho: float,
        squared_norm: float,
        saved: Tensor,
        squares: Tensor | None,
    ) -> AbstractContextManager[None]:
        values = saved if self._sharpness.adaptive else None
        whole = not self._blocks.processes.sharded
        return moved(layout, saved, move_along(row, rho, squared_norm, values, squares, whole))


class _Second:
    """Collects the gradients of the second pass, and exchanges their rows.

    For every task all processes bring the row to ascend along here and then send their parts of the
    row that was found there; one that has failed has to do both, too.
    """

    def __init__(
        self,
        clean: Gradients,
        ascent: PerturbationGradients,
        blocks: Blocks,
        sharpness: Sharpness,
        here: bool,
    ) -> None:
        self.heads = dict(clean.heads)
        self.at_shared: dict[str, Tensor] = {}
        self.at_heads: dict[str, Tensor] = {}
        self._clean = clean
        self._shared = blocks.shared
        self._split = sharpness.splits
        self._moves = sharpness.moves_shared
        self._ascent = ascent
        self._begun = self._sent = 0
        self.exchanges = 0
        """How many rows the processes exchange."""
        if self._moves:
            self._rows = blocks.rows("second")
            self._sums = blocks.row_sums(self._rows, here)
            if sharpness.point == "joint" or blocks.shared.params:
                self.exchanges = len(blocks.tasks)
                ascent.fetch(0)

    def row(self, i: int) -> Tensor:
        """The row to ascend along for task ``i``; the next one is under way then."""
        row = self._ascent.row(i)
        self._ascent.fetch(i + 1)
        self._begun = i + 1
        return row

    def write(self, i: int, gradients: Sequence[Tensor | None]) -> None:
        columns = self._shared.numel
        row = self._rows[i, :columns]
        if self._split:
            self._shared.write_difference(gradients, self._clean.shared[i, :columns], row)
        else:
            self._shared.write(gradients, row)

    def send(self, i: int, written: bool) -> None:
        if not written:
            self._rows[i].zero_()
        self._sums.send(i)
        self._sent = i + 1

    def complete(self) -> None:
        """Take part in what is left of the exchanges."""
        for i in range(self._sent, self.exchanges):
            if i >= self._begun:
                self.row(i)
            self.send(i, written=False)

    def gradients(self) -> Gradients:
        rows, sums = self._clean.shared, self._clean.sums
        if self._moves:
            rows, sums = self._rows, self._sums
        reached = self._clean.reached
        return Gradients(rows, sums, self.heads, reached, self.at_shared, self.at_heads)
