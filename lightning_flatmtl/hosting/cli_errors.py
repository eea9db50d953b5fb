"""What is wrong with a command line, in one line instead of a hundred."""

import inspect
import os
import re
import sys
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_flatmtl.task import Task

__all__ = ["BriefParser", "refuse_briefly", "root_cause"]

FULL = "FLATMTL_TRACEBACK"
"""Set in the environment, this shows errors as Python and jsonargparse do."""

_ABOUT_SETTINGS = (
    ValueError,
    TypeError,
    FileNotFoundError,
    ModuleNotFoundError,
    MisconfigurationException,
)

_ROOTS = (Callback, LightningDataModule, nn.Module, Optimizer, LRScheduler, Task)
"""What the short names of classes stand for."""

# What jsonargparse says around the reason, of a value that several types were tried for.
_AROUND = re.compile(
    r"^(Does not validate against any of the Union subtypes|Subtypes:|Errors:|Given value( type)?:"
    r"|Expected a <class 'NoneType'>|Expected a path but .* either not accessible or invalid"
    r"|Not a valid subclass of|Subclass types expect one of:|a class path \(str\)|a dict with"
    r"|Problem with given class_path 'lightning\.(pytorch\.)?Callback':)"
)
_KEY = re.compile(r'^(?:Parser key|Key) "(?P<key>[^"]+)":\s*(?P<rest>.*)$')
_CLASS = re.compile(r"^Problem with given class_path '(?P<path>[\w.]+)':$")
_WRONG_TYPE = re.compile(r"^Expected a <class '(?P<type>[\w.]+)'>(?:\. Got value: (?P<value>.*))?$")
_VALUE = re.compile(r"^\s*Given value: (?P<value>.*)$", re.MULTILINE)
_UNKNOWN_CLASS = re.compile(r"^Expected a dot import path string: (?P<name>\S+)$")
_UNKNOWN_OPTION = re.compile(r"^Option '(?P<name>\w+)' is not accepted$")
_UNKNOWN_ARGUMENT = re.compile(r"^unrecognized arguments: --(?P<name>[\w.]+)")


class BriefParser(LightningArgumentParser):
    """A parser that ends with the reason of an error, without sixty lines of usage above it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the reason and exit with status 2."""
        if in_full() or not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        refuse_briefly(reason(message, parser), parser.prog.replace(" [options]", ""))


def in_full() -> bool:
    """Whether errors are to be shown with all there is to them."""
    return os.environ.get(FULL, "0") not in ("", "0")


def refuse_briefly(why: str, command: str = "flatmtl") -> NoReturn:
    """Say what is wrong, last where to read more, and exit with status 2."""
    sys.stderr.write(
        f"`{command} --help` lists the arguments; {FULL}=1 in the environment shows all of an "
        f"error.\nerror: {why}\n"
    )
    sys.exit(2)


def root_cause(error: BaseException) -> BaseException:
    """What the first of a chain of exceptions was."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def is_about_settings(error: BaseException) -> bool:
    """Whether an exception is what a constructor says of its arguments."""
    return type(error) in _ABOUT_SETTINGS


def reason(message: str, parser: Any = None) -> str:
    """The reason in a message of jsonargparse, which is the innermost of what it says.

    Args:
        message: The message.
        parser: The parser, whose options are looked at for the nearest one.
    """
    keys: list[str] = []
    reasons: dict[str, None] = {}  # in their order, each once
    path: str | None = None
    for line in message.splitlines():
        said = line.strip().removeprefix("- ").strip()
        if key := _KEY.match(said):
            keys = [*keys, key["key"]] if key["key"] not in keys else keys
            said = key["rest"]
        if known := _CLASS.match(said):
            path = known["path"]
        if said and not _AROUND.match(said) and not _CLASS.match(said):
            reasons[_explained(said, path, parser)] = None
        elif said.startswith("Problem with given class_path 'lightning."):
            path = ""
    first = next(iter(reasons), message)
    if (wrong := _WRONG_TYPE.match(first)) and (given := wrong["value"] or _VALUE.search(message)):
        value = given if isinstance(given, str) else given["value"]
        first = f"Expected a value of type {wrong['type']}, got '{value}'."
    where = ".".join(keys)
    return f"{where}: {first}" if where else first


def _explained(said: str, path: str | None, parser: Any) -> str:
    if unknown := _UNKNOWN_CLASS.match(said):
        return f"There is no class '{unknown['name']}' known by this short name." + (
            _nearest(unknown["name"], set(_short_names()))
            or " Write the full path of a class of your own, such as 'my_project.models.MyModule'."
        )
    if (unknown := _UNKNOWN_OPTION.match(said)) and path:
        name = unknown["name"]
        return f"{path.rpartition('.')[2]} has no argument '{name}'." + _nearest(
            name, _arguments(path)
        )
    if unknown := _UNKNOWN_ARGUMENT.match(said):
        options = getattr(parser, "_option_string_actions", {})
        near = _nearest(unknown["name"], {option.lstrip("-") for option in options})
        return f"{said}.{near}" if near else said
    return said


def _nearest(name: str, known: Iterable[str]) -> str:
    """A question for the nearest of the known names; nothing if none is near."""
    by_lower = {k.lower(): k for k in sorted(known)}
    found = get_close_matches(name.lower(), by_lower, n=1, cutoff=0.7)
    return f" Did you mean '{by_lower[found[0]]}'?" if found else ""


def _short_names() -> Iterator[str]:
    stack: list[type] = list(_ROOTS)
    while stack:
        known = stack.pop()
        if not (known.__name__.startswith("_") or "._" in known.__module__):
            yield known.__name__
        stack.extend(known.__subclasses__())


def _arguments(path: str) -> set[str]:
    module, _, name = path.rpartition(".")
    constructor = getattr(import_module(module), name)
    return set(inspect.signature(constructor).parameters)
