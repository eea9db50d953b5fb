"""Which of the searched arguments each method has, and the configuration of a trial."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_flatmtl.comparison.plan import make_plan
from lightning_flatmtl.comparison.resolving import MISSING, Config, get_key, resolve, set_key
from lightning_flatmtl.comparison.settings import Settings, words_of
from lightning_flatmtl.comparison.tuning.settings import TuneSettings
from lightning_flatmtl.comparison.tuning.space import Space
from lightning_flatmtl.hosting.names import nearest

__all__ = ["Searched", "make_search"]


@dataclass(frozen=True)
class Searched:
    """A method and the arguments that are searched for it.

    Args:
        name: Its name.
        settings: What the trials have in common.
        config: Its complete configuration, as given.
        spaces: The space of each argument that it has.
    """

    name: str
    settings: Settings
    config: Config
    spaces: dict[str, Space]

    @property
    def callbacks(self) -> list[dict[str, Any]]:
        """Its callbacks, as given."""
        return self.settings.methods[self.name]

    def placed(self, values: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Its callbacks with values in them, and what is changed in the configuration.

        Args:
            values: A value for each searched argument.
        """
        callbacks, arguments = copy.deepcopy(self.callbacks), {}
        for address, value in values.items():
            place = _callback(self.callbacks, address)
            if place is None:
                arguments[address] = value
            else:
                self._place(callbacks[place], place, address.partition(".")[2], value)
        return callbacks, arguments

    def resolved(self, values: Mapping[str, Any]) -> Config:
        """The complete configuration with values in it.

        Raises:
            ValueError: If it refuses them.
        """
        callbacks, arguments = self.placed(values)
        own = self.settings.method_arguments.get(self.name, ())
        words = (*self.settings.arguments, *own, *words_of("search", arguments))
        try:
            return resolve(self.settings.config, words, callbacks)
        except ValueError as error:
            given = ", ".join(f"{k} = {v!r}" for k, v in values.items())
            raise ValueError(f"Method '{self.name}' with {given}: {error}") from None

    def configured(self, values: Mapping[str, Any]) -> Config:
        """The same without asking the command again, which has seen such values."""
        config = copy.deepcopy(self.config)
        entries = _own_entries(config, self.callbacks)
        for address, value in values.items():
            place = _callback(self.callbacks, address)
            if isinstance(_value(self.config, self.callbacks, address), Mapping):
                return self.resolved(values)  # an object by its class: its arguments change too
            if place is None:
                config = set_key(config, address, value)
                entries = _own_entries(config, self.callbacks)
            else:
                name = address.partition(".")[2]
                entries[place]["init_args"] = set_key(entries[place]["init_args"], name, value)
        return config

    def _place(self, entry: dict[str, Any], place: int, name: str, value: Any) -> None:
        given = dict(entry.get("init_args") or {})
        first, _, rest = name.partition(".")
        if rest and first not in given:  # an object whose defaults nobody has written
            given[first] = self._entries[place]["init_args"][first]
        given[first] = set_key({first: given.get(first)}, name, value)[first] if rest else value
        entry["init_args"] = given

    @property
    def _entries(self) -> list[dict[str, Any]]:
        """Its callbacks with all defaults."""
        return _own_entries(self.config, self.callbacks)


def make_search(settings: TuneSettings) -> tuple[Config, list[Searched]]:
    """The base, and each method with the arguments that it has; nothing is built or trained.

    Raises:
        ValueError: If a configuration is refused, or nobody has a searched argument.
    """
    runs = settings.runs
    plan = make_plan(runs)
    seed = runs.seeds[0]
    configs = {run.method: run.config for run in plan.runs if run.seed == seed}
    unseen, found = set(settings.search), []
    for name, config in configs.items():
        spaces = {}
        for address, space in settings.search.items():
            value = _value(config, runs.methods[name], address)
            if value is not MISSING and address not in runs.seed_keys:
                spaces[address] = space.like(value)
                unseen.discard(address)
        found.append(Searched(name, runs, config, spaces))
    for address in settings.search:
        if address in unseen:
            _refuse(address, configs, runs.methods)
    checked: set[str] = set()
    for method in found:
        unchecked = {k: space for k, space in method.spaces.items() if k not in checked}
        for values in _samples(unchecked):
            method.resolved(values)
        checked |= set(unchecked)
    return plan.base, found


def _value(config: Config, callbacks: Sequence[Mapping[str, Any]], address: str) -> Any:
    """What an argument is now; ``MISSING`` if the method has none such."""
    place = _callback(callbacks, address)
    if place is None:
        return get_key(config, address)
    arguments = _own_entries(config, callbacks)[place].get("init_args") or {}
    return get_key(arguments, address.partition(".")[2])


def _callback(callbacks: Sequence[Mapping[str, Any]], address: str) -> int | None:
    """The callback that an address such as ``TaskSAM.rho`` is in."""
    head, _, rest = address.partition(".")
    names = [_short(entry) for entry in callbacks]
    return names.index(head) if rest and head in names else None


def _own_entries(config: Config, callbacks: Sequence[Any]) -> list[dict[str, Any]]:
    listed = config["trainer"].get("callbacks") or []
    return list(listed[len(listed) - len(callbacks) :])


def _short(entry: Mapping[str, Any]) -> str:
    return str(entry["class_path"]).rpartition(".")[2]


def _samples(spaces: Mapping[str, Space]) -> Iterator[dict[str, Any]]:
    """Values that together show every bound and every choice."""
    count = max((len(space.samples) for space in spaces.values()), default=0)
    for i in range(count):
        yield {name: space.samples[i % len(space.samples)] for name, space in spaces.items()}


def _refuse(
    address: str,
    configs: Mapping[str, Config],
    methods: Mapping[str, Sequence[Mapping[str, Any]]],
) -> None:
    known: dict[str, None] = {}
    for name, config in configs.items():
        for entry in _own_entries(config, methods[name]):
            known |= dict.fromkeys(_names(entry.get("init_args") or {}, _short(entry)))
    for part in ("model", "data", "trainer"):
        config = next(iter(configs.values()))
        known |= dict.fromkeys(_names(config.get(part), part))
    raise ValueError(
        f"`search` must name an argument that a method has, got '{address}', which none has. "
        f"{nearest(address, known)}It is a dotted name of the configuration, such as "
        "'model.optimizer.lr', or of a callback of a method, such as 'TaskSAM.rho'."
    )


def _names(node: Any, at: str) -> Iterator[str]:
    """All dotted names below, without ``init_args``."""
    if not isinstance(node, Mapping):
        yield at
        return
    inner = node.get("init_args")
    for key, value in (inner if isinstance(inner, Mapping) else node).items():
        yield from _names(value, f"{at}.{key}")
