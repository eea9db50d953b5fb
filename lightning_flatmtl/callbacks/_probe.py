"""Sharpness and curvature of task losses on a batch, by a perturbation and products of its own."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_flatmtl.callbacks._eigenvalue import Eigenvalue, top_eigenvalue
from lightning_flatmtl.engine import FlatMTLError
from lightning_flatmtl.engine.autocast import outside_autocast
from lightning_flatmtl.engine.checks import check_graphs
from lightning_flatmtl.engine.gradients.gram import squared_norms, wide_type
from lightning_flatmtl.engine.gradients.perturbed import moved
from lightning_flatmtl.engine.gradients.radius import move_along
from lightning_flatmtl.engine.parameters.blocks import unscaled
from lightning_flatmtl.engine.parameters.flat_parameters import FlatParameters
from lightning_flatmtl.engine.processes.base import Processes
from lightning_flatmtl.engine.processes.failure import Failure
from lightning_flatmtl.hosting.batches import batch_size
from lightning_flatmtl.hosting.trainer import loss_scale
from lightning_flatmtl.hosting.untraced import Look, looking_at

__all__ = ["Ascent", "Found", "PowerIteration", "Probe"]

_ASYMMETRIC = 0.1
"""More than rounding does, also that of TF32."""

_WAY_OUT = (
    "Use `top_eigenvalue=False`, or replace the layer that cannot (torch.compile, a fused kernel, "
    "a function of your own without a second derivative)."
)


@dataclass(frozen=True)
class Ascent:
    """A perturbation along the gradient of a task's loss, by a radius.

    Args:
        rho: The radius.
        adaptive: Whether it is measured relative to the parameters.
    """

    rho: float
    adaptive: bool


@dataclass(frozen=True)
class PowerIteration:
    """How the largest eigenvalue is looked for.

    Args:
        iterations: How often to move at most.
        tolerance: Length of the residual over the eigenvalue at which to stop.
        seed: Of the generator that the first vector comes from.
    """

    iterations: int
    tolerance: float
    seed: int

    def of(self, product: Callable[[Tensor], Tensor], layout: FlatParameters) -> Eigenvalue:
        """That of a Hessian, given its products with vectors ``[d]``."""
        # On the CPU, so that it is the same vector on all devices and in all processes.
        generator = torch.Generator().manual_seed(self.seed)
        start = torch.randn(layout.numel, generator=generator, dtype=layout.dtype)
        start = start.to(layout.device)
        return top_eigenvalue(product, start, self.iterations, self.tolerance)


@dataclass(frozen=True)
class Found:
    """What was found of a task on a batch of all processes.

    Args:
        samples: The number of samples behind its loss.
        rise: By how much the loss is larger where the parameters are perturbed; ``None`` if that
            was not asked for.
        eigenvalue: The largest of its Hessian; ``None`` if that was not asked for.
    """

    samples: float
    rise: float | None
    eigenvalue: Eigenvalue | None


class Probe:
    """Looks at the loss of every task around the parameters, without a trace.

    Looked at are all trainable parameters that the loss reaches: the shared ones and those of the
    task's head.

    Args:
        module: The module, in the hands of a Trainer.
        processes: Those whose batches are looked at as one; each has to come here with its part.
        ascent: The perturbation, if one is wanted.
        power: The search for an eigenvalue, if that is wanted.
    """

    def __init__(
        self,
        module: LightningModule,
        processes: Processes,
        ascent: Ascent | None,
        power: PowerIteration | None,
    ) -> None:
        self._module, self._processes = module, processes
        self._ascent, self._power = ascent, power

    def __call__(self, batch: Any, batch_idx: int) -> dict[str, Found]:
        """Look at a batch; a task that no process has a sample of is not there."""
        processes, failure = self._processes, Failure(self._processes, self._module)
        size = float(batch_size(batch))  # where the module does not tell its own
        with looking_at(self._module, batch, batch_idx, size=size) as look:
            scale = loss_scale(self._module.trainer, self._module)
            clean: dict[str, Tensor] = {}
            with failure.kept():
                losses = look.losses()
                check_graphs(losses)
                clean = {task: _wide(loss) for task, loss in losses.items()}
                del losses  # the graph goes
            counts = {task: look.counts[task] for task in clean}
            everyones = processes.everyones(counts)
            failure.meet()
            samples: dict[str, float] = {}
            for of_process in everyones:
                for task, n in of_process.items():
                    samples[task] = samples.get(task, 0.0) + n
            found = {}
            for task, n in samples.items():
                share = counts.get(task, 0.0) / n
                of_task = _OfTask(task, clean.get(task), share, look, scale, failure)
                found[task] = self._of_task(of_task, n)
        return found

    def _of_task(self, task: "_OfTask", samples: float) -> Found:
        layout, row = self._reached(task)
        rise = eigenvalue = None
        if self._ascent is not None:
            rise = self._rise(task, layout, row, self._ascent)
        if self._power is not None:
            eigenvalue = self._eigenvalue(task, layout, self._power)
        return Found(samples, rise, eigenvalue)

    def _reached(self, task: "_OfTask") -> tuple[FlatParameters, Tensor]:
        """The parameters that the loss reaches in any process, and its gradient there."""
        params = [p for p in self._module.parameters() if p.requires_grad]
        every = FlatParameters(params)
        gradients: Sequence[Tensor | None] = [None] * len(params)
        with task.failure.kept():
            gradients = task.gradients(params)
        flags = torch.tensor([float(g is not None) for g in gradients] + [task.failure.flag])
        summed = torch.cat([every.flatten(gradients), flags.to(every.device, every.dtype)])
        summed = self._processes.sum(summed)
        *reached, failed = summed[every.numel :].tolist()
        task.failure.tell(failed)
        pairs = zip(params, every.views(summed[: every.numel]), reached, strict=True)
        kept = [(p, view) for p, view, n in pairs if n > 0]
        layout = FlatParameters([p for p, _ in kept])
        return layout, layout.flatten([view for _, view in kept])

    def _rise(self, task: "_OfTask", layout: FlatParameters, row: Tensor, ascent: Ascent) -> float:
        saved = layout.values()
        scale = saved if ascent.adaptive else None
        squared = float(squared_norms(row[None], scale))
        if not math.isfinite(squared):
            return math.nan
        squares = saved.square() if ascent.adaptive else None
        move = move_along(row, ascent.rho, squared, scale, squares)
        share = 0.0
        with task.failure.kept(), moved(layout, saved, move):
            share = task.rise()
        both = torch.tensor([share, task.failure.flag], dtype=torch.float64)
        rise, failed = self._processes.sum_on_host(both)
        task.failure.tell(float(failed))
        return float(rise)

    def _eigenvalue(
        self, task: "_OfTask", layout: FlatParameters, power: PowerIteration
    ) -> Eigenvalue:
        first: list[Tensor] = []
        with task.failure.kept():
            first = task.first_order(layout.params)

        def product(vector: Tensor) -> Tensor:
            image = layout.zeros()
            with task.failure.kept():
                if task.failure.error is None:
                    views = layout.views(vector)
                    layout.write(task.second_order(first, layout.params, views), image)
            return self._processes.sum(image)

        found = power.of(product, layout)
        task.failure.meet()
        self._refuse_asymmetric(task, found)
        return found

    def _refuse_asymmetric(self, task: "_OfTask", found: Eigenvalue) -> None:
        """A part of the graph that has no graph itself is left out of the products in silence."""
        in_16_bits = "16" in str(self._module.trainer.precision)  # which are too coarse to tell
        if found.asymmetry > _ASYMMETRIC and not in_16_bits:
            raise FlatMTLError(
                f"The Hessian of task '{task.name}' must be symmetric, got one whose products with "
                f"two vectors differ by {found.asymmetry:.0%}: a part of the loss cannot be "
                f"differentiated twice. {_WAY_OUT}"
            )


@dataclass(frozen=True)
class _OfTask:
    """The loss of one task on the batch of this process, and its share of the derivatives.

    Args:
        name: The task.
        clean: Its loss here, float64; ``None`` if this process has none.
        share: The share of its samples that lies here.
        look: Computes the loss.
        scale: The loss scale of 16-bit training.
        failure: Keeps an error of this process.
    """

    name: str
    clean: Tensor | None
    share: float
    look: Look
    scale: Tensor | None
    failure: Failure

    def gradients(self, params: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Of the loss, ``None`` where it does not reach."""
        if self.clean is None:
            return [None] * len(params)
        return self._grad(self._loss(), params)

    def rise(self) -> float:
        """How much larger the loss is at the parameters as they are now."""
        if self.clean is None:
            return 0.0
        return float(_wide(self.look.again(self.name)) - self.clean) * self.share

    def first_order(self, params: Sequence[Tensor]) -> list[Tensor]:
        """The gradients with their graphs, scaled; empty if this process has no loss."""
        if self.clean is None:
            return []
        with _differentiable_twice(self.look.module), self._told(), _plainly(self.clean):
            grads = torch.autograd.grad(
                self._scaled(self._loss()), params, create_graph=True, allow_unused=True
            )
        return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True)]

    def second_order(
        self, first: Sequence[Tensor], params: Sequence[Tensor], vectors: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """The product of the Hessian with a vector, in pieces of the parameters' shapes."""
        pairs = zip(first, vectors, strict=False)
        curved = [(g, v.to(g.dtype)) for g, v in pairs if g.requires_grad]
        if not curved:  # a loss that is linear, or none
            return [None] * len(params)
        outputs, along = zip(*curved, strict=True)
        with self._told(), _plainly(outputs[0]):
            images = torch.autograd.grad(
                outputs, params, along, retain_graph=True, allow_unused=True
            )
        return unscaled(images, self.scale)

    def _loss(self) -> Tensor:
        loss = self.look.again(self.name)
        return loss if self.share == 1.0 else loss * self.share

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.scale is None else loss.float() * self.scale

    def _grad(self, loss: Tensor, params: Sequence[Tensor]) -> Sequence[Tensor | None]:
        with _plainly(loss):
            grads = torch.autograd.grad(self._scaled(loss), params, allow_unused=True)
        return unscaled(grads, self.scale)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise FlatMTLError(
                f"The Hessian of task '{self.name}' needs a loss that can be differentiated twice, "
                f"got: {error} {_WAY_OUT}"
            ) from error


def _wide(loss: Tensor) -> Tensor:
    return loss.detach().to(wide_type(loss.device))


def _plainly(tensor: Tensor) -> AbstractContextManager[Any]:
    return outside_autocast(tensor.device)


@contextmanager
def _differentiable_twice(module: nn.Module) -> Iterator[None]:
    """Run a forward pass with the kernels whose backward pass has a derivative itself."""
    recurrent = any(isinstance(part, nn.RNNBase) for part in module.modules())
    own = torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()
    with sdpa_kernel(SDPBackend.MATH), own:
        yield
