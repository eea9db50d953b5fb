"""What the second pass borrows and gives back: statistics, buffers, random numbers."""

import random
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_flatmtl.engine.passes.attributes import AttributeSnapshot
from lightning_flatmtl.engine.errors import FlatMTLError

__all__ = [
    "BufferSnapshot",
    "ModuleSnapshot",
    "RandomTape",
    "frozen_buffers",
    "frozen_module",
    "frozen_parameters_unmoved",
    "frozen_statistics",
    "is_batch_norm",
    "noted_as_second_pass",
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
    """

    def __init__(self, module: nn.Module) -> None:
        self._saved = [
            (layer, name, buffer, buffer.detach().clone())
            for layer in module.modules()
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


class ModuleSnapshot:
    """Buffers and plain attributes of a module, so that a pass can begin where another did.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._buffers = BufferSnapshot(module)
        self._attributes = AttributeSnapshot(module)

    def put_back(self) -> None:
        """Let both be what they were."""
        self._attributes.put_back()
        self._buffers.put_back()

    def changed(self) -> list[str]:
        """The attributes that are not what they were and cannot be put back."""
        return self._attributes.changed()


_warned: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
"""The attributes that a module's user has been told of."""


@contextmanager
def frozen_module(
    module: nn.Module, start: ModuleSnapshot | None = None
) -> Iterator[Callable[[], None]]:
    """Run the block, then give ``module`` its buffers and plain attributes back.

    What cannot be put back is compared, and a warning names it once.

    Yields a function that winds both back to ``start``, for a block of several passes each of which
    is to begin there: a step that reads what it changes is then the same function.

    Args:
        module: The module.
        start: What was before the clean pass; by default what is before the block.
    """
    now = ModuleSnapshot(module)
    try:
        with frozen_statistics(module):
            yield (now if start is None else start).put_back
    finally:
        now.put_back()
    told = _warned.setdefault(module, set())
    new = [name for name in now.changed() if name not in told]
    if new:
        told.update(new)
        warnings.warn(
            f"A further run of the step on the same batch has changed {_listed(new)}, which cannot "
            "be put back: it changes several times a batch. Change it in `on_train_batch_end`, or "
            "only if `second_pass(self)` is false, see lightning_flatmtl.takeover.second_pass.",
            UserWarning,
            stacklevel=2,
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


@contextmanager
def noted_as_second_pass() -> Iterator[None]:
    """Let every error of the block say that the step has run once without it."""
    try:
        yield
    except Exception as error:
        error.add_note(
            "This is a second pass: the step has run once on this batch without an error and was "
            "being run again at other parameters (TaskSAM, FAMO). Look for what it can do only "
            "once; `lightning_flatmtl.takeover.second_pass(self)` is true meanwhile."
        )
        raise


@contextmanager
def frozen_parameters_unmoved(module: nn.Module) -> Iterator[None]:
    """Run the block and refuse it if it has moved a parameter that is not trained.

    Raises:
        FlatMTLError: If there is such a parameter, for example of an averaged teacher.
    """
    frozen = [(n, p) for n, p in module.named_parameters() if not p.requires_grad]
    before = [p._version for _, p in frozen if not p.is_inference()]
    yield
    if before != [p._version for _, p in frozen if not p.is_inference()]:
        names = [n for n, _ in frozen[:3]]
        raise FlatMTLError(
            "A pass at perturbed parameters has changed a parameter that is not trained (among "
            f"{len(frozen)} such as {names}), so it would change several times a batch. Change it "
            "in `on_train_batch_end`, or only if `second_pass(self)` is false, see "
            "lightning_flatmtl.takeover.second_pass."
        )


def is_batch_norm(layer: nn.Module) -> bool:
    """Whether ``layer`` is torch's batch normalisation, with torch's own forward."""
    return isinstance(layer, _BatchNorm) and type(layer).forward in _FLAGGED


class RandomTape:
    """Records where the random streams stand and winds them back, so that masks repeat.

    Covers torch (the CPU and, if given, one accelerator), Python's :mod:`random` and NumPy.

    Args:
        device: The device of the model.

    Example:
        >>> import torch
        >>> tape = RandomTape(torch.device("cpu"))
        >>> tape.mark("mask"); first = torch.rand(3)
        >>> with tape.replaying():
        ...     tape.rewind("mask"); again = torch.rand(3)
        >>> bool((first == again).all())
        True
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: dict[Hashable, tuple[Any, ...]] = {}

    def mark(self, key: Hashable) -> None:
        """Remember the present state under ``key``."""
        self._marks[key] = self._read()

    def rewind(self, key: Hashable) -> None:
        """Put the state that was marked under ``key`` back."""
        self._write(self._marks[key])

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Run the block, then let the streams go on as if it had not been."""
        now = self._read()
        try:
            yield
        finally:
            self._write(now)

    def _accelerator(self) -> Any:
        return None if self._device.type == "cpu" else torch.get_device_module(self._device)

    def _read(self) -> tuple[Any, ...]:
        accelerator = self._accelerator()
        state = accelerator.get_rng_state(self._device) if accelerator else None
        return torch.get_rng_state(), random.getstate(), np.random.get_state(), state

    def _write(self, state: tuple[Any, ...]) -> None:
        cpu, python, numpy, device = state
        torch.set_rng_state(cpu)
        random.setstate(python)
        np.random.set_state(numpy)
        if device is not None:
            self._accelerator().set_rng_state(device, self._device)
