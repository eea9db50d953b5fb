"""Single-task baselines by metric name, from a mapping or a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from torch import Tensor

from lightning_flatmtl._yaml import load_yaml, once

__all__ = ["load_baselines"]


def load_baselines(source: str | PathLike[str] | Mapping[str, Any]) -> dict[str, float]:
    """Read single-task values by full metric name, ``"task/metric"``.

    Args:
        source: A mapping or the path of a YAML or JSON file (``.json``) that holds one, either
            flat, ``{"left/accuracy": 0.95}``, or nested, ``{"left": {"accuracy": 0.95}}``.

    Returns:
        The flat mapping, values as floats, in the order of ``source``.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file cannot be parsed or holds no mapping, a name is not a string or
            given twice, or a value is not a number.

    Example:
        >>> from lightning_flatmtl.metrics import load_baselines
        >>> load_baselines({"left": {"accuracy": 0.95, "loss": 0.2}, "right/accuracy": 0.9})
        {'left/accuracy': 0.95, 'left/loss': 0.2, 'right/accuracy': 0.9}
    """
    content = source if isinstance(source, Mapping) else _read(Path(source))
    baselines: dict[str, float] = {}
    for name, value in _flat(content, ""):
        if name in baselines:
            raise ValueError(f"The baseline of {name!r} is given twice: remove one of the two.")
        baselines[name] = _number(name, value)
    return baselines


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of baselines at {str(path)!r}.")
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".json":
            content = json.loads(text, object_pairs_hook=once)
        else:
            content = load_yaml(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"The file of baselines {str(path)!r} cannot be parsed: {error}"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"The file of baselines {str(path)!r} must hold a mapping from metric name to value, "
            f"got {type(content).__name__}."
        )
    return content


def _flat(content: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield names joined by slashes; a task without metrics yields nothing."""
    for key, value in content.items():
        if not isinstance(key, str):
            raise ValueError(
                f"Names of baselines must be strings, got {key!r} under {prefix!r}: "
                "put it in quotes."
            )
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"The baseline of {name!r} must be a number, got {value!r}.")
    return float(value)
