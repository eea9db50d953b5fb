"""The flat parts of the tasks, kept over a step or from step to step, and whose turn it is."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_flatmtl.engine.aggregation import TaskGradients
from lightning_flatmtl.engine.gradients.combination import weighted_rows
from lightning_flatmtl.engine.gradients.gram import cross_gram
from lightning_flatmtl.engine.gradients.row_store import RowStore
from lightning_flatmtl.engine.parameters.blocks import Blocks
from lightning_flatmtl.engine.parameters.flat_parameters import FlatParameters
from lightning_flatmtl.engine.sharpness import Sharpness

__all__ = ["FlatParts"]


@dataclass
class _Kept:
    """What is known of a task's flat part beside its row.

    Args:
        at: The number of the update that it is of.
        norm: Norm of the shared gradient then.
        head_norm: Norm of the head's gradient then.
        head: The head's parameters.
        flat: The head's flat part, the sum over all processes.
    """

    at: int
    norm: float
    head_norm: float
    head: FlatParameters
    flat: Tensor


class FlatParts:
    r"""The flat parts :math:`f_i = s_i - g_i` of the tasks, and those of their heads.

    With ``refresh=k`` an update renews those of k tasks, the ones that have waited longest (with
    k < 1 one task in every 1/k updates); tasks without any are renewed at once, beyond k if need
    be. The others use theirs again, times :math:`\lVert g_i \rVert` over what it was when they were
    renewed, shared part and head each by its own norm. So an update has k second passes whatever
    the number of tasks.

    All processes hold the same: the whole sums. Each takes part in an update with the columns that
    it keeps of every row. Rows are never scaled where they lie: their Gram matrix and their weights
    are.

    The object lasts as long as the fit; :meth:`state_dict` is part of a checkpoint.
    """

    splits = True
    sums_with = None

    def __init__(self) -> None:
        self._update = 0
        self._sharpness: Sharpness | None = None
        self._samples: Mapping[str, float] = {}
        self._counts: dict[str, float] = {}
        """By task that this update renews: the samples so far."""
        self._kept: dict[str, _Kept] = {}
        self._slots: dict[str, int] = {}
        self._store: RowStore | None = None
        self._shared: FlatParameters | None = None
        self._gram = torch.zeros(0, 0, dtype=torch.float64)
        """Inner products of the rows as they lie, ``[slots, slots]``, on the CPU."""
        self._factors = torch.ones(0, dtype=torch.float64)
        self._loaded: dict[str, Any] = {}

    # Whose turn it is.

    def begin_update(self, sharpness: Sharpness) -> None:
        """An update begins; what an earlier one has left unfinished is no use."""
        for task in self._counts:
            self._drop(task)
        self._counts = {}
        self._sharpness = sharpness
        self._update += 1

    def begin_batch(self, samples: Mapping[str, float]) -> None:
        """A batch of the update begins, with these samples of every task in all processes."""
        self._samples = samples

    def turn(self, blocks: Blocks, rows: bool) -> tuple[int, ...]:
        """Which of the tasks of ``blocks`` are renewed; the same in all processes.

        Args:
            blocks: The parameters and the tasks of the batch.
            rows: Whether there are rows to be kept, or flat parts of heads only.
        """
        self._lay(blocks, rows)
        self._counts.update(dict.fromkeys(self._chosen(blocks.tasks), 0.0))
        return tuple(i for i, task in enumerate(blocks.tasks) if task in self._counts)

    def _chosen(self, tasks: Sequence[str]) -> list[str]:
        """The tasks that join those that the update renews already."""
        assert self._sharpness is not None
        others = [task for task in tasks if task not in self._counts]
        if self._sharpness.refresh is None:
            return others
        new = [task for task in others if task not in self._kept]
        room = self._allowed(self._sharpness.refresh) - len(self._counts) - len(new)
        waiting = sorted(
            (task for task in others if task in self._kept), key=lambda t: self._kept[t].at
        )
        return new + waiting[: max(0, room)]

    def _allowed(self, refresh: float) -> int:
        """How many tasks this update may renew; a share of one adds up over the updates."""
        if refresh >= 1:
            return int(refresh)
        rounding = 1e-9
        now, before = (math.floor(n * refresh + rounding) for n in (self._update, self._update - 1))
        return now - before

    def put(self, task: str, row: Tensor) -> None:
        """Take in the row of a task that this update renews, of one of its batches."""
        samples = self._samples.get(task, 1.0)
        self._counts[task] += samples
        assert self._store is not None
        self._store.put(self._slots[task], row, samples / self._counts[task])

    # What the update is made of.

    @torch.no_grad()
    def heads(
        self,
        clean: Mapping[str, Tensor],
        second: Mapping[str, Tensor],
        gram: Tensor,
        blocks: Blocks,
    ) -> dict[str, Tensor]:
        """The heads' gradients of the update; from now on the factors of the rows are known, too.

        Args:
            clean: The clean gradients of the heads, this process's share of them.
            second: Those of the second pass, for the tasks that are renewed.
            gram: Inner products of the clean rows, ``[m, m]``.
            blocks: The parameters and the tasks of the update.
        """
        norms = gram.diagonal().sqrt().tolist()
        head_norms = self._head_norms(clean, blocks)
        found: dict[str, Tensor] = {}
        factors = []
        for task, norm in zip(blocks.tasks, norms, strict=True):
            if task in self._counts:
                flat = blocks.processes.sum(second[task] - clean[task])
                self._kept[task] = _Kept(
                    self._update, norm, head_norms[task], blocks.heads[task], flat
                )
                found[task] = second[task]
                factors.append(1.0)
            else:
                kept = self._kept[task]
                factors.append(_ratio(norm, kept.norm))
                found[task] = clean[task]
                if blocks.processes.rank == 0:  # what all processes bring is added up
                    factor = _ratio(head_norms[task], kept.head_norm)
                    found[task] = torch.add(clean[task], kept.flat, alpha=factor)
        self._factors = torch.tensor(factors, dtype=torch.float64)
        return found

    def _head_norms(self, clean: Mapping[str, Tensor], blocks: Blocks) -> dict[str, float]:
        """Norms of the sums over all processes."""
        assert self._sharpness is not None
        if self._sharpness.refresh is None:
            return dict.fromkeys(blocks.tasks, 0.0)  # nobody asks for them
        parts = [clean[task] for task in blocks.tasks]
        whole = torch.cat(parts)
        if blocks.processes.size > 1:
            whole = blocks.processes.sum(whole)
        pieces = torch.split(whole, [len(part) for part in parts])
        norms = torch.stack([piece.to(torch.float64).norm() for piece in pieces]).tolist()
        return dict(zip(blocks.tasks, norms, strict=True))

    @property
    def _fresh(self) -> list[int]:
        """The rows that this update renews."""
        return [self._slots[task] for task in self._counts]

    @torch.no_grad()
    def products(self, blocks: Blocks) -> Tensor:
        """Inner products of the renewed rows with all, of the columns that this process keeps.

        Only these change: O(k) rows are read against all, not all against all.
        """
        store = self._settled()
        rows = self._columns(blocks)
        fresh = self._fresh
        renewed = rows if fresh == list(range(len(rows))) else rows[fresh]
        return cross_gram(renewed, rows, store.device)

    @torch.no_grad()
    def cross(self, clean: Tensor, blocks: Blocks) -> Tensor:
        """Inner products of the columns ``clean`` ``[m, width / R]`` with the rows as they lie."""
        self._settled()
        products = cross_gram(clean, self._columns(blocks), clean.device)
        return products[:, [self._slots[task] for task in blocks.tasks]]

    def gram(self, products: Tensor, blocks: Blocks) -> Tensor:
        """The Gram matrix ``[m, m]`` of the flat parts.

        Args:
            products: :meth:`products`, the sum over all processes, on the CPU.
            blocks: The tasks of the update.
        """
        fresh = self._fresh
        if fresh:
            square = products[:, fresh]
            self._gram[fresh] = products
            self._gram[:, fresh] = products.T
            self._gram[torch.tensor(fresh)[:, None], fresh] = (square + square.T) / 2
        return self._lying(blocks) * torch.outer(self._factors, self._factors)

    def scaled_cross(self, summed: Tensor) -> Tensor:
        """The inner products with the flat parts, from those with the rows as they lie."""
        return summed * self._factors

    def settle(self) -> None:
        """The update is right: what it has renewed is kept."""
        self._counts = {}

    def dense(self, blocks: Blocks) -> Tensor:
        """The columns of the flat parts that this process keeps, for who looks at them."""
        store = self._settled()
        rows = self._of_slots(self._columns(blocks), blocks).to(store.device, blocks.shared.dtype)
        return rows * self._factors.to(rows)[:, None]

    def add_weighted(
        self,
        weights: Tensor,
        part: TaskGradients,
        method: object,
        blocks: Blocks,
        direction: Tensor,
    ) -> None:
        """Add the weighted sum of the flat parts to ``direction``, in this process's columns.

        Args:
            weights: Shape ``[m]``, float64 on the CPU.
            part: What the weights were computed from.
            method: What has computed them, for messages.
            blocks: The parameters and the tasks of the update.
            direction: Shape ``[width]``; the mean over the processes counts.
        """
        self._settled()
        rows = self._columns(blocks)
        slots = [self._slots[task] for task in blocks.tasks]
        of_rows = torch.zeros(len(rows), dtype=torch.float64)
        of_rows[slots] = weights * self._factors
        gram = torch.zeros_like(self._gram)
        gram[torch.tensor(slots)[:, None], slots] = self._lying(blocks)
        whole = replace(part, gram=gram, tasks=tuple(self._slots))
        onto = direction[_kept_columns(blocks)]
        weighted_rows(of_rows, whole, method, rows, onto, blocks.processes.ddp_mean_correction)

    # Where it lies.

    def _lay(self, blocks: Blocks, rows: bool) -> None:
        """Make room for the tasks in the layout of ``blocks``; what fits no more is dropped."""
        assert self._sharpness is not None
        if self._shared is None or not self._shared.same_as(blocks.shared):
            self._kept, self._slots, self._store = {}, {}, None
            self._gram = self._gram.new_zeros(0, 0)
            self._shared = blocks.shared
        for task in blocks.tasks:
            kept = self._kept.get(task)
            if kept is not None and not kept.head.same_as(blocks.heads[task]):
                self._drop(task)
        if self._loaded:
            self._continue(blocks, rows)
        self._grow(blocks.tasks, blocks, rows)

    def _grow(self, tasks: Iterable[str], blocks: Blocks, rows: bool) -> None:
        """Give a row to each of the tasks that has none."""
        before, count = self._store, len(self._slots)
        for task in tasks:
            self._slots.setdefault(task, len(self._slots))
        if not rows or (before is not None and len(self._slots) == count):
            return
        assert self._sharpness is not None
        self._store = RowStore(self._sharpness.rows, len(self._slots), blocks.row("scratch"))
        if before is not None:
            before.settle()
            self._store.rows[:count] = before.rows
        gram = self._gram
        self._gram = gram.new_zeros(len(self._slots), len(self._slots))
        self._gram[: len(gram), : len(gram)] = gram

    def _drop(self, task: str) -> None:
        self._kept.pop(task, None)
        if self._store is not None and task in self._slots:
            self._store.zero(self._slots[task])

    def _settled(self) -> RowStore:
        assert self._store is not None
        self._store.settle()
        return self._store

    def _columns(self, blocks: Blocks) -> Tensor:
        assert self._store is not None
        return self._store.rows[:, _kept_columns(blocks)]

    def _of_slots(self, rows: Tensor, blocks: Blocks) -> Tensor:
        slots = [self._slots[task] for task in blocks.tasks]
        return rows if slots == list(range(len(rows))) else rows[slots]

    def _lying(self, blocks: Blocks) -> Tensor:
        """Inner products of the rows of the tasks, as they lie."""
        slots = torch.tensor([self._slots[task] for task in blocks.tasks])
        return self._gram[slots[:, None], slots]

    # In checkpoints.

    def state_dict(self, names: Mapping[Tensor, str]) -> dict[str, Any]:
        """The flat parts by task, without those that an unfinished update is about to renew.

        Args:
            names: The names of the parameters.
        """
        if self._loaded:
            return {k: v for k, v in self._loaded.items() if k != "names"}
        whole = [task for task in self._slots if task in self._kept and task not in self._counts]
        slots = torch.tensor([self._slots[task] for task in whole], dtype=torch.int64)
        return {
            "update": self._update,
            "gram": self._gram[slots[:, None], slots] if self._store is not None else None,
            "tasks": {task: self._saved(task, names) for task in whole},
        }

    def _saved(self, task: str, names: Mapping[Tensor, str]) -> dict[str, Any]:
        kept, shared = self._kept[task], {}
        if self._store is not None and self._shared is not None:
            row = self._settled().rows[self._slots[task], : self._shared.numel]
            shared = _by_name(self._shared, row, names)
        return {
            "at": kept.at,
            "norm": kept.norm,
            "head_norm": kept.head_norm,
            "shared": shared,
            "head": _by_name(kept.head, kept.flat, names),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`, once the next update shows what is shared.

        Args:
            state: That, and under ``"names"`` the names of the parameters.
        """
        self._loaded = dict(state)

    @torch.no_grad()
    def _continue(self, blocks: Blocks, rows: bool) -> None:
        """Take what was loaded, if all of it is of parameters that are what they were."""
        state, self._loaded = self._loaded, {}
        names, tasks = state["names"], state["tasks"]
        self._update = int(state["update"]) + 1
        heads = blocks.heads_of(tasks)
        shared = _names(blocks.shared, names) if rows else []
        if any(list(saved["shared"]) != shared for saved in tasks.values()):
            return
        if any(list(saved["head"]) != _names(heads[task], names) for task, saved in tasks.items()):
            return
        self._grow(tasks, blocks, rows)
        for task, saved in tasks.items():
            if rows:
                row = self._settled().rows[self._slots[task], : blocks.shared.numel]
                for view, values in zip(
                    blocks.shared.views(row), saved["shared"].values(), strict=True
                ):
                    view.copy_(values)
            head = heads[task]
            flat = head.flatten([values.to(head.device) for values in saved["head"].values()])
            numbers = int(saved["at"]), float(saved["norm"]), float(saved["head_norm"])
            self._kept[task] = _Kept(*numbers, head, flat)
        if rows and tasks:
            slots = torch.tensor([self._slots[task] for task in tasks])
            self._gram[slots[:, None], slots] = state["gram"].to(self._gram)


def _kept_columns(blocks: Blocks) -> slice:
    if blocks.processes.size == 1 or blocks.processes.sharded:
        return slice(None)
    return blocks.processes.columns(blocks.width)


def _ratio(now: float, then: float) -> float:
    """A gradient of exactly zero had no direction to be perturbed along, and no flat part."""
    return now / then if then > 0 and math.isfinite(now) else 0.0


def _names(layout: FlatParameters, names: Mapping[Tensor, str]) -> list[str]:
    return [names[p] for p in layout.params]


def _by_name(layout: FlatParameters, row: Tensor, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    views = [view.detach().cpu().clone() for view in layout.views(row)]
    return dict(zip(_names(layout, names), views, strict=True))
