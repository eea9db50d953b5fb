"""Who reaches which parameter, read off the graph."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_flatmtl.engine import Partition


def scalar() -> nn.Parameter:
    return nn.Parameter(torch.tensor(2.0))


def test_shared_by_some_by_all_and_heads() -> None:
    w, ab, a, b, c, unused = (scalar() for _ in range(6))
    params = [w, ab, a, b, c, unused]
    partition = Partition()
    partition.observe({"a": w * ab * a, "b": w * ab * b, "c": w * c})
    assert partition.shared(params) == [w, ab]
    assert [partition.head(t, params) for t in "abc"] == [[a], [b], [c]]
    assert partition.unreached(params) == [unused]
    assert partition.seen == {"a", "b", "c"}


def test_deep_graphs_and_many_tasks() -> None:
    w, heads = scalar(), [scalar() for _ in range(30)]
    x = w
    for _ in range(5000):  # deeper than Python's recursion limit
        x = x * 1.0
    partition = Partition()
    partition.observe({str(i): x * h for i, h in enumerate(heads)})
    assert partition.shared([w, *heads]) == [w]
    assert all(partition.head(str(i), [w, *heads]) == [h] for i, h in enumerate(heads))


def test_an_absent_task_keeps_what_it_reached() -> None:
    w, a, b = scalar(), scalar(), scalar()
    partition = Partition()
    partition.observe({"a": w * a})
    assert partition.head("a", [w, a]) == [w, a]
    partition.observe({"b": w * b})
    assert partition.shared([w, a, b]) == [w]
    partition.observe({"a": w * a})
    assert partition.shared([w, a, b]) == [w]


def test_detached_and_frozen_are_not_reached() -> None:
    w, a, frozen = scalar(), scalar(), nn.Parameter(torch.tensor(1.0), requires_grad=False)
    partition = Partition()
    partition.observe({"a": w.detach() * a * frozen, "b": w * frozen})
    assert partition.head("a", [w, a, frozen]) == [a]
    assert partition.head("b", [w, a, frozen]) == [w]


def test_checkpointed_segments_are_seen_through() -> None:
    layer, a, b = nn.Linear(2, 2), scalar(), scalar()
    x = checkpoint(layer, torch.ones(1, 2), use_reentrant=False).sum()
    partition = Partition()
    partition.observe({"a": x * a, "b": x * b})
    assert partition.shared(list(layer.parameters())) == list(layer.parameters())


def test_declared_parameters_are_not_looked_for() -> None:
    w, a, b = scalar(), scalar(), scalar()
    partition = Partition(shared=[a], heads={"b": [w]})
    partition.observe({"a": w * a, "b": w * b})
    assert partition.shared([w, a, b]) == [a]
    assert partition.head("b", [w, a, b]) == [w, b]
    with pytest.raises(ValueError, match="declared for the shared part and for task 'b'"):
        partition.declare(None, {"b": [a]})


def test_what_all_tasks_share_is_noted_once_unless_it_is_declared() -> None:
    declared, head, new = scalar(), scalar(), scalar()
    partition = Partition(heads={"a": [declared]})
    partition.observe({"a": 2 * head})
    before = partition.changes
    partition.share([declared, head, new])
    assert partition.shared([declared, head, new]) == [head, new]
    assert partition.head("a", [declared, head, new]) == [declared]
    assert partition.changes == before + 2
    partition.share([declared, head, new])
    assert partition.changes == before + 2


def test_state_goes_by_name() -> None:
    w, a, b = scalar(), scalar(), scalar()
    partition = Partition()
    partition.observe({"a": w * a, "b": w * b})
    named = {"w": w, "a": a, "b": b}
    other = {name: scalar() for name in named}
    fresh = Partition()
    fresh.load_state_dict(partition.state_dict(named), other)
    assert fresh.shared(list(other.values())) == [other["w"]]
    assert fresh.head("b", list(other.values())) == [other["b"]]
    assert fresh.seen == {"a", "b"}


def test_what_a_penalty_has_reached_is_part_of_the_state() -> None:
    w, a, spare = scalar(), scalar(), scalar()
    named = {"w": w, "a": a, "spare": spare}
    partition = Partition()
    partition.observe({"a": 2 * w})
    assert "penalised" not in partition.state_dict(named)
    partition.penalise([a])
    assert partition.unreached([w, a, spare]) == [spare]
    other = {name: scalar() for name in named}
    loaded, merged = Partition(), Partition()
    loaded.load_state_dict(partition.state_dict(named), other)
    merged.merge([Partition().state_dict(named), partition.state_dict(named)], other)
    for fresh in (loaded, merged):
        assert fresh.penalised == {other["a"]}
        assert fresh.unreached(list(other.values())) == [other["spare"]]
        assert fresh.head("a", list(other.values())) == [other["w"]]


def test_the_heads_of_all_tasks_are_those_of_each() -> None:
    params = [nn.Parameter(torch.ones(())) for _ in range(5)]
    w, a, a2, b, _ = params
    partition = Partition()
    partition.observe({"a": w * a * a2, "b": w * b})
    heads = partition.heads(["b", "a", "unseen"], params)
    found = {task: [id(p) for p in head] for task, head in heads.items()}
    assert list(found) == ["b", "a", "unseen"]
    assert found == {"b": [id(b)], "a": [id(a), id(a2)], "unseen": []}
    for task, ids in found.items():
        assert ids == [id(p) for p in partition.head(task, params)]
