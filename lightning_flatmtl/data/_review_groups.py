"""Which reviews must not be torn apart: those of one product, and those with one text."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

__all__ = ["deal_out", "grouped"]


def grouped(*keys: Sequence[Hashable | None]) -> list[list[int]]:
    """Rows that are connected by an equal key, of any kind, directly or through others.

    Args:
        keys: Of each kind one key a row, ``None`` for a row that has none.

    Returns:
        The groups, each sorted, in the order of their first rows.

    Example:
        >>> grouped(["a", "b", "a", "c"], [None, "x", None, "x"])
        [[0, 2], [1, 3]]
    """
    rows = len(keys[0])
    parent = list(range(rows))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for kind in keys:
        first: dict[Hashable, int] = {}
        for row, key in enumerate(kind):
            if key is not None:
                one, other = root(first.setdefault(key, row)), root(row)
                parent[max(one, other)] = min(one, other)
    groups: dict[int, list[int]] = {}
    for row in range(rows):
        groups.setdefault(root(row), []).append(row)
    return list(groups.values())


def deal_out(
    groups: Sequence[Sequence[int]], kinds: Sequence[Hashable], shares: Sequence[float], seed: int
) -> list[list[int]]:
    """Deal whole groups out, so that each part gets about its share of the rows of every kind.

    The groups of a kind come by size, large ones first and equal ones in a random order, so that
    the small ones level out. Each goes to a part that is drawn in proportion to what the parts
    still lack, among those that lack at least half of the group.

    Args:
        groups: Rows.
        kinds: The kind of each group.
        shares: Of each part, with the sum 1.
        seed: Seed of order and draws.

    Returns:
        The rows of each part, sorted.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(groups), generator=generator).tolist()
    order.sort(key=lambda number: -len(groups[number]))
    parts: list[list[int]] = [[] for _ in shares]
    for kind in dict.fromkeys(kinds):
        chosen = [groups[number] for number in order if kinds[number] == kind]
        lacks = torch.tensor(shares, dtype=torch.float64) * sum(map(len, chosen))
        for group in chosen:
            weights = torch.where(lacks >= len(group) / 2, lacks, 0.0)
            none = not bool(weights.any())
            part = int(lacks.argmax() if none else weights.multinomial(1, generator=generator))
            parts[part] += group
            lacks[part] -= len(group)
    return [sorted(part) for part in parts]
