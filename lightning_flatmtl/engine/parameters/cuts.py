"""Where the graph of the losses can be cut, so that it is differentiated piece by piece."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, combinations

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_flatmtl.engine.parameters.flat_parameters import FlatParameters

__all__ = ["Piece", "pieces_of"]

_WORTH = 0.9
"""Pieces that need more than this share of the whole rows' memory are not worth another pass."""

_SLACK = 1.05
"""How much more than the least memory may be taken for the sake of fewer pieces."""

_LARGE = 0.2
"""Pieces of more than this share of the parameters are worth walking twice."""

_FREE = 1.25
"""How many whole rows all rows of a piece may be: direction and ``.grad`` need as much later."""


@dataclass(frozen=True)
class Piece:
    """A part of the graph that is entered at one cut and left at the next.

    Args:
        groups: Those of the shared parameters that only this piece reaches, as indices: one group
            for each time that the piece is walked.
        below: Where it is left: the edges into the one node through which everything below is
            reached; empty for the last piece.
    """

    groups: tuple[tuple[int, ...], ...]
    below: tuple[GradientEdge, ...]


def pieces_of(losses: Sequence[Tensor], shared: FlatParameters) -> list[Piece]:
    r"""Cut the graph of the losses where all paths meet, so that rows of a piece are few columns.

    A cut is a node that every path from a loss to anything below it goes through: the features,
    the sum at the end of a residual block, the output of a layer. The gradients of all tasks at a
    cut are all that the pieces below it need. The cuts that are taken are those with the least
    memory for a task,

    .. math:: \max_p \; (\text{gradients where } p \text{ is entered or left}
        + \text{shared parameters of } p),

    and of those with about the least, or with little for all tasks together, the fewest. Parameters
    that are used on both sides of a cut, such as tied weights, forbid it. A large piece that
    cannot be cut may be walked twice, for one half of its parameters each.

    Args:
        losses: The losses with their graphs, one or more.
        shared: The shared parameters.

    Returns:
        The pieces from the losses down; empty if they do not save a tenth. If a first piece has no
        shared parameters, it holds the heads.
    """
    cuts = _Graph(losses).chain(shared)
    sizes = tuple(
        tuple(shared.sizes[i] * shared.dtype.itemsize for i in params) for _, params in cuts
    )
    of_edges = tuple(sum(_bytes(edge) for edge in edges) for edges, _ in cuts)
    pieces = []
    for start, end, split in _cheapest(sizes, of_edges, len(losses)):
        params = tuple(i for _, found in cuts[start:end] for i in found)
        groups = (params[:split], params[split:]) if split else (params,)
        pieces.append(Piece(groups, cuts[end][0] if end < len(cuts) else ()))
    return pieces


class _Graph:
    """The nodes below some losses, and through which of them everything below is reached.

    Node 0 stands for the losses together. The nodes are numbered so that edges go upwards in
    number.

    Args:
        losses: The losses.
    """

    def __init__(self, losses: Sequence[Tensor]) -> None:
        roots = [(loss.grad_fn, loss.output_nr) for loss in losses if loss.grad_fn is not None]
        self.nodes: list[Node | None] = [None, *_topological([node for node, _ in roots])]
        number = {node: i for i, node in enumerate(self.nodes)}
        self.edges: list[list[tuple[int, int]]] = [[(number[n], nr) for n, nr in roots]]
        for node in self.nodes[1:]:
            assert node is not None
            below = node.next_functions
            self.edges.append([(number[n], nr) for n, nr in below if n is not None])
        self._dominate()

    def _dominate(self) -> None:
        """Find the nearest node above each that all paths to it go through."""
        above, depth = [0] * len(self.nodes), [0] * len(self.nodes)
        found = [False] * len(self.nodes)
        for u, edges in enumerate(self.edges):  # all edges into u have been seen
            if u:
                depth[u] = depth[above[u]] + 1
            for v, _ in edges:
                if not found[v]:
                    found[v], above[v] = True, u
                    continue
                a, b = above[v], u
                while a != b:
                    if depth[a] < depth[b]:
                        a, b = b, a
                    a = above[a]
                above[v] = a
        self.above, self.depth = above, depth

    def closed(self) -> list[bool]:
        """For each node whether everything below it is reached through it only."""
        nearest = list(range(len(self.nodes)))  # the nearest node above that is still closed

        def up(x: int) -> int:
            while nearest[x] != x:
                nearest[x] = nearest[nearest[x]]
                x = nearest[x]
            return x

        for u, edges in enumerate(self.edges):
            for v, _ in edges:
                top = self.above[v]  # nothing between u and it is on all paths to v
                x = up(u)
                while self.depth[x] > self.depth[top]:
                    nearest[x] = self.above[x]
                    x = up(x)
        return [nearest[x] == x for x in range(len(self.nodes))]

    def _cuts(self) -> dict[int, tuple[GradientEdge, ...]]:
        """The nodes where the graph can be cut, with the edges into each."""
        entered: dict[int, set[int]] = {}
        for edges in self.edges:
            for v, nr in edges:
                entered.setdefault(v, set()).add(nr)
        found = {}
        for x, closed in enumerate(self.closed()):
            node = self.nodes[x]
            if node is not None and closed and node.next_functions:
                edges_in = tuple(GradientEdge(node, nr) for nr in sorted(entered[x]))
                if all(_bytes(edge) for edge in edges_in):
                    found[x] = edges_in
        return found

    def chain(self, shared: FlatParameters) -> list[tuple[tuple[GradientEdge, ...], list[int]]]:
        """A chain of possible cuts, downwards, each with the parameters before the next.

        Of two branches the one that can be cut more often is followed. The first entry stands for
        the losses and has no edges.
        """
        n = len(self.nodes)
        index = {p: i for i, p in enumerate(shared.params)}
        leaf = [_shared(node, index) for node in self.nodes]
        possible = self._cuts()
        itemsize = shared.dtype.itemsize
        # Parameters below each node, and how many of them the cuts on one way down set apart.
        count = [int(i is not None) for i in leaf]
        memory = [0 if i is None else shared.sizes[i] * itemsize for i in leaf]
        apart = [0] * n
        under: list[list[int]] = [[] for _ in range(n)]
        for x in range(n - 1, 0, -1):
            most = max((count[y] for y in under[x]), default=0)
            apart[x] = max((apart[y] for y in under[x]), default=0)
            saves = x in possible and sum(map(_bytes, possible[x])) < memory[x]
            if saves and (count[x] > most or not apart[x]):
                apart[x] += 1
            top = self.above[x]
            count[top] += count[x]
            memory[top] += memory[x]
            under[top].append(x)
        place = {0: 0}
        cuts: list[tuple[tuple[GradientEdge, ...], list[int]]] = [((), [])]
        x = 0
        while under[x]:
            x = max(under[x], key=lambda y: (apart[y], count[y]))
            if not count[x]:
                break
            if x in possible:
                place[x] = len(cuts)
                cuts.append((possible[x], []))
        belongs = [0] * n
        for x in range(1, n):
            belongs[x] = place.get(x, belongs[self.above[x]])
        for x in sorted(range(n), key=self.depth.__getitem__):
            i = leaf[x]
            if i is not None:
                cuts[belongs[x]][1].append(i)
        return cuts


def _shared(node: Node | None, index: Mapping[Tensor, int]) -> int | None:
    """The shared parameter that a node stands for."""
    if type(node).__name__ != "AccumulateGrad":
        return None
    return index.get(node.variable)  # type: ignore[union-attr]


def _topological(roots: Sequence[Node]) -> Iterator[Node]:
    """All nodes below ``roots``, each before those that it leads to."""
    seen: set[Node] = set()
    left: list[Node] = []
    stack = [(node, False) for node in roots]
    while stack:
        node, entered = stack.pop()
        if entered:
            left.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((child, False) for child, _ in node.next_functions if child is not None)
    return reversed(left)


def _bytes(edge: GradientEdge) -> int:
    """The memory of a gradient there; 0 if it is not known."""
    try:
        found = edge.node._input_metadata[edge.output_nr]
        return int(torch.Size(found.shape).numel()) * int(found.dtype.itemsize)
    except (AttributeError, IndexError, TypeError, NotImplementedError, RuntimeError):
        return 0


@lru_cache(maxsize=64)
def _cheapest(
    sizes: tuple[tuple[int, ...], ...], edges: tuple[int, ...], tasks: int
) -> list[tuple[int, int, int]]:
    """Which pieces to take: each as the numbers of two cuts and where to split its parameters.

    Args:
        sizes: The memory of each parameter between a cut and the next, the losses being cut 0.
        edges: The memory of the gradients at each cut; 0 for the losses.
        tasks: How many tasks there are.

    Returns:
        The pieces; 0 for those that are not split. Empty if they do not save enough.
    """
    end, edges = len(sizes), (*edges, 0)
    before = list(accumulate((sum(found) for found in sizes), initial=0))
    free = [k for k in range(1, end) if not before[k]]
    kept = min(free, key=lambda k: edges[k], default=0)  # the gradients there serve twice

    stops = [kept]
    for k in range(kept + 1, end):
        if before[k] == before[stops[-1]] and stops[-1] != kept:
            if edges[k] < edges[stops[-1]]:
                stops[-1] = k  # of cuts with no parameter between them the cheapest is enough
        elif before[kept] < before[k] < before[end]:
            stops.append(k)
    stops.append(end)

    # For every piece and split: the memory that it needs, and how often it is walked.
    options: dict[int, list[tuple[int, int, int]]] = {}
    needs: dict[tuple[int, int, int], int] = {}
    for i, j in combinations(stops, 2):
        # What is entered with goes as what is left with comes, one task after the other.
        fixed = edges[kept] + max(edges[i] if i != kept else 0, edges[j])
        options.setdefault(j, []).append((i, j, 0))
        needs[i, j, 0] = fixed + before[j] - before[i]
        large = before[j] - before[i] > _LARGE * before[end]
        if large and stops.index(j) == stops.index(i) + 1:
            split, half = _halves([size for found in sizes[i:j] for size in found])
            if split:
                options[j].append((i, j, split))
                needs[i, j, split] = fixed + half
    least: dict[int, int] = {kept: 0}
    for j in stops[1:]:
        least[j] = min(max(least[option[0]], needs[option]) for option in options[j])
    if least[end] >= _WORTH * before[end]:
        return []
    # Of all ways with little more memory the one that walks the fewest pieces.
    room = max(int(least[end] * _SLACK), int(before[end] * _FREE / tasks))
    ways: dict[int, tuple[int, list[tuple[int, int, int]]]] = {kept: (0, [])}
    for j in stops[1:]:
        found = [
            (ways[i][0] + 1 + bool(split), [*ways[i][1], (i, j, split)])
            for i, _, split in options[j]
            if i in ways and needs[i, j, split] <= room
        ]
        if found:
            ways[j] = min(found, key=lambda way: way[0])
    way = ways[end][1]
    if len(way) == 1 and not way[0][2]:
        return []
    return [(0, kept, 0), *way] if kept else way


def _halves(sizes: list[int]) -> tuple[int, int]:
    """Where to split parameters in two, and the memory of the larger part; 0 for nowhere."""
    total, parts = sum(sizes), list(accumulate(sizes))[:-1]
    if not parts:
        return 0, total
    split = min(range(len(parts)), key=lambda k: max(parts[k], total - parts[k]))
    return split + 1, max(parts[split], total - parts[split])
