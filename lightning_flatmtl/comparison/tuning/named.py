"""Samplers, pruners and storages of Optuna, by name. Optuna is imported when it is needed."""

import inspect
import warnings
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from lightning_flatmtl.hosting.names import nearest

__all__ = ["Entry", "build", "entry_of", "has_argument", "make_storage", "optuna"]

Entry = str | Mapping[str, Any]
"""A class name, or a mapping with ``class_path`` and ``init_args``."""

_ROOMS = {
    "sampler": "optuna.samplers",
    "pruner": "optuna.pruners",
    "storage": "optuna.storages",
}
_FURTHER = ("optuna.samplers", "optuna.pruners", "optuna.storages", "optuna.storages.journal")
"""Where the classes are that an argument may name."""

_SQLITE_SECONDS = 60.0
"""How long a process waits for another one that writes to the same file."""


def optuna() -> Any:
    """The package.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    try:
        return import_module("optuna")
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise ModuleNotFoundError(
            "Optuna, which `flatmtl tune` needs, is not installed: run "
            '`pip install "lightning-flatmtl[tune]"`.'
        ) from None


def entry_of(setting: str, given: Any) -> Entry:
    """A class name, or a mapping, as a file gives it.

    Raises:
        ValueError: If it is neither.
    """
    mapping = isinstance(given, Mapping) and set(given) <= {"class_path", "init_args"}
    named = given.get("class_path") if mapping else given
    arguments = (given.get("init_args") or {}) if mapping else {}
    if not isinstance(named, str) or not named or not isinstance(arguments, Mapping):
        raise ValueError(
            f"`{setting}` must be a class name of Optuna, or a mapping with `class_path` and "
            f"`init_args`, got {given!r}."
        )
    return {"class_path": named, "init_args": dict(arguments)} if mapping else named


def build(setting: str, entry: Entry, **further: Any) -> Any:
    """The object that an entry names.

    Args:
        setting: ``"sampler"``, ``"pruner"`` or ``"storage"``.
        entry: Its class and arguments; arguments may be such entries too.
        further: Arguments that are given if the entry does not give them.

    Raises:
        ValueError: If there is no such class, or it refuses its arguments.
    """
    name, arguments = _parts(entry)
    kind = _class(setting, name)
    _refuse_unknown(kind, arguments)
    built = {k: _built(setting, value) for k, value in arguments.items()}
    try:
        with warnings.catch_warnings():
            # Said for every trial anew; who names a class of Optuna reads Optuna's pages.
            warnings.simplefilter("ignore", optuna().exceptions.ExperimentalWarning)
            return kind(**{**further, **built})
    except TypeError as error:
        raise ValueError(f"`{setting}`: {kind.__name__}: {error}.") from None
    except ValueError as error:
        raise ValueError(f"`{setting}`: {kind.__name__}: {error}") from None


def has_argument(setting: str, entry: Entry, argument: str) -> bool | None:
    """Whether the class takes it; ``None`` if it is given already."""
    name, arguments = _parts(entry)
    if argument in arguments:
        return None
    return argument in inspect.signature(_class(setting, name)).parameters


def make_storage(entry: Entry) -> Any:
    """The storage of a URL, or of a class of ``optuna.storages``.

    Raises:
        ValueError: If there is none, or other processes could not open it.
        ModuleNotFoundError: If it needs a package that is not installed.
    """
    if isinstance(entry, str) and "://" in entry:
        if entry.endswith((":memory:", "sqlite://")):
            raise ValueError(_refused_memory(entry))
        file = entry.startswith("sqlite")
        kwargs = {"connect_args": {"timeout": _SQLITE_SECONDS}} if file else {}
        try:
            return optuna().storages.RDBStorage(entry, engine_kwargs=kwargs)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"`storage` '{entry}' needs a package that is not installed: {error}."
            ) from None
        except (ImportError, ValueError) as error:
            raise ValueError(f"`storage` '{entry}' cannot be opened: {error}") from None
    if _parts(entry)[0].endswith("InMemoryStorage"):
        raise ValueError(_refused_memory("InMemoryStorage"))
    return build("storage", entry)


def _refused_memory(entry: str) -> str:
    return (
        f"`storage` must be one that every trial's process can open, got '{entry}'. Leave it out "
        "for an SQLite file in the output folder."
    )


def _parts(entry: Entry) -> tuple[str, dict[str, Any]]:
    if isinstance(entry, str):
        return entry, {}
    return str(entry["class_path"]), dict(entry.get("init_args") or {})


def _class(setting: str, name: str) -> type:
    optuna()
    room, _, last = name.rpartition(".")
    rooms = [room] if room else [_ROOMS[setting], *_FURTHER]
    for each in rooms:
        try:
            found = getattr(import_module(each), last, None)
        except ModuleNotFoundError:
            found = None
        if isinstance(found, type):
            return found
    known = [each for each in import_module(_ROOMS[setting]).__all__ if _is_leaf(setting, each)]
    raise ValueError(
        f"`{setting}` must be a class of {_ROOMS[setting]}, got '{name}'. "
        f"{nearest(name, known)}It has: {', '.join(known)}."
    )


def _is_leaf(setting: str, name: str) -> bool:
    return name.lower().endswith(setting) and not name.startswith(("Base", "_"))


def _refuse_unknown(kind: type, arguments: Mapping[str, Any]) -> None:
    known = inspect.signature(kind).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in known.values()):
        return
    for name in arguments:
        if name not in known:
            raise ValueError(
                f"{kind.__name__} has no argument '{name}'. {nearest(name, known)}It has: "
                f"{', '.join(known)}."
            )


def _built(setting: str, value: Any) -> Any:
    if isinstance(value, Mapping) and isinstance(value.get("class_path"), str):
        return build(setting, entry_of(setting, value))
    return value
