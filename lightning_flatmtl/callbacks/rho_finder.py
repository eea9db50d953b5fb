"""RhoFinder: looks for the radius of TaskSAM by what it does to the losses."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, final

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_flatmtl.callbacks._batches import batches_of
from lightning_flatmtl.callbacks._evaluation import working_on
from lightning_flatmtl.callbacks._pictures import checked_path, need_matplotlib
from lightning_flatmtl.callbacks._radius_probe import RadiusProbe, Sums
from lightning_flatmtl.callbacks._radius_results import COLUMNS, RhoResults, RhoRow, rows_of
from lightning_flatmtl.callbacks._survey import checked_count, is_positive
from lightning_flatmtl.callbacks._table import Table
from lightning_flatmtl.engine import RNGReplay, Sharpness
from lightning_flatmtl.engine.gradients.nested import refuse_unfit_to_nest
from lightning_flatmtl.engine.processes.base import Processes
from lightning_flatmtl.hosting.automatic import host_of
from lightning_flatmtl.hosting.host import Host
from lightning_flatmtl.hosting.refusals import refuse_unfit_gradients
from lightning_flatmtl.hosting.trainer import (
    WHOLE,
    aggregator_of,
    kinds_of,
    of_role,
    processes_of,
)
from lightning_flatmtl.hosting.untraced import refuse_unfit_to_look_at

__all__ = ["RhoFinder"]

_SHARE, _MOST = 3, 500
"""The warm-up: one step in so many of the fit, at most so many."""


@final
class RhoFinder(Callback):
    r"""Looks for the radius of :class:`~lightning_flatmtl.TaskSAM`, and changes nothing else.

    The radius decides between accuracy gained, accuracy lost and a network that is dead after ten
    steps, and it differs between networks. After some steps of warm-up (at the initial weights it
    means little) this callback moves the parameters as TaskSAM does (`arXiv:2211.13723
    <https://arxiv.org/abs/2211.13723>`_, Algorithm 1, separate point), by a range of radii, and
    looks how much each task's loss rises on held-out batches:

    .. math:: \Delta L_i^{shared}(\rho) = L_i(\theta_{sh} + \epsilon_{sh, i}, \theta_{ns, i})
        - L_i(\theta), \qquad
        \Delta L_i^{head}(\rho) = L_i(\theta_{sh}, \theta_{ns, i} + \epsilon_{ns, i}) - L_i(\theta)

    with :math:`\epsilon = \rho\, g / \lVert g \rVert` or, adaptive, :math:`\epsilon = \rho\,
    \theta^2 g / \lVert\, |\theta|\, g \rVert` along the task's own gradient on the same batch. What
    it suggests is the largest radius at which the mean of :math:`(\Delta L_i^{shared} + \Delta
    L_i^{head}) / L_i^0` is at most 15 %, :math:`L_i^0` being the task's loss before training. That
    is a rule of thumb; the page on the radius says where it holds and where it fails.

    Results are kept, printed, and on demand written and drawn. Training goes on bit for bit as
    without the callback: parameters, optimizer, gradients, buffers, metrics, logs and random
    streams are as before. With ``update_attr=True`` the rest of the fit uses the radius that was
    found.

    The module is in training mode, with the same masks for every radius, and with the statistics of
    the batch: as in TaskSAM's second pass. With several processes each looks at batches of its own,
    and figures are means over the samples of all. An existing module returns its ``"losses"`` from
    ``training_step``, which is run on validation batches; ``second_pass`` is true there. Without
    validation data (or without ``validation_step``) one training batch is looked at, and it is
    said so.

    Cost: for each task and batch two forward and backward passes for every radius, and a forward
    pass for each batch when the fit begins.

    Not supported: strategies other than one device or DDP, and existing modules with manual
    optimization.

    Args:
        min_rho: The smallest radius of plain perturbations, in ``(0, inf)``.
        max_rho: The largest one, above ``min_rho``.
        min_adaptive_rho: The smallest radius of adaptive perturbations, in ``(0, inf)``.
        max_adaptive_rho: The largest one, above ``min_adaptive_rho``.
        num_radii: How many of each kind, at equal ratios, at least 2.
        warmup_steps: After how many optimizer steps to look, at least 0. By default after a third
            of the fit, but at most 500.
        batches: The most validation batches of each process to look at, at least 1.
        update_attr: Whether to set the radius of the Trainer's TaskSAM to the one found, adaptive
            or not as that is; a radius of 0 stays 0 unless both are.
        verbose: Whether to print what was found.
        csv: A file for the figures, a row for each task, part, kind and radius.
        png: A file for the picture; needs matplotlib.

    Attributes:
        results: What was found, a :class:`~lightning_flatmtl.callbacks.RhoResults`; ``None``
            before.

    Raises:
        ValueError: If an argument is out of its bounds.
        ModuleNotFoundError: If there is to be a picture and matplotlib is not installed.
        MisconfigurationException: When a fit begins, if the module or the strategy is one that it
            cannot look at, or if there is no TaskSAM to update.

    Example:
        >>> from lightning_flatmtl import TaskSAM
        >>> finder = RhoFinder(warmup_steps=200, png="radius.png")
        >>> callbacks = [TaskSAM(rho=0.05), finder]
        >>> # trainer.fit(...), then finder.results.suggestion(adaptive=True)
    """

    def __init__(
        self,
        min_rho: float = 2.0**-8,
        max_rho: float = 1.0,
        min_adaptive_rho: float = 2.0**-4,
        max_adaptive_rho: float = 16.0,
        num_radii: int = 9,
        *,
        warmup_steps: int | None = None,
        batches: int = 4,
        update_attr: bool = False,
        verbose: bool = True,
        csv: str | Path | None = None,
        png: str | Path | None = None,
    ) -> None:
        self.radii = {
            False: _radii("min_rho", min_rho, "max_rho", max_rho, num_radii),
            True: _radii(
                "min_adaptive_rho",
                min_adaptive_rho,
                "max_adaptive_rho",
                max_adaptive_rho,
                num_radii,
            ),
        }
        n = warmup_steps
        if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 0):
            raise ValueError(f"`warmup_steps` must be an integer >= 0 or None, got {n!r}.")
        for name, flag in (("update_attr", update_attr), ("verbose", verbose)):
            if not isinstance(flag, bool):
                raise ValueError(f"`{name}` must be True or False, got {flag!r}.")
        self.warmup_steps, self.batches = warmup_steps, checked_count("batches", batches)
        self.update_attr, self.verbose = update_attr, verbose
        self._csv = checked_path("csv", csv, ".csv")
        self._png = checked_path("png", png, ".png")
        if self._png is not None:
            need_matplotlib()
        self._forget()

    def _forget(self) -> None:
        self.results: RhoResults | None = None
        self._begin: dict[str, float] | None = None
        self._end: float = math.inf

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(
            radii=[list(radii) for radii in self.radii.values()],
            warmup_steps=self.warmup_steps,
            batches=self.batches,
        )

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._forget()
        refuse_unfit_to_look_at(pl_module, type(self).__name__)
        self._refuse(trainer)
        if self.update_attr:
            self._refuse_later(trainer, pl_module)

    def _refuse(self, trainer: Trainer) -> None:
        if not kinds_of(trainer) & {"SingleDeviceStrategy", WHOLE}:
            raise MisconfigurationException(
                "RhoFinder needs whole parameters on one device or with strategy='ddp', got "
                f"{type(trainer.strategy).__name__}. Remove the callback, and look for the radius "
                "on one device."
            )
        if self.update_attr and not of_role(trainer, "TaskSAM"):
            raise MisconfigurationException(
                "`RhoFinder(update_attr=True)` sets the radius of a TaskSAM, got a Trainer without "
                "one. Add `TaskSAM(rho=0.0)` to its callbacks, or use `update_attr=False`."
            )

    def _refuse_later(self, trainer: Trainer, module: LightningModule) -> None:
        """Refuse now what the radius to come would not go with; a radius of 0 hides it."""
        sam = of_role(trainer, "TaskSAM")[0]
        active = replace(sam.sharpness, rho_shared=1.0, rho_heads=1.0)
        refuse_unfit_to_nest(aggregator_of(trainer), active)
        if isinstance(module, Host):
            refuse_unfit_gradients(module.gradients, active, share=1)

    # When.

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end = self._last_step(trainer)
        if self.results is not None:  # of a fit that resumes
            self._update(trainer, pl_module)

    def _last_step(self, trainer: Trainer) -> float:
        """How many optimizer steps the warm-up takes."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return min(_MOST, trainer.estimated_stepping_batches // _SHARE)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.results is not None:
            return
        ended = trainer.global_step >= self._end
        if self._begin is None or ended:
            self._look(trainer, pl_module, (batch, batch_idx), ended)
        if self.results is not None:
            self._tell(trainer, self.results)
            self._update(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.results is None and math.isfinite(self._end):
            rank_zero_warn(
                f"RhoFinder was to look after {self._end} optimizer steps, got a fit that ended "
                f"after {trainer.global_step}: nothing was found. Use a smaller `warmup_steps`."
            )

    # Looking.

    def _look(
        self, trainer: Trainer, module: LightningModule, at_hand: tuple[Any, int], ended: bool
    ) -> None:
        processes = processes_of(trainer)
        try:
            with RNGReplay(module.device).replaying():
                batches = self._batches(trainer, module, processes) or [at_hand]
                probe = RadiusProbe(module, self.radii, processes)
                if self._begin is None:
                    self._begin = _means(probe.clean(batches))
                if not ended:
                    return
                found = probe(batches)
        finally:
            processes.close()
        data = "training" if batches[0] is at_hand else "validation"
        rows = tuple(rows_of(found, trainer.global_step))
        self.results = RhoResults(rows, _means(found) | self._begin, data)

    def _batches(
        self, trainer: Trainer, module: LightningModule, processes: Processes
    ) -> list[tuple[Any, int]]:
        """Validation batches, as many in every process; none if there are none somewhere."""
        batches: list[tuple[Any, int]] = []
        error = None
        try:
            if trainer.enable_validation:
                with working_on(trainer, "val"):
                    batches = list(batches_of(trainer, module, "val", self.batches))
        except Exception as raised:
            error = raised  # the other processes are told before it goes on
        processes.end(error)
        return batches[: min(processes.everyones(len(batches)))]

    # What becomes of it.

    def _tell(self, trainer: Trainer, results: RhoResults) -> None:
        if not trainer.is_global_zero:
            return
        if self._csv is not None:
            table = Table(self._csv, COLUMNS, lambda _: False)
            table.add(list(row.values()) for row in results.table())
        if self._png is not None:
            results.plot(self._png)
        if self.verbose:
            from lightning_flatmtl.comparison.terminal import print_table  # noqa: PLC0415 # slow

            print_table(results.markdown())

    def _update(self, trainer: Trainer, module: LightningModule) -> None:
        """Let the rest of the fit use the radius."""
        if not self.update_attr or self.results is None:
            return
        (sam,) = of_role(trainer, "TaskSAM")
        radius = self.results.suggestion(sam.sharpness.adaptive)
        if radius is None:
            rank_zero_warn(
                "RhoFinder found all its radii too large; that of TaskSAM stays as it is. Use a "
                "smaller `min_rho` (`min_adaptive_rho`)."
            )
            return
        before: Sharpness = sam.sharpness
        both = not before.active
        sam.sharpness = replace(
            before,
            rho_shared=radius if both or before.rho_shared > 0 else 0.0,
            rho_heads=radius if both or before.rho_heads > 0 else 0.0,
        )
        fit = host_of(module).fit if hasattr(host_of(module), "fit") else host_of(module)._fit
        fit.sharpness = sam.sharpness

    # So that a fit that resumes goes on from there.

    @override
    def state_dict(self) -> dict[str, Any]:
        results = self.results
        if results is None:
            return {"begin": self._begin}
        rows = [list(asdict(row).values()) for row in results.rows]
        return {"begin": dict(results.begin), "rows": rows, "data": results.data}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._begin = state_dict["begin"]
        if self._begin is not None and "rows" in state_dict:
            rows = tuple(RhoRow(*row) for row in state_dict["rows"])
            self.results = RhoResults(rows, self._begin, state_dict["data"])


def _means(sums: Sums) -> dict[str, float]:
    """The losses of all tasks."""
    return {key.task: loss / n for key, (n, loss, *_) in sums.items() if n and not key.part}


def _radii(low_name: str, low: float, high_name: str, high: float, n: int) -> tuple[float, ...]:
    if not is_positive(low):
        raise ValueError(f"`{low_name}` must be in (0, inf), got {low!r}.")
    if not is_positive(high) or high <= low:
        raise ValueError(f"`{high_name}` must be in ({low:g}, inf), got {high!r}.")
    if not isinstance(n, int) or isinstance(n, bool) or n < 2:
        raise ValueError(f"`num_radii` must be an integer >= 2, got {n!r}.")
    return tuple(float(low) * (high / low) ** (i / (n - 1)) for i in range(n))
