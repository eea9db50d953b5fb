"""What a run costs: seconds of a step, memory, parameters."""

import statistics
import sys
import time

import torch
from torch import nn

__all__ = ["Cost", "trainable_parameters"]


def trainable_parameters(module: nn.Module) -> int | None:
    """How many numbers are trained; ``None`` while a lazy layer has no shape."""
    params = [p for p in module.parameters() if p.requires_grad]
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in params):
        return None
    return sum(p.numel() for p in params)


class Cost:
    """Wall-clock seconds of training, without validation, by epoch.

    Args:
        device: The device of the model. A GPU is waited for at the end of an epoch and before a
            validation, and nowhere else.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device or torch.device("cpu")
        self._since: float | None = None
        self._spent = 0.0
        self._step = 0
        self._per_step: list[float] = []

    def begin(self, device: torch.device, step: int) -> None:
        """The fit begins with so many steps done."""
        self._device, self._step = device, step
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def go(self) -> None:
        """A batch begins."""
        if self._since is None:
            self._since = time.perf_counter()

    def pause(self) -> None:
        """Something else begins that is no training."""
        if self._since is None:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._spent += time.perf_counter() - self._since
        self._since = None

    def end_epoch(self, step: int) -> None:
        """An epoch has ended with so many steps done."""
        self.pause()
        if step > self._step:
            self._per_step.append(self._spent / (step - self._step))
        self._spent, self._step = 0.0, step

    @property
    def seconds_per_step(self) -> float | None:
        """The median over epochs, which warming up and a busy moment do not move."""
        return statistics.median(self._per_step) if self._per_step else None

    @property
    def peak_memory_mib(self) -> float | None:
        """Peak of what tensors take on a GPU; of the whole process on a CPU, imports included."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**20
        try:
            import resource  # noqa: PLC0415 # not on every system
        except ImportError:
            return None
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)

    def state_dict(self) -> list[float]:
        """What a checkpoint keeps."""
        return list(self._per_step)

    def load_state_dict(self, per_step: list[float]) -> None:
        """Go on from there."""
        self._per_step = list(per_step)
