"""Random streams in checkpoints, so that a resumed run draws what the unbroken one would have."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_flatmtl.engine.processes.base import Processes

__all__ = ["RandomStreams"]

_KEY = "lightning_flatmtl.random_streams"


class RandomStreams:
    """Saves the global random streams with a run and puts them back where it is resumed.

    Those of torch (the CPU and the device of the model), Python's :mod:`random` and NumPy's global
    generator. Nothing is drawn, and a fit that resumes nothing is left alone. Each of several
    processes has streams of its own: they are brought together where all come by, at the end of a
    validation and of an epoch's last batch, because a checkpoint may be saved by one process alone.
    One that is saved elsewhere has none of them.
    """

    def __init__(self) -> None:
        self._of_all: list[dict[str, Any]] = []
        """Those of all processes when they last came by."""
        self._loaded: list[dict[str, Any]] = []
        """Those of the checkpoint, to be put back when the fit begins."""
        self._may_load = False
        """Whether a checkpoint that comes is the one to resume from."""

    def begin(self) -> None:
        """A fit begins."""
        self._of_all, self._loaded = [], []
        self._may_load = True

    def exchange(self, trainer: Trainer, module: LightningModule, processes: Processes) -> None:
        """Let all processes know those of all; to be called in all of them."""
        fits = trainer.state.fn == "fit" and not trainer.sanity_checking
        if fits and processes.size > 1:
            self._of_all = processes.everyones(_read(module.device))

    def save(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the streams as they are now."""
        self._may_load = False  # what comes now puts something back in the middle of the fit
        own = _read(module.device)
        if trainer.world_size == 1:
            checkpoint[_KEY] = [own]
        elif self._of_all and _same(self._of_all[trainer.global_rank], own):
            checkpoint[_KEY] = self._of_all

    def load(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the streams to be put back; by another number of processes they are not."""
        saved = checkpoint.get(_KEY, [])
        if not self._may_load or len(saved) != trainer.world_size:
            return
        self._may_load = False
        self._loaded = saved
        if trainer.strategy.restore_checkpoint_after_setup:
            self.put_back(trainer, module)

    def put_back(self, trainer: Trainer, module: LightningModule) -> None:
        """Put the streams of the checkpoint back, before the first batch is drawn."""
        if self._loaded:
            _write(self._loaded[trainer.global_rank], module.device)
        self._loaded = []


def _read(device: torch.device) -> dict[str, Any]:
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "python": [version, torch.tensor(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
    }
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state(device)
    return state


def _write(state: dict[str, Any], device: torch.device) -> None:
    version, words, gauss = state["python"]
    name, keys, *rest = state["numpy"]
    torch.set_rng_state(state["torch"].cpu())
    random.setstate((version, tuple(words.tolist()), gauss))
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    if device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type].cpu(), device)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return all(_same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)
