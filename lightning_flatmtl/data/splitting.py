"""Splits of a data set, or of one for each task, that keep the shares of the classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Subset

from lightning_flatmtl.data._checks import check
from lightning_flatmtl.data._rounding import largest_remainder, rounded_table

__all__ = ["split"]

T = TypeVar("T")
Labels = Tensor | NDArray[Any] | Sequence[Any]
Stratify = Labels | Mapping[str, Any] | Callable[[Any], Any] | None
"""Labels of all samples, those of several tasks by name, or what reads them off a sample."""


@overload
def split(
    dataset: Mapping[str, Dataset[T]],
    shares: Sequence[float] = ...,
    stratify: Stratify = ...,
    seed: int = ...,
    at_least: int = ...,
) -> tuple[dict[str, Subset[T]], ...]: ...
@overload
def split(
    dataset: Dataset[T],
    shares: Sequence[float] = ...,
    stratify: Stratify = ...,
    seed: int = ...,
    at_least: int = ...,
) -> tuple[Subset[T], ...]: ...
def split(
    dataset: Dataset[T] | Mapping[str, Dataset[T]],
    shares: Sequence[float] = (0.7, 0.15, 0.15),
    stratify: Stratify = None,
    seed: int = 0,
    at_least: int = 0,
) -> tuple[Subset[T], ...] | tuple[dict[str, Subset[T]], ...]:
    r"""Deal the samples of a data set out to splits, each sample to one.

    The sizes are :math:`n s_k` rounded by largest remainder. With ``stratify`` every class
    (a combination of labels, if there are several) of :math:`n_c` samples gives
    :math:`\lfloor n_c s_k \rfloor` or :math:`\lceil n_c s_k \rceil` of them to split :math:`k`, the
    sizes being as without. (With four or more splits a class may have to give more.) So a class of
    a single sample is in one of the splits; which one is drawn, and many such rare combinations are
    spread as the shares say. ``at_least`` refuses what is too rare.

    What is drawn depends on ``seed`` and on the labels only, and draws nothing from torch's global
    generator. Indices are in the order of the data set.

    Args:
        dataset: A data set with a length, or a mapping with one for each task. Each of a mapping is
            split by itself, as if it were alone.
        shares: Share of every split, in [0, 1]; together 1. A share of 0 gives an empty split.
        stratify: Labels whose shares are kept: a tensor, array or list with one for each sample, or
            a mapping with such labels for several tasks, whose combinations are kept. Of shape
            ``[samples, ...]`` a row is a combination. Or a function that reads the label, or a
            mapping of labels by task, off a sample; it sees all samples once. NaN and other marks
            of missing labels are a class of their own. With a mapping of data sets: such a
            function, or labels for some of the tasks by name.
        seed: Seed of the draws, at least 0.
        at_least: Samples that every class must have in every split whose share is not 0.

    Returns:
        A ``Subset`` for every share; of a mapping of data sets, for every share a dictionary of
        subsets by task, ready for a :class:`TaskLoader` or Lightning's ``CombinedLoader``.

    Raises:
        TypeError: If the data set has no length.
        ValueError: If the shares are no shares, a split whose share is not 0 would be empty (the
            message names the task), labels and samples do not match, a label is a fraction, or a
            class has too few samples for ``at_least``.

    Example:
        >>> from lightning_flatmtl.data import split
        >>> labels = [0] * 80 + [1] * 20
        >>> train, val, test = split(labels, shares=(0.8, 0.1, 0.1), stratify=labels)
        >>> [(len(part), sum(part)) for part in (train, val, test)]
        [(80, 16), (10, 2), (10, 2)]
        >>> train, test = split({"a": range(10), "b": range(1000)}, shares=(0.9, 0.1))
        >>> {task: len(part) for task, part in test.items()}
        {'a': 1, 'b': 100}
    """
    parts = _checked(shares)
    check(seed >= 0, "seed", "at least 0", seed)
    check(at_least >= 0, "at_least", "at least 0", at_least)
    if not isinstance(dataset, Mapping):
        return _split(dataset, parts, stratify, seed, at_least, "`dataset`")
    by_task = _of_tasks(dataset, stratify)
    done = {
        task: _split(one, parts, by_task[task], seed, at_least, f"The data set of task '{task}'")
        for task, one in dataset.items()
    }
    return tuple({task: done[task][k] for task in done} for k in range(len(parts)))


def _split(
    dataset: Dataset[T],
    shares: NDArray[np.float64],
    stratify: Stratify,
    seed: int,
    at_least: int,
    name: str,
) -> tuple[Subset[T], ...]:
    """Split one data set; ``name`` is what messages call it."""
    if not hasattr(dataset, "__len__"):
        raise TypeError(
            f"{name} must have a length, got {type(dataset).__name__}. Split an iterable data set "
            "where its samples come from, for example by files."
        )
    count = len(dataset)
    sizes = largest_remainder(shares * count)
    empty = [k for k, size in enumerate(sizes) if size == 0 and shares[k] > 0]
    if empty:
        raise ValueError(
            f"{name} must have enough samples for every split, got {count}, of which split "
            f"{empty[0]} with a share of {shares[empty[0]]:.3g} has none. Give more samples or "
            "other shares; a share of 0 asks for an empty split."
        )
    labels = _read(dataset, stratify) if callable(stratify) else stratify
    codes = np.zeros(count, np.int64) if labels is None else _codes(labels, count, name)
    _, first, codes, members = np.unique(
        codes, return_index=True, return_inverse=True, return_counts=True
    )
    rng = np.random.default_rng(seed)
    cells = rounded_table(members, shares, sizes, rng)
    short = np.argwhere((cells < at_least) & (shares > 0))
    if len(short) and labels is not None:
        stratum, k = short[0]
        raise ValueError(
            f"{name} must have at least {at_least} samples of every class in every split, got "
            f"{cells[stratum, k]} in split {k} of the class {_at(labels, first[stratum])}, which "
            f"has {members[stratum]} in all. Join it with another, or lower `at_least`."
        )
    chosen = _dealt(codes, cells, rng)
    return tuple(Subset(dataset, np.flatnonzero(chosen == k).tolist()) for k in range(len(shares)))


def _dealt(
    codes: NDArray[Any], cells: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.int64]:
    """For every sample its split, so that each class has as many in each as ``cells`` says."""
    order = rng.permutation(len(codes))
    order = order[np.argsort(codes[order], kind="stable")]  # class by class, shuffled within
    chosen = np.empty(len(codes), np.int64)
    classes, splits = cells.shape
    chosen[order] = np.repeat(np.tile(np.arange(splits), classes), cells.flatten())
    return chosen


def _checked(shares: Sequence[float]) -> NDArray[np.float64]:
    given = [float(share) for share in shares]
    check(bool(given) and all(0 <= s <= 1 for s in given), "shares", "numbers in [0, 1]", given)
    check(math.isclose(sum(given), 1, abs_tol=1e-6), "shares", "1 together", f"{sum(given):.6g}")
    return np.array(given) / sum(given)


def _of_tasks(dataset: Mapping[str, Any], stratify: Stratify) -> dict[str, Stratify]:
    """What to stratify each task's data set by."""
    check(bool(dataset), "dataset", "a data set, or a mapping with at least one", "an empty one")
    if stratify is None or (callable(stratify) and not isinstance(stratify, Mapping)):
        return dict.fromkeys(dataset, stratify)
    if not isinstance(stratify, Mapping):
        raise ValueError(
            "`stratify` must be a function or labels by task for a mapping of data sets, got "
            f"{type(stratify).__name__}. Pass {{task: labels}}."
        )
    unknown = [task for task in stratify if task not in dataset]
    if unknown:
        raise ValueError(
            f"`stratify` must have keys among the tasks {list(dataset)}, got '{unknown[0]}'."
        )
    return {task: stratify.get(task) for task in dataset}


def _read(dataset: Any, label: Callable[[Any], Any]) -> Any:
    """The labels of all samples; by task, if that is what the function returns."""
    labels = [label(dataset[i]) for i in range(len(dataset))]
    if isinstance(labels[0], Mapping):
        return {task: [of_sample[task] for of_sample in labels] for task in labels[0]}
    return labels


def _codes(labels: Any, count: int, name: str) -> NDArray[np.int64]:
    """A number for each sample, the same for the same label or combination of labels."""
    if isinstance(labels, Mapping):
        check(bool(labels), "stratify", "labels of at least one task", "none")
        columns = [_codes(of_task, count, name) for of_task in labels.values()]
        return _rows(np.stack(columns, axis=1))
    if not hasattr(labels, "__len__") or len(labels) != count:
        got = len(labels) if hasattr(labels, "__len__") else type(labels).__name__
        raise ValueError(
            f"`stratify` must have a label for each of the {count} samples of "
            f"{name[0].lower() + name[1:]}, got {got}."
        )
    values = _array(labels)
    if values is None:  # words, or other labels without an order
        known: dict[Any, int] = {}
        return np.array([known.setdefault(label, len(known)) for label in labels], np.int64)
    if np.issubdtype(values.dtype, np.floating):
        numbers = values[~np.isnan(values)]
        fraction = numbers[numbers != np.round(numbers)]
        if len(fraction):
            raise ValueError(
                f"`stratify` must have classes as labels, got the number {fraction[0]:g}. Make "
                "classes of it, for example with torch.bucketize."
            )
        values = np.nan_to_num(values, nan=-np.inf)  # NaN is not equal to itself
    return _rows(values.reshape(count, -1))


def _rows(values: NDArray[Any]) -> NDArray[np.int64]:
    return np.unique(values, axis=0, return_inverse=True)[1].reshape(-1)


def _array(labels: Any) -> NDArray[Any] | None:
    """Labels as numbers, ``None`` if they are none."""
    if isinstance(labels, Sequence) and all(isinstance(label, Tensor) for label in labels):
        labels = torch.stack(list(labels))
    if isinstance(labels, Tensor):
        return labels.detach().cpu().numpy()
    try:
        values = np.asarray(labels)
    except ValueError:  # of different lengths
        return None
    return values if np.issubdtype(values.dtype, np.number) or values.dtype == bool else None


def _at(labels: Any, sample: int) -> Any:
    """The label of a sample, for a message."""
    if isinstance(labels, Mapping):
        return {task: _at(of_task, sample) for task, of_task in labels.items()}
    label = labels[sample]
    return label.tolist() if hasattr(label, "tolist") else label
