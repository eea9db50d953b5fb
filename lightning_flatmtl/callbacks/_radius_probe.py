"""What a perturbation along its own gradient does to the loss of every task, at several radii."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_flatmtl.engine import MultiTaskStep
from lightning_flatmtl.engine.autocast import outside_autocast
from lightning_flatmtl.engine.checks import check_graphs
from lightning_flatmtl.engine.gradients.gram import squared_norms, wide_type
from lightning_flatmtl.engine.gradients.perturbed import moved
from lightning_flatmtl.engine.gradients.radius import move_along
from lightning_flatmtl.engine.parameters.blocks import unscaled
from lightning_flatmtl.engine.parameters.flat_parameters import FlatParameters
from lightning_flatmtl.engine.partition import Partition
from lightning_flatmtl.engine.processes.base import Processes
from lightning_flatmtl.engine.processes.distributed import waiting_layers
from lightning_flatmtl.hosting.automatic import declared_by, host_of
from lightning_flatmtl.hosting.batches import batch_size
from lightning_flatmtl.hosting.trainer import loss_scale
from lightning_flatmtl.hosting.untraced import Look, looking_at

__all__ = ["Key", "RadiusProbe", "Sums"]

Batches = Sequence[tuple[Any, int]]


@dataclass(frozen=True, order=True)
class Key:
    """What a figure is of.

    Args:
        task: The task.
        part: What is perturbed: ``"shared"`` or ``"head"`` parameters; ``""`` for nothing.
        adaptive: Whether the perturbation is adaptive.
        rho: Its radius.
    """

    task: str
    part: str = ""
    adaptive: bool = False
    rho: float = 0.0


Sums = dict[Key, tuple[float, float, float, float]]
"""Samples, and over these the sums of the loss, of the cosine of the gradient there with the clean
one, and of its length over that of the clean one."""


class RadiusProbe:
    """Perturbs the parameters of a module as Algorithm 1 does, without a trace.

    The shared parameters along the gradient of a task's loss, and its head along that of its own,
    each by itself, on the same batch and with the same random numbers.

    Args:
        module: The module, in the hands of a Trainer.
        radii: The radii, of plain (``False``) and of adaptive (``True``) perturbations.
        processes: Each of them looks at batches of its own; all have to come here.
    """

    def __init__(
        self,
        module: LightningModule,
        radii: Mapping[bool, Sequence[float]],
        processes: Processes,
    ) -> None:
        self._module, self._radii, self._processes = module, radii, processes
        self._partition = Partition()

    def clean(self, batches: Batches) -> Sums:
        """The losses at the parameters as they are, over the samples of all processes."""
        with self._agreed() as sums:
            for batch, batch_idx in batches:
                with self._look(batch, batch_idx) as look:
                    for task, loss in look.losses().items():
                        _add(sums, Key(task), look.counts[task], float(_wide(loss)), 1.0, 1.0)
        return self._over_processes(sums)

    def __call__(self, batches: Batches) -> Sums:
        """The losses at every radius, over the samples of all processes."""
        self._partition = _known(self._module)
        with self._agreed():
            for batch, batch_idx in batches:
                with self._look(batch, batch_idx) as look:
                    self._observe(look)
        self._exchange()
        with self._agreed() as sums:
            for batch, batch_idx in batches:
                with self._look(batch, batch_idx) as look:
                    self._measure(look, sums)
        return self._over_processes(sums)

    @contextmanager
    def _agreed(self) -> Iterator[Sums]:
        """Run a block in every process; the error of one ends it in all."""
        error: Exception | None = None
        sums: Sums = {}
        try:
            yield sums
        except Exception as raised:
            if self._processes.size == 1 or waiting_layers(self._module):
                raise
            error = raised  # the others are told before it goes on
        self._processes.end(error)

    @contextmanager
    def _look(self, batch: Any, batch_idx: int) -> Iterator[Look]:
        size = float(batch_size(batch))
        with looking_at(self._module, batch, batch_idx, size=size) as look:
            yield look

    def _over_processes(self, sums: Sums) -> Sums:
        total: Sums = {}
        for of_process in self._processes.everyones(sums):
            for key, (n, *values) in of_process.items():
                before = total.get(key, (0.0, 0.0, 0.0, 0.0))
                total[key] = (
                    before[0] + n,
                    before[1] + values[0],
                    before[2] + values[1],
                    before[3] + values[2],
                )
        return total

    # What is shared.

    def _observe(self, look: Look) -> None:
        losses = look.losses()
        check_graphs(losses)
        params = _trainable(self._module)
        declares = hasattr(self._module, "task_parameters")
        for task in losses:
            if declares and task not in self._partition.seen:
                own = declared_by(self._module, "task_parameters", task) or ()
                self._partition.declare(None, {task: own})
            found = self._gradients(look.again(task), params)
            reached = [p for p, g in zip(params, found, strict=True) if g is not None]
            self._partition.note(task, reached)
        self._partition.share(look.common)

    def _exchange(self) -> None:
        named = dict(self._module.named_parameters())
        states = self._processes.everyones(self._partition.state_dict(named))
        seen = [state["seen"] for state in states]
        if waiting_layers(self._module) and any(tasks != seen[0] for tasks in seen):
            raise MisconfigurationException(
                "With layers that wait for all processes (SyncBatchNorm) RhoFinder needs batches "
                f"with the same tasks in all of them, got {seen}. Use `data_batches=1` with labels "
                "of all tasks, or look for the radius in one process."
            )
        if len(states) > 1:
            self._partition.merge(states, named)

    # The curves.

    def _measure(self, look: Look, sums: Sums) -> None:
        clean = {task: float(_wide(loss)) for task, loss in look.losses().items()}
        counts, params = dict(look.counts), _trainable(self._module)
        shared = FlatParameters(self._partition.shared(params))
        for task, loss in clean.items():
            _add(sums, Key(task), counts[task], loss, 1.0, 1.0)
            head = FlatParameters(self._partition.head(task, params))
            found = self._gradients(look.again(task), [*shared.params, *head.params])
            cut = len(shared.params)
            for part, layout, of_part in (
                ("shared", shared, found[:cut]),
                ("head", head, found[cut:]),
            ):
                if layout.params:
                    row = layout.flatten(of_part)
                    for key, figures in self._curves(look, task, part, layout, row):
                        _add(sums, key, counts[task], *figures)

    def _curves(
        self, look: Look, task: str, part: str, layout: FlatParameters, row: Tensor
    ) -> Iterator[tuple[Key, tuple[float, float, float]]]:
        saved = layout.values()
        length = math.sqrt(float(squared_norms(row[None])))
        for adaptive, radii in self._radii.items():
            values = saved if adaptive else None
            squares = saved.square() if adaptive else None
            squared = float(squared_norms(row[None], values))
            for rho in radii:
                key = Key(task, part, adaptive, rho)
                if not math.isfinite(squared):
                    yield key, (math.nan, math.nan, math.nan)
                    continue
                with moved(layout, saved, move_along(row, rho, squared, values, squares)):
                    loss = look.again(task)
                    found = layout.flatten(self._gradients(loss, layout.params))
                yield key, (float(_wide(loss)), *_compared(found, row, length))

    def _gradients(self, loss: Tensor, params: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        scale = loss_scale(self._module.trainer, self._module)
        with outside_autocast(loss.device):
            scaled = loss if scale is None else loss.float() * scale
            return unscaled(torch.autograd.grad(scaled, params, allow_unused=True), scale)


def _compared(found: Tensor, row: Tensor, length: float) -> tuple[float, float]:
    """Cosine with the clean gradient, and length over its length; 0 of a gradient of zeros."""
    wide = wide_type(row.device)
    other = math.sqrt(float(squared_norms(found[None])))
    if not math.isfinite(other):
        return math.nan, math.nan
    if other == 0.0 or length == 0.0:
        return 0.0, 0.0
    unit, other_unit = row.to(wide) / length, found.to(wide) / other
    return float(unit @ other_unit), other / length


def _add(sums: Sums, key: Key, n: float, *values: float) -> None:
    before = sums.get(key, (0.0, 0.0, 0.0, 0.0))
    loss, cosine, length = (b + n * v for b, v in zip(before[1:], values, strict=True))
    sums[key] = (before[0] + n, loss, cosine, length)


def _known(module: LightningModule) -> Partition:
    """What the fit knows already of what is shared, in a copy; or what the module declares."""
    engine = getattr(host_of(module), "engine", None)
    if isinstance(engine, MultiTaskStep):
        return engine.partition.copy()
    return Partition(declared_by(module, "shared_parameters"))


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _wide(loss: Tensor) -> Tensor:
    return loss.detach().to(wide_type(loss.device))
