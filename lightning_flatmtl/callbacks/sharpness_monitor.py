"""SharpnessMonitor: how much the loss of every task rises around the parameters."""

import math
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any, Literal, final

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.callbacks._eigenvalue import Eigenvalue
from lightning_flatmtl.callbacks._pictures import checked_path, need_matplotlib
from lightning_flatmtl.callbacks._probe import Ascent, Found, PowerIteration, Probe
from lightning_flatmtl.callbacks._records import Records
from lightning_flatmtl.callbacks._sharpness_picture import draw_sharpness
from lightning_flatmtl.callbacks._turns import Means, Turns
from lightning_flatmtl.engine import PerturbedLosses, StepResult
from lightning_flatmtl.engine.gradients.gram import wide_type
from lightning_flatmtl.engine.processes.base import Processes
from lightning_flatmtl.engine.processes.single import SingleProcess
from lightning_flatmtl.hosting.automatic import host_of
from lightning_flatmtl.hosting.trainer import WHOLE, kinds_of, processes_of, sharpness_of
from lightning_flatmtl.hosting.untraced import refuse_unfit_to_look_at

__all__ = ["SharpnessMonitor"]

_PREFIX = "sharpness"
_EPOCH = "sharpness/epoch"
_EIGENVALUE = "top_eigenvalue"
_WORDS = {"train": "training", "val": "validation"}


@final
class SharpnessMonitor(Callback):
    r"""Logs how sharp the minimum is for every task; it changes nothing of the training.

    By how much the loss of a task rises where the parameters are perturbed along its gradient
    (Foret et al., 2021, `arXiv:2010.01412 <https://arxiv.org/abs/2010.01412>`_; for several tasks
    Phan et al., `arXiv:2211.13723 <https://arxiv.org/abs/2211.13723>`_):

    .. math:: L_i(\theta + \epsilon_i) - L_i(\theta), \qquad
        \epsilon_i = \rho\, \frac{g_i}{\lVert g_i \rVert}
        \quad\text{or, adaptive,}\quad
        \epsilon_i = \rho\, \frac{\theta^2 g_i}{\lVert\, |\theta|\, g_i \rVert}

    On training batches the losses of :class:`~lightning_flatmtl.TaskSAM`'s second pass are taken,
    where there is one, and no pass is added: :math:`\epsilon_i` is TaskSAM's. Otherwise, with
    ``own=True`` and on validation batches the callback perturbs the parameters itself, by its own
    ``rho``, and runs the model again: :math:`\theta` are then all trainable parameters that the
    task's loss reaches, the shared ones and those of its head, and :math:`g_i` and its norm are of
    all of them. To compare trainings with and without TaskSAM, use ``own=True`` or
    ``data="val"`` in both.

    ========================================= =====================================================
    logged                                    what it is
    ========================================= =====================================================
    ``sharpness/{task}``                      the rise of the loss. From TaskSAM's second pass at
                                              the separate point: where the shared parameters are
                                              perturbed (if only heads are, the head's); at the
                                              joint point: where shared and head parameters are
    ``sharpness/{task}/head``                 from TaskSAM's second pass at the separate point:
                                              the rise where the head alone is perturbed
    ``sharpness/{task}/top_eigenvalue``       the largest eigenvalue of the Hessian of the task's
                                              loss, by the same parameters :math:`\theta` as
                                              above, in every case
    ``sharpness/epoch/{task}``, ...           the means over the training batches of the epoch
                                              that were looked at
    ========================================= =====================================================

    On validation batches a figure is the mean over the epoch's batches, weighted by the samples
    that have a label of the task, each batch with its own :math:`\epsilon_i` and its own Hessian;
    with several data loaders the names end in ``/dataloader_idx_0`` and so on. With several
    processes all figures are those of all: on training batches of the batch that they make
    together, on validation batches the mean over the batches of all. Accumulated batches are looked
    at one by one.

    The eigenvalue is the largest one, not the one of largest magnitude, and negative only if all
    are. It is found by power iteration on Hessian-vector products, two backward passes one through
    the other: each move is the best in the span of the vector, its product and the last move, so
    that large negative eigenvalues are left behind. The model is at the clean parameters, in the
    mode it is in: on training batches with the masks and the batch statistics of the step. A search
    that ends at ``iterations`` warns once; its figure is then too small.

    Names do not tell training from validation batches: two monitors in one fit log under the same.

    A task that is absent from a batch, and a figure that is not finite, are left out. A module that
    is not a :class:`~lightning_flatmtl.MultiTaskModule` returns its ``"losses"`` from
    ``training_step``, as for an aggregator; that is what the callback runs where it runs the model,
    on validation batches too.

    Not supported where the callback runs the model itself: strategies other than one device or DDP,
    models behind a reentrant checkpoint, and, for the eigenvalue, models behind ``torch.compile``
    or other layers that cannot be differentiated twice.

    Args:
        every_n_steps: Look at every n-th batch, at least 1. By default on training batches those of
            the steps in which the Trainer logs (``log_every_n_steps``), on validation batches all.
            The first batch of every epoch is always looked at. Loggers get what falls into the
            steps in which the Trainer logs; the means, the CSV and the picture have all.
        data: The batches: ``"train"`` or ``"val"``.
        rho: Radius of the callback's own perturbation, in ``(0, inf)``.
        adaptive: Whether that is adaptive (ASAM).
        own: Perturb by ``rho`` even where TaskSAM has a second pass. Where the callback perturbs, a
            look costs a forward pass, and two more and a backward pass for each task.
        top_eigenvalue: Whether to log the largest eigenvalue, too. It costs a forward pass and two
            backward passes for a task, and two more for every iteration.
        iterations: How many at most, at least 1.
        tolerance: Stop where :math:`\lVert H v - \lambda v \rVert \le` ``tolerance`` times
            :math:`|\lambda|` for the unit vector found, in ``(0, inf)``: there is an eigenvalue so
            near, and as a rule the figure is much closer.
        seed: Of the private generator of the vector to begin with, ``seed >= 0``.
        csv: A file to write all figures to: columns ``epoch``, ``step`` (optimizer steps done),
            ``name`` and ``value``. It is begun anew by a fit that does not resume.
        png: A file to draw the means to, when the fit ends; needs matplotlib.

    Raises:
        ValueError: If an argument is out of its bounds.
        ModuleNotFoundError: If there is to be a picture and matplotlib is not installed.
        MisconfigurationException: When a run begins, if the module or the strategy is one that it
            cannot look at.

    Example:
        >>> from lightning_flatmtl import TaskSAM
        >>> callbacks = [TaskSAM(), SharpnessMonitor(csv="sharpness.csv")]
        >>> callbacks = [SharpnessMonitor(data="val", rho=0.05, top_eigenvalue=True)]
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        *,
        data: Literal["train", "val"] = "train",
        rho: float = 0.05,
        adaptive: bool = False,
        own: bool = False,
        top_eigenvalue: bool = False,
        iterations: int = 100,
        tolerance: float = 1e-3,
        seed: int = 0,
        csv: str | Path | None = None,
        png: str | Path | None = None,
    ) -> None:
        self._turns = Turns(every_n_steps)
        if data not in ("train", "val"):
            raise ValueError(f"`data` must be 'train' or 'val', got {data!r}.")
        for name, value in (("rho", rho), ("tolerance", tolerance)):
            number = isinstance(value, Real) and not isinstance(value, bool)
            if not number or not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be in (0, inf), got {value!r}.")
        flags = {"adaptive": adaptive, "own": own, "top_eigenvalue": top_eigenvalue}
        for name, flag in flags.items():
            if not isinstance(flag, bool):
                raise ValueError(f"`{name}` must be True or False, got {flag!r}.")
        for name, whole, least in (("iterations", iterations, 1), ("seed", seed, 0)):
            if not isinstance(whole, int) or isinstance(whole, bool) or whole < least:
                raise ValueError(f"`{name}` must be an integer >= {least}, got {whole!r}.")
        self.every_n_steps, self.data, self.own = every_n_steps, data, own
        self.ascent = Ascent(rho, adaptive)
        self.power = PowerIteration(iterations, tolerance, seed) if top_eigenvalue else None
        self._csv = checked_path("csv", csv, ".csv")
        self._png = checked_path("png", png, ".png")
        if self._png is not None:
            need_matplotlib()
        self._processes: Processes = SingleProcess()
        self._forget()

    def _forget(self) -> None:
        self._turns.forget()
        self._resumed = False
        self._told = False
        self._means = Means()
        self._of_loaders: dict[int, Means] = {}
        self._probed: dict[str, float] = {}
        self._drawn: list[dict[str, float]] = []
        self._records: Records | None = None

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(
            every_n_steps=self.every_n_steps, data=self.data, own=self.own, csv=str(self._csv)
        )

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()
        if stage == "fit":
            self._forget()
        if stage not in ({"fit"} if self.data == "train" else {"fit", "validate"}):
            return
        if self.data == "val" or self._perturbs(trainer) or self.power is not None:
            refuse_unfit_to_look_at(pl_module, type(self).__name__)
            _refuse_unfit_strategy(trainer)
        self._processes = processes_of(trainer)

    def _perturbs(self, trainer: Trainer) -> bool:
        """Whether training batches are perturbed by the callback itself."""
        sharpness = sharpness_of(trainer)
        return self.own or sharpness is None or not sharpness.active

    # On training batches.

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._csv is not None and trainer.is_global_zero:
            self._records = Records(self._csv, trainer.global_step if self._resumed else None)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.data != "train":
            return
        self._turns.begin_batch(trainer, batch_idx)
        self._probed = {}
        if not self._turns.due:
            return
        ascent = self.ascent if self._perturbs(trainer) else None
        if ascent is not None or self.power is not None:
            found = Probe(pl_module, self._processes, ascent, self.power)(batch, batch_idx)
            self._probed = self._figures(found)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.data != "train" or not self._turns.due:
            return
        figures = self._probed
        if not self._perturbs(trainer):
            result = getattr(host_of(pl_module), "last_step", None)
            if not isinstance(result, StepResult) or result.perturbed is None:
                return  # the step was skipped
            figures = _of_second_pass(result.perturbed, self._processes) | figures
        if not figures:
            return
        self._turns.due = False
        for name, value in figures.items():
            pl_module.log(name, value, on_step=True, on_epoch=False, batch_size=1)
        self._means.add(figures)
        self._record(trainer, figures)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        means = self._means.take()
        for name, mean in means.items():
            of_epoch = _EPOCH + name.removeprefix(_PREFIX)
            pl_module.log(of_epoch, mean, sync_dist=trainer.world_size > 1)
        self._draw_later(trainer, means)

    # On validation batches.

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._of_loaders = {}

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.data != "val" or trainer.sanity_checking:
            return
        if batch_idx % (self.every_n_steps or 1):
            return
        # Each process by itself: they may have different numbers of batches.
        found = Probe(pl_module, SingleProcess(), self.ascent, self.power)(batch, batch_idx)
        means = self._of_loaders.setdefault(dataloader_idx, Means())
        for task, of_task in found.items():
            means.add(self._figures({task: of_task}), of_task.samples)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.data != "val" or trainer.sanity_checking:
            return
        figures = self._of_validation(trainer)
        for name, value in figures.items():
            several = trainer.world_size > 1
            pl_module.log(name, value, sync_dist=several, add_dataloader_idx=False)
        if trainer.state.fn == "fit":
            self._record(trainer, figures)
            self._draw_later(trainer, figures)

    def _of_validation(self, trainer: Trainer) -> dict[str, float]:
        """The means over the batches of all processes."""
        of_loaders: dict[int, Means] = {}
        mine = {loader: means.sums for loader, means in self._of_loaders.items()}
        for of_process in self._processes.everyones(mine):
            for loader, sums in of_process.items():
                of_loaders.setdefault(loader, Means()).merge(sums)
        several = len(trainer.num_val_batches) > 1
        figures = {}
        for loader, means in sorted(of_loaders.items()):
            end = f"/dataloader_idx_{loader}" if several else ""
            figures.update({f"{name}{end}": value for name, value in means.take().items()})
        return figures

    # What both have in common.

    def _figures(self, found: Mapping[str, Found]) -> dict[str, float]:
        """Figures by their names in the log, those that are finite."""
        figures = {}
        for task, of_task in found.items():
            name, eigenvalue = f"{_PREFIX}/{task}", of_task.eigenvalue
            if of_task.rise is not None:
                figures[name] = of_task.rise
            if eigenvalue is not None:
                figures[f"{name}/{_EIGENVALUE}"] = eigenvalue.value
                self._tell(task, eigenvalue)
        return _finite(figures)

    def _tell(self, task: str, eigenvalue: Eigenvalue) -> None:
        """Say once that a search has come to no end."""
        if eigenvalue.converged or not math.isfinite(eigenvalue.value) or self._told:
            return
        self._told = True
        assert self.power is not None
        rank_zero_warn(
            f"The largest Hessian eigenvalue of task '{task}' was not found to "
            f"`tolerance={self.power.tolerance}` within `iterations={self.power.iterations}`: it "
            f"is at least {eigenvalue.value:.6g} (residual {eigenvalue.residual:.2g}). Allow more "
            "iterations or a larger tolerance.",
            category=UserWarning,
        )

    def _record(self, trainer: Trainer, figures: Mapping[str, float]) -> None:
        if self._records is not None:
            self._records.add(trainer.current_epoch, trainer.global_step, figures)

    def _draw_later(self, trainer: Trainer, figures: Mapping[str, float]) -> None:
        if figures:
            self._drawn.append({"step": float(trainer.global_step), **figures})

    # The picture, and what outlives a broken run.

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._close()
        self._draw(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        self._processes.close()
        self._processes = SingleProcess()

    def _draw(self, trainer: Trainer) -> None:
        if self._png is not None and self._drawn and trainer.is_global_zero:
            draw_sharpness(self._drawn, self._png, _WORDS[self.data])

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**self._turns.state_dict(), "sums": self._means.sums, "drawn": self._drawn}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = True
        self._turns.load_state_dict(state_dict)
        self._means = Means()
        self._means.merge(state_dict["sums"])
        self._drawn = [dict(figures) for figures in state_dict["drawn"]]


def _refuse_unfit_strategy(trainer: Trainer) -> None:
    if not kinds_of(trainer) & {"SingleDeviceStrategy", WHOLE}:
        raise MisconfigurationException(
            "SharpnessMonitor runs the model itself with one device or DDP, got "
            f"{type(trainer.strategy).__name__}. Use one of these, or take the figures from the "
            "second pass of a TaskSAM (on training batches, without `own` and `top_eigenvalue`)."
        )


def _of_second_pass(perturbed: PerturbedLosses, processes: Processes) -> dict[str, float]:
    """What TaskSAM's second pass has found, by names, as all processes together have it."""
    tasks, clean = list(perturbed.shares), perturbed.clean
    points = (perturbed.shared, perturbed.heads)
    here = [[task in losses for task in tasks] for losses in points]
    found = [
        (_wide(losses[task]) - _wide(clean[task])) * perturbed.shares[task]
        for losses in points
        for task in tasks
        if task in losses
    ]
    rises = iter(torch.stack(found).tolist() if found else ())
    numbers = [[next(rises) if present else 0.0 for present in of_point] for of_point in here]
    summed = processes.sum_on_host(torch.tensor([numbers, here], dtype=torch.float64))
    figures = {}
    for i, end in ((1, "/head"), (1, ""), (0, "")):  # the head's rise stands in for the other
        for task, rise, present in zip(tasks, *summed[:, i].tolist(), strict=True):
            if present:
                figures[f"{_PREFIX}/{task}{end}"] = rise
    return _finite(figures)


def _wide(loss: Tensor) -> Tensor:
    return loss.to(wide_type(loss.device))


def _finite(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if math.isfinite(value)}
