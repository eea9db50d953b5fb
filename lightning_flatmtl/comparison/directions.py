"""Whether higher is better, as the metrics that a module logs say it."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from torchmetrics import Metric

from lightning_flatmtl.hosting.muting import log_replaced

__all__ = ["by_name", "noted_directions"]

_LOWER = re.compile(
    r"loss|err(or)?(?![a-z])|[^a-z](rmse|mse|mae|nll|ece|brier|perplexity)(?![a-z])"
)
_HIGHER = re.compile(r"acc(uracy)?(?![a-z])|[^a-z](f1|auroc|auc|m?iou|precision|recall)(?![a-z])")


@contextmanager
def noted_directions(module: LightningModule, found: dict[str, bool]) -> Iterator[None]:
    """Run the block; ``found`` then has the direction of every torchmetrics metric it logged."""
    log = module.log

    def noting(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(value, Metric) and value.higher_is_better is not None:
            found[name] = value.higher_is_better
        log(name, value, *args, **kwargs)

    with log_replaced(module, noting):
        yield


def by_name(name: str, said: Mapping[str, bool]) -> bool | None:
    """The direction of a metric: as said by its name or the last part of it, else by its words.

    Example:
        >>> by_name("test/depth/error", {}), by_name("test/left/accuracy", {})
        (False, True)
        >>> by_name("test/left/score", {"score": True}), by_name("test/left/score", {}) is None
        (True, True)
    """
    parts = name.split("/")
    for start in range(len(parts)):
        if (whole := "/".join(parts[start:])) in said:
            return said[whole]
    last = f"/{name.lower()}"
    if _LOWER.search(last):
        return False
    return True if _HIGHER.search(last) else None
