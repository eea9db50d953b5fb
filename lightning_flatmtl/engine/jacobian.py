"""The task Jacobian: one row of shared gradients per task, and the gradients of the heads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_flatmtl.engine.errors import FlatMTLError
from lightning_flatmtl.engine.gram import gram_matrix, squared_norms
from lightning_flatmtl.engine.layout import Layout
from lightning_flatmtl.engine.partition import Partition
from lightning_flatmtl.engine.workspace import Workspace

__all__ = [
    "Blocks",
    "Gradients",
    "Measures",
    "measure",
    "measure_second",
    "task_gradients",
]


class Blocks:
    """The parameters of one step: a shared block and a block for the head of every task.

    Args:
        params: All trainable parameters, in their order.
        partition: Which of them are shared.
        tasks: The tasks that this step has a loss of.
        workspace: Lends what is as long as the shared block.
    """

    keep_graph = False
    """Whether the graph of the losses is needed after they have been differentiated."""

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        partition: Partition,
        tasks: Sequence[str],
        workspace: Workspace,
    ) -> None:
        self.tasks = tuple(tasks)
        self.shared = Layout(partition.shared(params))
        self.heads = {task: Layout(partition.head(task, params)) for task in self.tasks}
        self._workspace = workspace

    def rows(self, name: str) -> Tensor:
        """Memory ``[m, d]`` for a row of the shared block per task, by name."""
        return self._take(name, (len(self.tasks), self.shared.numel))

    def vector(self, name: str) -> Tensor:
        """Memory ``[d]`` for one entry per shared parameter, by name."""
        return self._take(name, (self.shared.numel,))

    def shared_gradients(
        self, direction: Tensor, reached: Sequence[bool]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """The parameters that the aggregated row concerns, and the gradient of each.

        Args:
            direction: The aggregated row, ``[d]``.
            reached: For each entry of the shared block whether a loss reaches it; one that none
                reaches gets no gradient, as in plain training.
        """
        views = self.shared.views(direction)
        gradients = [view if r else None for view, r in zip(views, reached, strict=True)]
        return list(self.shared.params), gradients

    def _take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._workspace.take(name, shape, self.shared.dtype, self.shared.device)


@dataclass(frozen=True)
class Gradients:
    """Gradients of all tasks at one point (or at one point each).

    Args:
        shared: Shape ``[m, d]``, row i the gradient of task i with respect to the shared block.
        heads: For each task the gradient with respect to its own head, a vector.
        reached: For each shared parameter whether any of the losses reaches it.
    """

    shared: Tensor
    heads: dict[str, Tensor]
    reached: list[bool]


def differentiate(
    loss: Tensor,
    layouts: Sequence[Layout],
    scale: Tensor | None = None,
    retain_graph: bool = False,
) -> list[Sequence[Tensor | None]]:
    """Gradients of a scalar with respect to several blocks, in one backward pass.

    Args:
        loss: The scalar.
        layouts: The blocks.
        scale: The loss scale of 16-bit training: the backward pass runs on the scaled loss, so that
            small gradients survive, and the gradients are divided by it.
        retain_graph: Whether the graph is needed again.
    """
    params = [p for layout in layouts for p in layout.params]
    if not params:
        return [[] for _ in layouts]
    if scale is not None:
        loss = loss.float() * scale
    grads = _grad(loss, params, retain_graph)
    if scale is not None:
        grads = tuple(None if g is None else g.to(scale.dtype) / scale for g in grads)
    pieces: list[Sequence[Tensor | None]] = []
    start = 0
    for layout in layouts:
        pieces.append(grads[start : start + len(layout.params)])
        start += len(layout.params)
    return pieces


def _grad(loss: Tensor, params: Sequence[Tensor], retain_graph: bool) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(loss, params, retain_graph=retain_graph, allow_unused=True)
    except RuntimeError as error:
        if "donated buffers" in str(error):
            raise FlatMTLError(
                "A compiled part of the model was compiled before the fit began, for one backward "
                "pass only, and every task needs one. Call `torch.compiler.reset()` before `fit`."
            ) from error
        if "use_reentrant" in str(error):
            raise FlatMTLError(
                "Gradient checkpointing with `use_reentrant=True` hides its parameters from "
                "per-task gradients. Use `torch.utils.checkpoint.checkpoint(..., "
                "use_reentrant=False)`."
            ) from error
        raise


def task_gradients(
    losses: Mapping[str, Tensor], blocks: Blocks, scale: Tensor | None = None
) -> Gradients:
    """Differentiate every loss by itself, so that no backward pass walks another task's head."""
    shared = blocks.shared
    rows = blocks.rows("loss")
    heads: dict[str, Tensor] = {}
    reached = [False] * len(shared.params)
    last = len(losses) - 1
    for i, (task, loss) in enumerate(losses.items()):
        head = blocks.heads[task]
        of_shared, of_head = differentiate(
            loss, [shared, head], scale, retain_graph=blocks.keep_graph or i < last
        )
        shared.write(of_shared, rows[i])
        reached = [r or g is not None for r, g in zip(reached, of_shared, strict=True)]
        heads[task] = head.flatten(of_head)
    return Gradients(rows, heads, reached)


@dataclass(frozen=True)
class Measures:
    """What the host needs to know of the clean gradients, fetched in one transfer.

    Args:
        gram: Inner products of the shared rows, ``[m, m]``, float64 on the CPU.
        losses: The losses ``[m]``, float64 on the CPU.
        shared_squares: Squared norms of the shared rows, weighted by the parameters if adaptive.
        head_squares: The same for the heads.
        has_shared: Whether there is any shared parameter.
    """

    gram: Tensor
    losses: Tensor
    shared_squares: list[float]
    head_squares: list[float]
    has_shared: bool

    @property
    def dead(self) -> bool:
        """Whether every task gradient is exactly zero."""
        shared = self.gram.diagonal().tolist()
        return not any(shared if self.has_shared else self.head_squares)


def measure(
    gradients: Gradients, losses: Mapping[str, Tensor], blocks: Blocks, adaptive: bool
) -> Measures:
    """Gram, losses and norms of the clean gradients.

    Args:
        gradients: The clean gradients.
        losses: The clean losses.
        blocks: The parameters.
        adaptive: Whether the norms are those of the gradients times the parameters.
    """
    m = len(losses)
    scale = blocks.shared.save(blocks.vector("saved")) if adaptive else None
    with torch.no_grad():
        gram = gram_matrix(gradients.shared)
        squares = gram.diagonal() if scale is None else squared_norms(gradients.shared, scale)
        heads = torch.cat(
            [
                squared_norms(gradients.heads[t][None], head.values() if adaptive else None)
                for t, head in blocks.heads.items()
            ]
        )
        values = torch.stack([loss.detach().to(torch.float64) for loss in losses.values()])
        packed = torch.cat([t.to(gram.device) for t in (gram.flatten(), values, squares, heads)])
    host = packed.cpu()
    gram, values, squares, heads = torch.split(host, [m * m, m, m, m])
    return Measures(
        gram.view(m, m), values, squares.tolist(), heads.tolist(), blocks.shared.numel > 0
    )


def measure_second(gradients: Gradients) -> tuple[Tensor, Tensor]:
    """Gram of the second pass ``[m, m]`` and squared norms of its head gradients ``[m]``.

    In float64 on the CPU, fetched in one transfer.
    """
    with torch.no_grad():
        gram = gram_matrix(gradients.shared)
        heads = torch.cat([squared_norms(head[None]) for head in gradients.heads.values()])
        host = torch.cat([gram.flatten(), heads.to(gram.device)]).cpu()
    m = len(gram)
    return host[: m * m].view(m, m), host[m * m :]
