"""Delta_m as a metric: wraps the metrics of all tasks and compares them with single-task values."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities.distributed import gather_all_tensors
from torchmetrics.utilities.prints import rank_zero_warn
from torchmetrics.wrappers.abstract import WrapperMetric

from lightning_flatmtl.functional.delta_m import (
    DeltaSign,
    check_delta_m,
    check_directions,
    delta_m,
    delta_m_by_task,
)
from lightning_flatmtl.metrics.baselines import load_baselines

# The functions too: `metrics.delta_m` must not be this file.
__all__ = ["DeltaM", "delta_m", "delta_m_by_task"]

Unit = Metric | MetricCollection
Group = Mapping[str, Metric] | nn.ModuleDict  # Lightning modules hold metrics in ModuleDicts


class _Slot(NamedTuple):
    """A metric or collection that is updated as a whole, and what its results are called."""

    task: str
    names: dict[str, str]  # name in the unit's result -> full name
    unit: Unit


class DeltaM(WrapperMetric):
    r"""Mean relative improvement over single-task training (Maninis et al., 2019), in percent.

    .. math::
        \Delta_m = \frac{100}{K} \sum_{k=1}^{K} (-1)^{l_k} \frac{M_k - S_k}{|S_k|}

    over all :math:`K` metrics of all tasks: multi-task values :math:`M` come from the wrapped
    metrics, single-task values :math:`S` are the baselines, :math:`l_k = 1` where lower is better
    (`arXiv:1904.08918 <https://arxiv.org/abs/1904.08918>`_). The mathematics is
    :func:`lightning_flatmtl.functional.delta_m`.

    A metric's full name is ``"task/metric"``. The values are those of the whole epoch and of all
    processes, because every wrapped metric keeps and synchronises its own state.

    Args:
        metrics: The metrics to wrap, by task: ``{"left": {"accuracy": ...}}`` or
            ``{"left": MetricCollection(...)}`` (names without the collection's prefix and
            postfix), or by full name: ``{"left/accuracy": ...}``. A single metric under a bare
            task name has the task's name as its full name. Every metric must give one number.
        baselines: Single-task values by full name, or the path of a YAML or JSON file, see
            :func:`lightning_flatmtl.metrics.load_baselines`. Exactly the wrapped metrics, finite,
            not zero.
        sign: ``"gain"``, positive is better than single-task (the papers' text), or ``"drop"``,
            negative is better (the papers' tables).
        higher_is_better: Directions by full name, over those that the metrics declare. Needed for
            a metric that declares none.
        copy: Whether to wrap copies. With ``False`` the metrics are shared: what updates them
            elsewhere is seen here, and only ``compute`` is to be called; ``update``, ``forward``
            and ``reset`` of this object would act on the shared metrics.

    Raises:
        TypeError: If something in ``metrics`` is not a metric.
        ValueError: If baselines and metrics do not fit, a direction is unknown, or ``sign`` is.

    Example:
        >>> from torch import tensor
        >>> from torchmetrics.classification import MulticlassAccuracy
        >>> from torchmetrics.regression import MeanSquaredError
        >>> from lightning_flatmtl.metrics import DeltaM
        >>> metric = DeltaM(
        ...     {"digit": {"accuracy": MulticlassAccuracy(3)}, "size": {"mse": MeanSquaredError()}},
        ...     baselines={"digit/accuracy": 0.5, "size/mse": 2.0},
        ... )
        >>> preds = {"digit": tensor([0, 1, 2]), "size": tensor([1.0, 2.0])}
        >>> target = {"digit": tensor([0, 1, 2]), "size": tensor([3.0, 2.0])}
        >>> metric.update(preds, target)
        >>> metric.compute()  # accuracy 1.0 is 100 % better, mse 2.0 as good
        tensor(50.)
    """

    is_differentiable = False
    full_state_update = False

    def __init__(
        self,
        metrics: Mapping[str, Unit | Group],
        baselines: Mapping[str, Any] | str | PathLike[str],
        sign: DeltaSign = "gain",
        higher_is_better: Mapping[str, bool] | None = None,
        *,
        copy: bool = True,
    ) -> None:
        super().__init__()
        if sign not in get_args(DeltaSign):
            raise ValueError(f'`sign` must be "gain" or "drop", got {sign!r}.')
        check_directions(higher_is_better)
        self.sign = sign
        given = [
            slot._replace(unit=slot.unit.clone()) if copy else slot for slot in _slots(metrics)
        ]
        self.units = nn.ModuleList(slot.unit for slot in given)  # moved and saved with this module
        self._labels = [(slot.task, slot.names) for slot in given]
        self._baselines = load_baselines(baselines)
        self._directions = _directions(given, higher_is_better or {})
        check_delta_m(self._directions, self._baselines, self._directions)

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]
        """Whether a larger result is better, which depends on the sign."""
        return self.sign == "gain"

    @property
    def baselines(self) -> dict[str, float]:
        """The single-task values by full name."""
        return dict(self._baselines)

    def update(self, preds: Mapping[str, Any], target: Mapping[str, Any]) -> None:
        """Update the metrics of the tasks in this batch.

        Args:
            preds: Predictions by task. Tasks that are absent are left out.
            target: Targets by task, for all tasks of ``preds``.

        Raises:
            TypeError: If ``preds`` or ``target`` is not a mapping.
            ValueError: If a task of ``preds`` has no target or no metric.
        """
        for task, _, unit in self._present(preds, target):
            unit.update(preds[task], target[task])

    def compute(self) -> Tensor:
        """Return Delta_m of everything seen so far, in percent, a float tensor without dimensions.

        A task that no process has seen anything of is left out, with a warning: its metrics have
        no value yet, only one that they begin with. NaN if that is so for all tasks.

        Raises:
            ValueError: If a metric's value is not a single number.
        """
        values: dict[str, Any] = {}
        unseen: dict[str, None] = {}
        slots = self._slots()
        for slot, fed in zip(slots, self._fed([slot.unit for slot in slots]), strict=True):
            if fed:
                values |= _named(slot, slot.unit.compute())
            else:
                unseen[slot.task] = None
        if unseen:
            rank_zero_warn(
                f"Delta_m is that of the other tasks: nothing was seen of {', '.join(unseen)}. "
                "Update all tasks before `compute`.",
                UserWarning,
            )
        return self._delta_m(values)

    def _fed(self, units: Sequence[Unit]) -> list[bool]:
        """Whether any process has fed the metrics of each unit."""
        fed = [any(map(_is_fed, _members(unit))) for unit in units]
        members = [metric for unit in units for metric in _members(unit)]
        # They synchronise, so all processes are here.
        if not any(m._to_sync and m.distributed_available_fn() for m in members):
            return fed
        flags = torch.tensor(fed, device=members[0].device, dtype=torch.int32)
        return torch.stack(gather_all_tensors(flags, members[0].process_group)).any(0).tolist()

    def forward(self, preds: Mapping[str, Any], target: Mapping[str, Any]) -> Tensor:
        """Update the metrics and return this batch's Delta_m over the tasks it holds.

        Args:
            preds: As for :meth:`update`.
            target: As for :meth:`update`.

        Returns:
            Percent, a float tensor without dimensions; NaN if the batch holds no task.
        """
        values: dict[str, Any] = {}
        for slot in self._present(preds, target):
            values |= _named(slot, slot.unit(preds[slot.task], target[slot.task]))
        delta = self._delta_m(values)
        self._forward_cache = delta  # type: ignore[assignment] # what Lightning logs per step
        return delta

    def reset(self) -> None:
        """Reset all wrapped metrics."""
        for slot in self._slots():
            slot.unit.reset()
        super().reset()

    def persistent(self, mode: bool = False) -> None:
        """Choose whether the states of the wrapped metrics are saved in ``state_dict``."""
        for slot in self._slots():
            slot.unit.persistent(mode)

    def _delta_m(self, values: Mapping[str, Any]) -> Tensor:
        """Compare a batch's or an epoch's values with the baselines of the same metrics."""
        delta = torch.nan
        if values:
            baselines = {name: self._baselines[name] for name in values}
            delta = delta_m(values, baselines, self._directions, self.sign)
        devices = (value.device for value in values.values() if isinstance(value, Tensor))
        return torch.tensor(delta, device=next(devices, self.device))

    def _slots(self) -> list[_Slot]:
        """Put the labels and the registered modules, which a deep copy replaces, together."""
        units = cast("Iterable[Unit]", self.units)
        return [_Slot(*label, unit) for label, unit in zip(self._labels, units, strict=True)]

    def _present(self, preds: Mapping[str, Any], target: Mapping[str, Any]) -> list[_Slot]:
        """Return what the batch has predictions for."""
        for name, given in {"preds": preds, "target": target}.items():
            if not isinstance(given, Mapping):
                raise TypeError(f"`{name}` must be a mapping by task, got {type(given).__name__}.")
        lacking = [task for task in preds if task not in target]
        if lacking:
            raise ValueError(
                f"`target` must hold every task of `preds`, got none for {', '.join(lacking)}."
            )
        slots = self._slots()
        tasks = dict.fromkeys(slot.task for slot in slots)
        unknown = [task for task in preds if task not in tasks]
        if unknown:
            near = difflib.get_close_matches(str(unknown[0]), tasks, n=1)
            raise ValueError(
                f"`preds` must hold tasks among {', '.join(tasks)}, got {unknown[0]!r}"
                f"{f': did you mean {near[0]!r}?' if near else '; leave it out.'}"
            )
        return [slot for slot in slots if slot.task in preds]


def _slots(metrics: Mapping[str, Unit | Group]) -> Iterator[_Slot]:
    """Flatten the ways to give metrics; a collection stays whole, its metrics share states."""
    for name, given in metrics.items():
        if isinstance(given, MetricCollection):
            bases = zip(given.keys(), given.keys(keep_base=True), strict=True)
            yield _Slot(name, {str(key): f"{name}/{base}" for key, base in bases}, given)
        elif isinstance(given, Mapping | nn.ModuleDict):
            for inner, metric in given.items():
                yield _single(name, f"{name}/{inner}", metric)
        else:
            yield _single(name.partition("/")[0], name, given)


def _single(task: str, full_name: str, metric: Any) -> _Slot:
    if not isinstance(metric, Metric):
        raise TypeError(
            f"`metrics` must hold metrics, got {type(metric).__name__} for {full_name!r}."
        )
    return _Slot(task, {full_name: full_name}, metric)


def _named(slot: _Slot, result: Any) -> dict[str, Any]:
    """Put a result under full names."""
    if isinstance(slot.unit, Metric):
        result = dict.fromkeys(slot.names, result)
    if result.keys() != slot.names.keys() or any(isinstance(v, Mapping) for v in result.values()):
        raise ValueError(
            f"Every metric of {slot.task!r} must give a single number, "
            "got a mapping: wrap its entries as metrics of their own."
        )
    return {slot.names[key]: value for key, value in result.items()}


def _directions(slots: Iterable[_Slot], overrides: Mapping[str, bool]) -> dict[str, bool]:
    """Return every metric's direction by full name: the override if there is one, else its own."""
    directions: dict[str, bool] = {}
    for slot in slots:
        for name, metric in zip(slot.names.values(), _members(slot.unit), strict=True):
            if name in directions:
                raise ValueError(f"Two metrics are named {name!r}: rename one of them.")
            directions[name] = _direction(name, metric, overrides)
    unknown = [name for name in overrides if name not in directions]
    if unknown:
        raise ValueError(
            f"`higher_is_better` names metrics that do not exist: {', '.join(unknown)}; "
            f"known names: {', '.join(directions)}."
        )
    return directions


def _direction(name: str, metric: Metric, overrides: Mapping[str, bool]) -> bool:
    direction = overrides.get(name, metric.higher_is_better)
    if direction is None:
        raise ValueError(
            f"Metric {name!r} ({type(metric).__name__}) does not say whether higher is better: "
            f'pass `higher_is_better={{"{name}": ...}}`.'
        )
    return direction


def _is_fed(metric: Metric) -> bool:
    """Whether a metric has been updated, in this run or in the one whose state it has loaded."""
    # A wrapper counts no updates and has no state but that of the metrics inside.
    inner = [m for m in metric.modules() if isinstance(m, Metric) and m._defaults]
    return metric.update_called or not inner or any(map(_has_moved, inner))


def _has_moved(metric: Metric) -> bool:
    if metric.update_called:
        return True
    for name, default in metric._defaults.items():
        state = getattr(metric, name)
        if not isinstance(state, Tensor) or not isinstance(default, Tensor):  # lists of samples
            if len(state):
                return True
        elif not torch.equal(state, default.to(state.device)):
            return True
    return False


def _members(unit: Unit) -> list[Metric]:
    return [unit] if isinstance(unit, Metric) else list(unit.values(copy_state=False))
