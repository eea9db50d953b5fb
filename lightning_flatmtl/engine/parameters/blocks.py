"""What one step works on: the shared block, a block for the head of every task, and the memory."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_flatmtl.engine.autocast import outside_autocast
from lightning_flatmtl.engine.parameters.flat_parameters import FlatParameters
from lightning_flatmtl.engine.parameters.workspace import Workspace
from lightning_flatmtl.engine.partition import Partition
from lightning_flatmtl.engine.processes.base import LocalRows, Processes, RowSums
from lightning_flatmtl.engine.processes.failure import Failure

__all__ = ["Blocks", "GraphBlocks", "ParameterBlocks", "Setting", "share_of", "unscaled"]


@dataclass(frozen=True)
class Setting:
    """What is known of a step once its clean losses are there.

    Args:
        module: The model.
        trainable: Its trainable parameters, in their order.
        partition: Which of them are shared.
        shares: For every task that any process has a loss of, the share of its samples that lies
            in this process; 0 for a task that it lacks.
        processes: The processes that share the step.
        workspace: Lends what is as long as the shared block.
        failure: Keeps an error of this process until the others are told.
        scale: The loss scale of 16-bit training.
        substitute: The task whose loss, times zero, stands in for those that this process lacks, if
            its layers wait for those of other processes.
        names: The names of the trainable parameters.
    """

    module: nn.Module
    trainable: Sequence[nn.Parameter]
    partition: Partition
    shares: Mapping[str, float]
    processes: Processes
    workspace: Workspace
    failure: Failure
    scale: Tensor | None = None
    substitute: str | None = None
    names: Sequence[str] = ()


class Blocks(ABC):
    """The parameters of one step: a shared block and a block for the head of every task.

    Args:
        setting: What is known of the step.
    """

    keep_graph = False
    """Whether the graph of the losses is needed after they have been differentiated."""

    of_samples = False
    """Whether the columns belong to the samples of this process, and no other has them."""

    def __init__(self, setting: Setting) -> None:
        self.module = setting.module
        self.trainable: list[Tensor] = list(setting.trainable)
        self.tasks = tuple(setting.shares)
        self.shares = setting.shares
        self.processes = setting.processes
        self.failure = setting.failure
        self._setting = setting
        self.shared = self._layout(setting.partition.shared(setting.trainable))
        self.heads = self.heads_of(self.tasks)

    @property
    def scaled(self) -> bool:
        """Whether the losses are scaled, so that an overflow is to be expected."""
        return self.scale is not None

    @property
    def scale(self) -> Tensor | None:
        """The loss scale, if there is one."""
        return self._setting.scale

    def heads_of(self, tasks: Iterable[str]) -> dict[str, FlatParameters]:
        """The heads of any tasks, those that this step lacks too."""
        heads = self._setting.partition.heads(tasks, self._setting.trainable)
        return {task: self._layout(head) for task, head in heads.items()}

    def _layout(self, params: Sequence[Tensor]) -> FlatParameters:
        return FlatParameters(params)

    def shared_names(self) -> tuple[tuple[str, int], ...] | None:
        """Name and size of every shared parameter, in the order of the columns.

        ``None`` where the columns are those of something else.
        """
        if self.of_samples or not self._setting.names:
            return None
        names = dict(zip(self._setting.trainable, self._setting.names, strict=True))
        pairs = zip(self.shared.params, self.shared.sizes, strict=True)
        return tuple((names[p], size) for p, size in pairs)  # type: ignore[index]

    # Memory.

    @property
    def width(self) -> int:
        """The number of columns, and what makes them a number that can be shared out evenly."""
        return self.processes.width(self.shared.numel)

    def rows(self, name: str, count: int | None = None) -> Tensor:
        """Memory ``[m, width]`` for a row of the shared block per task, by name.

        Columns beyond the block's, which make rows that can be shared out evenly, are zero.

        Args:
            name: The name.
            count: Another number of rows.
        """
        rows = self._take(name, (len(self.tasks) if count is None else count, self.width))
        rows[:, self.shared.numel :].zero_()
        return rows

    def row(self, name: str) -> Tensor:
        """Memory ``[width]`` for one row, by name."""
        return self._take(name, (self.width,))

    def vector(self, name: str) -> Tensor:
        """Memory ``[d]`` for one entry per shared parameter, by name."""
        return self._take(name, (self.shared.numel,))

    def _take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._setting.workspace.take(name, shape, self.shared.dtype, self.shared.device)

    # Differentiating.

    def source(self, task: str) -> str | None:
        """The task whose loss this process differentiates for ``task``; ``None`` for none."""
        return task if self.shares[task] else self._setting.substitute

    def differentiating(self) -> AbstractContextManager[Any]:
        """A context for all that is differentiated in a step."""
        return nullcontext()

    def differentiate(
        self, task: str, loss: Tensor, layouts: Sequence[FlatParameters], retain_graph: bool = False
    ) -> list[Sequence[Tensor | None]]:
        """Gradients with respect to several blocks, in one backward pass.

        They are this process's share of the gradients of the task's loss. With a loss scale the
        backward pass runs on the scaled loss, so that small gradients survive in 16 bits, and the
        gradients are divided by it.

        Args:
            task: The task.
            loss: The loss of its :meth:`source`.
            layouts: The blocks.
            retain_graph: Whether the graph is needed again.
        """
        params = [p for layout in layouts for p in layout.params]
        if not params:
            return [[] for _ in layouts]
        loss = self.own_share(task, loss)
        grads = self._true_grad(loss, params, retain_graph)
        pieces: list[Sequence[Tensor | None]] = []
        start = 0
        for layout in layouts:
            pieces.append(grads[start : start + len(layout.params)])
            start += len(layout.params)
        return pieces

    def own_share(self, task: str, loss: Tensor) -> Tensor:
        """What this process adds to the loss of a task."""
        return share_of(loss, self.processes.weight(self.shares[task]))

    def root(self, task: str, loss: Tensor) -> Tensor:
        """What the backward pass of a task begins at: its scaled loss."""
        loss = self.own_share(task, loss)
        return loss if self.scale is None else loss.float() * self.scale

    def differentiate_term(self, term: Tensor) -> Sequence[Tensor | None]:
        """Gradients of what belongs to no task, for all trainable parameters; the graph stays."""
        return self._true_grad(term, self.trainable, retain_graph=True)

    def _true_grad(
        self, loss: Tensor, params: Sequence[Tensor], retain_graph: bool
    ) -> tuple[Tensor | None, ...]:
        """The gradients, by way of the scaled loss if there is a loss scale."""
        if self.scale is not None:
            loss = loss.float() * self.scale
        return unscaled(self._grad(loss, params, retain_graph), self.scale)

    @abstractmethod
    def _grad(
        self, loss: Tensor, params: Sequence[Tensor], retain_graph: bool
    ) -> tuple[Tensor | None, ...]:
        """The gradients of what is given."""

    # Columns.

    def row_sums(self, rows: Tensor, here: bool = False) -> RowSums:
        """The sums of ``rows`` over all processes; with ``here`` those of this process only."""
        return LocalRows(rows) if here else self.processes.row_sums(rows)

    def sent(self, rows: Tensor) -> RowSums:
        """The sums of ``rows`` over all processes, all on the way."""
        sums = self.row_sums(rows)
        for i in range(len(rows)):
            sums.send(i)
        return sums

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
            direction: The aggregated row, ``[width]``.
            reached: For each entry of the shared block whether a loss reaches it; one that none
                reaches gets no gradient, as in plain training.
        """
        views = self.shared.views(direction[: self.shared.numel])
        gradients = [view if r else None for view, r in zip(views, reached, strict=True)]
        return list(self.shared.params), gradients


class GraphBlocks(Blocks, ABC):
    """Blocks whose graph ends in the parameters: ``torch.autograd.grad`` reaches them."""

    @override
    def _grad(
        self, loss: Tensor, params: Sequence[Tensor], retain_graph: bool
    ) -> tuple[Tensor | None, ...]:
        with outside_autocast(loss.device):
            return torch.autograd.grad(loss, params, retain_graph=retain_graph, allow_unused=True)


@final
class ParameterBlocks(GraphBlocks):
    """The shared parameters and those of the heads, all of them here."""


def unscaled(
    gradients: tuple[Tensor | None, ...], scale: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of a loss, given those of the loss times ``scale`` (``None`` for 1)."""
    if scale is None:
        return gradients
    return tuple(None if g is None else g.to(scale.dtype) / scale for g in gradients)


def share_of(loss: Tensor, share: float) -> Tensor:
    """What this process adds to the mean over the samples of all processes."""
    return loss if share == 1.0 else loss * share
