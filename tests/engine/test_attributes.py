"""What lies in plain attributes is put back, and what cannot be is named."""

import random
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric

from lightning_flatmtl.engine.passes.attributes import AttributeSnapshot


class Net(nn.Module):
    """Holds one thing in a plain attribute."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.held = held


class Running:
    """A running mean of one's own."""

    def __init__(self) -> None:
        self.total, self.history = 0.0, [1.0]

    def update(self) -> None:
        self.total += 1.0
        self.history.append(2.0)


class Slotted:
    """An object without a dictionary: nothing of it can be seen."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0


class Reader:
    """An iterator: its parts cannot be put back without what it reads."""

    def __init__(self) -> None:
        self.place = 0

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        self.place += 1
        return self.place


def counting() -> Iterator[int]:
    place = 0
    while True:
        place += 1
        yield place


def hidden() -> nn.Module:
    return nn.BatchNorm1d(2)


# What is held, how a step changes it, and how to look at it.
PUT_BACK: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "list": (lambda: [1, 2], lambda x: x.append(3), list),
    "list, shorter": (lambda: [1, 2], lambda x: x.pop(), list),
    "list, same length": (lambda: [1, 2], lambda x: x.__setitem__(0, 3), list),
    "dict, new key": (lambda: {"a": 1}, lambda x: x.update(b=2), dict),
    "dict, new value": (lambda: {"a": 1}, lambda x: x.update(a=2), dict),
    "dict, another key": (lambda: {"a": 1}, lambda x: (x.clear(), x.update(b=1)), dict),
    "dict, other order": (lambda: {"a": 1, "b": 2}, lambda x: x.update(a=x.pop("a")), list),
    "set": (lambda: {1, 2}, lambda x: x.add(3), set),
    "set, same length": (lambda: {"a"}, lambda x: (x.add("b"), x.discard("a")), set),
    "deque": (lambda: deque([1, 2], maxlen=2), lambda x: x.append(3), list),
    "list in a dict": (lambda: {"a": [1]}, lambda x: x["a"].append(2), lambda x: x["a"][:]),
    "list in a tuple": (lambda: ([1],), lambda x: x[0].append(2), lambda x: x[0][:]),
    "tensor": (lambda: torch.zeros(3), lambda x: x.add_(1), torch.Tensor.tolist),
    "tensor in a list": (lambda: [torch.zeros(3)], lambda x: x[0].add_(1), lambda x: x[0].tolist()),
    "array": (lambda: np.zeros(3), lambda x: np.add(x, 1, out=x), np.ndarray.tolist),
    "torch generator": (
        torch.Generator,
        lambda x: torch.rand(1, generator=x),
        lambda x: x.get_state().tolist(),
    ),
    "python generator": (lambda: random.Random(0), lambda x: x.random(), lambda x: x.getstate()),
    "numpy generator": (
        lambda: np.random.default_rng(0),
        lambda x: x.random(),
        lambda x: x.bit_generator.state,
    ),
    "object": (Running, Running.update, lambda x: (x.total, x.history[:])),
    "objects in a list": (
        lambda: [Running()],
        lambda x: x[0].update(),
        lambda x: (x[0].total, x[0].history[:]),
    ),
    "module in a list": (
        lambda: [hidden()],
        lambda x: x[0](torch.randn(4, 2)),
        lambda x: x[0].running_mean.tolist(),
    ),
    "metric in a dict": (
        lambda: {"a": MeanMetric()},
        lambda x: x["a"].update(3.0),
        lambda x: (x["a"].update_count, x["a"].mean_value.item(), x["a"].weight.item()),
    ),
}


@pytest.mark.parametrize(("make", "change", "look"), PUT_BACK.values(), ids=PUT_BACK)
def test_is_put_back(make: Any, change: Any, look: Any) -> None:
    held = make()
    net = Net(held)
    snapshot = AttributeSnapshot(net)
    before = look(held)
    for _ in range(2):  # once for every further pass
        change(held)
        assert look(held) != before
        snapshot.put_back()
        assert look(held) == before
    assert net.held is held
    assert snapshot.changed() == []


def test_what_the_attributes_are_bound_to_is_put_back() -> None:
    net = Net([1])
    held = net.held
    snapshot = AttributeSnapshot(net)
    net.held, net.new = [2], 3
    snapshot.put_back()
    assert net.held is held
    assert not hasattr(net, "new")


@pytest.mark.parametrize("make", [Reader, counting])
def test_what_is_only_compared_is_named_once_it_differs(make: Any) -> None:
    held = make()
    snapshot = AttributeSnapshot(Net({"batches": held}))
    assert snapshot.changed() == []
    next(held)
    snapshot.put_back()
    assert snapshot.changed() == ["self.held['batches']"]


def test_objects_that_show_nothing_or_are_of_a_library_are_left_alone() -> None:
    slotted, library = Slotted(), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    net = Net([slotted, library])
    snapshot = AttributeSnapshot(net)
    slotted.value, library.fresh = 1, True
    snapshot.put_back()
    assert slotted.value == 1
    assert library.fresh
    assert snapshot.changed() == []


def test_registered_metrics_are_left_to_the_host() -> None:
    net = Net(None)
    net.metric = MeanMetric()
    net.metric.note = [1]
    net.inner = Net([1])  # and submodules are not
    snapshot = AttributeSnapshot(net)
    net.metric.update(3.0)
    net.metric.note.append(2)
    net.inner.held.append(2)
    snapshot.put_back()
    assert net.metric.compute() == 3.0
    assert net.metric.update_count == 1
    assert net.metric.note == [1, 2]
    assert net.inner.held == [1]


def test_parameters_and_what_shares_their_memory_are_not_written_to() -> None:
    net = Net(None)
    net.view, net.other = net.layer.weight.detach(), torch.zeros(2, requires_grad=True)
    snapshot = AttributeSnapshot(net)
    with torch.no_grad():
        net.layer.weight.fill_(5.0)
        net.other.fill_(5.0)
    snapshot.put_back()
    assert net.layer.weight.eq(5.0).all()
    assert net.other.eq(5.0).all()


def test_large_ones_are_only_compared() -> None:
    long, large, array = [0] * 10_001, torch.zeros(2**16 + 1), np.zeros(2**16 + 1)
    at_most = ([0] * 10_000, torch.zeros(2**16), np.zeros(2**16))
    net = Net({"long": long, "large": large, "array": array, "at most": at_most})
    snapshot = AttributeSnapshot(net)
    for values in ((long, large, array), at_most):
        values[0][0] = 1
        values[0].append(2)
        values[1].add_(1)
        values[2][:] = 1
    assert snapshot.changed() == [
        "self.held['long']",
        "self.held['large']",
        "self.held['at most'][0]",
    ]
    snapshot.put_back()
    assert len(long) == 10_001  # what was added is taken away
    assert long[0] == 1
    assert large.eq(1).all()
    assert array.all()
    assert at_most[0] == [0] * 10_000
    assert at_most[1].eq(0).all()
    assert not at_most[2].any()
    assert snapshot.changed() == ["self.held['large']"]


def nested(depth: int, inner: Any) -> Any:
    return [nested(depth - 1, inner)] if depth else inner


@pytest.mark.parametrize(("depth", "reached"), [(0, True), (3, True), (4, False)])
def test_how_far_it_looks_into_containers(depth: int, reached: bool) -> None:
    inner = [1]
    snapshot = AttributeSnapshot(Net(nested(depth, inner)))
    inner.append(2)
    snapshot.put_back()
    assert inner == ([1] if reached else [1, 2])


class Box:
    """An object that holds another."""

    def __init__(self, held: Any) -> None:
        self.held, self.count = held, 1000


@pytest.mark.parametrize(("depth", "kept"), [(1, True), (2, True), (3, True), (4, False)])
def test_objects_within_objects_are_put_back_or_named(depth: int, kept: bool) -> None:
    inner: Any = Box(random.Random(0))
    outer = inner
    for _ in range(depth - 1):
        outer = Box(outer)
    before = inner.held.getstate()
    snapshot = AttributeSnapshot(Net(outer))
    inner.count = 0
    inner.held.random()
    snapshot.put_back()
    assert (inner.count == 1000) is kept
    assert (inner.held.getstate() == before) is kept
    assert snapshot.changed() == ([] if kept else ["self.held"])


class Source(Reader):
    """An iterator that holds something else."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.held, self.place = held, 1000


COMPARED: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "list": (lambda: [1], lambda x: x.append(2)),
    "tensor": (lambda: torch.zeros(1), lambda x: x.add_(1)),
    "generator": (counting, next),
    "object": (lambda: Box(None), lambda x: setattr(x, "count", 0)),
    "generator of a generator": (lambda: started(chained(counting())), next),
    "object of an object": (lambda: Box(Box(None)), lambda x: setattr(x.held, "count", 0)),
}


def chained(inner: Any) -> Any:
    yield from inner


def started(generator: Any) -> Any:
    next(generator)
    return generator


@pytest.mark.parametrize(("make", "change"), COMPARED.values(), ids=COMPARED)
def test_what_an_iterator_holds_is_compared(make: Any, change: Any) -> None:
    source = Source(make())
    net = Net(source)
    net.again = source  # named once all the same
    snapshot = AttributeSnapshot(net)
    source.place = int("1000")  # an equal number is no change
    assert snapshot.changed() == []
    change(source.held)
    assert snapshot.changed() == ["self.held"]


def test_what_a_library_or_a_module_within_an_iterator_does_is_its_own() -> None:
    layer = nn.BatchNorm1d(2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    with torch.inference_mode():
        constant = torch.zeros(1)
    net = Net(Source((layer, optimizer)))
    net.held.layer, net.held.optimizer, net.held.constant = layer, optimizer, constant
    snapshot = AttributeSnapshot(net)
    layer.fresh = optimizer.fresh = True
    assert snapshot.changed() == []


def test_methods_flags_and_registered_parts_are_left_alone() -> None:
    def first() -> None: ...
    def second() -> None: ...

    net = Net(None)
    net.wrapped, net.unwrapped, net.rewrapped = None, first, first
    net.track_running_stats = True
    snapshot = AttributeSnapshot(net)
    net.wrapped, net.unwrapped, net.rewrapped, net.fresh = second, None, second, second
    net.track_running_stats, net.second_pass = False, True
    net.layer.note = "torch's own layers change nothing but buffers"
    net.register_forward_hook(lambda *_: None)
    snapshot.put_back()
    assert (net.wrapped, net.unwrapped, net.rewrapped) == (second, None, second)
    assert net.fresh is second
    assert (net.track_running_stats, net.second_pass) == (False, True)
    assert hasattr(net.layer, "note")
    assert len(net._forward_hooks) == 1


class Drifting(nn.Module):
    """Binds a buffer to a new tensor, has one that is none, and one too large to copy."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("none", None)
        self.register_buffer("large", torch.zeros(2**16 + 1))
        with torch.inference_mode():
            self.register_buffer("constant", torch.zeros(1))

    def forward(self) -> None:
        self.mean = self.mean + 1
        self.large.add_(1)


def test_buffers_of_a_module_in_a_list() -> None:
    drifting = Drifting()
    mean = drifting.mean
    net = Net([nn.Sequential(nn.Identity(), drifting)])
    net.again = [nn.Sequential(drifting), net.layer]
    snapshot = AttributeSnapshot(net)
    drifting()
    snapshot.put_back()
    assert drifting.mean is mean
    assert snapshot.changed() == ["self.held[0].1.large"]


def test_a_container_is_looked_into_up_to_its_length() -> None:
    counts = {size: torch.zeros(1) for size in (10_000, 10_001)}
    net = Net([[count] + [0] * (size - 1) for size, count in counts.items()])
    snapshot = AttributeSnapshot(net)
    for count in counts.values():
        count.add_(1)
    snapshot.put_back()
    assert [count.item() for count in counts.values()] == [0, 1]


@pytest.mark.parametrize(("depth", "reached"), [(2, True), (3, False)])
def test_an_object_is_one_step_of_the_way(depth: int, reached: bool) -> None:
    inner = [1]
    snapshot = AttributeSnapshot(Net(Box(nested(depth, inner))))
    inner.append(2)
    snapshot.put_back()
    assert inner == ([1] if reached else [1, 2])


@pytest.mark.parametrize("kind", [Box, Source])
def test_objects_that_hold_themselves(kind: Any) -> None:
    held = kind(None)
    held.held = held
    assert AttributeSnapshot(Net(held)).changed() == []
