"""What the second pass borrows of buffers and statistics, and gives back."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = [
    "BufferSnapshot",
    "frozen_buffers",
    "frozen_statistics",
    "is_batch_norm",
    "statistics_put_back",
]

_FLAGGED = {
    _BatchNorm.forward,
    nn.BatchNorm1d.forward,
    nn.BatchNorm2d.forward,
    nn.BatchNorm3d.forward,
    nn.SyncBatchNorm.forward,
}
"""Forwards that leave their statistics alone when ``track_running_stats`` is off."""


class BufferSnapshot:
    """The values of the buffers of a module, except those of batch normalisation.

    Args:
        module: The module.
        layers: Its modules, for who has them at hand.
    """

    def __init__(self, module: nn.Module, layers: Iterable[nn.Module] | None = None) -> None:
        self._saved = [
            (layer, name, buffer, buffer.detach().clone())
            for layer in (module.modules() if layers is None else layers)
            if not is_batch_norm(layer)
            for name, buffer in layer._buffers.items()
            if buffer is not None
        ]

    @torch.no_grad()
    def put_back(self) -> None:
        """Give every buffer its value again, also one that was bound to a new tensor."""
        for layer, name, buffer, value in self._saved:
            buffer.copy_(value)
            layer._buffers[name] = buffer


@contextmanager
def statistics_put_back(module: nn.Module) -> Iterator[None]:
    """Run the block, then give batch normalisation the running statistics from before.

    For a block in which layers must behave as they did before, such as a checkpointed part that is
    run again in a backward pass and compares what it saves.
    """
    buffers = [
        buffer
        for layer in module.modules()
        if isinstance(layer, _BatchNorm) and layer.training
        for buffer in layer._buffers.values()
        if buffer is not None
    ]
    saved = [buffer.clone() for buffer in buffers]
    versions = [buffer._version for buffer in buffers]
    try:
        yield
    finally:
        if versions != [buffer._version for buffer in buffers]:
            with torch.no_grad():
                for buffer, value in zip(buffers, saved, strict=True):
                    buffer.copy_(value)


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Run the block with batch normalisation that leaves its running statistics alone.

    In training mode it normalises by the batch as it does anyway, and neither its running
    statistics nor ``num_batches_tracked`` move. What was borrowed comes back after an exception
    too.
    """
    flagged = [
        layer
        for layer in module.modules()
        # In evaluation mode its statistics are inputs and nothing moves.
        if isinstance(layer, _BatchNorm)
        and is_batch_norm(layer)
        and layer.training
        and layer.track_running_stats
    ]
    try:
        for layer in flagged:
            layer.track_running_stats = False
        yield
    finally:
        for layer in flagged:
            layer.track_running_stats = True


@contextmanager
def frozen_buffers(
    module: nn.Module, start: BufferSnapshot | None = None
) -> Iterator[Callable[[], None]]:
    """Run the block with batch statistics and leave every buffer of ``module`` as it was.

    Batch normalisation is left alone by :func:`frozen_statistics`. All other buffers (instance
    normalisation, spectral norm, moving averages, normalisation layers of your own) are copied and
    put back, also when they were bound to a new tensor.

    Yields a function that winds the buffers back to ``start``, for a block of several passes each
    of which is to begin there: a layer that reads a buffer that it moves is then the same function.

    Args:
        module: The module.
        start: The buffers before the clean pass; by default those before the block.
    """
    now = BufferSnapshot(module)
    try:
        with frozen_statistics(module):
            yield (now if start is None else start).put_back
    finally:
        now.put_back()


def is_batch_norm(layer: nn.Module) -> bool:
    """Whether ``layer`` is torch's batch normalisation, with torch's own forward."""
    return isinstance(layer, _BatchNorm) and type(layer).forward in _FLAGGED
