"""What the second pass writes into plain attributes of a module, put back or at least noticed."""

import random
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from types import (
    BuiltinFunctionType,
    FunctionType,
    GeneratorType,
    MethodType,
    ModuleType,
    NoneType,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_flatmtl.engine.passes.inputs import is_library_object

__all__ = ["AttributeSnapshot"]

_FUNCTIONS = (FunctionType, MethodType, BuiltinFunctionType, partial)
_ATOMS = {
    int, float, complex, bool, str, bytes, NoneType, type, range, slice,
    torch.dtype, torch.device, torch.Size, ModuleType, *_FUNCTIONS,
}  # fmt: skip
"""Types of which nothing can be changed but the attribute that holds them."""

_OF_MODULES = frozenset(vars(nn.Module()))
"""Parameters, buffers, submodules and hooks, which others look after."""

_OURS = {"second_pass", "track_running_stats"}
"""Flags that are another during a second pass on purpose."""

_LONG = 10_000
"""Entries of the largest container that is copied."""
_LARGE = 2**16
"""Elements of the largest tensor or array that is copied; a buffer may be larger."""
_DEEP = 3
"""How far objects within objects are looked into."""


class AttributeSnapshot:
    """The plain attributes of a module and its submodules: what lies in ``self.anything``.

    Numbers and whatever else an attribute is bound to; what lists, dictionaries, sets and deques
    contain; values of small tensors and arrays; generators of random numbers; metrics and other
    modules that lie in a list or a dictionary; objects that consist of all these, such as a running
    mean of one's own. Other objects (an iterator over batches) are only compared.

    Parameters, buffers, hooks and registered metrics are left to others, functions are left alone.

    Args:
        module: The module.
        layers: Its modules by name, for who has them at hand.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> net.seen, net.count = [1], 0
        >>> snapshot = AttributeSnapshot(net)
        >>> net.seen.append(2); net.count += 1
        >>> snapshot.put_back(); net.seen, net.count
        ([1], 0)
    """

    def __init__(
        self, module: nn.Module, layers: Iterable[tuple[str, nn.Module]] | None = None
    ) -> None:
        self._entries: list[_Entry] = []
        self._seen: set[int] = set()
        self._module = module
        self._parts: set[int] | None = None
        self._memory: set[int] | None = None
        for name, part in module.named_modules() if layers is None else layers:
            kind: Any = type(part)
            if not _is_of_torch(kind) and not _is_metric(part):
                self._of_module(part, f"self.{name}" if name else "self", _OF_MODULES)

    def put_back(self) -> None:
        """Let all be what it was."""
        with torch.no_grad():
            for entry in self._entries:
                entry.put_back()

    def changed(self) -> list[str]:
        """The attributes that are not what they were and cannot be put back."""
        return [entry.name for entry in self._entries if entry.is_lost()]

    def _of_module(self, part: nn.Module, name: str, hidden: frozenset[str]) -> None:
        attributes = vars(part)
        self._entries.append(_Attributes(name, attributes))
        for key, value in attributes.items():
            if type(value) not in _ATOMS and key not in hidden:
                self._visit(value, f"{name}.{key}", _DEEP)

    def _visit(self, value: Any, name: str, depth: int) -> None:
        if type(value) in _ATOMS or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            self._of_tensor(value, name)
        elif isinstance(value, nn.Module):
            self._of_hidden(value, name)
        elif isinstance(value, dict | list | set | deque | tuple):
            self._of_container(value, name, depth)
        elif isinstance(value, np.ndarray):
            self._entries.append(_Array(name, value))
        elif (stream := _stream(value)) is not None:
            self._entries.append(_Stream(name, *stream))
        elif isinstance(value, GeneratorType):
            self._entries.append(_Compared(name, partial(_position, value)))
        elif hasattr(value, "__dict__") and not is_library_object(value):
            if depth and _is_made_of_known(value, depth):
                self._entries.append(_Attributes(name, vars(value)))
                for key, item in vars(value).items():
                    self._visit(item, f"{name}.{key}", depth - 1)
            else:
                self._entries.append(_Compared(name, partial(_look, value, _DEEP)))

    def _of_tensor(self, value: Tensor, name: str) -> None:
        # What is differentiated or perturbed must not be written to.
        trained = value.requires_grad or isinstance(value, nn.Parameter)
        if trained or value.is_inference() or value.layout != torch.strided:
            return
        if self._memory is None:
            self._memory = {_address(p) for p in self._module.parameters()}
        if _address(value) not in self._memory:
            self._entries.append(_Values(name, value))

    def _of_container(self, value: Any, name: str, depth: int) -> None:
        if not isinstance(value, tuple):
            self._entries.append(_Items(name, value))
        if depth == 0 or len(value) > _LONG:
            return
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            if type(item) not in _ATOMS:
                self._visit(item, f"{name}[{key!r}]", depth - 1)

    def _of_hidden(self, value: nn.Module, name: str) -> None:
        """A module that is no submodule, with its buffers, but not its parameters."""
        if self._parts is None:
            self._parts = {id(part) for part in self._module.modules()}
        for path, part in value.named_modules():
            if id(part) not in self._parts:
                self._parts.add(id(part))
                named = f"{name}.{path}" if path else name
                self._of_module(part, named, _OF_MODULES)
                self._entries.append(_Items(named, part._buffers))
                for key, buffer in part._buffers.items():
                    if buffer is not None and not buffer.is_inference():
                        self._entries.append(_Values(f"{named}.{key}", buffer, counted=False))


class _Entry(ABC):
    """Something that may change.

    Args:
        name: How the user calls it.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def put_back(self) -> None:
        """Let it be what it was."""

    def is_lost(self) -> bool:
        """Whether it is not what it was, nor can be."""
        return False


class _Attributes(_Entry):
    """What the attributes of an object are bound to."""

    def __init__(self, name: str, attributes: dict[str, Any]) -> None:
        super().__init__(name)
        self._attributes = attributes
        self._saved = dict(attributes)

    @override
    def put_back(self) -> None:
        attributes, saved = self._attributes, self._saved
        for name, value in saved.items():
            now = attributes.get(name, self)
            if now is not value and name not in _OURS and not _replaced(now, value):
                attributes[name] = value
        for name in attributes.keys() - saved.keys():
            if name not in _OURS and not isinstance(attributes[name], _FUNCTIONS):
                del attributes[name]


class _Items(_Entry):
    """What a container holds; of a long list only how much."""

    def __init__(self, name: str, container: Any) -> None:
        super().__init__(name)
        self._container = container
        self._length = len(container)
        self._saved: Any = None
        if self._length <= _LONG:
            copied = dict if isinstance(container, dict) else list
            self._saved = copied(container)

    @override
    def put_back(self) -> None:
        container, saved = self._container, self._saved
        if saved is None:
            if isinstance(container, list):
                del container[self._length :]
            return
        if isinstance(container, list):
            container[:] = saved
        elif not _same_items(container, saved):
            container.clear()
            (container.extend if isinstance(container, deque) else container.update)(saved)

    @override
    def is_lost(self) -> bool:
        return len(self._container) != self._length


class _Values(_Entry):
    """The values of a tensor.

    Args:
        name: See :class:`_Entry`.
        tensor: The tensor.
        counted: Whether all changes are counted in its version; those of running statistics are
            not.
    """

    def __init__(self, name: str, tensor: Tensor, counted: bool = True) -> None:
        super().__init__(name)
        self._tensor = tensor
        self._counted = counted
        self._version = tensor._version
        self._saved = tensor.clone() if tensor.numel() <= _LARGE else None

    @override
    def put_back(self) -> None:
        changed = self._tensor._version != self._version
        if self._saved is not None and (changed or not self._counted):
            self._tensor.copy_(self._saved)
            self._version = self._tensor._version

    @override
    def is_lost(self) -> bool:
        return self._saved is None and self._tensor._version != self._version


class _Array(_Entry):
    """The values of a NumPy array."""

    def __init__(self, name: str, array: Any) -> None:
        super().__init__(name)
        self._array = array
        self._saved = array.copy() if array.size <= _LARGE and array.flags.writeable else None

    @override
    def put_back(self) -> None:
        if self._saved is not None:
            self._array[...] = self._saved


class _Stream(_Entry):
    """Where a private stream of random numbers stands."""

    def __init__(self, name: str, read: Callable[[], Any], write: Callable[[Any], Any]) -> None:
        super().__init__(name)
        self._write = write
        self._state = read()

    @override
    def put_back(self) -> None:
        self._write(self._state)


class _Compared(_Entry):
    """An object of which parts cannot be put back without breaking the rest."""

    def __init__(self, name: str, look: Callable[[], list[Any]]) -> None:
        super().__init__(name)
        self._look = look
        self._before = look()

    @override
    def put_back(self) -> None:
        """Nothing."""

    @override
    def is_lost(self) -> bool:
        now = self._look()
        return len(now) != len(self._before) or any(
            a is not b and (type(a) is not int or a != b)
            for a, b in zip(now, self._before, strict=True)
        )


def _replaced(now: Any, value: Any) -> bool:
    """Whether it was a method that has been replaced, or the attribute is one by now."""
    return isinstance(now, _FUNCTIONS) or isinstance(value, _FUNCTIONS)


def _same_items(container: Any, saved: Any) -> bool:
    if len(container) != len(saved):
        return False
    if isinstance(container, dict):
        pairs = zip(container.items(), saved.items(), strict=True)
        return all(a is c and b is d for (a, b), (c, d) in pairs)
    return all(a is b for a, b in zip(container, saved, strict=True))


def _stream(value: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]] | None:
    """How to read and write the state of a generator of random numbers."""
    if isinstance(value, torch.Generator):
        return value.get_state, value.set_state
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return value.getstate, value.setstate
    if isinstance(value, np.random.RandomState):
        return value.get_state, value.set_state
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return partial(getattr, bits, "state"), partial(setattr, bits, "state")
    return None


def _is_made_of_known(value: Any, depth: int) -> bool:
    """Whether an object consists of what can be put back, so that it may be put back in parts."""
    if isinstance(value, Iterator):
        return False
    return all(_is_known(item, depth - 1) for item in vars(value).values())


def _is_known(item: Any, depth: int) -> bool:
    if type(item) in _ATOMS or isinstance(
        item, Tensor | nn.Module | np.ndarray | dict | list | set | deque | tuple | type
    ):
        return True
    if _stream(item) is not None:
        return True
    return depth > 0 and hasattr(item, "__dict__") and _is_made_of_known(item, depth)


def _look(value: Any, depth: int) -> list[Any]:
    """What can be seen of an object from outside: its attributes, and how long they are."""
    seen: list[Any] = []
    for item in getattr(value, "__dict__", {}).values():
        seen.append(item)
        if isinstance(item, dict | list | set | deque):
            seen.append(len(item))
        elif isinstance(item, Tensor) and not item.is_inference():
            seen.append(item._version)
        elif type(item) not in _ATOMS and depth and not isinstance(item, nn.Module):
            if isinstance(item, GeneratorType):
                seen.extend(_position(item))
            elif not is_library_object(item):
                seen.extend(_look(item, depth - 1))
    return seen


def _position(generator: Any) -> list[Any]:
    """Where a generator stands: its line, and what its variables are bound to."""
    frame, inner = generator.gi_frame, generator.gi_yieldfrom
    if frame is None:
        return []
    further = _position(inner) if isinstance(inner, GeneratorType) else _look(inner, _DEEP)
    return [frame.f_lasti, *frame.f_locals.values(), inner, *further]


def _address(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a tensor without memory of its own
        return id(tensor)


@lru_cache(maxsize=4096)
def _is_of_torch(kind: Any) -> bool:
    """Whether a class of modules is torch's own: its layers change nothing but buffers."""
    classes = kind.__mro__[: kind.__mro__.index(nn.Module)]
    return all(c.__module__.partition(".")[0] == "torch" for c in classes)


def _is_metric(part: nn.Module) -> bool:
    """Whether a module is torchmetrics' own kind; without that library in use none is."""
    library = sys.modules.get("torchmetrics")
    return library is not None and isinstance(part, library.Metric)
