"""Keeping further passes out of logs and metrics."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric

__all__ = ["log_replaced", "logs_silenced", "metrics_unmoved"]


@contextmanager
def metrics_unmoved(module: nn.Module) -> Iterator[None]:
    """Run the block on copies of what every torchmetrics metric of ``module`` has, and drop these.

    States, counters and caches are plain attributes of a metric; all of them are copied.
    """
    saved = [(metric, _attributes(metric)) for metric in module.modules() if _is_metric(metric)]
    try:
        for metric, attributes in saved:
            for name, value in attributes.items():
                setattr(metric, name, _copy(value))
        yield
    finally:
        for metric, attributes in saved:
            for name, value in attributes.items():
                setattr(metric, name, value)


def logs_silenced(module: LightningModule) -> AbstractContextManager[None]:
    """Run the block with a ``self.log`` that does nothing."""
    return log_replaced(module, _silent)


@contextmanager
def log_replaced(module: LightningModule, log: Callable[..., None]) -> Iterator[None]:
    """Run the block with another ``self.log``."""
    own = vars(module).get("log")
    module.log = log  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.log
        if own is not None:
            module.log = own  # type: ignore[method-assign]


def _silent(*_: Any, **__: Any) -> None:
    """``self.log`` in a further pass."""


def _is_metric(module: nn.Module) -> bool:
    return isinstance(module, Metric)


def _attributes(metric: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(metric).items()
        if value is None or isinstance(value, Tensor | list | int | float)
    }


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return list(value) if isinstance(value, list) else value
