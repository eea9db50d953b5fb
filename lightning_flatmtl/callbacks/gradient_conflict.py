"""GradientConflict: how much the gradients of the tasks point against each other."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_flatmtl.callbacks._conflict import between, within
from lightning_flatmtl.callbacks._conflict_picture import draw_conflict
from lightning_flatmtl.callbacks._pictures import checked_path, need_matplotlib
from lightning_flatmtl.callbacks._records import Records
from lightning_flatmtl.callbacks._turns import Means, Turns
from lightning_flatmtl.engine import MultiTaskStep, StepResult
from lightning_flatmtl.hosting.automatic import host_of
from lightning_flatmtl.hosting.host import Host
from lightning_flatmtl.hosting.onlooker import Onlooker
from lightning_flatmtl.hosting.trainer import SHARDING, WHOLE, kinds_of

__all__ = ["GradientConflict"]


@final
class GradientConflict(Callback):
    r"""Logs which task gradients conflict, and how much; it changes nothing of the training.

    Two task gradients conflict when their inner product is negative. Looked at are the gradients
    of the shared parameters that an update is made of: the *loss parts* :math:`g_i`, and with a
    :class:`~lightning_flatmtl.TaskSAM` that splits, the *flat parts* :math:`f_i = s_i - g_i`
    (Phan et al., `arXiv:2211.13723 <https://arxiv.org/abs/2211.13723>`_, Figure 3).

    ===================================== =========================================================
    logged                                what it is
    ===================================== =========================================================
    ``conflict/rate``                     share of task pairs whose loss parts conflict
    ``conflict/cosine/{a}/{b}``           cosine of the loss parts of two tasks
    ``conflict/mean_cosine``              its mean over all pairs
    ``conflict/flat/...``                 the same of the flat parts
    ``conflict/between/...``              the same of the loss part of ``a`` with the flat part of
                                          ``b``, for all ``a`` and ``b``, equal ones among them
    ``conflict/epoch/rate``               mean of ``conflict/rate`` over the updates of the epoch
                                          that were looked at; also ``conflict/epoch/flat/rate``
                                          and ``conflict/epoch/between/rate``
    ===================================== =========================================================

    A gradient of zero has cosine 0 with every other. A task that is absent from an update has no
    figures there. With several processes they are those of the batch of all.

    Without TaskSAM and an aggregator that looks at gradients a step has no task gradients: they
    are computed, by a backward pass for each task, in the steps that are looked at. An existing
    module returns its ``"losses"`` for this as for an aggregator. Accumulated batches are then
    looked at one by one.

    Not supported, without TaskSAM and such an aggregator: models that ``torch.compile`` or a
    reentrant checkpoint hides the graph of, strategies other than one device or DDP, and existing
    modules with manual optimization.

    Args:
        every_n_steps: Look at every n-th batch, or the update that it becomes part of, at least 1;
            by default in the steps in which the Trainer logs (``log_every_n_steps``). The first
            batch of every epoch is always looked at. Loggers get what falls into the steps in
            which the Trainer logs; the means, the CSV and the picture have all.
        pairs: Whether to log the cosines of single pairs, too, of which m tasks have up to
            :math:`2 m^2 - m`.
        csv: A file to write all figures to: columns ``epoch``, ``step`` (optimizer steps done),
            ``name`` and ``value``. It is begun anew by a fit that does not resume.
        png: A file to draw the means of the epochs to, when the fit ends; needs matplotlib.

    Raises:
        ValueError: If an argument is out of its bounds.
        ModuleNotFoundError: If there is to be a picture and matplotlib is not installed.

    Example:
        >>> import lightning.pytorch as pl
        >>> from lightning_flatmtl import TaskSAM
        >>> from lightning_flatmtl.aggregators import CAGrad
        >>> callbacks = [CAGrad(), TaskSAM(), GradientConflict(csv="conflict.csv")]
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        *,
        pairs: bool = True,
        csv: str | Path | None = None,
        png: str | Path | None = None,
    ) -> None:
        self._turns = Turns(every_n_steps)
        if not isinstance(pairs, bool):
            raise ValueError(f"`pairs` must be True or False, got {pairs!r}.")
        self.every_n_steps = every_n_steps
        self.pairs = pairs
        self._csv = checked_path("csv", csv, ".csv")
        self._png = checked_path("png", png, ".png")
        if self._png is not None:
            need_matplotlib()
        self._forget()

    def _forget(self) -> None:
        self._turns.forget()
        self._resumed = False
        self._means = Means()
        self._epochs: list[dict[str, float]] = []
        self._records: Records | None = None
        self._onlooker: Onlooker | None = None
        self._told = False

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(every_n_steps=self.every_n_steps, csv=str(self._csv))

    # Looking.

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._forget()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        alone = not isinstance(pl_module, Host) and host_of(pl_module) is pl_module
        if alone and not _hides_gradients(trainer):
            self._onlooker = Onlooker(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._csv is not None and trainer.is_global_zero:
            self._records = Records(self._csv, trainer.global_step if self._resumed else None)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._turns.begin_batch(trainer, batch_idx)
        if self._turns.due and not _hides_gradients(trainer):
            self._watch(pl_module, True)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._turns.due:
            return
        self._watch(pl_module, False)
        host = self._host(pl_module)
        result = getattr(host, "last_step", None)
        if not isinstance(result, StepResult) or result.gram is None:
            self._tell(getattr(host, "engine", None))
            return  # the update comes with a later batch, or never
        self._turns.due = False
        figures = _figures(result)
        for name, value in figures.items():
            if self.pairs or "/cosine/" not in name:
                pl_module.log(name, value, on_step=True, on_epoch=False, batch_size=1)
        self._means.add(figures)
        if self._records is not None:
            self._records.add(trainer.current_epoch, trainer.global_step, figures)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        means = self._means.take()
        if not means:
            return
        epoch = _of_epoch(means)
        for series in ("", "/flat", "/between"):
            rate = epoch.get(f"conflict{series}/rate")
            if rate is not None:
                name = f"conflict/epoch{series}/rate"
                pl_module.log(name, rate, sync_dist=trainer.world_size > 1)
        self._epochs.append({"epoch": float(trainer.current_epoch), **epoch})

    def _host(self, module: LightningModule) -> Any:
        return host_of(module) if self._onlooker is None else self._onlooker

    def _watch(self, module: LightningModule, watched: bool) -> None:
        if self._onlooker is not None:
            self._onlooker.begin() if watched else self._onlooker.end()
            return
        engine = getattr(host_of(module), "engine", None)
        if isinstance(engine, MultiTaskStep):
            engine.watched = watched

    def _tell(self, engine: Any) -> None:
        """Say once that there is nothing to be seen."""
        hidden = isinstance(engine, MultiTaskStep) and engine.partition.hidden
        if hidden and not self._told:
            self._told = True
            rank_zero_warn(
                "GradientConflict sees no gradients of single tasks: torch.compile or a reentrant "
                "checkpoint hides them in a training without TaskSAM and an aggregator that looks "
                "at gradients. Do without it, or add one of them.",
                category=UserWarning,
            )

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
        if self._onlooker is not None:
            self._onlooker.close()
            self._onlooker = None

    def _draw(self, trainer: Trainer) -> None:
        if self._png is not None and self._epochs and trainer.is_global_zero:
            draw_conflict(self._epochs, self._png)

    @override
    def state_dict(self) -> dict[str, Any]:
        own = {"sums": self._means.sums, "epochs": self._epochs}
        return {**self._turns.state_dict(), **own}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = True
        self._turns.load_state_dict(state_dict)
        self._means = Means()
        self._means.merge(state_dict["sums"])
        self._epochs = [dict(epoch) for epoch in state_dict["epochs"]]


def _hides_gradients(trainer: Trainer) -> bool:
    """Whether the strategy leaves no process gradients of whole parameters."""
    return not kinds_of(trainer) & {"SingleDeviceStrategy", WHOLE, SHARDING}


def _figures(result: StepResult) -> dict[str, float]:
    """All figures of an update by their names in the log."""
    tasks = tuple(result.update_losses)
    assert result.gram is not None
    found = within("conflict", tasks, result.gram)
    if result.flat_gram is not None:
        found |= within("conflict/flat", tasks, result.flat_gram)
    if result.flat_gram is not None and result.cross_gram is not None:
        found |= between(
            "conflict/between", tasks, result.gram, result.flat_gram, result.cross_gram
        )
    return found


def _of_epoch(means: Mapping[str, float]) -> dict[str, float]:
    """What is kept of an epoch: the overall figures, and the range of the single pairs."""
    found = {name: mean for name, mean in means.items() if "/cosine/" not in name}
    for series in ("conflict", "conflict/flat", "conflict/between"):
        pairs = [mean for name, mean in means.items() if name.startswith(f"{series}/cosine/")]
        if pairs:
            found[f"{series}/least_cosine"] = min(pairs)
            found[f"{series}/greatest_cosine"] = max(pairs)
    return found
