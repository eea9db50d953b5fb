"""Several processes over :mod:`torch.distributed`, with whole parameters or with parts of them."""

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_flatmtl.engine.partition import Partition
from lightning_flatmtl.engine.processes.base import Agreement, ProcessError, Processes, RowSums

__all__ = ["DataParallel", "Distributed", "Sharded", "synchronised_layers", "waiting_layers"]

_MOMENT = timedelta(seconds=5)
"""How long a process that has failed waits for others that may not come."""


class Distributed(Processes, ABC):
    """What the processes of a group of :mod:`torch.distributed` agree on and sum, in common.

    Args:
        timeout: How long the others may be late for a step, in seconds; then an error ends the job.

    Raises:
        RuntimeError: If torch.distributed has not been started.
    """

    def __init__(self, timeout: float = 1800.0) -> None:
        self.size = dist.get_world_size()
        self.rank = dist.get_rank()
        self._tasks: list[str] = []
        self._changes = -1
        self._layers_wait = False
        # A few numbers a step on the host: neither the device nor its queue is disturbed.
        self._host: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def check_plan(
        self,
        plan: tuple[int, list[str]] | None,
        module: nn.Module,
        error: Exception | None = None,
    ) -> None:
        """See :meth:`Processes.check_plan`; one exchange, for models with such layers only."""
        layers = waiting_layers(module)
        self._layers_wait = bool(layers)
        if not layers or (plan is None and error is None):
            return  # an error comes again in the clean pass, and is told then
        answers = self.everyones((plan, self._reason(error)))
        self._refuse_failed(error, [reason for _, reason in answers])
        plans = [plan for plan, _ in answers]
        passes = [encodings for encodings, _ in plans]
        if len(set(passes)) > 1:
            raise ProcessError(
                "With SyncBatchNorm or sharded parameters every process needs a label of some task "
                "in every batch, and the same data sets, got different numbers of encoder passes: "
                f"{passes}. Use BatchNorm, or batches with labels."
            )
        heads = [set(tasks) for _, tasks in plans]
        partial = sorted(set.union(*heads) - set.intersection(*heads))
        inside = {id(layer) for layer in layers}
        for task, head in getattr(module, "heads", nn.ModuleDict()).items():
            if task in partial and any(id(layer) in inside for layer in head.modules()):
                raise ProcessError(
                    f"With SyncBatchNorm in the head of task '{task}' every "
                    "process needs a label of the task in every batch, got a process without one. "
                    "Use BatchNorm in heads, or strategy='ddp'."
                )

    def agree(
        self,
        counts: Mapping[str, float],
        partition: Partition,
        module: nn.Module,
        named: Mapping[str, nn.Parameter],
        last: bool,
        error: Exception | None,
    ) -> Agreement:
        """See :meth:`Processes.agree`."""
        news = partition.changes != self._changes or any(t not in self._tasks for t in counts)
        sums = self._sum_up(counts, [news, last, error is not None, not counts], error)
        any_news, finished, failed, empty = sums[-4:]
        if failed:
            self.end(error)
        if finished not in (0, self.size):
            raise ProcessError(
                f"Expected all {self.size} processes to have the same number of batches, got "
                f"{int(finished)} at their last batch and the others not. Use a DistributedSampler "
                "(Lightning's default), `drop_last=True`, or `limit_train_batches`."
            )
        if any_news:
            self._exchange(counts, partition, named)
            sums = self._sum_up(counts, [False, last, False, not counts])
        m = len(self._tasks)
        totals = dict(zip(self._tasks, sums[:m], strict=True))
        present = dict(zip(self._tasks, sums[m : 2 * m], strict=True))
        partial = {task for task, n in present.items() if 0 < n < self.size}
        _refuse_waiting_layers(module, partition, partial, empty=0 < empty < self.size)
        samples = {task: n for task, n in totals.items() if n > 0}
        return Agreement({t: counts.get(t, 0.0) / n for t, n in samples.items()}, samples)

    def _sum_up(
        self,
        counts: Mapping[str, float],
        flags: Sequence[bool],
        error: Exception | None = None,
    ) -> list[float]:
        """Samples by task, processes by task, and processes by flag."""
        mine = [float(counts.get(task, 0.0)) for task in self._tasks]
        vector = [*mine, *(float(n > 0) for n in mine), *(float(flag) for flag in flags)]
        return self._sum_or_raise(torch.tensor(vector, dtype=torch.float64), error).tolist()

    def _sum_or_raise(self, numbers: Tensor, error: Exception | None) -> Tensor:
        """The sum on the host, for which one that has failed does not wait long.

        Where layers wait for the other processes these may be in one of them, and will not come
        before this process ends.
        """
        if error is None or not self._layers_wait:
            return self.sum_on_host(numbers)
        work = dist.all_reduce(numbers, group=self._host, async_op=True)
        try:
            work.wait(_MOMENT)
        except RuntimeError:
            raise error from None
        return numbers

    def end(self, error: Exception | None) -> None:
        """See :meth:`Processes.end`."""
        self._refuse_failed(error, self.everyones(self._reason(error)))

    def _reason(self, error: Exception | None) -> str | None:
        return None if error is None else f"process {self.rank}: {type(error).__name__}: {error}"

    def _refuse_failed(self, error: Exception | None, reasons: Sequence[str | None]) -> None:
        """Raise the error of this process, or say what another one has told."""
        if error is not None:
            raise error
        told = [reason for reason in reasons if reason is not None]
        if told:
            raise ProcessError("Another process failed. " + " ".join(told))

    def _exchange(
        self,
        counts: Mapping[str, float],
        partition: Partition,
        named: Mapping[str, nn.Parameter],
    ) -> None:
        found = list(counts), partition.state_dict(named), partition.needs_backward
        everyones = self.everyones(found)
        for tasks, _, _ in everyones:
            self._tasks += [task for task in tasks if task not in self._tasks]
        partition.merge([state for _, state, _ in everyones], named)
        partition.needs_backward = any(hides for _, _, hides in everyones)
        self._changes = partition.changes

    def everyones(self, value: Any) -> list[Any]:
        """See :meth:`Processes.everyones`."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._host)
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        """See :meth:`Processes.sum`."""
        dist.all_reduce(tensor)
        return tensor

    def sum_on_host(self, tensor: Tensor) -> Tensor:
        """See :meth:`Processes.sum_on_host`."""
        dist.all_reduce(tensor, group=self._host)
        return tensor

    def means(
        self,
        losses: Mapping[str, Tensor],
        counts: Mapping[str, float],
        error: Exception | None = None,
    ) -> dict[str, Tensor]:
        """See :meth:`Processes.means`."""
        n = [counts.get(task, 0.0) for task in self._tasks]
        sums = [float(losses[t]) * c if c else 0.0 for t, c in zip(self._tasks, n, strict=True)]
        failed = float(error is not None)
        mine = torch.tensor([[*sums, failed], [*n, 0.0]], dtype=torch.float64)
        summed = self._sum_or_raise(mine, error)
        if summed[0, -1] > 0:
            self.end(error)
        both = summed[:, :-1]
        means = dict(zip(self._tasks, (both[0] / both[1]).unbind(), strict=True))
        return {task: mean for task, mean in means.items() if not mean.isnan()}

    def close(self) -> None:
        """Leave the group."""
        if dist.is_initialized():
            dist.destroy_process_group(self._host)


@final
class DataParallel(Distributed):
    """Processes with whole parameters (DDP): each keeps the sums of its share of the columns.

    Args:
        timeout: See :class:`Distributed`.
    """

    def __init__(self, timeout: float = 1800.0) -> None:
        super().__init__(timeout)
        self.ddp_mean_correction = self.size  # the backward pass takes the mean of the processes

    def width(self, columns: int) -> int:
        """See :meth:`Processes.width`."""
        return -(-columns // self.size) * self.size

    def columns(self, width: int) -> slice:
        """See :meth:`Processes.columns`."""
        share = width // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def row_sums(self, rows: Tensor) -> RowSums:
        """See :meth:`Processes.row_sums`."""
        return _SharedRowSums(rows, self.size)

    def gather(self, shard: Tensor) -> Tensor:
        """See :meth:`Processes.gather`."""
        m, share = shard.shape
        pieces = shard.new_empty(self.size * m, share)
        dist.all_gather_into_tensor(pieces, shard.contiguous())
        return pieces.view(self.size, m, share).movedim(0, 1).reshape(m, self.size * share)


@final
class Sharded(Distributed):
    """Processes each of which holds a part of every parameter (FSDP2).

    The layers bring the parameters together for each pass and sum up their gradients after it: each
    process has its part of the finished rows, and the engine only adds up inner products.

    Args:
        timeout: See :class:`Distributed`.
    """

    sharded = True

    def weight(self, share: float) -> float:
        """See :meth:`Processes.weight`; the layers take means."""
        return share * self.size


def _refuse_waiting_layers(
    module: nn.Module, partition: Partition, partial: set[str], empty: bool
) -> None:
    """Refuse what would wait for ever in a layer that itself waits for the other processes."""
    if not (partial or empty):
        return
    if any(isinstance(layer, FSDPModule) for layer in module.modules()):
        raise ProcessError(
            "With sharded parameters every process needs a label of every task in every batch, got "
            f"a process without {sorted(partial) or 'any'}. Use strategy='ddp' for such data."
        )
    layers = synchronised_layers(module)
    if not layers:
        return
    if empty:
        raise ProcessError(
            "With SyncBatchNorm every process needs a label of some task in every batch, got a "
            "process without any. Use BatchNorm, or batches with labels."
        )
    params = [p for layer in layers for p in layer.parameters()]
    heads = [task for task in sorted(partial) if partition.head(task, params)]
    if heads:
        raise ProcessError(
            f"With SyncBatchNorm in the head of task '{heads[0]}' every process needs a label of "
            "the task in every batch, got a process without one. Use BatchNorm in heads."
        )


def waiting_layers(module: nn.Module) -> list[nn.Module]:
    """The layers of ``module`` that need all processes in each of their passes."""
    return [m for m in module.modules() if isinstance(m, nn.SyncBatchNorm | FSDPModule)]


def synchronised_layers(module: nn.Module) -> list[nn.Module]:
    """The layers of ``module`` that wait for the other processes in each of their passes."""
    return [layer for layer in module.modules() if isinstance(layer, nn.SyncBatchNorm)]


@dataclass
class _Fetched:
    row: int
    buffer: Tensor
    work: Any


@final
class _SharedRowSums(RowSums):
    """Reduce-scatter of each row as soon as it is complete, beside the next backward pass."""

    def __init__(self, rows: Tensor, size: int) -> None:
        super().__init__(rows)
        self._shards = rows.new_empty(len(rows), rows.shape[1] // size)
        self._sent: list[Any] = []
        self._next = 0
        self._fetched: _Fetched | None = None
        self._buffers: Sequence[Tensor] = ()

    def send(self, i: int) -> None:
        self._next = i + 1
        self._sent.append(dist.reduce_scatter_tensor(self._shards[i], self.rows[i], async_op=True))

    def complete(self) -> None:
        for i in range(self._next, len(self.rows)):
            self.send(i)

    def shards(self) -> Tensor:
        for work in self._sent:
            work.wait()
        self._sent.clear()
        return self._shards

    def fetch(self, i: int) -> None:
        if not self._buffers:
            self._buffers = [torch.empty_like(self.rows[0]) for _ in range(2)]
        # Not the one of the row before, which is in use.
        buffer, *_ = self._buffers = [*self._buffers[1:], self._buffers[0]]
        work = dist.all_gather_into_tensor(buffer, self._shards[i], async_op=True)
        self._fetched = _Fetched(i, buffer, work)

    def whole(self, i: int) -> Tensor:
        if self._fetched is None or self._fetched.row != i:
            self.fetch(i)
        assert self._fetched is not None
        self._fetched.work.wait()
        return self._fetched.buffer
