"""The runs of a comparison: methods over seeds, and single tasks."""

import copy
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_flatmtl import __version__
from lightning_flatmtl.comparison.resolving import Config, class_of, resolve, set_key
from lightning_flatmtl.comparison.selection import Selection
from lightning_flatmtl.comparison.settings import SINGLE_TASK, Settings
from lightning_flatmtl.hosting.callback import MethodCallback
from lightning_flatmtl.hosting.names import nearest

__all__ = ["Plan", "Run", "difference", "make_plan"]


@dataclass(frozen=True)
class Run:
    """One training: a method (or a single task) with a seed.

    Args:
        method: Its name in the table.
        seed: Its seed.
        config: The complete configuration, without what depends on the folder.
        select: Which epochs are tested.
        task: The task, for a baseline.
        tested: Whether the test data are used at all; a trial of a search leaves them alone.
    """

    method: str
    seed: int
    config: Config
    select: Selection
    task: str | None = None
    tested: bool = True

    @property
    def hash(self) -> str:
        """Of the complete configuration, the selection and the version of the package."""
        content = [self.config, self.select.setting, __version__]
        content += [] if self.tested else ["untested"]
        text = json.dumps(content, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """What it is called in messages and loggers."""
        of_task = f" {self.task}" if self.task else ""
        return f"{self.method}{of_task}, seed {self.seed}"

    @property
    def slug(self) -> str:
        """The name of its folder."""
        words = [
            self.method,
            *([self.task] if self.task else []),
            f"seed{self.seed}",
            self.hash[:8],
        ]
        return re.sub(r"[^\w.+-]+", "_", "-".join(words))


@dataclass(frozen=True)
class Plan:
    """All runs, and what their folder belongs to.

    Args:
        runs: In the order of the table, seed by seed, so that a first row of it is there early.
        base: The configuration without methods and seeds.
        tasks: The names of the tasks, as far as known.
    """

    runs: tuple[Run, ...]
    base: Config
    tasks: tuple[str, ...]

    def methods(self, names: Sequence[str] | None = None) -> list[str]:
        """The methods of the table, or those that are named.

        Raises:
            ValueError: If there is no such method.
        """
        known = list(dict.fromkeys(run.method for run in self.runs))
        for name in names or ():
            if name not in known:
                raise ValueError(
                    f"`--only` must name methods of the comparison, got '{name}'. "
                    f"{nearest(name, known)}It has: {', '.join(known)}."
                )
        return [name for name in known if name in names] if names else known


def make_plan(settings: Settings) -> Plan:
    """Resolve the configuration of every run; nothing is built or trained.

    Raises:
        ValueError: If a configuration is refused, or single tasks cannot be told.
    """
    base = resolve(settings.config, settings.arguments, [])
    _refuse_methods_in(base)
    tasks = settings.tasks or _tasks_of(base)
    rows: dict[str, Config] = {}
    for name, callbacks in settings.methods.items():
        try:
            words = (*settings.arguments, *settings.method_arguments.get(name, ()))
            rows[name] = resolve(settings.config, words, callbacks)
        except ValueError as error:
            raise ValueError(f"Method '{name}': {error}") from None
        _refuse_two_of_a_role(name, rows[name])
    _refuse_equal(rows)
    runs = [run for seed in settings.seeds for run in _of_seed(settings, base, rows, tasks, seed)]
    return Plan(tuple(runs), base, tasks)


def _of_seed(
    settings: Settings, base: Config, rows: Mapping[str, Config], tasks: Sequence[str], seed: int
) -> Iterator[Run]:
    def seeded(config: Config) -> Config:
        for key in settings.seed_keys:
            config = set_key(config, key, seed)
        return config

    if settings.single_task is not None:
        if not tasks:
            raise ValueError(
                "`single_task` needs the names of the tasks, and the configuration of the model "
                "does not list them. Add `tasks: [first, second]` to the file of the comparison."
            )
        for task in tasks:
            config, select = _single(settings, base, tasks, task)
            yield Run(SINGLE_TASK, seed, seeded(config), select, task)
    for name, config in rows.items():
        yield Run(name, seed, seeded(config), settings.select)


def _single(
    settings: Settings, base: Config, tasks: Sequence[str], task: str
) -> tuple[Config, Selection]:
    """The configuration that trains one task alone, and what its epochs are chosen by."""
    assert settings.single_task is not None
    select = settings.select
    if cut := _cut(base, task):
        config, monitor = cut, select.monitor
    else:  # a model that cannot be cut: the losses of the others weigh nothing
        weights = {name: float(name == task) for name in tasks}
        entry = {"class_path": "LinearScalarization", "init_args": {"weights": weights}}
        config = resolve(settings.config, settings.arguments, [entry])
        monitor = select.monitor and _of_task(select.monitor, task)
    if settings.single_task.monitor is not None and select.monitor is not None:
        monitor = settings.single_task.monitor.replace("{task}", task)
    return config, Selection(monitor, select.mode, select.count)


def _of_task(monitor: str, task: str) -> str:
    """``val/loss`` of one task is ``val/{task}/loss``; a figure of a task stays what it is."""
    stage, _, rest = monitor.partition("/")
    return f"{stage}/{task}/{rest}" if rest and "/" not in rest else monitor


def _cut(base: Config, task: str) -> Config | None:
    """The configuration with one of the model's tasks; ``None`` if it does not list them."""
    if not _lists_tasks(base):
        return None
    config = copy.deepcopy(base)
    given = config["model"]["init_args"]
    given["tasks"] = [entry for entry in given["tasks"] if entry["init_args"]["name"] == task]
    given["baselines"] = None  # they have all tasks
    encoder = given.get("encoder") or {}
    if "tasks" in encoder.get("init_args", {}):  # an encoder such as MTAN, with parts by task
        encoder["init_args"]["tasks"] = [task]
    return config if given["tasks"] else None


def _lists_tasks(base: Config) -> bool:
    """Whether the model is made of encoder and tasks, so that it can do with fewer of them."""
    from lightning_flatmtl.module import MultiTaskModule  # noqa: PLC0415

    model = class_of(base["model"])
    if model is None or not issubclass(model, MultiTaskModule):
        return False
    listed = base["model"].get("init_args", {}).get("tasks")
    return bool(listed) and model.losses is MultiTaskModule.losses


def _tasks_of(base: Config) -> tuple[str, ...]:
    listed = base["model"].get("init_args", {}).get("tasks") or []
    entries = listed if isinstance(listed, list) else []
    names = [entry.get("init_args", {}).get("name") for entry in entries if isinstance(entry, dict)]
    return tuple(name for name in names if isinstance(name, str))


def _refuse_methods_in(base: Config) -> None:
    for entry in base["trainer"].get("callbacks") or []:
        kind = class_of(entry)
        if kind is not None and issubclass(kind, MethodCallback):
            raise ValueError(
                f"`config` must be a base without a method, got one with {kind.__name__}. Move it "
                "from the file's `callbacks` to `methods:` of the comparison."
            )


def _refuse_two_of_a_role(name: str, config: Config) -> None:
    kinds = [class_of(entry) for entry in config["trainer"].get("callbacks") or []]
    methods = [kind for kind in kinds if kind is not None and issubclass(kind, MethodCallback)]
    for role in ("Aggregator", "TaskSAM"):
        found = [kind.__name__ for kind in methods if kind.role == role]
        if len(found) > 1:
            raise ValueError(
                f"Method '{name}' must have at most one {role}, got {' and '.join(found)}. Keep "
                "one of them."
            )


def _refuse_equal(rows: Mapping[str, Config]) -> None:
    seen: dict[str, str] = {}
    for name, config in rows.items():
        text = json.dumps(config, sort_keys=True, default=str)
        if text in seen:
            raise ValueError(
                f"Methods '{seen[text]}' and '{name}' are the same: their callbacks and settings "
                "do not differ. Remove one of them."
            )
        seen[text] = name


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def difference(before: Mapping[str, Any], now: Mapping[str, Any], at: str = "") -> str | None:
    """The first setting in which two configurations differ, in words; ``None`` if none does."""
    for key in dict.fromkeys([*before, *now]):
        a, b, name = before.get(key), now.get(key), f"{at}{key}"
        if a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            return difference(a, b, f"{name}.")
        return f"{name} was {_brief(a)} and is {_brief(b)}"
    return None
