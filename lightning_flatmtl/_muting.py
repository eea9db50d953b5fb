"""Keeping the second pass out of logs and metrics."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric

__all__ = ["metrics_unmoved"]


@contextmanager
def metrics_unmoved(module: nn.Module) -> Iterator[None]:
    """Run the block, then put every torchmetrics metric of ``module`` back as it was."""
    saved = [(metric, _read(metric)) for metric in module.modules() if isinstance(metric, Metric)]
    try:
        yield
    finally:
        for metric, state in saved:
            for name, value in state.items():
                setattr(metric, name, value)


def _read(metric: Metric) -> dict[str, Any]:
    names = [*metric._defaults, "_update_count", "_computed", "_forward_cache"]
    return {name: _copy(getattr(metric, name)) for name in names}


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return list(value) if isinstance(value, list) else value
