"""The second pass: every task's gradients at its own perturbed parameters."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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
    shared = blocks.shared
    rows = blocks.rows("second") if sharpness.moves_shared else clean.shared
    heads = dict(clean.heads)
    saved = shared.save(blocks.vector("saved"))
    adaptive = sharpness.adaptive
    squares = torch.square(saved, out=blocks.vector("squares")) if adaptive else None

    def keep_shared(i: int, gradients: Sequence[Tensor | None]) -> None:
        if sharpness.aggregate == "split":
            shared.write_difference(gradients, clean.shared[i], rows[i])
        else:
            shared.write(gradients, rows[i])

    for i, task in enumerate(blocks.tasks):
        head = blocks.heads[task]
        at_shared = moved(
            shared,
            saved,
            clean.shared[i],
            ascent_factor(sharpness.rho_shared, measures.shared_squares[i]),
            squares,
        )
        head_values = head.values()
        at_head = moved(
            head,
            head_values,
            clean.heads[task],
            ascent_factor(sharpness.rho_heads, measures.head_squares[i]),
            head_values.square() if adaptive else None,
        )
        if sharpness.point == "joint":
            with at_shared, at_head:
                of_shared, of_head = differentiate(passes.again(task), [shared, head], scale)
            keep_shared(i, of_shared)
            heads[task] = head.flatten(of_head)
            continue
        if sharpness.moves_shared and shared.params:
            with at_shared:
                (of_shared,) = differentiate(passes.again(task), [shared], scale)
            keep_shared(i, of_shared)
        if sharpness.moves_heads and head.params:
            with at_head:
                again = passes.head_again(task, head.params)
                (of_head,) = differentiate(again, [head], scale)
            heads[task] = head.flatten(of_head)
    return Gradients(rows, heads, clean.reached)
