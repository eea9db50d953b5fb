"""The parameters at the point where a task's gradients are taken once more."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from lightning_flatmtl.engine.gradients.perturbation_gradients import PerturbationGradients
from lightning_flatmtl.engine.gradients.radius import Move, move_along
from lightning_flatmtl.engine.gradients.stats import GradientStats
from lightning_flatmtl.engine.parameters.blocks import Blocks
from lightning_flatmtl.engine.parameters.flat_parameters import FlatParameters
from lightning_flatmtl.engine.sharpness import Sharpness

__all__ = ["Perturbed", "moved"]


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


class Perturbed:
    """Contexts in which the parameters are perturbed.

    Args:
        ascent: What to perturb along.
        measures: Its norms.
        blocks: The parameters.
        sharpness: Radii and kind.
    """

    def __init__(
        self,
        ascent: PerturbationGradients,
        measures: GradientStats,
        blocks: Blocks,
        sharpness: Sharpness,
    ) -> None:
        self.sharpness = sharpness
        self._ascent, self._measures, self._blocks = ascent, measures, blocks
        self._saved = blocks.shared.save(blocks.vector("saved"))
        adaptive = sharpness.adaptive
        self._squares = (
            torch.square(self._saved, out=blocks.vector("squares")) if adaptive else None
        )

    def shared(
        self, i: int, row: Tensor, squared_norm: float | None = None
    ) -> AbstractContextManager[None]:
        """The shared parameters along ``row``, the one of task ``i`` unless its norm is given."""
        rho = self.sharpness.rho_shared
        squared = self._measures.shared_squares[i] if squared_norm is None else squared_norm
        return self._moved(self._blocks.shared, row, rho, squared, self._saved, self._squares)

    def head(self, i: int) -> AbstractContextManager[None]:
        """The head of task ``i`` along its gradient."""
        task = self._blocks.tasks[i]
        head = self._blocks.heads[task]
        squared, saved = self._measures.head_squares[i], head.values()
        row, rho = self._ascent.heads[task], self.sharpness.rho_heads
        squares = saved.square() if self.sharpness.adaptive else None
        return self._moved(head, row, rho, squared, saved, squares)

    def shared_by(self, row: Tensor, factor: float) -> AbstractContextManager[None]:
        """The shared parameters moved by ``factor * row``."""
        return moved(self._blocks.shared, self._saved, Move(row, factor))

    @property
    def values(self) -> Tensor:
        """The shared parameters where they are, ``[d]``."""
        return self._saved

    def _moved(
        self,
        layout: FlatParameters,
        row: Tensor,
        rho: float,
        squared_norm: float,
        saved: Tensor,
        squares: Tensor | None,
    ) -> AbstractContextManager[None]:
        values = saved if self.sharpness.adaptive else None
        whole = not self._blocks.processes.sharded
        return moved(layout, saved, move_along(row, rho, squared_norm, values, squares, whole))
