"""The processes that train one model together, and the sums they make: the engine's only traffic.

With R processes the loss of a task is its mean over the samples of all of them, and so is its
gradient: the sum of the processes' rows, each of its share. Every decision that depends on data is
made on such sums, so that all processes make the same one.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn
from typing_extensions import override

from lightning_flatmtl.engine.errors import FlatMTLError
from lightning_flatmtl.engine.partition import Partition

__all__ = ["Agreement", "LocalRows", "ProcessError", "Processes", "RowSums"]


class ProcessError(FlatMTLError):
    """Another process cannot go on, so this one does not either; the message says why."""


@dataclass(frozen=True)
class Agreement:
    """The tasks of a step that any process has a loss of; empty if none has any.

    Args:
        shares: By task the share of its samples that lies in this process, 0 for none.
        samples: By task the samples in all processes.
    """

    shares: dict[str, float]
    samples: dict[str, float]


class RowSums(ABC):
    """The sums of rows over all processes; each process keeps a share of the columns.

    Args:
        rows: The rows of this process, ``[m, width]``.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    @abstractmethod
    def send(self, i: int) -> None:
        """Start adding up row ``i``, which is complete now."""

    @abstractmethod
    def complete(self) -> None:
        """Send the rows that have not been sent, as they are."""

    @abstractmethod
    def shards(self) -> Tensor:
        """The columns ``[m, width / R]`` of the sums that this process keeps."""

    @abstractmethod
    def fetch(self, i: int) -> None:
        """Start bringing the whole sum of row ``i`` here."""

    @abstractmethod
    def whole(self, i: int) -> Tensor:
        """The whole sum of row ``i``, ``[width]``."""


@final
class LocalRows(RowSums):
    """Rows that nobody adds to: those of one process, or that stay in it for now."""

    @override
    def send(self, i: int) -> None:
        pass

    @override
    def complete(self) -> None:
        pass

    @override
    def shards(self) -> Tensor:
        return self.rows

    @override
    def fetch(self, i: int) -> None:
        pass

    @override
    def whole(self, i: int) -> Tensor:
        return self.rows[i]


class Processes(ABC):
    """What the processes of a training agree on and sum."""

    size = 1
    rank = 0
    ddp_mean_correction = 1
    """What the sum of all processes' directions is divided by on its way to the parameters."""

    sharded = False
    """Whether each process holds a part of every parameter; gradients are summed already then."""

    @abstractmethod
    def check_plan(
        self,
        plan: tuple[int, list[str]] | None,
        module: nn.Module,
        error: Exception | None = None,
    ) -> None:
        """Refuse passes in which a layer would wait for a process that does not come to it.

        Args:
            plan: How many encoder passes and which heads this process is about to run.
            module: The model.
            error: What was wrong with the batch of this process.

        Raises:
            ProcessError: If the processes are about to run different parts of a model whose layers
                wait for each other, or if another process cannot go on.
        """

    @abstractmethod
    def agree(
        self,
        counts: Mapping[str, float],
        partition: Partition,
        module: nn.Module,
        named: Mapping[str, nn.Parameter],
        last: bool,
        error: Exception | None,
    ) -> "Agreement":
        """Which tasks the step has, and which share of each is in this process.

        Args:
            counts: For every task that this process has a loss of, its number of samples.
            partition: What this process has seen of it; afterwards what all have.
            module: The model.
            named: Its parameters by name.
            last: Whether this is the last batch that this process has.
            error: What went wrong in this process.

        Returns:
            The tasks, in an order that is the same everywhere.

        Raises:
            ProcessError: If another process cannot go on.
        """

    def weight(self, share: float) -> float:
        """What a loss is to be multiplied by, for gradients that add up to those of the mean."""
        return share

    def width(self, columns: int) -> int:
        """The width of rows that can be shared out evenly."""
        return columns

    def columns(self, width: int) -> slice:
        """The columns of a row of ``width`` that this process keeps."""
        return slice(0, width)

    def row_sums(self, rows: Tensor) -> RowSums:
        """The sums of ``rows`` over all processes, row by row."""
        return LocalRows(rows)

    @abstractmethod
    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of ``tensor`` over all processes, in place."""

    @abstractmethod
    def sum_on_host(self, tensor: Tensor) -> Tensor:
        """The same for a few numbers on the CPU."""

    def gather(self, shard: Tensor) -> Tensor:
        """The shards ``[m, width / R]`` of all processes side by side, ``[m, width]``."""
        return shard

    @abstractmethod
    def means(
        self,
        losses: Mapping[str, Tensor],
        counts: Mapping[str, float],
        error: Exception | None = None,
    ) -> dict[str, Tensor]:
        """The losses of known tasks, each the mean over the samples of all processes.

        Args:
            losses: The losses of this process.
            counts: The number of samples behind each.
            error: What went wrong in this process.

        Raises:
            ProcessError: If another process cannot go on.
        """

    @abstractmethod
    def end(self, error: Exception | None) -> None:
        """End the step in all processes, once one of them has failed.

        Args:
            error: What went wrong in this process.

        Raises:
            ProcessError: If another process has failed and this one has not.
        """

    @abstractmethod
    def everyones(self, value: Any) -> list[Any]:
        """What every process gives, by rank; small things that can be pickled."""

    @abstractmethod
    def close(self) -> None:
        """Give the connection back."""
