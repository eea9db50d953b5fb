"""Keeping the second pass out of logs and metrics."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric

__all__ = ["metrics_unmoved"]


@contextmanager
def metrics_unmoved(module: nn.Module) -> Iterator[None]:
    """Run the block, then put every torchmetrics metric of ``module`` back as it was.

    States, counters and caches are plain attributes of a metric; all of them are copied.
    """
    saved = [(metric, _attributes(metric)) for metric in module.modules() if _is_metric(metric)]
    try:
        yield
    finally:
        for metric, attributes in saved:
            for name, value in attributes.items():
                setattr(metric, name, value)


def _is_metric(module: nn.Module) -> bool:
    return isinstance(module, Metric)


def _attributes(metric: nn.Module) -> dict[str, Any]:
    return {
        name: _copy(value)
        for name, value in vars(metric).items()
        if value is None or isinstance(value, Tensor | list | int | float)
    }


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return list(value) if isinstance(value, list) else value
