"""The RNG state of the clean pass, wound back for the second one."""

import random
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["RNGReplay"]


class RNGReplay:
    """Records where the random streams stand and winds them back, so that masks repeat.

    Covers torch (the CPU and, if given, one accelerator), Python's :mod:`random` and NumPy.

    Args:
        device: The device of the model.

    Example:
        >>> import torch
        >>> tape = RNGReplay(torch.device("cpu"))
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
