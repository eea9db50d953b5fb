"""One process by itself."""

from collections.abc import Mapping
from typing import Any, final

from torch import Tensor, nn
from typing_extensions import override

from lightning_flatmtl.engine.partition import Partition
from lightning_flatmtl.engine.processes.base import Agreement, Processes

__all__ = ["SingleProcess"]


@final
class SingleProcess(Processes):
    """A process that has nobody to agree with: an error is raised where it is."""

    @override
    def check_plan(
        self,
        plan: tuple[int, list[str]] | None,
        module: nn.Module,
        error: Exception | None = None,
    ) -> None:
        self.end(error)

    @override
    def agree(
        self,
        counts: Mapping[str, float],
        partition: Partition,
        module: nn.Module,
        named: Mapping[str, nn.Parameter],
        last: bool,
        error: Exception | None,
    ) -> Agreement:
        self.end(error)
        return Agreement(dict.fromkeys(counts, 1.0), dict(counts))

    @override
    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    @override
    def sum_on_host(self, tensor: Tensor) -> Tensor:
        return tensor

    @override
    def means(
        self,
        losses: Mapping[str, Tensor],
        counts: Mapping[str, float],
        error: Exception | None = None,
    ) -> dict[str, Tensor]:
        self.end(error)
        return dict(losses)

    @override
    def end(self, error: Exception | None) -> None:
        if error is not None:
            raise error

    @override
    def everyones(self, value: Any) -> list[Any]:
        return [value]

    @override
    def close(self) -> None:
        pass
