"""Every call of a step gets its arguments as the first call found them."""

import dataclasses
from collections import deque, namedtuple
from collections.abc import Callable
from enum import Enum
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_flatmtl.engine import FlatMTLError
from lightning_flatmtl.engine.passes import inputs as module
from lightning_flatmtl.engine.passes.inputs import Inputs

Pair = namedtuple("Pair", ["x", "y"])


@dataclasses.dataclass
class Sample:
    x: Any


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Any


class Dictionary(dict):
    """With an attribute, as HuggingFace's batches."""

    note: Any = None


class Color(Enum):
    RED = 1


class Uncopyable:
    def __copy__(self) -> None:
        raise TypeError("not to be copied")


def ones() -> torch.Tensor:
    return torch.ones(2)


def noted() -> Dictionary:
    made = Dictionary(x=1)
    made.note = [1]
    return made


def itself() -> dict[str, Any]:
    made: dict[str, Any] = {"x": 1}
    made["me"] = made
    return made


# A batch, what a step does to it, and what is to be seen of it afterwards.
CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "popped": (lambda: {"x": 1, "y": 2}, lambda b: b.pop("y"), dict),
    "added": (lambda: {"x": 1}, lambda b: b.update(y=2), dict),
    "appended": (lambda: [1], lambda b: b.append(2), list),
    "replaced in a list": (lambda: [1, 2], lambda b: b.__setitem__(1, 3), list),
    "deque": (lambda: deque([1, 2]), lambda b: b.append(3), list),
    "list in a list": (lambda: [[1]], lambda b: b[0].append(2), lambda b: b[0][:]),
    "list in a dict": (lambda: {"x": [1]}, lambda b: b["x"].append(2), lambda b: b["x"][:]),
    "list in a tuple": (lambda: (1, [1]), lambda b: b[1].append(2), lambda b: (b[0], b[1][:])),
    "list in a named tuple": (lambda: Pair([1], 2), lambda b: b.x.append(2), lambda b: b.x[:]),
    "dataclass": (lambda: Sample(1), lambda b: setattr(b, "x", 2), lambda b: b.x),
    "list in a dataclass": (lambda: Frozen([1]), lambda b: b.x.append(2), lambda b: b.x[:]),
    "attribute of a dict": (noted, lambda b: b.note.append(2), lambda b: (b["x"], b.note[:])),
    "array": (lambda: np.ones(2), lambda b: np.add(b, 1, out=b), np.ndarray.tolist),
    "tensor": (ones, lambda b: b.div_(2), torch.Tensor.tolist),
    "tensor in a dict": (
        lambda: {"x": ones()},
        lambda b: b["x"].mul_(2),
        lambda b: b["x"].tolist(),
    ),
    "tensor in a tuple": (lambda: (ones(), 1), lambda b: b[0].mul_(2), lambda b: b[0].tolist()),
    "refers to itself": (itself, lambda b: b["me"].pop("x"), lambda b: (b.get("x"), b["me"] is b)),
}


@pytest.mark.parametrize(("make", "change", "look"), CHANGES.values(), ids=CHANGES)
def test_further_calls_get_what_the_first_one_got(make: Any, change: Any, look: Any) -> None:
    batch = make()
    before = look(make())
    inputs = Inputs(batch, 3, option=[4])
    assert not inputs.altered()
    (first, number), options = inputs.take()
    assert first is batch  # others see of it what they see in plain training
    change(first)
    assert inputs.altered()
    for _ in range(2):
        (again, number), options = inputs.take()
        assert look(again) == before
        assert type(again) is type(batch)
        assert (number, options) == (3, {"option": [4]})
        change(again)
    assert look(batch) != before


def test_what_is_the_same_stays_the_same() -> None:
    x, layer = ones(), nn.Linear(1, 1)
    shared = [x]
    kept = (1, "x", None, Color.RED, layer, len, torch.float32, Uncopyable())
    inputs = Inputs({"a": shared, "b": shared, "x": x, "kept": kept})
    inputs.take()
    (again,), _ = inputs.take()
    assert again["a"] is again["b"] is not shared
    assert again["x"] is again["a"][0] is x  # nobody has changed it
    assert again["kept"] is kept
    assert not inputs.altered()
    x.add_(1)
    (again,), _ = inputs.take()
    assert again["x"] is again["a"][0]
    assert again["x"].tolist() == [1, 1]


def test_a_tensor_keeps_what_it_is() -> None:
    leaf = torch.ones(2, requires_grad=True)
    computed = leaf * 2
    leaf.note = "mine"
    inputs = Inputs(leaf, computed)
    inputs.take()
    with torch.no_grad():
        leaf.add_(1)
        computed.add_(1)
    (first, second), _ = inputs.take()
    assert first.tolist() == [1, 1]
    assert first.requires_grad
    assert first.note == "mine"
    assert second.tolist() == [2, 2]
    assert not second.requires_grad  # its graph is that of the clean pass


class Label(torch.Tensor):
    """A tensor with a type of its own."""


def test_a_subclass_of_tensors_comes_again_as_one() -> None:
    label, plain = torch.zeros(2).as_subclass(Label), torch.zeros(2)
    inputs = Inputs(label, plain)
    inputs.take()
    label.add_(1)
    plain.add_(1)
    (again, other), _ = inputs.take()
    assert (type(again), type(other)) == (Label, torch.Tensor)
    assert again.tolist() == other.tolist() == [0, 0]


def test_objects_of_libraries_are_handed_on() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(ones())], lr=1.0)
    data = torch.utils.data.TensorDataset(ones())
    inputs = Inputs(optimizer, data)
    inputs.take()
    (same, copied), _ = inputs.take()
    assert same is optimizer
    assert copied is not data  # data sets are the user's


def test_what_cannot_be_changed_in_place_is_handed_on() -> None:
    with torch.inference_mode():
        x = ones()
    inputs = Inputs(x)
    inputs.take()
    (again,), _ = inputs.take()
    assert again is x
    assert not inputs.altered()


@pytest.mark.parametrize(
    ("args", "place"),
    [
        (lambda x: ({"x": x},), r"`batch\['x'\]`"),
        (lambda x: (x,), "`batch`"),
        (lambda x: (0, [x]), r"`arguments\[0\]\[1\]\[0\]`"),
        (lambda x: (Sample(x),), r"`batch\.x`"),
    ],
)
def test_a_large_tensor_that_was_changed_is_refused(
    args: Any, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LARGEST_COPY", 8)
    small, large = ones(), torch.ones(3)
    inputs = Inputs(*args(large), small=small)
    inputs.take()
    small.add_(1)
    _, again = inputs.take()
    assert again["small"].tolist() == [1, 1]
    large.add_(1)
    with pytest.raises(FlatMTLError, match=f"has changed the tensor at {place} in its batch"):
        inputs.take()
