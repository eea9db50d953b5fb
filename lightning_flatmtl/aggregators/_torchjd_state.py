"""What a method of TorchJD has learned, as plain values and back."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

__all__ = ["TorchJDState"]

_INTERNAL = frozenset(vars(nn.Module()))
"""Attributes that every module has."""


class TorchJDState:
    """The state of one aggregator of TorchJD.

    Theirs is what ``reset`` forgets: buffers, which they make in the first call, and attributes
    such as the ``_state_key`` by which they tell whether the buffers fit. It is found by comparing
    with a copy that has been reset, so that settings are not part of it.

    Args:
        theirs: The aggregator.
    """

    def __init__(self, theirs: nn.Module) -> None:
        self._theirs = theirs
        self._fresh = copy.deepcopy(theirs)
        self.exists = hasattr(theirs, "reset")
        """Whether the aggregator has a state at all."""
        if self.exists:
            self._fresh.reset()  # type: ignore[operator]
        self._moving = False
        """Whether a loaded state has not met the device of the gradients yet."""

    def reset(self) -> None:
        """Forget what has been learned."""
        if self.exists:
            self._theirs.reset()  # type: ignore[operator]
        self._moving = False

    def get(self) -> dict[str, Any]:
        """The state by the names of submodules and attributes: copies, only plain values."""
        state: dict[str, Any] = {}
        for path, theirs, fresh in self._pairs():
            changed = {
                name: value
                for name, value in _attributes(theirs).items()
                if not _same(value, _attributes(fresh).get(name))
            }
            if changed:
                plain = all(_is_plain(value) for value in changed.values())
                state[path] = {k: _encoded(v) for k, v in changed.items()} if plain else None
        return state

    def set(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`get`."""
        self.reset()
        lost = [path for path, values in state.items() if values is None]
        if lost:
            rank_zero_warn(
                f"The state of {type(self._theirs).__name__} of TorchJD cannot be saved, so it "
                "starts afresh. Use the aggregator of lightning_flatmtl.aggregators, if there is "
                "one of that name, to go on where the run was.",
                category=UserWarning,
            )
            return
        for path, values in state.items():
            theirs = self._theirs.get_submodule(path)
            for name, value in values.items():
                setattr(theirs, name, _decoded(value))
        self._moving = bool(state)

    def meet(self, device: torch.device) -> None:
        """Bring a loaded state to the device of the gradients, where it was with them before."""
        if not self._moving:
            return
        self._moving = False
        for theirs in self._theirs.modules():
            key = getattr(theirs, "_state_key", ())
            follows = (
                [isinstance(k, torch.device) for k in key] if isinstance(key, tuple) else [False]
            )
            if any(follows):
                theirs._state_key = tuple(  # type: ignore[assignment]
                    device if moved else k for k, moved in zip(key, follows, strict=True)
                )
            elif follows:  # a state that says where it fits, and not that a device matters
                continue
            for name, buffer in theirs._buffers.items():
                theirs._buffers[name] = None if buffer is None else buffer.to(device)

    def _pairs(self) -> Iterator[tuple[str, nn.Module, nn.Module]]:
        fresh = dict(self._fresh.named_modules())
        for path, theirs in self._theirs.named_modules() if self.exists else ():
            yield path, theirs, fresh[path]


def _attributes(module: nn.Module) -> dict[str, Any]:
    own = {name: value for name, value in vars(module).items() if name not in _INTERNAL}
    return {**own, **module._buffers}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        both = isinstance(a, Tensor) and isinstance(b, Tensor)
        return both and a.shape == b.shape and torch.equal(a.to(b.device), b)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if _is_plain(a) or _is_plain(b):
        return type(a) is type(b) and bool(a == b)
    return type(a) is type(b) and repr(a) == repr(b)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(v) for v in value)
    kinds = Tensor | bool | int | float | str | torch.dtype | torch.device
    return value is None or isinstance(value, kinds)


def _encoded(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple):
        return {"tuple": [_encoded(v) for v in value]}
    if isinstance(value, list):
        return {"list": [_encoded(v) for v in value]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    return {"device": str(value)} if isinstance(value, torch.device) else value


def _decoded(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(_decoded(v) for v in value["tuple"])
    if "list" in value:
        return [_decoded(v) for v in value["list"]]
    return getattr(torch, value["dtype"]) if "dtype" in value else torch.device(value["device"])
