"""The forward passes of one step: once clean, then again at perturbed parameters.

The engine never sees a batch or a module. It sees a :class:`Passes`, which knows how to compute the
losses cleanly and how to compute one task's loss again under the same random numbers.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_flatmtl.engine.passes.rng_replay import RNGReplay
from lightning_flatmtl.engine.passes.state_guards import (
    ModuleSnapshot,
    frozen_module,
    frozen_parameters_unmoved,
    noted_as_second_pass,
)

__all__ = ["Passes", "plain"]

T = TypeVar("T")


class Passes(ABC):
    """How the losses of one batch are computed, and computed again.

    Args:
        module: Its buffers are protected during the second passes; the random stream of its device
            is replayed.
        around: A context to enter around the second passes, to mute what would count twice.
        count: How many samples a task's loss is the mean of, asked after the clean pass; several
            processes weigh their losses by it.
    """

    def __init__(
        self,
        module: nn.Module,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
        count: Callable[[str], float] | None = None,
    ) -> None:
        self._count = count
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self._module = module
        self._around = around
        self._tape = RNGReplay(device)
        self._start: ModuleSnapshot | None = None
        self._put_back: Callable[[], None] | None = None
        self.penalty: Callable[[], Any] | None = None
        """Computes the term that belongs to no task, asked once, after the clean pass."""
        self.at_features = False
        """Whether the task Jacobian is to be taken at the features."""
        self.without_matrix = False
        """Whether the Gram matrix is to be found without the rows of the whole task Jacobian."""
        self.features: list[Tensor] | None = None
        """The features with their graph; ``None`` elsewhere, and where the batch has no task."""
        self.common: set[Any] = set()
        """Parameters that all tasks reach, also those that this batch lacks."""

    @abstractmethod
    def clean(self) -> dict[str, Tensor]:
        """The losses of the tasks that the batch has, with their graphs."""

    @abstractmethod
    def again(self, task: str) -> Tensor:
        """The loss of ``task`` at the parameters as they are now, the whole model run again."""

    def again_all(self, tasks: Sequence[str]) -> dict[str, Tensor]:
        """The losses of several tasks at the parameters as they are now, of one run."""
        return {task: self.again(task) for task in tasks}

    def head_again(self, task: str, head: list[Tensor]) -> Tensor:
        """The loss of ``task`` when only its ``head`` has moved since the clean pass."""
        return self.again(task)

    def planned(self) -> tuple[int, list[str]] | None:
        """How many encoder passes and which heads the clean pass will run; ``None`` if unknown."""
        return None

    def count(self, task: str) -> float:
        """How many samples the loss of ``task`` is the mean of; 1 if it is not known."""
        return 1.0 if self._count is None else self._count(task)

    def keep_start(self) -> None:
        """Remember buffers and attributes, before the clean pass, for passes that begin there."""
        self._start = ModuleSnapshot(self._module)

    @contextmanager
    def repeating(self) -> Iterator[None]:
        """Around the second passes: module and random streams afterwards are as before."""
        noted = noted_as_second_pass()
        frozen = frozen_module(self._module, self._start)
        unmoved = frozen_parameters_unmoved(self._module)
        with noted, frozen as put_back, self._around(), self._tape.replaying(), unmoved:
            self._put_back = put_back
            yield

    def begin_at(self, put_back: Callable[[], None]) -> None:
        """Let further passes begin where ``put_back`` takes the module.

        For who guards module and random streams by other means than :meth:`repeating`.
        """
        self._put_back = put_back

    def _record(self, key: Hashable, function: Callable[[], T]) -> T:
        self._tape.mark(key)
        return function()

    def _replay(self, key: Hashable, function: Callable[[], T], wind_back: bool = True) -> T:
        """Run ``function`` with the random numbers of ``key``, and the module of the start."""
        self._tape.rewind(key)
        if wind_back and self._put_back is not None:
            self._put_back()
        return function()


def plain(loss: Tensor) -> Tensor:
    """A loss that carries attributes of a Tensor subclass as a Tensor, with the same graph."""
    if not isinstance(loss, Tensor) or type(loss) is Tensor or isinstance(loss, DTensor):
        return loss  # what is no tensor is refused elsewhere
    return loss.as_subclass(Tensor)
