"""The cheaper second passes written naively, over several steps; no code of the package.

Beside :mod:`tests.naive`, whose functions they use: everything is recomputed from model functions
at explicit parameter values, nothing is cached but what a variant remembers by definition.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests import naive
from tests.naive import Params

Losses = dict[str, Callable[[Params], Tensor]]


def split(row: Tensor, like: Params, names: list[str]) -> Params:
    pieces = torch.split(row, [like[k].numel() for k in names])
    return {k: piece.view_as(like[k]) for k, piece in zip(names, pieces, strict=True)}


def mean(of_batches: Sequence[Params]) -> Params:
    return {k: sum(of[k] for of in of_batches) / len(of_batches) for k in of_batches[0]}


def move(at: Params, along: Params, rho: float, adaptive: bool) -> Params:
    return naive.perturb(at, along, rho, adaptive)


class Remembered:
    """A task's flat part, and the norms of its gradients when it was found."""

    def __init__(self, update: int, g: Params, h: Params, flat: Params, head: Params) -> None:
        self.update, self.flat, self.head = update, flat, head
        self.norms = naive.vector(g).norm(), naive.vector(h).norm()

    def again(self, g: Params, h: Params) -> tuple[Params, Params]:
        ratios = [
            now.norm() / then if then > 0 else torch.zeros_like(then)
            for now, then in zip((naive.vector(g), naive.vector(h)), self.norms, strict=True)
        ]
        shared = {k: ratios[0] * v for k, v in self.flat.items()}
        return shared, {k: ratios[1] * v for k, v in self.head.items()}


class Flatness:
    """The update directions of a run with one of the variants.

    Args:
        shared: Names of the shared parameters.
        heads: Those of every task's head.
        aggregate: Method X on rows.
        settings: Of TaskSAM.
    """

    def __init__(
        self,
        shared: list[str],
        heads: dict[str, list[str]],
        aggregate: Callable[[Tensor], Tensor],
        rho: float = 0.05,
        adaptive: bool = False,
        point: str = "separate",
        arm: str = "split",
        perturbation: str = "global",
        refresh: float | None = None,
        beta: float = 0.5,
        step: float = 0.01,
    ) -> None:
        self.shared, self.heads, self.aggregate = shared, heads, aggregate
        self.rho, self.adaptive, self.point, self.arm = rho, adaptive, point, arm
        self.perturbation, self.refresh = perturbation, refresh
        self.beta, self.step = beta, step
        self.memory: dict[str, Remembered] = {}
        self.updates = 0
        self.stream = torch.Generator().manual_seed(0)
        self.renewed: list[list[str]] = []

    def turn(self, tasks: Sequence[str]) -> list[str]:
        if self.refresh is None:
            return list(tasks)
        new = [t for t in tasks if t not in self.memory]
        old = sorted((t for t in tasks if t in self.memory), key=lambda t: self.memory[t].update)
        allowed = self.refresh
        if allowed < 1:  # one whenever another whole one has been saved up
            whole = [int(n * self.refresh + 1e-9) for n in (self.updates - 1, self.updates)]
            allowed = whole[1] - whole[0]
        return new + old[: max(0, allowed - len(new))]

    def directions(self, batches: Sequence[Losses], at: Params) -> Params:
        """The gradient of every parameter in one update, of batches with equally many samples."""
        self.updates += 1
        tasks = list(dict.fromkeys(t for losses in batches for t in losses))
        turn = self.turn(tasks)
        self.renewed.append(turn)
        found = [self.of_batch(losses, at, turn) for losses in batches]
        g, h, flat, head_flat = (
            {
                t: mean([of_batch[kind][t] for of_batch in found if t in of_batch[kind]])
                for t in names
            }
            for kind, names in enumerate((tasks, tasks, turn, turn))
        )
        for t in turn:
            self.memory[t] = Remembered(self.updates, g[t], h[t], flat[t], head_flat[t])
        result: Params = {}
        for t in tasks:
            if t not in turn:
                flat[t], head_flat[t] = self.memory[t].again(g[t], h[t])
            result.update({k: h[t][k] + head_flat[t][k] for k in h[t]})
        rows = torch.stack([naive.vector(g[t]) for t in tasks])
        flats = torch.stack([naive.vector(flat[t]) for t in tasks])
        direction = naive.ARMS[self.arm](rows, flats, self.aggregate)
        result.update(split(direction, at, self.shared))
        return result

    def of_batch(self, losses: Losses, at: Params, turn: Sequence[str]) -> list[dict[str, Params]]:
        """Clean gradients of trunk and heads, and the flat parts of the tasks whose turn it is."""
        g = {t: naive.gradient(f, at, self.shared) for t, f in losses.items()}
        h = {t: naive.gradient(f, at, self.heads[t]) for t, f in losses.items()}
        along = self.along(losses, at, g, turn)
        flat: dict[str, Params] = {}
        head_flat: dict[str, Params] = {}
        for t, loss in losses.items():
            if t not in turn:
                continue
            shared_at = move(at, along[t], self.rho, self.adaptive)
            head_at = move(at, h[t], self.rho, self.adaptive)
            if self.point == "joint":
                both = {k: shared_at[k] if k in self.shared else head_at[k] for k in at}
                shared_at = head_at = both
            s = naive.gradient(loss, shared_at, self.shared)
            of_head = naive.gradient(loss, head_at, self.heads[t])
            flat[t] = {k: s[k] - g[t][k] for k in s}
            head_flat[t] = {k: of_head[k] - h[t][k] for k in of_head}
        return [g, h, flat, head_flat]

    def along(
        self, losses: Losses, at: Params, g: dict[str, Params], turn: Sequence[str]
    ) -> dict[str, Params]:
        mean = {k: sum(g[t][k] for t in g) / len(g) for k in self.shared}
        if self.perturbation == "common":
            return dict.fromkeys(losses, mean)
        if self.perturbation != "samo":
            return g
        seeds = torch.randint(2**62, (len(losses),), generator=self.stream).tolist()
        mixed: dict[str, Params] = {}
        for (t, loss), seed in zip(losses.items(), seeds, strict=True):
            if t not in turn:
                continue
            width = sum(at[k].numel() for k in self.shared)
            drawn = torch.Generator().manual_seed(seed)
            z = split(torch.randn(width, generator=drawn, dtype=torch.float64), at, self.shared)
            ends = [loss({**at, **{k: at[k] + s * self.step * z[k] for k in z}}) for s in (1, -1)]
            slope = (ends[0] - ends[1]).detach() / (2 * self.step)
            own = {k: slope * z[k] for k in z}
            mixed[t] = {
                k: (1 - self.beta) * mean[k] + self.beta * mean[k].norm() * own[k] / own[k].norm()
                for k in z
            }
        return mixed


def kinds(**settings: Any) -> dict[str, Any]:
    """The settings of :class:`Flatness` as those of TaskSAM."""
    names = {"arm": "aggregate", "beta": "samo_beta", "step": "samo_step"}
    return {names.get(k, k): v for k, v in settings.items()}
