"""The task Jacobian: one row of shared gradients per task, and the gradients of the heads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_flatmtl.engine.gram import gram_matrix, squared_norms
from lightning_flatmtl.engine.layout import Layout
from lightning_flatmtl.engine.partition import Partition
from lightning_flatmtl.engine.processes import Processes, RowSums
from lightning_flatmtl.engine.workspace import Workspace

__all__ = [
    "Ascent",
    "Blocks",
    "Gradients",
    "Measures",
    "measure",
    "measure_second",
    "share_of",
    "task_gradients",
]


class Blocks:
    """The parameters of one step: a shared block and a block for the head of every task.

    Args:
        params: All trainable parameters, in their order.
        partition: Which of them are shared.
        tasks: The tasks that this step has a loss of, in this process or another.
        workspace: Lends what is as long as the shared block.
        processes: The processes that share the step.
    """

    keep_graph = False
    """Whether the graph of the losses is needed after they have been differentiated."""

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        partition: Partition,
        tasks: Sequence[str],
        workspace: Workspace,
        processes: Processes,
    ) -> None:
        self.trainable: list[Tensor] = list(params)
        self.tasks = tuple(tasks)
        self.shared = Layout(partition.shared(params))
        self.heads = {task: Layout(partition.head(task, params)) for task in self.tasks}
        self.processes = processes
        self._workspace = workspace

    @property
    def width(self) -> int:
        """The number of columns, and what makes them a number that can be shared out evenly."""
        return self.processes.width(self.shared.numel)

    def row_sums(self, rows: Tensor) -> RowSums:
        """The sums of ``rows`` over all processes."""
        return self.processes.row_sums(rows)

    def rows(self, name: str) -> Tensor:
        """Memory ``[m, width]`` for a row of the shared block per task, by name.

        Columns beyond the block's, which make rows that can be shared out evenly, are zero.
        """
        rows = self._take(name, (len(self.tasks), self.width))
        rows[:, self.shared.numel :].zero_()
        return rows

    def vector(self, name: str) -> Tensor:
        """Memory ``[d]`` for one entry per shared parameter, by name."""
        return self._take(name, (self.shared.numel,))

    def row(self, name: str) -> Tensor:
        """Memory ``[width]`` for one row, by name."""
        return self._take(name, (self.width,))

    def differentiate(
        self,
        loss: Tensor,
        layouts: Sequence[Layout],
        scale: Tensor | None = None,
        retain_graph: bool = False,
    ) -> list[Sequence[Tensor | None]]:
        """Gradients of a scalar with respect to several blocks, in one backward pass.

        Args:
            loss: The scalar.
            layouts: The blocks.
            scale: The loss scale of 16-bit training: the backward pass runs on the scaled loss, so
                that small gradients survive, and the gradients are divided by it.
            retain_graph: Whether the graph is needed again.
        """
        params = [p for layout in layouts for p in layout.params]
        if not params:
            return [[] for _ in layouts]
        if scale is not None:
            loss = loss.float() * scale
        grads = self._grad(loss, params, retain_graph)
        if scale is not None:
            grads = tuple(None if g is None else g.to(scale.dtype) / scale for g in grads)
        pieces: list[Sequence[Tensor | None]] = []
        start = 0
        for layout in layouts:
            pieces.append(grads[start : start + len(layout.params)])
            start += len(layout.params)
        return pieces

    def _grad(
        self, loss: Tensor, params: Sequence[Tensor], retain_graph: bool
    ) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(loss, params, retain_graph=retain_graph, allow_unused=True)

    def kept_columns(self, vector: Tensor) -> Tensor:
        """Those entries of a vector ``[d]`` whose columns this process keeps the sums of."""
        if self.processes.size == 1 or self.processes.sharded:
            return vector
        padded = nn.functional.pad(vector, (0, self.width - len(vector)))
        return padded[self.processes.columns(self.width)]

    def shared_gradients(
        self, direction: Tensor, reached: Sequence[bool]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """The parameters that the aggregated row concerns, and the gradient of each.

        Args:
            direction: The aggregated row, ``[d]``.
            reached: For each entry of the shared block whether a loss reaches it; one that none
                reaches gets no gradient, as in plain training.
        """
        views = self.shared.views(direction[: self.shared.numel])
        gradients = [view if r else None for view, r in zip(views, reached, strict=True)]
        return list(self.shared.params), gradients

    def _take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._workspace.take(name, shape, self.shared.dtype, self.shared.device)


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
    """

    shared: Tensor
    sums: RowSums
    heads: dict[str, Tensor]
    reached: list[bool]


def task_gradients(
    losses: Mapping[str, Tensor],
    blocks: Blocks,
    shares: Mapping[str, float],
    scale: Tensor | None = None,
    stand_in: str | None = None,
) -> Gradients:
    """Differentiate every loss by itself, so that no backward pass walks another task's head.

    Args:
        losses: The losses that this process has.
        blocks: The parameters.
        shares: For every task, the share of its samples that this process has.
        scale: The loss scale of 16-bit training.
        stand_in: The task whose loss, times zero, stands in for those that this process lacks, if
            its layers wait for those of other processes.
    """
    shared = blocks.shared
    rows = blocks.rows("loss")
    sums = blocks.row_sums(rows)
    heads: dict[str, Tensor] = {}
    reached = [False] * len(shared.params)
    last = [task for task in blocks.tasks if shares[task] or stand_in][-1:]
    for i, task in enumerate(blocks.tasks):
        head = blocks.heads[task]
        source = task if shares[task] else stand_in
        if source is not None:
            of_shared, of_head = blocks.differentiate(
                share_of(losses[source], blocks.processes.weight(shares[task])),
                [shared, head],
                scale,
                retain_graph=blocks.keep_graph or [task] != last,
            )
            shared.write(of_shared, rows[i, : shared.numel])
            reached = [r or g is not None for r, g in zip(reached, of_shared, strict=True)]
            heads[task] = head.flatten(of_head)
        else:
            rows[i].zero_()
            heads[task] = head.zeros()
        sums.send(i)
    return Gradients(rows, sums, heads, reached)


def share_of(loss: Tensor, share: float) -> Tensor:
    """What this process adds to the mean over the samples of all processes."""
    return loss if share == 1.0 else loss * share


class Ascent:
    """The gradients that the parameters are perturbed along.

    Those of the tasks, whose sums over all processes are brought here; or, for a local
    perturbation, this process's share of them. With one process they are the same.

    Args:
        clean: The clean gradients.
        blocks: The parameters.
        local: Whether every process perturbs along its own share.
        needed: Whether there is a perturbation at all.
    """

    def __init__(self, clean: Gradients, blocks: Blocks, local: bool, needed: bool) -> None:
        processes = blocks.processes
        apart = needed and processes.size > 1 and not processes.sharded
        self.summed = apart and not local
        self.local = apart and local
        self._clean = clean
        self._columns = blocks.shared.numel
        self.heads = clean.heads
        if self.summed:
            parts = list(clean.heads.values())
            summed = torch.split(processes.sum(torch.cat(parts)), [len(part) for part in parts])
            self.heads = dict(zip(clean.heads, summed, strict=True))

    def fetch(self, i: int) -> None:
        """Start bringing row ``i`` here."""
        if self.summed and i < len(self._clean.shared):
            self._clean.sums.fetch(i)

    def row(self, i: int) -> Tensor:
        """The row ``[d]`` of the shared block for task ``i``."""
        row = self._clean.sums.whole(i) if self.summed else self._clean.shared[i]
        return row[: self._columns]


@dataclass(frozen=True)
class Measures:
    """What the host needs to know of the clean gradients, fetched in one transfer.

    All but the squares of a local perturbation are the same in all processes.

    Args:
        gram: Inner products of the shared rows, ``[m, m]``, float64 on the CPU.
        losses: The losses ``[m]``, float64 on the CPU.
        heads: Squared norms of the heads' gradients (or the sums of those of their shares): finite
            and positive if and only if the gradients are finite and not zero.
        reached: For each shared parameter whether any loss of any process reaches it.
        shared_squares: Squared norms of the rows to ascend along, weighted by the parameters if
            adaptive.
        head_squares: The same for the heads.
    """

    gram: Tensor
    losses: Tensor
    heads: Tensor
    reached: list[bool]
    shared_squares: list[float]
    head_squares: list[float]

    @property
    def dead(self) -> bool:
        """Whether every task gradient is exactly zero."""
        return not (self.gram.diagonal() if self.reached else self.heads).any()


@torch.no_grad()
def measure(
    gradients: Gradients,
    ascent: Ascent,
    losses: Mapping[str, Tensor],
    shares: Mapping[str, float],
    blocks: Blocks,
    adaptive: bool,
) -> Measures:
    """Gram, losses and norms of the clean gradients.

    Args:
        gradients: The clean gradients.
        ascent: What the parameters are perturbed along.
        losses: The clean losses that this process has.
        shares: For every task, the share of its samples that this process has.
        blocks: The parameters.
        adaptive: Whether the norms are those of the gradients times the parameters.
    """
    m, processes, shared = len(blocks.tasks), blocks.processes, blocks.shared
    scale = shared.save(blocks.vector("saved")) if adaptive else None
    shards = gradients.sums.shards()
    gram = gram_matrix(shards)
    zero = torch.zeros((), dtype=torch.float64, device=gram.device)
    values = [
        share_of(losses[t].detach().to(gram), shares[t]) if shares[t] else zero
        for t in blocks.tasks
    ]
    heads = _head_squares(ascent, blocks, adaptive=False)
    reached = torch.tensor(gradients.reached, dtype=torch.float64)
    parts = {"gram": gram.flatten(), "losses": torch.stack(values), "heads": heads}
    if processes.size > 1:
        parts["reached"] = reached
    if adaptive and not ascent.local:
        kept = None if scale is None else blocks.kept_columns(scale)
        parts["shared squares"] = squared_norms(shards, kept)
    if adaptive and processes.sharded:
        parts["head squares"] = _head_squares(ascent, blocks, adaptive)
    summed = processes.sum(torch.cat([part.to(gram.device) for part in parts.values()]))
    # What is the same in all processes, or is this one's own, is not summed.
    own = {}
    if ascent.local:
        own["shared squares"] = squared_norms(gradients.shared[:, : shared.numel], scale)
    if not processes.sharded and (adaptive or processes.size > 1):
        own["head squares"] = _head_squares(ascent, blocks, adaptive)
    host = torch.cat([summed, *(part.to(gram.device) for part in own.values())]).cpu()
    names = [*parts, *own]
    pieces = torch.split(host, [len(part) for part in (*parts.values(), *own.values())])
    found = dict(zip(names, pieces, strict=True))
    gram = found["gram"].view(m, m)
    return Measures(
        gram=gram,
        losses=found["losses"],
        heads=found["heads"],
        reached=[n > 0 for n in found.get("reached", reached).tolist()],
        shared_squares=found.get("shared squares", gram.diagonal()).tolist(),
        head_squares=found.get("head squares", found["heads"]).tolist(),
    )


@torch.no_grad()
def measure_second(gradients: Gradients, processes: Processes) -> tuple[Tensor, Tensor]:
    """Gram of the second pass ``[m, m]`` and squared norms of its head gradients ``[m]``.

    In float64 on the CPU, fetched in one transfer, the same in all processes. With several
    processes the second are sums of squares of shares: enough to see what is not finite.
    """
    gram = gram_matrix(gradients.sums.shards())
    heads = torch.cat([squared_norms(head[None]) for head in gradients.heads.values()])
    host = processes.sum(torch.cat([gram.flatten(), heads.to(gram.device)])).cpu()
    m = len(gram)
    return host[: m * m].view(m, m), host[m * m :]


def _head_squares(ascent: Ascent, blocks: Blocks, adaptive: bool) -> Tensor:
    pairs = [(ascent.heads[task], head) for task, head in blocks.heads.items()]
    return torch.cat(
        [squared_norms(g[None], head.values() if adaptive else None) for g, head in pairs]
    )
