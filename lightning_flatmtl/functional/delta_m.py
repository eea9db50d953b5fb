"""Delta_m: what multi-task training gained over single-task training, in percent."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Literal, get_args

from torch import Tensor

__all__ = [
    "DeltaSign",
    "check_delta_m",
    "check_directions",
    "delta_m",
    "delta_m_by_task",
    "relative_improvement",
]

DeltaSign = Literal["gain", "drop"]


def delta_m(
    values: Mapping[str, float | Tensor],
    baselines: Mapping[str, float],
    higher_is_better: Mapping[str, bool],
    sign: DeltaSign = "gain",
) -> float:
    r"""Mean relative improvement over single-task training (Maninis et al., 2019), in percent.

    .. math::
        \Delta_m = \frac{100}{K} \sum_{k=1}^{K} (-1)^{l_k} \frac{M_k - S_k}{|S_k|}

    with the multi-task values :math:`M`, the single-task values :math:`S`, and :math:`l_k = 1`
    where lower is better. It is the mean over all *metrics*, so a task with many metrics weighs
    more (`arXiv:1904.08918 <https://arxiv.org/abs/1904.08918>`_; `arXiv:2211.13723
    <https://arxiv.org/abs/2211.13723>`_, section 5). The papers divide by :math:`S_k`; the
    absolute value is the same for their positive metrics and keeps "better" positive for metrics
    below zero, such as a log-likelihood.

    Args:
        values: Multi-task values by metric name, floats or tensors of one element. A NaN among
            them makes the result NaN.
        baselines: Single-task values under the same names and in the same units; finite, not zero.
        higher_is_better: Direction by metric name.
        sign: ``"gain"``, positive is better than single-task (the papers' text), or ``"drop"``,
            negative is better (the papers' tables).

    Returns:
        :math:`\Delta_m` in percent, or :math:`-\Delta_m` for ``sign="drop"``.

    Raises:
        ValueError: If there are no metrics, the names of ``values`` and ``baselines`` differ, a
            value is not a single number, a baseline is zero, NaN or infinite, a direction is
            missing or not a bool, ``sign`` is unknown, or one value is infinitely better and
            another infinitely worse.

    Example:
        >>> from lightning_flatmtl.functional.delta_m import delta_m
        >>> values = {"seg/miou": 0.44, "depth/error": 0.60}
        >>> baselines = {"seg/miou": 0.40, "depth/error": 0.50}
        >>> higher_is_better = {"seg/miou": True, "depth/error": False}
        >>> round(delta_m(values, baselines, higher_is_better), 6)  # (+10 % - 20 %) / 2
        -5.0
        >>> round(delta_m(values, baselines, higher_is_better, sign="drop"), 6)
        5.0
    """
    if sign not in get_args(DeltaSign):
        raise ValueError(f'`sign` must be "gain" or "drop", got {sign!r}.')
    improvements = relative_improvement(values, baselines, higher_is_better)
    _check_infinities(improvements)
    count = len(improvements)
    try:
        gain = math.fsum(improvements.values()) / count
    except OverflowError:  # the sum is too large for a float, the mean is not
        gain = math.fsum(value / count for value in improvements.values())
    return gain if sign == "gain" else -gain


def relative_improvement(
    values: Mapping[str, float | Tensor],
    baselines: Mapping[str, float],
    higher_is_better: Mapping[str, bool],
) -> dict[str, float]:
    r"""Relative improvement over single-task training, metric by metric, in percent.

    :math:`100 \, (-1)^{l_k} (M_k - S_k) / |S_k|`, the terms whose mean is :func:`delta_m`.

    Args:
        values: Multi-task values by metric name, floats or tensors of one element.
        baselines: Single-task values under the same names; finite and not zero.
        higher_is_better: Direction by metric name.

    Returns:
        Percent by metric name, in the order of ``values``; positive is better.

    Raises:
        ValueError: As :func:`delta_m`.

    Example:
        >>> from lightning_flatmtl.functional.delta_m import relative_improvement
        >>> directions = {"accuracy": True, "loss": False}
        >>> baselines = {"accuracy": 0.5, "loss": 2.0}
        >>> relative_improvement({"accuracy": 0.75, "loss": 3.0}, baselines, directions)
        {'accuracy': 50.0, 'loss': -50.0}
    """
    check_delta_m(values, baselines, higher_is_better)
    return {
        name: _improvement(_number(name, value), float(baselines[name]), higher_is_better[name])
        for name, value in values.items()
    }


def delta_m_by_task(
    values: Mapping[str, float | Tensor],
    baselines: Mapping[str, float],
    higher_is_better: Mapping[str, bool],
    sign: DeltaSign = "gain",
) -> dict[str, float]:
    r"""Mean relative improvement of every task by itself: who gains, and who pays, in percent.

    :func:`delta_m` over the metrics of one task after the other. The mean over all tasks may hide a
    task that is harmed (negative transfer).

    Args:
        values: Multi-task values by ``"task/metric"``; what is before the last ``/`` is the task.
        baselines: As for :func:`delta_m`.
        higher_is_better: As for :func:`delta_m`.
        sign: As for :func:`delta_m`.

    Returns:
        Percent by task, in the order of ``values``.

    Raises:
        ValueError: As :func:`delta_m`.

    Example:
        >>> from lightning_flatmtl.functional.delta_m import delta_m_by_task
        >>> values = {"seg/miou": 0.44, "depth/error": 0.60}
        >>> baselines = {"seg/miou": 0.40, "depth/error": 0.50}
        >>> by_task = delta_m_by_task(values, baselines, {"seg/miou": True, "depth/error": False})
        >>> {task: round(value, 6) for task, value in by_task.items()}
        {'seg': 10.0, 'depth': -20.0}
    """
    check_delta_m(values, baselines, higher_is_better)
    names: dict[str, list[str]] = {}
    for name in values:
        names.setdefault(name.rpartition("/")[0] or name, []).append(name)
    return {
        task: delta_m(
            {name: values[name] for name in own},
            {name: baselines[name] for name in own},
            higher_is_better,
            sign,
        )
        for task, own in names.items()
    }


def check_delta_m(
    names: Iterable[str], baselines: Mapping[str, float], higher_is_better: Mapping[str, bool]
) -> None:
    """Refuse baselines and directions that do not fit the metrics, before there are values.

    Args:
        names: Names of the metrics.
        baselines: Single-task values by metric name.
        higher_is_better: Direction by metric name.

    Raises:
        ValueError: As :func:`delta_m`, for everything but the values.
    """
    metrics = list(names)
    check_directions(higher_is_better)
    if not metrics:
        raise ValueError("Delta_m needs at least one metric, got none.")
    for name in metrics:
        if name not in baselines:
            raise ValueError(f"Metric {name!r} has no baseline; known names: {_listed(baselines)}.")
        _check_baseline(name, baselines[name])
        _check_direction(name, higher_is_better.get(name))
    unknown = [name for name in baselines if name not in metrics]
    if unknown:
        raise ValueError(
            f"`baselines` name metrics that do not exist: {_listed(unknown)}; "
            f"known names: {_listed(metrics)}."
        )


def check_directions(higher_is_better: Mapping[str, bool] | None) -> None:
    """Refuse one direction for all metrics.

    Args:
        higher_is_better: Direction by metric name; ``None`` for none.

    Raises:
        ValueError: If it is no mapping.
    """
    if higher_is_better is not None and not isinstance(higher_is_better, Mapping):
        raise ValueError(
            "`higher_is_better` must give the direction of every metric by its name, such as "
            f'{{"seg/miou": True}}, got {higher_is_better!r}.'
        )


def _check_infinities(improvements: Mapping[str, float]) -> None:
    better = [name for name, value in improvements.items() if value == math.inf]
    worse = [name for name, value in improvements.items() if value == -math.inf]
    if better and worse:
        raise ValueError(
            f"Delta_m has no value where {better[0]!r} is infinitely better than its baseline and "
            f"{worse[0]!r} infinitely worse: leave one of them out."
        )


def _improvement(value: float, baseline: float, higher_is_better: bool) -> float:
    change = 100.0 * (value - baseline) / abs(baseline)
    return change if higher_is_better else -change


def _number(name: str, value: float | Tensor) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(
            f"Metric {name!r} must be a single number, got shape {list(value.shape)}: "
            "reduce it to one value, for example by its mean."
        )
    if not isinstance(value, (Tensor, Real)):
        raise ValueError(f"Metric {name!r} must be a single number, got {value!r}.")
    return float(value)


def _check_baseline(name: str, baseline: float) -> None:
    if not isinstance(baseline, (Tensor, Real)) or not math.isfinite(baseline) or baseline == 0:
        raise ValueError(
            f"The baseline of {name!r} must be a finite number and not zero, got {baseline}."
        )


def _check_direction(name: str, higher_is_better: bool | None) -> None:
    if not isinstance(higher_is_better, bool):
        raise ValueError(
            f"`higher_is_better` must say True or False for {name!r}, got {higher_is_better!r}."
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
