"""The complete configuration of ``flatmtl fit``, defaults included, without building anything."""

import copy
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml  # type: ignore[import-untyped]

__all__ = ["MISSING", "Config", "class_of", "get_key", "resolve", "set_key"]

Config = dict[str, Any]

MISSING: Any = object()
"""What is no value of a configuration."""

_HEADER = "# lightning.pytorch=="


def resolve(
    files: Sequence[Path], arguments: Sequence[str], callbacks: Sequence[Mapping[str, Any]]
) -> Config:
    """What ``flatmtl fit --print_config`` prints, with callbacks added to those of the files.

    Args:
        files: The files of the base.
        arguments: Further arguments.
        callbacks: Entries with ``class_path`` and ``init_args``.

    Raises:
        ValueError: If the command refuses them, with its reason.
    """
    with TemporaryDirectory() as folder:
        added = Path(folder) / "callbacks.yaml"
        added.write_text(yaml.safe_dump({"trainer": {"callbacks+": list(callbacks)}}))
        more = [f"--config={added}"] if callbacks else []
        printed = _printed([*(f"--config={file}" for file in files), *more, *arguments])
    config: Config = yaml.safe_load(printed)
    return config


def _printed(arguments: list[str]) -> str:
    from lightning_flatmtl.cli import FlatMTLCLI  # noqa: PLC0415 # imports this room

    out, err = io.StringIO(), io.StringIO()
    with _no_arguments(), redirect_stdout(out), redirect_stderr(err):
        try:
            FlatMTLCLI(["fit", *arguments, "--print_config"])
        except SystemExit as stopped:
            if stopped.code not in {0, None}:
                said = err.getvalue().strip().splitlines()
                why = said[-1].removeprefix("error: ") if said else "it was refused"
                raise ValueError(why) from None
    text = out.getvalue()
    return text[text.index(_HEADER) :]  # what the user's code prints when imported comes before


@contextmanager
def _no_arguments() -> Iterator[None]:
    """LightningCLI warns of arguments given from Python beside those of the command line."""
    saved = sys.argv
    sys.argv = saved[:1]
    try:
        yield
    finally:
        sys.argv = saved


def class_of(entry: Any) -> type | None:
    """The class that an entry of a configuration names; ``None`` if it names none."""
    path = entry.get("class_path") if isinstance(entry, Mapping) else None
    if not isinstance(path, str):
        return None
    module, _, name = path.rpartition(".")
    found = getattr(import_module(module), name)
    return found if isinstance(found, type) else None


def set_key(config: Config, key: str, value: Any) -> Config:
    """A copy with one value changed, by its dotted name; ``init_args`` may be left out.

    Raises:
        ValueError: If the configuration has no such value.
    """
    changed = copy.deepcopy(config)
    *parents, last = key.split(".")
    node: Any = changed
    for name in parents:
        node = _holding(node, name).get(name)
    node = _holding(node, last)
    if last not in node:
        raise ValueError(
            f"`seed_keys` must be values of the configuration, got '{key}', which it does not "
            "have. `flatmtl fit --config ... --print_config` shows all, such as 'data.seed'."
        )
    node[last] = value
    return changed


def get_key(config: Config, key: str) -> Any:
    """A value by its dotted name, ``MISSING`` if there is none; ``init_args`` may be left out."""
    node: Any = config
    for name in key.split("."):
        node = _holding(node, name).get(name, MISSING)
    return node


def _holding(node: Any, name: str) -> dict[str, Any]:
    """The mapping that has a value of this name: the node, or the ``init_args`` in it."""
    if not isinstance(node, dict):
        return {}
    inner = node.get("init_args")
    return inner if name not in node and isinstance(inner, dict) else node
