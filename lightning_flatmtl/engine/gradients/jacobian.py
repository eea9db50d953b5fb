"""The task Jacobian: one row of shared gradients per task, and the gradients of the heads."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lightning_flatmtl.engine.gradients.flat_parts import FlatParts
from lightning_flatmtl.engine.gradients.gram import cross_gram, gram_matrix
from lightning_flatmtl.engine.parameters.blocks import Blocks
from lightning_flatmtl.engine.passes.buffers import statistics_put_back
from lightning_flatmtl.engine.processes.base import RowSums

__all__ = ["Gradients", "task_gradients"]


@dataclass(frozen=True)
class Gradients:
    """Gradients of all tasks at one point (or at one point each).

    With several processes these are this process's shares of the gradients, whose sums over all
    processes are the gradients of the losses.

    Args:
        shared: Shape ``[m, width]``, row i the gradient of task i with respect to the shared block.
        sums: The sums of these rows over all processes.
        heads: For each task the gradient with respect to its own head, a vector.
        reached: For each shared parameter whether any of the losses reaches it.
        at_shared: The losses of this process, detached, that the shared rows are gradients of,
            where they have been computed once more.
        at_heads: The same of the heads' gradients, where those are others.
        moved: Whether the rows are taken at another point than the parameters.
        flat: The rows, if they are kept elsewhere; then ``shared`` and ``sums`` are others.
    """

    shared: Tensor
    sums: RowSums
    heads: dict[str, Tensor]
    reached: list[bool]
    at_shared: Mapping[str, Tensor] = field(default_factory=dict)
    at_heads: Mapping[str, Tensor] = field(default_factory=dict)
    moved: bool = False
    flat: FlatParts | None = None

    def products(self, blocks: Blocks) -> Tensor:
        """What the Gram matrix is made of, of the columns that this process keeps, float64."""
        return gram_matrix(self.sums.shards()) if self.flat is None else self.flat.products(blocks)

    def gram(self, products: Tensor, blocks: Blocks) -> Tensor:
        """Inner products of the rows, ``[m, m]``.

        Args:
            products: :meth:`products`, the sum over all processes, on the CPU.
            blocks: The tasks.
        """
        return products if self.flat is None else self.flat.gram(products, blocks)

    def cross(self, clean: "Gradients", blocks: Blocks) -> Tensor:
        """What the inner products of the rows of ``clean`` with these are made of."""
        shards = clean.sums.shards()
        if self.flat is not None:
            return self.flat.cross(shards, blocks)
        return cross_gram(shards, self.sums.shards())

    def scaled_cross(self, products: Tensor) -> Tensor:
        """These inner products, from the sum of :meth:`cross` over all processes."""
        return products if self.flat is None else self.flat.scaled_cross(products)

    def columns(self, blocks: Blocks, looked_at: bool) -> Tensor:
        """The columns of the rows that this process keeps.

        Args:
            blocks: The tasks.
            looked_at: Whether their entries matter; if not, there may be none.
        """
        if self.flat is None:
            return self.sums.shards()
        return self.flat.dense(blocks) if looked_at else self.shared[:, :0]


def task_gradients(losses: Mapping[str, Tensor], blocks: Blocks, here: bool = False) -> Gradients:
    """Differentiate every loss by itself, so that no backward pass walks another task's head.

    With several processes a row is on its way to the others while the next is differentiated; an
    error is kept for the next sum, and what is returned then means nothing.

    Args:
        losses: The losses that this process has, with their graphs.
        blocks: The parameters.
        here: Whether the rows stay in this process for now.
    """
    rows = blocks.rows("loss")
    reached = [False] * len(blocks.shared.params)
    found = Gradients(rows, blocks.row_sums(rows, here), {}, reached)
    with blocks.failure.kept(), statistics_put_back(blocks.module):  # a checkpoint runs again
        if blocks.failure.error is None:
            _differentiate(losses, blocks, found)
    found.sums.complete()
    for task in blocks.tasks:
        if task not in found.heads:
            found.heads[task] = blocks.heads[task].zeros()
    return found


def _differentiate(losses: Mapping[str, Tensor], blocks: Blocks, found: Gradients) -> None:
    shared, rows = blocks.shared, found.shared
    last = [task for task in blocks.tasks if blocks.source(task) is not None][-1:]
    for i, task in enumerate(blocks.tasks):
        head, source = blocks.heads[task], blocks.source(task)
        if source is None:
            rows[i].zero_()
            found.heads[task] = head.zeros()
        else:
            of_shared, of_head = blocks.differentiate(
                task,
                losses[source],
                [shared, head],
                retain_graph=blocks.keep_graph or [task] != last,
            )
            shared.write(of_shared, rows[i, : shared.numel])
            for j, gradient in enumerate(of_shared):
                found.reached[j] |= gradient is not None
            found.heads[task] = head.flatten(of_head)
        found.sums.send(i)
