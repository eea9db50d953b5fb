"""The clean pass where only the mean of the task gradients is asked for: one backward pass."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_flatmtl.engine.checks import Finite
from lightning_flatmtl.engine.gradients.gram import squared_norms
from lightning_flatmtl.engine.gradients.jacobian import Gradients
from lightning_flatmtl.engine.gradients.stats import GradientStats
from lightning_flatmtl.engine.parameters.blocks import Blocks
from lightning_flatmtl.engine.passes.buffers import statistics_put_back
from lightning_flatmtl.engine.processes.base import LocalRows
from lightning_flatmtl.engine.sharpness import Sharpness

__all__ = ["mean_gradient", "needs_the_mean_only"]


def needs_the_mean_only(blocks: Blocks, sharpness: Sharpness | None, linear: bool) -> bool:
    """Whether no task's own clean gradient of the shared parameters is looked at.

    The perturbation is along the mean, or mixed from it, and the clean gradients cancel: in the
    direct arm, and with an aggregation that is linear.

    Args:
        blocks: The parameters.
        sharpness: The perturbations; ``None`` for none.
        linear: Whether the aggregation is a sum with weights that depend on no gradient.
    """
    if sharpness is None or sharpness.perturbation not in {"common", "samo"}:
        return False
    return blocks.processes.size == 1 and (linear or not sharpness.splits) and not sharpness.keeps


def mean_gradient(
    losses: Mapping[str, Tensor], blocks: Blocks, adaptive: bool
) -> tuple[Gradients, GradientStats]:
    """The mean of the shared gradients as the one row, the heads' gradients, and their norms.

    A parameter of a head is reached by no other task's loss: the gradient of the sum is that of its
    own.

    Args:
        losses: The losses, with their graphs, which go afterwards.
        blocks: The parameters.
        adaptive: Whether the norms are weighted by the parameters.

    Raises:
        NonFiniteError: If a loss or a gradient is NaN or infinite, without loss scaling.
        ScaledOverflowError: The same, with it.
    """
    check_finite = Finite(blocks.tasks, blocks.scaled)
    values = torch.stack([losses[task].detach().double() for task in blocks.tasks])
    heads = [blocks.heads[task] for task in blocks.tasks]
    total = torch.stack([losses[task] for task in blocks.tasks]).sum()
    layouts = [blocks.shared, *heads]
    with statistics_put_back(blocks.module):  # a checkpoint runs again
        found = blocks.differentiate(blocks.tasks[0], total, layouts, retain_graph=True)
    row = blocks.rows("loss", 1)
    columns = blocks.shared.numel
    blocks.shared.write(found[0], row[0, :columns])
    row /= len(blocks.tasks)
    of_heads = {
        task: head.flatten(of_head)
        for task, head, of_head in zip(blocks.tasks, heads, found[1:], strict=True)
    }
    scale = blocks.shared.save(blocks.vector("saved")) if adaptive else None
    numbers = torch.cat(
        [
            values.to(row.device),
            *(squared_norms(of_heads[task][None]) for task in blocks.tasks),
            *(
                squared_norms(of_heads[task][None], head.values() if adaptive else None)
                for task, head in zip(blocks.tasks, heads, strict=True)
            ),
            squared_norms(row),
            squared_norms(row[:, :columns], scale),
        ]
    ).cpu()
    m = len(blocks.tasks)
    values, squares, head_squares, of_mean = torch.split(numbers, [m, m, m, 2])
    check_finite(values, "loss")
    check_finite(squares, "head's gradient")
    if not of_mean[0].isfinite():
        check_finite(_squares_by_task(losses, blocks), "gradient")
    reached = [gradient is not None for gradient in found[0]]
    stats = GradientStats(
        gram=torch.diag(of_mean[0].expand(m)),
        losses=values,
        heads=squares,
        reached=reached,
        shared_squares=[float(of_mean[1])] * m,
        head_squares=head_squares.tolist(),
        crossed=False,
    )
    return Gradients(row, LocalRows(row), of_heads, reached), stats


def _squares_by_task(losses: Mapping[str, Tensor], blocks: Blocks) -> Tensor:
    """Squared norms of each task's gradient, to find the one that is not finite."""
    squares = []
    for task in blocks.tasks:
        (of_shared,) = blocks.differentiate(task, losses[task], [blocks.shared], retain_graph=True)
        squares.append(squared_norms(blocks.shared.flatten(of_shared)[None]))
    return torch.cat(squares).cpu()
