"""Splits: complete, disjoint, of the sizes asked for, with the shares of the classes."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from lightning_flatmtl.data import split
from lightning_flatmtl.data._rounding import largest_remainder, rounded_table, systematic


def rows(parts: Any) -> list[list[int]]:
    return [list(part.indices) for part in parts]


def assert_partition(parts: Any, count: int) -> None:
    assert sorted(i for part in rows(parts) for i in part) == list(range(count))


@given(st.integers(7, 200), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_every_sample_is_in_one_split_of_the_right_size(count: int, seed: int) -> None:
    parts = split(list(range(count)), seed=seed)
    assert_partition(parts, count)
    for part, share in zip(parts, (0.7, 0.15, 0.15), strict=True):
        assert abs(len(part) - share * count) < 1
        assert all(a < b for a, b in pairwise(part.indices))


def test_sizes_are_rounded_by_largest_remainder() -> None:
    assert [len(p) for p in split(range(10), (0.7, 0.15, 0.15))] == [7, 2, 1]
    assert [len(p) for p in split(range(11), (0.7, 0.15, 0.15))] == [8, 2, 1]  # 7.7, 1.65, 1.65
    assert [len(p) for p in split(range(100), (1 / 3, 1 / 3, 1 / 3))] == [34, 33, 33]
    assert [len(p) for p in split(range(10), (0.7, 0.3, 0.0))] == [7, 3, 0]
    assert [len(p) for p in split(range(5), (1.0,))] == [5]


def test_a_seed_says_all_and_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = (rows(split(range(50), seed=seed)) for seed in (1, 1, 2))
    assert one == same != other
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("form", [list, np.array, torch.tensor])
def test_every_class_gives_its_share(form: Any) -> None:
    labels = [0] * 700 + [1] * 201 + [2] * 99
    parts = split(labels, (0.7, 0.15, 0.15), stratify=form(labels))
    assert_partition(parts, 1000)
    assert [len(p) for p in parts] == [700, 150, 150]
    for label, count in ((0, 700), (1, 201), (2, 99)):
        for part, share in zip(parts, (0.7, 0.15, 0.15), strict=True):
            assert abs([labels[i] for i in part.indices].count(label) - share * count) < 1


def test_labels_may_be_words_rows_or_read_off_a_sample() -> None:
    words = ["red", "green"] * 50
    halves = split(range(100), (0.5, 0.5), stratify=words)
    assert [sum(words[i] == "red" for i in part.indices) for part in halves] == [25, 25]
    several = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).repeat(10, 1)
    for part in split(range(40), (0.5, 0.5), stratify=several):
        assert torch.equal(several[part.indices].unique(dim=0, return_counts=True)[1],
                           torch.full((4,), 5))  # fmt: skip
    samples = TensorDataset(torch.zeros(40, 2), several[:, 0])
    read = split(samples, (0.5, 0.5), stratify=lambda sample: sample[1])
    assert rows(read) == rows(split(samples, (0.5, 0.5), stratify=several[:, 0]))
    by_task = split(several, (0.5, 0.5), stratify=lambda row: {"a": row[0], "b": int(row[1])})
    assert rows(by_task) == rows(split(several, (0.5, 0.5), stratify=several))


def test_combinations_of_several_tasks_keep_their_shares_rare_ones_too() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = {
        "a": torch.randint(3, (1000,), generator=generator),
        "b": torch.cat([torch.randint(3, (900,), generator=generator), torch.arange(100, 200)]),
    }
    parts = split(range(1000), stratify=labels)
    assert_partition(parts, 1000)
    assert [len(p) for p in parts] == [700, 150, 150]
    for a in range(3):
        for b in range(3):
            both = ((labels["a"] == a) & (labels["b"] == b)).float()
            for part, share in zip(parts, (0.7, 0.15, 0.15), strict=True):
                assert abs(both[part.indices].sum() - share * both.sum()) < 1
    # A hundred combinations of one sample each are spread as the shares say.
    alone = [(labels["b"][part.indices] >= 100).sum().item() for part in parts]
    assert all(abs(n - s) < 9 for n, s in zip(alone, (70, 15, 15), strict=True)), alone


def test_missing_labels_are_a_class() -> None:
    labels = torch.tensor([math.nan] * 60 + [0.0] * 20 + [1.0] * 20)
    for part, count in zip(split(range(100), (0.5, 0.5), labels), (30, 30), strict=True):
        assert labels[part.indices].isnan().sum() == count


def test_a_data_set_for_each_task_is_split_by_itself() -> None:
    data = {"a": range(40), "b": range(1000)}
    labels = [i % 2 for i in range(40)]
    train, val, test = split(data, stratify={"a": labels})
    assert [{t: len(p) for t, p in part.items()} for part in (train, val, test)] == [
        {"a": 28, "b": 700},
        {"a": 6, "b": 150},
        {"a": 6, "b": 150},
    ]
    for task, one in data.items():
        assert_partition([train[task], val[task], test[task]], len(one))
    alone = split(data["a"], stratify=labels)  # another task changes nothing
    assert rows(alone) == rows([train["a"], val["a"], test["a"]])
    assert sum(train["a"]) == sum(train["a"].indices)


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=8),
    st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any),
    st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_a_table_is_rounded_with_its_margins(counts: Any, parts: Any, seed: int) -> None:
    rows, shares = np.array(counts), np.array(parts) / sum(parts)
    totals = largest_remainder(shares * rows.sum())
    table = rounded_table(rows, shares, totals, np.random.default_rng(seed))
    assert (table.sum(0) == totals).all()
    assert (table.sum(1) == rows).all()
    off = np.abs(table - rows[:, None] * shares).max()
    assert off < (1 if len(shares) <= 3 else 2)


def test_systematic_rounding_is_right_on_average() -> None:
    quotas = np.array([0.25, 3.5, 0.25, 4.0])
    drawn = [systematic(quotas, (i + 0.5) / 1000) for i in range(1000)]
    assert all(d.sum() == 8 for d in drawn)
    assert np.abs(np.mean(drawn, axis=0) - quotas).max() < 1e-9


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shares": (0.5, 0.4)}, "`shares` must be 1 together, got 0.9"),
        ({"shares": (1.2, -0.2)}, r"numbers in \[0, 1\]"),
        ({"shares": (math.nan, 1.0)}, r"numbers in \[0, 1\]"),
        ({"shares": ()}, r"numbers in \[0, 1\]"),
        ({"seed": -1}, "`seed` must be at least 0"),
        ({"at_least": -1}, "`at_least` must be at least 0"),
        ({"stratify": [0, 1]}, "a label for each of the 20 samples of `dataset`, got 2"),
        ({"stratify": [0.5] * 20}, "got the number 0.5. Make classes of it"),
        ({"stratify": {}}, "labels of at least one task"),
        ({"stratify": 3}, "got int"),
        (
            {"stratify": [0] * 18 + [1] * 2, "at_least": 1},
            r"at least 1 samples of every class in every split, got 0 in split \d of the class 1, "
            "which has 2 in all",
        ),
        ({"shares": (0.99, 0.01)}, "got 20, of which split 1 with a share of 0.01 has none"),
    ],
)
def test_what_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        split(range(20), **change)


def test_a_task_without_samples_in_a_split_is_named() -> None:
    with pytest.raises(ValueError, match="The data set of task 'b' must have enough samples"):
        split({"a": range(100), "b": range(2)})
    with pytest.raises(ValueError, match="must have enough samples for every split, got 0"):
        split([])
    with pytest.raises(ValueError, match="at least one"):
        split({})
    with pytest.raises(ValueError, match="among the tasks \\['a'\\], got 'c'"):
        split({"a": range(9)}, stratify={"c": [0] * 9})
    with pytest.raises(ValueError, match="labels by task for a mapping"):
        split({"a": range(9)}, stratify=[0] * 9)
    with pytest.raises(TypeError, match="must have a length, got list_iterator"):
        split(iter([1, 2]))  # type: ignore[call-overload]
