"""The second pass: every task's gradients at its own perturbed parameters."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from lightning_flatmtl.engine.jacobian import Blocks, Gradients, Measures, differentiate
from lightning_flatmtl.engine.layout import Layout
from lightning_flatmtl.engine.passes import Passes
from lightning_flatmtl.engine.sharpness import Sharpness, ascent_factor

__all__ = ["moved", "sam_gradients"]


@contextmanager
def moved(
    layout: Layout, saved: Tensor, row: Tensor, factor: float, scale: Tensor | None = None
) -> Iterator[None]:
    r"""Run the block at the perturbed parameters, then put the exact old values back.

    The perturbation is ``factor * scale * row``.

    Args:
        layout: The parameters to move.
        saved: Their present values.
        row: The gradient to move along.
        factor: The radius over the norm, see :func:`~lightning_flatmtl.engine.ascent_factor`.
        scale: The squared values if the perturbation is adaptive, else ``None`` for ones.
    """
    try:
        layout.add(row, factor, scale)
        # Autocast may hold copies of the weights from before the move.
        torch.clear_autocast_cache()
        yield
    finally:
        layout.restore(saved)
        torch.clear_autocast_cache()


def sam_gradients(
    clean: Gradients,
    measures: Measures,
    blocks: Blocks,
    passes: Passes,
    sharpness: Sharpness,
    scale: Tensor | None = None,
) -> Gradients:
    """SAM gradients of all tasks; those of the shared block less the clean ones if split.

    Args:
        clean: The clean gradients; they are left as they are.
        measures: Their norms.
        blocks: The parameters.
        passes: Computes the losses again.
        sharpness: Radii and point.
        scale: The loss scale of 16-bit training.

    Returns:
        New gradients; for a part that does not move, the clean ones.
    """
    rows = blocks.rows("second") if sharpness.moves_shared else clean.shared
    heads = dict(clean.heads)
    perturbed = _Perturbed(clean, measures, blocks, sharpness)

    def keep_shared(i: int, gradients: Sequence[Tensor | None]) -> None:
        if sharpness.aggregate == "split":
            blocks.shared.write_difference(gradients, clean.shared[i], rows[i])
        else:
            blocks.shared.write(gradients, rows[i])

    if sharpness.point == "joint":
        for i, task in enumerate(blocks.tasks):
            head = blocks.heads[task]
            with perturbed.shared(i), perturbed.head(i):
                again = passes.again(task)
                of_shared, of_head = differentiate(again, [blocks.shared, head], scale)
            keep_shared(i, of_shared)
            heads[task] = head.flatten(of_head)
        return Gradients(rows, heads, clean.reached)

    # The heads come first, while what the clean pass has left behind is still there.
    for i, task in enumerate(blocks.tasks if sharpness.moves_heads else ()):
        head = blocks.heads[task]
        if head.params:
            with perturbed.head(i):
                again = passes.head_again(task, head.params)
                (of_head,) = differentiate(again, [head], scale)
            heads[task] = head.flatten(of_head)
    shared_moves = sharpness.moves_shared and blocks.shared.params
    for i, task in enumerate(blocks.tasks if shared_moves else ()):
        with perturbed.shared(i):
            (of_shared,) = differentiate(passes.again(task), [blocks.shared], scale)
        keep_shared(i, of_shared)
    return Gradients(rows, heads, clean.reached)


class _Perturbed:
    """The parameters at each task's own perturbed point."""

    def __init__(
        self, clean: Gradients, measures: Measures, blocks: Blocks, sharpness: Sharpness
    ) -> None:
        self._clean, self._measures, self._blocks = clean, measures, blocks
        self._sharpness = sharpness
        self._saved = blocks.shared.save(blocks.vector("saved"))
        adaptive = sharpness.adaptive
        self._squares = (
            torch.square(self._saved, out=blocks.vector("squares")) if adaptive else None
        )

    def shared(self, i: int) -> AbstractContextManager[None]:
        factor = ascent_factor(self._sharpness.rho_shared, self._measures.shared_squares[i])
        row = self._clean.shared[i]
        return moved(self._blocks.shared, self._saved, row, factor, self._squares)

    def head(self, i: int) -> AbstractContextManager[None]:
        task = self._blocks.tasks[i]
        head = self._blocks.heads[task]
        factor = ascent_factor(self._sharpness.rho_heads, self._measures.head_squares[i])
        saved = head.values()
        squares = saved.square() if self._sharpness.adaptive else None
        return moved(head, saved, self._clean.heads[task], factor, squares)
