"""What a file of a comparison says."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from lightning_flatmtl._yaml import load_yaml
from lightning_flatmtl.comparison.selection import Selection
from lightning_flatmtl.hosting.names import nearest

__all__ = ["SINGLE_TASK", "Resources", "Settings", "SingleTask", "read", "words_of"]

SINGLE_TASK = "single-task"
"""The name of the baselines' row."""

_KEYS = (
    "config", "methods", "single_task", "seeds", "seed_keys", "select", "metrics",
    "delta_m", "higher_is_better", "tasks", "output", "resources", "arguments",
)  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """What a run takes: ``cpu`` threads and ``gpu`` devices or a share of one."""

    cpu: int | None = None
    gpu: float | None = None


@dataclass(frozen=True)
class SingleTask:
    """How the single-task baselines are trained; ``monitor`` selects where the model keeps all."""

    monitor: str | None = None


@dataclass(frozen=True)
class Settings:
    """A comparison: methods over seeds, from one configuration.

    Args:
        config: Files of ``flatmtl fit``, the base of every run.
        methods: The callbacks of each method, by name, in the order of the table.
        method_arguments: What a method changes in the configuration, as further arguments of
            ``flatmtl fit``; by name, where there is any.
        single_task: Train each task by itself too, for Delta_m; ``None`` if not.
        seeds: A run each.
        seed_keys: What follows the seed in the configuration, by dotted names.
        select: Which epochs are tested.
        metrics: Test metrics of the table; ``None`` for all.
        delta_m: Those of them that Delta_m is made of; ``None`` for all of tasks.
        higher_is_better: Directions of metrics that do not say it themselves.
        tasks: Names of the tasks, where the configuration of the model has none.
        output: The folder of runs, tables and figures.
        resources: What each run takes.
        arguments: Further arguments of ``flatmtl fit``, for every run, as words.
    """

    config: tuple[Path, ...]
    methods: dict[str, list[dict[str, Any]]]
    method_arguments: dict[str, tuple[str, ...]] = field(default_factory=dict)
    single_task: SingleTask | None = None
    seeds: tuple[int, ...] = (0,)
    seed_keys: tuple[str, ...] = ("seed_everything",)
    select: Selection = field(default_factory=Selection)
    metrics: tuple[str, ...] | None = None
    delta_m: tuple[str, ...] | None = None
    higher_is_better: dict[str, bool] = field(default_factory=dict)
    tasks: tuple[str, ...] | None = None
    output: Path = Path("runs/compare")
    resources: Resources = field(default_factory=Resources)
    arguments: tuple[str, ...] = ()

    @classmethod
    def load(
        cls,
        source: str | Path | Mapping[str, Any],
        arguments: Sequence[str] = (),
        output: str | Path | None = None,
        *,
        needs_methods: bool = True,
    ) -> "Settings":
        """Read a file, or a mapping with the same keys.

        Args:
            source: The path of a YAML file, or its content.
            arguments: Further arguments of ``flatmtl fit`` for every run.
            output: Another folder than the file's.
            needs_methods: Whether a comparison without methods is refused.

        Raises:
            FileNotFoundError: If a file is not there.
            ValueError: If a setting is unknown or out of its bounds.
        """
        given, folder = read(source)
        if "model" in given:
            raise ValueError(
                f"{source} is the configuration of a single run (it has a `model`). A comparison "
                f"needs a file of its own, with `config: {Path(str(source)).name}` and `methods:`."
            )
        for key in given:
            if key not in _KEYS:
                raise ValueError(
                    f"A comparison has no setting {key!r}. {nearest(key, _KEYS)}It has: "
                    f"{', '.join(_KEYS)}. Settings of the runs belong into the file of `config`."
                )
        single = _single_task(given.get("single_task", False))
        methods, method_arguments = _methods(given.get("methods") or {})
        if not methods and (needs_methods or single is None):
            raise ValueError(
                "`methods` must name at least one method with its callbacks, such as "
                "`CAGrad: [CAGrad]`, got none."
            )
        return cls(
            config=_configs(given.get("config"), folder),
            methods=methods,
            method_arguments=method_arguments,
            single_task=single,
            seeds=_seeds(given.get("seeds", [0])),
            seed_keys=_words("seed_keys", given.get("seed_keys", ["seed_everything"])),
            select=Selection.of(given.get("select")),
            metrics=_optional_words("metrics", given.get("metrics")),
            delta_m=_optional_words("delta_m", given.get("delta_m")),
            higher_is_better=_directions(given.get("higher_is_better") or {}),
            tasks=_optional_words("tasks", given.get("tasks")),
            output=Path(output if output is not None else given.get("output", "runs/compare")),
            resources=_resources(given.get("resources") or {}),
            arguments=(*words_of("arguments", given.get("arguments") or {}), *arguments),
        )


def read(source: str | Path | Mapping[str, Any]) -> tuple[Mapping[str, Any], Path]:
    """What a file says, or a mapping as it is, and the folder that its paths are relative to.

    Raises:
        FileNotFoundError: If the file is not there.
        ValueError: If it is no mapping in YAML.
    """
    if isinstance(source, Mapping):
        return source, Path()
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file of a comparison at '{path}'. It holds `config:`, `methods:` and "
            "`seeds:`, see examples/multidigits/compare.yaml."
        )
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"The file of a comparison '{path}' cannot be read: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"The file of a comparison '{path}' must hold a mapping, got {content!r}.")
    return content, path.parent


def _configs(given: Any, folder: Path) -> tuple[Path, ...]:
    names = [given] if isinstance(given, str | Path) else given
    if not names or not isinstance(names, list | tuple):
        raise ValueError(
            "`config` must be a file of `flatmtl fit` (or a list of them), the base of every run, "
            f"got {given!r}."
        )
    paths = tuple(folder / str(name) for name in names)
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(
                f"`config` must be a file, got '{path}', which does not exist. Its path is "
                "relative to the file of the comparison."
            )
    return paths


def words_of(name: str, given: Any) -> tuple[str, ...]:
    """The words of the command line that a mapping of dotted names to values stands for.

    Args:
        name: The setting, for a message.
        given: The mapping.

    Raises:
        ValueError: If it is none, or a name is none.

    Example:
        >>> words_of("arguments", {"model.optimizer.lr": 0.01, "data.name": "a", "data.cut": None})
        ('--model.optimizer.lr=0.01', '--data.name=a', '--data.cut=null')
    """
    fits = isinstance(given, Mapping) and all(isinstance(k, str) and k for k in given)
    if not fits:
        raise ValueError(
            f"`{name}` must map arguments of `flatmtl fit` to values, such as "
            f"`model.optimizer.lr: 0.01`, got {given!r}."
        )
    return tuple(
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in given.items()
    )


def _methods(given: Any) -> tuple[dict[str, list[dict[str, Any]]], dict[str, tuple[str, ...]]]:
    if not isinstance(given, Mapping):
        raise ValueError(
            "`methods` must map names to lists of callbacks, such as `CAGrad: [CAGrad]`, got "
            f"{given!r}."
        )
    methods: dict[str, list[dict[str, Any]]] = {}
    arguments: dict[str, tuple[str, ...]] = {}
    for name, entry in given.items():
        listed = entry
        if isinstance(entry, Mapping) and set(entry) <= {"callbacks", "arguments"}:
            listed = entry.get("callbacks")
            words = words_of(f"arguments` of `{name}", entry.get("arguments") or {})
            arguments |= {name: words} if words else {}
        methods[_name(name)] = _callbacks(name, listed)
    return methods, arguments


def _name(name: Any) -> str:
    if not isinstance(name, str) or not name.strip() or any(c in name for c in '/\\|"\n'):
        raise ValueError(
            f"The name of a method must be a text without / \\ | and quotes, got {name!r}."
        )
    if name == SINGLE_TASK:
        raise ValueError(
            f"'{SINGLE_TASK}' is the row of the baselines; write `single_task: true` for it, or "
            "give your method another name."
        )
    return name


def _callbacks(name: str, listed: Any) -> list[dict[str, Any]]:
    listed = [] if listed is None else listed
    if not isinstance(listed, list | tuple):
        raise ValueError(
            f"Method '{name}' must have a list of callbacks, such as [CAGrad], or a mapping with "
            f"`callbacks` and `arguments`, got {listed!r}."
        )
    found = []
    for callback in listed:
        entry = {"class_path": callback} if isinstance(callback, str) else callback
        if not isinstance(entry, Mapping) or not isinstance(entry.get("class_path"), str):
            raise ValueError(
                f"A callback of method '{name}' must be a class name or a mapping with "
                f"`class_path`, got {callback!r}."
            )
        found.append(dict(entry))
    return found


def _single_task(given: Any) -> SingleTask | None:
    if isinstance(given, bool):
        return SingleTask() if given else None
    if isinstance(given, Mapping) and set(given) <= {"monitor"}:
        return SingleTask(given.get("monitor"))
    raise ValueError(
        f"`single_task` must be true, false or `{{monitor: 'val/{{task}}/loss'}}`, got {given!r}."
    )


def _seeds(given: Any) -> tuple[int, ...]:
    seeds = [given] if isinstance(given, int) else given
    whole = isinstance(seeds, list | tuple) and seeds
    if not whole or any(not isinstance(s, int) or isinstance(s, bool) or s < 0 for s in seeds):
        raise ValueError(f"`seeds` must be a list of integers >= 0, got {given!r}.")
    twice = sorted({seed for seed in seeds if list(seeds).count(seed) > 1})
    if twice:
        raise ValueError(f"`seeds` must differ, got {twice[0]} more than once. Remove one.")
    return tuple(seeds)


def _words(name: str, given: Any) -> tuple[str, ...]:
    words = [given] if isinstance(given, str) else given
    if not isinstance(words, list | tuple) or not all(isinstance(w, str) and w for w in words):
        raise ValueError(f"`{name}` must be a list of names, got {given!r}.")
    twice = sorted({word for word in words if list(words).count(word) > 1})
    if not words or twice:
        got = f"{twice[0]!r} more than once" if twice else "none"
        raise ValueError(f"`{name}` must be different names, at least one, got {got}.")
    return tuple(words)


def _optional_words(name: str, given: Any) -> tuple[str, ...] | None:
    return None if given is None else _words(name, given)


def _directions(given: Any) -> dict[str, bool]:
    fits = isinstance(given, Mapping) and all(isinstance(v, bool) for v in given.values())
    if not fits:
        raise ValueError(
            "`higher_is_better` must map names of metrics to true or false, such as `{mae: false}`,"
            f" got {given!r}."
        )
    return dict(given)


def _resources(given: Any) -> Resources:
    if not isinstance(given, Mapping) or not set(given) <= {"cpu", "gpu"}:
        raise ValueError(f"`resources` must be a mapping with `cpu` and `gpu`, got {given!r}.")
    cpu, gpu = given.get("cpu"), given.get("gpu")
    if cpu is not None and (not isinstance(cpu, int) or isinstance(cpu, bool) or cpu < 1):
        raise ValueError(f"`cpu` of `resources` must be an integer >= 1, got {cpu!r}.")
    number = isinstance(gpu, Real) and not isinstance(gpu, bool)
    if gpu is not None and (not number or gpu < 0 or (gpu > 1 and gpu != int(gpu))):
        raise ValueError(
            f"`gpu` of `resources` must be a share in [0, 1] or a whole number, got {gpu!r}."
        )
    return Resources(cpu, None if gpu is None else float(gpu))
