"""Means, deviations, Delta_m and cost of every method, from the rows of all runs."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_flatmtl.comparison.directions import by_name as direction_of
from lightning_flatmtl.comparison.metric_names import (
    is_loss,
    is_share,
    label,
    named,
    task_of,
    without_task,
)
from lightning_flatmtl.comparison.results import Row, metrics_of
from lightning_flatmtl.comparison.settings import SINGLE_TASK
from lightning_flatmtl.functional.delta_m import delta_m

__all__ = ["COST", "DELTA_M", "PARAMETERS", "Column", "Figure", "Summary", "summarize"]

DELTA_M, COST, PARAMETERS = "test/delta_m", "cost", "parameters"

BySeed = dict[int, float]


@dataclass(frozen=True)
class Figure:
    """A figure of a method over its seeds.

    Args:
        by_seed: The values.
    """

    by_seed: BySeed

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return _mean(list(self.by_seed.values()))

    @property
    def std(self) -> float | None:
        """Standard deviation of a sample; ``None`` for one seed."""
        values = list(self.by_seed.values())
        if len(values) < 2:
            return None
        return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan

    @property
    def error(self) -> float | None:
        """Standard error of the mean; ``None`` for one seed."""
        return None if self.std is None else self.std / math.sqrt(len(self.by_seed))


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Args:
        name: The logged name, ``average/...``, ``test/delta_m``, ``cost`` or ``parameters``.
        title: What people read.
        higher_is_better: The direction; ``None`` if it is unknown or does not matter.
        scale: What values are multiplied by to be shown.
        unit: Of what is shown.
        average: The column that has the mean of this metric over the tasks, if there is one.
    """

    name: str
    title: str
    higher_is_better: bool | None
    scale: float = 1.0
    unit: str = ""
    average: str | None = None

    @property
    def heading(self) -> str:
        """Title and unit."""
        return f"{self.title} [{self.unit}]" if self.unit else self.title


@dataclass(frozen=True)
class Summary:
    """The table in numbers.

    Args:
        columns: Its columns.
        figures: By method and column.
        reference: The method that cost is relative to.
        gains: What flatness adds: by ``"F-X over X"`` and column, seed by seed.
        failures: Method, task, seed and error of runs that have failed.
        missing: Runs that are neither done nor failed, by method.
        notes: What a reader should know.
    """

    columns: tuple[Column, ...]
    figures: dict[str, dict[str, Figure]]
    reference: str | None = None
    gains: dict[str, dict[str, Figure]] = field(default_factory=dict)
    failures: tuple[Row, ...] = ()
    missing: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def best(self, column: Column) -> set[str]:
        """The methods with the best mean of a column; the single-task runs do not take part."""
        means = self._means(column)
        if column.higher_is_better is None or not means:
            return set()
        best = (max if column.higher_is_better else min)(means.values())
        return {method for method, mean in means.items() if mean == best}

    def close(self, column: Column) -> set[str]:
        """The methods within one standard error (of the best) of the best mean."""
        means, best = self._means(column), self.best(column)
        if not best:
            return set()
        error = max(self.figures[method][column.name].error or 0.0 for method in best)
        top = means[next(iter(best))]
        return {m for m, mean in means.items() if m not in best and abs(mean - top) <= error}

    def _means(self, column: Column) -> dict[str, float]:
        found = {
            method: figures[column.name].mean
            for method, figures in self.figures.items()
            if method != SINGLE_TASK and column.name in figures
        }
        return {method: mean for method, mean in found.items() if math.isfinite(mean)}

    def as_json(self) -> dict[str, Any]:
        """What ``summary.json`` holds."""
        return {
            "columns": [vars(column) for column in self.columns],
            "methods": {m: _listed(figures) for m, figures in self.figures.items()},
            "cost_relative_to": self.reference,
            "gains": {pair: _listed(figures) for pair, figures in self.gains.items()},
            "failures": list(self.failures),
            "missing": self.missing,
            "notes": list(self.notes),
        }


def summarize(
    rows: Sequence[Row],
    methods: Sequence[str],
    tasks: Sequence[str],
    *,
    wanted: Sequence[str] | None = None,
    improving: Sequence[str] | None = None,
    directions: Mapping[str, bool] | None = None,
    reference: str | None = None,
) -> Summary:
    """Sum up the rows; ``test/delta_m`` is added to those whose seed has all single-task runs.

    Args:
        rows: A row a run, with test metrics under their logged names.
        methods: The methods in the order of the table.
        tasks: The names of the tasks.
        wanted: The metrics of the table; all by default.
        improving: Those that Delta_m is made of; by default all of tasks.
        directions: Whether higher is better, by metric.
        reference: The method that cost is relative to; the first by default.

    Raises:
        ValueError: If no run has logged a metric that is wanted.
    """
    said = directions or {}
    done = [row for row in rows if row["status"] == "done"]
    logged = dict.fromkeys(name for row in done for name in metrics_of(row))
    names = named(wanted, logged) if wanted is not None and done else list(logged)
    names = [name for name in names if name.rpartition("/")[2] != "delta_m"]  # by task, too
    higher = {name: direction_of(name, said) for name in names}
    values = _values(done, names, tasks)
    if improving is not None and done:
        compared = named(improving, names, "delta_m")
    else:
        compared = _compared(names, tasks, wanted is not None)
    unknown = [name for name in compared if higher[name] is None]
    notes = []
    if unknown:
        notes.append(
            f"Nobody says whether higher is better for {', '.join(unknown)}: Delta_m leaves it "
            "out. Say it under `higher_is_better:`."
        )
    improved = _delta_m(values, [n for n in compared if higher[n] is not None], higher)
    _put_into_rows(done, improved)
    groups = _groups(names, tasks)
    averages = _averages(values, groups)
    seconds = _by_method(done, "seconds_per_step")
    sizes = _sizes(done)
    reference = (
        reference if reference in seconds else next((m for m in methods if m in seconds), None)
    )
    figures: dict[str, dict[str, Figure]] = {}
    for method in [SINGLE_TASK, *methods]:
        found = {name: Figure(seeds) for name, seeds in values.get(method, {}).items() if seeds}
        found |= {name: Figure(seeds) for name, seeds in averages.get(method, {}).items()}
        if improved.get(method):
            found[DELTA_M] = Figure(improved[method])
        if method in seconds and reference is not None and method != SINGLE_TASK:
            found[COST] = Figure(_ratio(seconds[method], seconds[reference]))
        if method in sizes:
            found[PARAMETERS] = Figure(sizes[method])
        if found:
            figures[method] = found
    columns = _columns(names, groups, higher, figures, reference)
    return Summary(
        tuple(columns),
        figures,
        reference,
        _gains(figures, columns),
        tuple(_failure(row) for row in rows if row["status"] == "failed"),
        _missing(rows),
        tuple(notes),
    )


Values = dict[str, dict[str, BySeed]]


def _mean(values: Sequence[float]) -> float:
    """The mean; NaN, and no error, of infinities of both signs."""
    finite = all(map(math.isfinite, values))
    return statistics.fmean(values) if finite else sum(values) / len(values)


def _values(rows: Sequence[Row], names: Sequence[str], tasks: Sequence[str]) -> Values:
    """Values by method, metric and seed; a single-task run speaks for its own task alone."""
    found: Values = {}
    for row in rows:
        for name in names:
            own = not row["task"] or task_of(name, tasks) == row["task"]
            if own and row.get(name) is not None:
                found.setdefault(row["method"], {}).setdefault(name, {})[row["seed"]] = row[name]
    return found


def _compared(names: Sequence[str], tasks: Sequence[str], chosen: bool) -> list[str]:
    """The metrics that Delta_m is made of: those of tasks, losses only where nothing else is."""
    of_tasks = [name for name in names if task_of(name, tasks) is not None]
    metrics = [name for name in of_tasks if not is_loss(name)]
    return of_tasks if chosen or not metrics else metrics


def _delta_m(
    values: Values, compared: Sequence[str], higher: Mapping[str, bool | None]
) -> dict[str, BySeed]:
    singles = values.get(SINGLE_TASK, {})
    found: dict[str, BySeed] = {}
    if not compared:
        return found
    directions = {name: bool(higher[name]) for name in compared}
    for method, by_metric in values.items():
        for seed in by_metric.get(compared[0], {}):
            own = {
                name: by_metric[name][seed] for name in compared if seed in by_metric.get(name, {})
            }
            base = {name: singles[name][seed] for name in own if seed in singles.get(name, {})}
            usable = len(own) == len(base) == len(compared)
            if usable and all(math.isfinite(v) and v != 0 for v in base.values()):
                found.setdefault(method, {})[seed] = delta_m(own, base, directions)
    return found


def _put_into_rows(rows: Sequence[Row], improved: Mapping[str, BySeed]) -> None:
    for row in rows:
        if row["method"] != SINGLE_TASK and row["seed"] in improved.get(row["method"], {}):
            row[DELTA_M] = improved[row["method"]][row["seed"]]


def _groups(names: Sequence[str], tasks: Sequence[str]) -> dict[str, list[str]]:
    """The metrics that all tasks have, by the name of their average."""
    groups: dict[str, list[str]] = {}
    for name in names:
        task = task_of(name, tasks)
        if task is not None:
            groups.setdefault(f"average/{without_task(name, task)}", []).append(name)
    whole = len(tasks) if len(tasks) > 1 else None
    return {group: members for group, members in groups.items() if len(members) == whole}


def _averages(values: Values, groups: Mapping[str, Sequence[str]]) -> Values:
    found: Values = {}
    for group, members in groups.items():
        for method, by_metric in values.items():
            seeds = set.intersection(*(set(by_metric.get(name, {})) for name in members))
            if seeds:
                found.setdefault(method, {})[group] = {
                    seed: _mean([by_metric[name][seed] for name in members])
                    for seed in sorted(seeds)
                }
    return found


def _by_method(rows: Sequence[Row], name: str) -> dict[str, BySeed]:
    found: dict[str, BySeed] = {}
    for row in rows:
        if row.get(name) is not None:
            found.setdefault(row["method"], {})[row["seed"]] = row[name]
    return found


def _sizes(rows: Sequence[Row]) -> dict[str, BySeed]:
    """Trained parameters by method and seed; those of the networks of all tasks together."""
    found: dict[str, BySeed] = {}
    for row in rows:
        if row.get("parameters") is not None:
            of_method = found.setdefault(row["method"], {})
            of_method[row["seed"]] = of_method.get(row["seed"], 0) + row["parameters"]
    return found


def _ratio(seconds: BySeed, reference: BySeed) -> BySeed:
    base = statistics.median(reference.values())
    return {seed: value / base for seed, value in seconds.items()}


def _columns(
    names: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    higher: Mapping[str, bool | None],
    figures: Mapping[str, Mapping[str, Figure]],
    reference: str | None,
) -> list[Column]:
    average = {name: group for group, members in groups.items() for name in members}
    columns = [_column(name, higher[name], figures, average.get(name)) for name in names]
    for group, members in groups.items():
        directions = {higher[name] for name in members}
        columns.append(_column(group, directions.pop() if len(directions) == 1 else None, figures))
    known = {name for of_method in figures.values() for name in of_method}
    if DELTA_M in known:
        columns.append(Column(DELTA_M, "Delta_m", True, 1.0, "%"))
    if COST in known:
        columns.append(Column(COST, f"cost over {reference}", None))
    if _differ(figures):
        columns.append(Column(PARAMETERS, "parameters", None))
    return [column for column in columns if column.name in known]


def _differ(figures: Mapping[str, Mapping[str, Figure]]) -> bool:
    """Whether methods train networks of different sizes, single-task networks apart."""
    sizes = [f[PARAMETERS].mean for m, f in figures.items() if m != SINGLE_TASK and PARAMETERS in f]
    return len(set(sizes)) > 1


def _column(
    name: str,
    higher: bool | None,
    figures: Mapping[str, Mapping[str, Figure]],
    average: str | None = None,
) -> Column:
    found = [of_method[name].by_seed for of_method in figures.values() if name in of_method]
    values = [value for by_seed in found for value in by_seed.values()]
    share = is_share(name) and all(0 <= value <= 1 for value in values)
    scale, unit = (100.0, "%") if share else (1.0, "")
    return Column(name, label(name), higher, scale, unit, average)


def _gains(
    figures: Mapping[str, Mapping[str, Figure]], columns: Sequence[Column]
) -> dict[str, dict[str, Figure]]:
    """Differences of every ``F-X`` to its ``X``, seed by seed."""
    found: dict[str, dict[str, Figure]] = {}
    for flat, own in figures.items():
        plain = flat.removeprefix("F-")
        if plain == flat or plain not in figures:
            continue
        for column in columns:
            a, b = figures[plain].get(column.name), own.get(column.name)
            if a is None or b is None or column.name in {COST, PARAMETERS}:
                continue
            seeds = [seed for seed in b.by_seed if seed in a.by_seed]
            if seeds:
                gain = {seed: b.by_seed[seed] - a.by_seed[seed] for seed in seeds}
                found.setdefault(f"{flat} over {plain}", {})[column.name] = Figure(gain)
    return found


def _failure(row: Row) -> Row:
    return {name: row[name] for name in ("method", "task", "seed", "error")}


def _missing(rows: Sequence[Row]) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in rows:
        if row["status"] not in {"done", "failed"}:
            found[row["method"]] = found.get(row["method"], 0) + 1
    return found


def _listed(figures: Mapping[str, Figure]) -> dict[str, Any]:
    return {
        name: {
            "mean": figure.mean,
            "std": figure.std,
            "standard_error": figure.error,
            "by_seed": figure.by_seed,
        }
        for name, figure in figures.items()
    }
