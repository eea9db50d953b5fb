"""A batch that could not be read: all processes hear of it before the error goes on."""

from torch import Tensor, nn
from typing_extensions import override

from lightning_flatmtl.engine.passes.base import Passes

__all__ = ["FailedPasses"]


class FailedPasses(Passes):
    """Stands in for the passes of a batch that has turned out to be wrong.

    A process that raised at once would leave the others waiting for it: the engine asks for the
    losses, and tells the others what came instead.

    Args:
        error: What went wrong.
        module: See :class:`~lightning_flatmtl.engine.Passes`.
        planned: Whether the passes of other batches are :meth:`planned`.
    """

    def __init__(self, error: Exception, module: nn.Module, planned: bool) -> None:
        super().__init__(module)
        self._error, self._planned = error, planned

    @override
    def planned(self) -> tuple[int, list[str]] | None:
        if self._planned:
            raise self._error
        return None

    @override
    def clean(self) -> dict[str, Tensor]:
        raise self._error

    @override
    def again(self, task: str) -> Tensor:
        raise self._error
