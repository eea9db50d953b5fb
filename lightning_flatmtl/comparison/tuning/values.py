"""The value of a trial: the metric of the epochs that a comparison would test."""

import math
import statistics
from collections.abc import Mapping, Sequence

from lightning_flatmtl.comparison.selection import Selection

__all__ = ["value_of"]


def value_of(
    curves: Sequence[Mapping[str, Mapping[int, float]]], metric: str, select: Selection
) -> float:
    """The mean over the seeds of a metric at the selected epochs.

    Args:
        curves: Values by name and epoch, for each seed.
        metric: Its name.
        select: Which epochs.

    Raises:
        ValueError: If it was not logged, or is not finite.

    Example:
        >>> curves = {"val/loss": {0: 3.0, 1: 1.0, 2: 2.0}, "val/hits": {0: 0.2, 1: 0.7, 2: 0.8}}
        >>> value_of([curves], "val/hits", Selection())
        0.8
        >>> value_of([curves], "val/hits", Selection(monitor="val/loss"))
        0.7
    """
    value = statistics.fmean(_of_seed(each, metric, select) for each in curves)
    if not math.isfinite(value):
        raise ValueError(f"{metric} was not finite")
    return value


def _of_seed(curves: Mapping[str, Mapping[int, float]], metric: str, select: Selection) -> float:
    by_epoch = curves.get(metric, {})
    if not by_epoch:
        raise ValueError(f"{metric} was not logged in validation")
    if select.monitor is None:
        return statistics.fmean([by_epoch[epoch] for epoch in sorted(by_epoch)][-select.count :])
    monitored = {e: v for e, v in curves.get(select.monitor, {}).items() if e in by_epoch}
    if not monitored:
        raise ValueError(f"{select.monitor} was not logged in validation")
    best = min if select.mode == "min" else max
    return by_epoch[best(monitored, key=lambda epoch: monitored[epoch])]
