"""What a file of a search says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_flatmtl.comparison.settings import Settings, read
from lightning_flatmtl.comparison.tuning.named import Entry, entry_of
from lightning_flatmtl.comparison.tuning.space import Space
from lightning_flatmtl.hosting.names import nearest

__all__ = ["TuneSettings"]

_SHARED = (
    "config", "methods", "seeds", "seed_keys", "select", "output", "resources", "arguments",
)  # fmt: skip
_OWN = (
    "search", "metric", "direction", "trials", "sampler", "pruner", "storage", "name", "compare",
)  # fmt: skip
_KEYS = (*_SHARED, *_OWN)
_FIXED = {"config", "methods", "arguments"}
"""What the file of the comparison has from here."""

_DIRECTIONS = ("minimize", "maximize")


@dataclass(frozen=True)
class TuneSettings:
    """A search over arguments of methods.

    Args:
        runs: What the trials have in common with the runs of a comparison: base, methods, seeds.
        search: The space of each argument, by its dotted name.
        metric: The figure of the validation data.
        direction: ``"minimize"`` or ``"maximize"``; ``None`` if the metric says it.
        trials: How many for each method.
        sampler: A class of ``optuna.samplers``.
        pruner: A class of ``optuna.pruners``.
        storage: A URL or a class of ``optuna.storages``; ``None`` for a file in the output folder.
        name: What the studies' names begin with.
        compare: Settings of the ``compare.yaml`` that is written.
    """

    runs: Settings
    search: dict[str, Space]
    metric: str
    direction: str | None = None
    trials: int = 20
    sampler: Entry = "TPESampler"
    pruner: Entry = "NopPruner"
    storage: Entry | None = None
    name: str = "tune"
    compare: Mapping[str, Any] | None = None

    @classmethod
    def load(
        cls,
        source: str | Path | Mapping[str, Any],
        arguments: Sequence[str] = (),
        output: str | Path | None = None,
    ) -> "TuneSettings":
        """Read a file, or a mapping with the same keys.

        Args:
            source: The path of a YAML file, or its content.
            arguments: Further arguments of ``flatmtl fit`` for every trial.
            output: Another folder than the file's.

        Raises:
            FileNotFoundError: If a file is not there.
            ValueError: If a setting is unknown or out of its bounds.
        """
        given, folder = read(source)
        for key in given:
            if key not in _KEYS:
                raise ValueError(
                    f"A search has no setting {key!r}. {nearest(key, _KEYS)}It has: "
                    f"{', '.join(_KEYS)}."
                )
        shared = {key: given[key] for key in _SHARED if key in given}
        shared["config"] = _beside(folder, given.get("config"))
        runs = Settings.load(shared, arguments, output or given.get("output", "runs/tune"))
        storage = given.get("storage")
        return cls(
            runs=runs,
            search=_search(given.get("search")),
            metric=_metric(given.get("metric")),
            direction=_direction(given.get("direction")),
            trials=_trials(given.get("trials", cls.trials)),
            sampler=entry_of("sampler", given.get("sampler", cls.sampler)),
            pruner=entry_of("pruner", given.get("pruner", cls.pruner)),
            storage=None if storage is None else entry_of("storage", storage),
            name=_name(given.get("name", runs.output.name or cls.name)),
            compare=_compare(given.get("compare") or {}, runs),
        )

    def budget(self, spaces: Mapping[str, Space]) -> int:
        """How many trials a method has; one where there is nothing to search."""
        return self.trials if spaces else 1


def _beside(folder: Path, given: Any) -> Any:
    """The paths of the base, relative to the file of the search."""
    if isinstance(given, str | Path):
        return str(folder / given)
    return [str(folder / str(name)) for name in given] if isinstance(given, list) else given


def _search(given: Any) -> dict[str, Space]:
    if not isinstance(given, Mapping) or not given or not all(isinstance(k, str) for k in given):
        raise ValueError(
            "`search` must map arguments to what they may be, such as `model.optimizer.lr: {low: "
            f"1.0e-4, high: 0.1, log: true}}`, got {given!r}."
        )
    return {name: Space.of(name, space) for name, space in given.items()}


def _metric(given: Any) -> str:
    if not isinstance(given, str) or not given:
        raise ValueError(
            f"`metric` must be the name of a figure of the validation data, such as 'val/loss', "
            f"got {given!r}."
        )
    for stage, why in (
        ("test", "settings that are chosen by the test data make its figures worthless"),
        ("train", "settings that are chosen by the training data are those that overfit"),
    ):
        if given.startswith(stage):
            raise ValueError(
                f"`metric` must be a figure of the validation data, got {given!r}: {why}. Name "
                "what is logged in validation, such as 'val/loss'."
            )
    return given


def _direction(given: Any) -> str | None:
    if given is not None and given not in _DIRECTIONS:
        raise ValueError(f"`direction` must be 'minimize' or 'maximize', got {given!r}.")
    return given if given is None else str(given)


def _trials(given: Any) -> int:
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise ValueError(f"`trials` must be an integer >= 1, got {given!r}.")
    return given


def _name(given: Any) -> str:
    if not isinstance(given, str) or not given.strip():
        raise ValueError(f"`name` must be a text, got {given!r}.")
    return given


def _compare(given: Any, runs: Settings) -> dict[str, Any]:
    """What the written file says beside the methods; it is read here, so that it can be run."""
    if not isinstance(given, Mapping):
        raise ValueError(f"`compare` must be a mapping of settings of a comparison, got {given!r}.")
    for key in given:
        if key in _FIXED:
            raise ValueError(f"`compare` must leave out `{key}`, which the search decides.")
    found = {
        "seeds": [0, 1, 2],
        "seed_keys": list(runs.seed_keys),
        "select": runs.select.setting,
        "output": str(runs.output / "compare"),
        **given,
    }
    config = [str(path) for path in runs.config]
    Settings.load({"config": config, "methods": {"any": []}, **found})
    return found
