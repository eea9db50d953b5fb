"""The Gram matrix of a step that needs none, for who looks at it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_flatmtl.engine.gradients.gram import gram_matrix
from lightning_flatmtl.engine.gradients.jacobian import task_gradients
from lightning_flatmtl.engine.gradients.without_matrix import gram_without_matrix
from lightning_flatmtl.engine.parameters.blocks import Blocks

__all__ = ["watched_gram"]


def watched_gram(
    losses: Mapping[str, Tensor], blocks: Blocks, without_matrix: bool = False
) -> Tensor | None:
    """Inner products of the task gradients, by one more backward pass for each loss.

    The graphs stay: the step differentiates the losses afterwards as it would have without this.

    Args:
        losses: The losses that this process has, with their graphs.
        blocks: The parameters.
        without_matrix: Whether to have the rows of a piece of the graph only, where it can be cut.

    Returns:
        ``[m, m]``, float64 on the CPU, the same in all processes; ``None`` if it is not finite,
        which is for the step to speak of.

    Raises:
        ProcessError: If another process has failed.
    """
    blocks.keep_graph = True
    with blocks.differentiating():
        gram = gram_without_matrix(losses, blocks) if without_matrix else None
        if gram is None:
            gram = gram_matrix(task_gradients(losses, blocks).sums.shards())
    parts = torch.cat([gram.flatten(), gram.new_full((1,), blocks.failure.flag)])
    host = blocks.processes.sum(parts).cpu()
    blocks.failure.tell(float(host[-1]))
    found = host[:-1].view(gram.shape)
    return found if found.isfinite().all() else None
