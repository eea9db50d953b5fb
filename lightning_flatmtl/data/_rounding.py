"""Fractions of samples made whole, so that sums stay what they are."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

__all__ = ["largest_remainder", "rounded_table", "systematic"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
EPSILON = 1e-9
"""What a product of shares and counts may be off; 0.7 * 10 is not quite 7."""


def largest_remainder(quotas: Floats) -> Ints:
    """Round numbers whose sum is whole, those with the largest fractions up.

    Args:
        quotas: At least 0, ``[parts]``.

    Returns:
        Whole numbers with the same sum; of equal fractions the earlier is rounded up.
    """
    whole = np.floor(quotas + EPSILON).astype(np.int64)
    left = round(float(quotas.sum())) - int(whole.sum())
    whole[np.argsort(whole - quotas, kind="stable")[:left]] += 1
    return whole


def systematic(quotas: Floats, offset: float) -> Ints:
    """Round numbers whose sum is whole, each up with a probability that is its fraction.

    Every number is rounded down or up, and on average over ``offset`` nothing is gained or lost.

    Args:
        quotas: At least 0, ``[parts]``.
        offset: Drawn uniformly from [0, 1).

    Returns:
        Whole numbers with the same sum.
    """
    ends = np.cumsum(quotas)
    ends = np.where(np.abs(ends - np.round(ends)) < EPSILON * len(ends), np.round(ends), ends)
    passed = np.floor(ends + offset).astype(np.int64)
    passed[1:] -= passed[:-1].copy()
    return passed


def rounded_table(counts: Ints, shares: Floats, totals: Ints, rng: np.random.Generator) -> Ints:
    """Round the table ``counts[:, None] * shares`` with its sums over rows and columns kept.

    Every cell is rounded down or up (controlled rounding), which with three columns or fewer is
    always possible; with more a cell may have to be larger by one.

    Args:
        counts: The sums of the rows, ``[rows]``.
        shares: Sum 1, ``[columns]``.
        totals: The sums of the columns, ``[columns]``, each its quota rounded down or up.
        rng: Draws which of several ways to round.

    Returns:
        The whole table, ``[rows, columns]``.
    """
    quotas = counts[:, None] * shares
    cells = np.floor(quotas + EPSILON).astype(np.int64)
    may_grow = quotas - cells > EPSILON
    grown = np.zeros_like(may_grow)
    need = totals - cells.sum(axis=0)
    left = counts - cells.sum(axis=1)
    for row in rng.permutation(len(counts)):
        columns = np.flatnonzero(may_grow[row])
        neediest = columns[np.argsort(-need[columns], kind="stable")][: left[row]]
        grown[row, neediest] = True
        need[neediest] -= 1
    while need.any():
        _move(grown, may_grow, need)
    return cells + grown


def _move(grown: NDArray[np.bool_], may_grow: NDArray[np.bool_], need: Ints) -> None:
    """Pass one from a column with too many to one with too few, by way of others if need be."""
    start = int(np.argmin(need))
    came_from = {start: start}
    queue = deque([start])
    while queue and need[queue[0]] <= 0:
        here = queue.popleft()
        for column in range(len(need)):
            if column not in came_from and (grown[:, here] & _free(grown, may_grow, column)).any():
                came_from[column] = here
                queue.append(column)
    if not queue:
        may_grow[:] = True  # only with four columns or more
        return
    column = queue[0]
    need[column] -= 1
    need[start] += 1
    while column != start:
        source = came_from[column]
        row = int(np.argmax(grown[:, source] & _free(grown, may_grow, column)))
        grown[row, source], grown[row, column] = False, True
        column = source


def _free(grown: NDArray[np.bool_], may_grow: NDArray[np.bool_], column: int) -> NDArray[np.bool_]:
    return ~grown[:, column] & may_grow[:, column]
