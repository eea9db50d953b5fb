"""A model that does not split: every pass computes all losses."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from lightning_flatmtl.engine.errors import FlatMTLError
from lightning_flatmtl.engine.passes.base import Passes, plain

__all__ = ["WholePasses"]


class WholePasses(Passes):
    """For a model that does not split: every pass computes all losses.

    Args:
        losses: Computes the losses of the batch by task name.
        module: See :class:`Passes`.
        around: See :class:`Passes`.
        count: See :class:`Passes`.
    """

    def __init__(
        self,
        losses: Callable[[], Mapping[str, Tensor]],
        module: nn.Module,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
        count: Callable[[str], float] | None = None,
    ) -> None:
        super().__init__(module, around, count)
        self._losses = losses

    def clean(self) -> dict[str, Tensor]:
        """All losses of the batch."""
        losses = self._record("losses", self._losses)
        if not isinstance(losses, Mapping):
            raise ValueError(
                "`losses` must return a mapping from task names to scalar losses, got "
                f"{type(losses).__name__}."
            )
        return {task: plain(loss) for task, loss in losses.items()}

    def again(self, task: str) -> Tensor:
        """All losses once more; that of ``task`` is returned."""
        return self.again_all([task])[task]

    def again_all(self, tasks: Sequence[str]) -> dict[str, Tensor]:
        """All losses once more."""
        losses = self._replay("losses", self._losses)
        for task in tasks:
            if task not in losses:
                raise FlatMTLError(
                    f"The loss of task '{task}' was there at first and is not when the same batch "
                    f"is run at perturbed parameters, got losses of {sorted(losses)}. A step must "
                    "give the same losses when it is run again: do not count its runs from "
                    "outside, and let nothing depend on "
                    "`lightning_flatmtl.takeover.second_pass` that they need."
                )
        return {task: plain(losses[task]) for task in tasks}
