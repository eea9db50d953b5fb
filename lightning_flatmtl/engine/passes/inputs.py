"""The arguments of a step, given to every call of it as the first call found them."""

import copy
import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_flatmtl.engine.errors import FlatMTLError

__all__ = ["Inputs", "is_library_object", "own_copy"]

_LARGEST_COPY = 64 * 2**20
"""Bytes of the largest tensor that is copied in case the step changes it."""

_ATOMS: tuple[type[Any], ...] = (
    int, float, complex, str, bytes, type, Enum, torch.dtype, torch.device,
    FunctionType, MethodType, BuiltinFunctionType, ModuleType, partial, Iterator, nn.Module,
)  # fmt: skip
"""What is handed on as it is."""

_LIBRARIES = {
    "torch",
    "lightning",
    "lightning_fabric",
    "pytorch_lightning",
    "lightning_flatmtl",
    "logging",
}


@dataclasses.dataclass(frozen=True)
class _Kept:
    """A tensor as it came: its place, how often it had been changed, and a copy of its values."""

    place: str
    tensor: Tensor
    version: int
    values: Tensor | None

    def changed(self) -> bool:
        return self.tensor._version != self.version


class Inputs:
    """A batch and what else a step is called with, protected from the step.

    The first call gets the arguments themselves, so that everybody sees of them what they see in
    plain training. Every further call gets containers built anew: what the step has popped from,
    added to or bound anew in dictionaries, lists, dataclasses and other objects with attributes is
    as it was before the first call. Tensors are the same ones, unless the step has changed them in
    place: then they come with their first values.

    What changes a tensor behind the back of autograd (``.data``, a shared NumPy array) goes unseen.

    Args:
        args: The arguments.
        kwargs: The keyword arguments.

    Example:
        >>> inputs = Inputs({"x": torch.ones(1), "label": 2})
        >>> for _ in range(2):
        ...     (batch,), _ = inputs.take()
        ...     print(batch.pop("label"), float(batch["x"].mul_(3)))
        2 3.0
        2 3.0
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._originals = args, kwargs
        self._taken = False
        self._kept: dict[int, _Kept] = {}
        self._template = self._first(self._originals)

    def take(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments for one call.

        Raises:
            FlatMTLError: If a tensor was changed in place that is too large to be copied each time.
        """
        if not self._taken:
            self._taken = True
            return self._originals
        first = {key: _again(kept) for key, kept in self._kept.items() if kept.changed()}
        copied: tuple[tuple[Any, ...], dict[str, Any]] = _Copy(first)(self._template)
        return copied

    def altered(self) -> bool:
        """Whether the originals are no longer what they were."""
        changed = any(kept.changed() for kept in self._kept.values())
        return changed or not _alike(self._originals, self._template, set())

    def _first(self, value: Any) -> Any:
        copying = _Copy({})
        copied = copying(value)
        for place, tensor in copying.tensors.values():
            if tensor.is_inference():
                continue  # cannot be changed in place
            small = tensor.layout != torch.strided or tensor.nbytes <= _LARGEST_COPY
            values = tensor.detach().clone() if small else None
            self._kept[id(tensor)] = _Kept(place, tensor, tensor._version, values)
        return copied


def own_copy(value: Any) -> Any:
    """A batch in containers and tensors of its own: what is done to it nobody else sees.

    Made in inference mode or not, its tensors can be differentiated through.

    Example:
        >>> x = torch.ones(2)
        >>> copied = own_copy({"x": x})
        >>> float(copied["x"].zero_().sum()), float(x.sum())
        (0.0, 2.0)
    """
    with torch.inference_mode(False):
        copying = _Copy({})
        copying(value)
        tensors = copying.tensors.items()
        return _Copy({key: _cloned(tensor, tensor) for key, (_, tensor) in tensors})(value)


class _Copy:
    """Copies containers and objects, but not what lies in them at the end.

    Args:
        instead: What comes in the place of some tensors, by their ids.
    """

    def __init__(self, instead: Mapping[int, Any]) -> None:
        self._instead = instead
        self._done: dict[int, Any] = {}
        self.tensors: dict[int, tuple[str, Tensor]] = {}

    def __call__(self, value: Any, place: str = "") -> Any:
        if value is None or isinstance(value, _ATOMS):
            return value
        if isinstance(value, Tensor):
            self.tensors.setdefault(id(value), (place, value))
            return self._instead.get(id(value), value)
        if id(value) not in self._done:
            self._done[id(value)] = value  # for what refers to itself
            self._done[id(value)] = self._copy(value, place)
        return self._done[id(value)]

    def _copy(self, value: Any, place: str) -> Any:
        if isinstance(value, np.ndarray):
            return value.copy()
        if type(value) is tuple or (isinstance(value, tuple) and hasattr(value, "_make")):
            return self._copy_tuple(value, place)
        new = _shallow(value)
        if new is value:
            return value
        self._done[id(value)] = new
        if isinstance(value, dict):
            for key, item in value.items():
                dict.__setitem__(new, key, self(item, f"{place}[{key!r}]"))
        elif isinstance(value, list | deque):
            for i, item in enumerate(value):
                new[i] = self(item, f"{place}[{i}]")
        attributes = getattr(new, "__dict__", None)
        if isinstance(attributes, dict):
            for name, item in list(attributes.items()):
                attributes[name] = self(item, f"{place}.{name}")
        return new

    def _copy_tuple(self, value: Any, place: str) -> Any:
        items = [self(v, f"{place}[{i}]") for i, v in enumerate(value)]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        return tuple(items) if type(value) is tuple else value._make(items)


def _shallow(value: Any) -> Any:
    """A copy of a container or of an object with attributes; itself if it has none."""
    if is_library_object(value):
        return value
    try:
        return copy.copy(value)
    except Exception:  # it does not want to be copied
        return value


def _again(kept: _Kept) -> Tensor:
    tensor = kept.tensor
    if kept.values is None:
        raise FlatMTLError(
            f"The step has changed the tensor at `{_named(kept.place)}` in its batch in place, so "
            "it cannot be run again on what it was first given (a tensor of "
            f"{tensor.nbytes >> 20} MiB is not copied in advance). Change a copy: "
            "`x = x / 255` instead of `x.div_(255)` or `x /= 255`."
        )
    return _cloned(kept.values, tensor)


def _cloned(values: Tensor, tensor: Tensor) -> Tensor:
    """A copy of ``values`` that is otherwise as ``tensor`` is."""
    values = values.detach().clone()
    if type(values) is not type(tensor):
        values = values.as_subclass(type(tensor))
    for name, value in getattr(tensor, "__dict__", {}).items():
        vars(values).setdefault(name, value)
    return values.requires_grad_(tensor.requires_grad) if tensor.is_leaf else values


def _named(place: str) -> str:
    """``[0][0]['image']``, the place in args and kwargs, in the words of who wrote the step."""
    if place.startswith("[0][0]"):
        return "batch" + place.removeprefix("[0][0]")
    return "arguments" + place


def _alike(a: Any, b: Any, met: set[tuple[int, int]]) -> bool:
    """Whether ``b``, a copy of what ``a`` was, still has the same in it.

    ``met`` has the pairs that are compared already, for what refers to itself.
    """
    if a is b or (id(a), id(b)) in met:
        return True
    if type(a) is not type(b) or isinstance(a, Tensor):
        return False
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    met.add((id(a), id(b)))
    same = hasattr(a, "__dict__")
    if isinstance(a, dict):
        same = a.keys() == b.keys() and all(_alike(v, b[k], met) for k, v in a.items())
    elif isinstance(a, list | tuple | deque):
        same = len(a) == len(b) and all(_alike(x, y, met) for x, y in zip(a, b, strict=True))
    mine, other = getattr(a, "__dict__", {}), getattr(b, "__dict__", {})
    same = same and mine.keys() == other.keys()
    return same and all(_alike(mine[k], other[k], met) for k in mine)


def is_library_object(value: Any) -> bool:
    """Whether ``value`` is an object of torch, Lightning or ours, such as a Trainer or a logger."""
    module = type(value).__module__
    return module.partition(".")[0] in _LIBRARIES and not module.startswith("torch.utils.data")
