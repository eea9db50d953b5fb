"""Gradients by whole backward passes, where the graph does not end in the parameters.

Reentrant gradient checkpointing runs the forward pass again within the backward pass, and sharded
layers bring their parameters together for each pass: ``torch.autograd.grad`` cannot reach them, and
walking the graph does not find them. What ``backward`` leaves in ``.grad`` tells both.
"""

from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, final

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_flatmtl.engine.autocast import outside_autocast
from lightning_flatmtl.engine.parameters.blocks import Blocks
from lightning_flatmtl.engine.partition import Partition
from lightning_flatmtl.engine.passes.buffers import frozen_buffers

__all__ = ["BackwardBlocks", "HiddenBlocks", "local_part", "observe_by_backward", "set_aside"]


class BackwardBlocks(Blocks, ABC):
    """Blocks that are differentiated by ``backward``, with the ``.grad`` that was there set aside.

    Args:
        setting: What is known of the step.
    """

    @override
    def differentiating(self) -> AbstractContextManager[Any]:
        return set_aside(self.trainable)

    @override
    def _grad(
        self, loss: Tensor, params: Sequence[Tensor], retain_graph: bool
    ) -> tuple[Tensor | None, ...]:
        with frozen_buffers(self._setting.module), outside_autocast(loss.device):
            loss.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]
        gradients = tuple(None if p.grad is None else local_part(p.grad) for p in params)
        for p in self.trainable:
            p.grad = None
        return gradients


@final
class HiddenBlocks(BackwardBlocks):
    """Whole parameters that the graph does not show."""


@contextmanager
def set_aside(params: Sequence[Tensor]) -> Iterator[None]:
    """Run the block with empty ``.grad`` and put what was there back."""
    kept = [p.grad for p in params]
    for p in params:
        p.grad = None
    try:
        yield
    finally:
        for p, gradient in zip(params, kept, strict=True):
            p.grad = gradient


def observe_by_backward(
    partition: Partition,
    losses: Mapping[str, Tensor],
    module: nn.Module,
    params: Sequence[nn.Parameter],
) -> None:
    """Note who reaches which parameter by a backward pass of each loss; the graphs stay."""
    with set_aside(params), frozen_buffers(module):
        for task, loss in losses.items():
            with outside_autocast(loss.device):
                loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
            partition.note(task, [p for p in params if p.grad is not None])
            for p in params:
                p.grad = None


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of ``tensor``: all of it, if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
