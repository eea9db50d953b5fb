"""What a module says of a batch: its task losses, and what its evaluation step logs."""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_flatmtl.hosting.batches import batch_size

__all__ = ["LogRecorder", "Means", "MetricCopies", "base_name", "evaluation_step"]

_STAGE = re.compile(r"^(val|valid|validation|test|eval)[/_.]")


def base_name(name: str) -> str:
    """A logged name without its stage.

    Example:
        >>> base_name("val/left/accuracy"), base_name("test_loss")
        ('left/accuracy', 'loss')
    """
    return _STAGE.sub("", name)


def evaluation_step(module: LightningModule, stage: str) -> Callable[[Any, int], Any]:
    """The module's step for validation or test data, of the first data loader."""
    step = module.test_step if stage == "test" else module.validation_step
    several = "dataloader_idx" in inspect.signature(step).parameters

    def run(batch: Any, batch_idx: int) -> Any:
        return step(batch, batch_idx, dataloader_idx=0) if several else step(batch, batch_idx)

    return run


class Means:
    """Means over samples, by name; nothing is read from the device before they are asked for."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[Tensor, float]] = {}
        """The sum over the samples, and their number."""

    def add(self, name: str, value: Any, weight: float) -> None:
        """Add the mean over ``weight`` samples; what is no single number is left out."""
        value = torch.as_tensor(value).detach()
        if value.numel() != 1:
            return
        value = value.reshape(()).to(torch.float32 if value.device.type == "mps" else torch.float64)
        # What no sample stands behind may be NaN.
        term = value * weight if weight else torch.zeros_like(value)
        summed, total = self.sums.get(name, (term.new_zeros(()), 0.0))
        self.sums[name] = summed + term.to(summed), total + weight

    def numbers(self) -> dict[str, tuple[float, float]]:
        """Sums and samples as numbers."""
        # One by one: what was logged as a number of Python's lies on the CPU.
        return {name: (summed.item(), total) for name, (summed, total) in self.sums.items()}


class LogRecorder:
    """Stands in for ``module.log`` and keeps what is logged, by its name without the stage.

    Values are means over the samples of a batch and weigh as much, as in Lightning. What is reduced
    otherwise than by its mean is left out.
    """

    def __init__(self) -> None:
        self.means = Means()
        self.metrics: dict[str, Metric] = {}
        """Metrics that were logged as such."""
        self._batch: Any = None

    def of_batch(self, batch: Any) -> None:
        """The batch whose size weighs what is logged without one."""
        self._batch = batch

    def __call__(
        self,
        name: str,
        value: Any,
        *_: Any,
        batch_size: int | None = None,
        reduce_fx: Any = "mean",
        **__: Any,
    ) -> None:
        """Take a value as ``self.log`` does."""
        if isinstance(value, Metric):
            self.metrics[base_name(name)] = value
        elif reduce_fx in {"mean", "avg", torch.mean}:
            weight = _size(self._batch) if batch_size is None else batch_size
            self.means.add(base_name(name), value, float(weight))


_size = batch_size


class MetricCopies:
    """Copies of a module's metrics to be used in their place, so that they stay as they are.

    Args:
        module: The module.
        n: How many copies of each.
    """

    def __init__(self, module: nn.Module, n: int) -> None:
        self._places = [
            (parent, name, child)
            for parent in module.modules()
            if not isinstance(parent, Metric | MetricCollection)
            for name, child in parent._modules.items()
            if isinstance(child, Metric | MetricCollection)
        ]
        metrics = {id(metric): metric for _, _, metric in self._places}
        self._copies = [{key: _fresh(metric) for key, metric in metrics.items()} for _ in range(n)]

    @contextmanager
    def lent(self, i: int) -> Iterator[None]:
        """Run the block with the i-th copies in the place of the metrics."""
        try:
            for parent, name, metric in self._places:
                parent._modules[name] = self._copies[i][id(metric)]
            yield
        finally:
            for parent, name, metric in self._places:
                parent._modules[name] = metric


def _fresh(metric: Metric | MetricCollection) -> Metric | MetricCollection:
    copied = deepcopy(metric)
    copied.reset()
    return copied
