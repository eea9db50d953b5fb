"""Calibration: how far the probabilities of classifiers can be trusted."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, final

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_flatmtl.callbacks._calibration_picture import draw_calibration
from lightning_flatmtl.callbacks._calibration_sums import Finding, add_up, entropy_sums
from lightning_flatmtl.callbacks._calibration_watch import Watch
from lightning_flatmtl.callbacks._classification import KINDS, Kind, unlabelled
from lightning_flatmtl.callbacks._ood import Source, batches_of, checked_source, predict, prepare
from lightning_flatmtl.callbacks._pictures import checked_path, need_matplotlib
from lightning_flatmtl.callbacks._table import Table
from lightning_flatmtl.hosting.host import Host
from lightning_flatmtl.hosting.names import nearest
from lightning_flatmtl.metrics import PredictiveEntropy

__all__ = ["Calibration"]

_COLUMNS = ("epoch", "step", "data", "task", "name", "bin", "value")
_STAGES = ("val", "test")

Stage = Literal["val", "test"]


@final
class Calibration(Callback):
    r"""Logs how well the probabilities of classification tasks are calibrated; it only looks.

    Phan et al. (`arXiv:2211.13723 <https://arxiv.org/abs/2211.13723>`_, Figure 2) ask this of flat
    minima. Of every validation or test epoch is logged

    ================================== ============================================================
    logged                             what it is
    ================================== ============================================================
    ``calibration/{task}/ece``         expected calibration error (Guo et al., 2017,
                                       `arXiv:1706.04599 <https://arxiv.org/abs/1706.04599>`_):
                                       :math:`\sum_b \frac{n_b}{n} |\mathrm{acc}(b) -
                                       \mathrm{conf}(b)|` over bins of the confidence, the value of
                                       torchmetrics' calibration errors
    ``calibration/{task}/brier``       mean Brier score (`1950
                                       <https://doi.org/10.1175/1520-0493(1950)078%3C0001:VOFEIT%3E2.0.CO;2>`_):
                                       :math:`\sum_c (p_c - 1[y = c])^2`, in [0, 2]; of a binary
                                       task :math:`(p - y)^2`, in [0, 1]
    ``calibration/{task}/entropy``     mean predictive entropy :math:`-\sum_c p_c \ln p_c`, in nats
    ``calibration/{task}/ood_entropy`` the same of inputs out of domain, if there are any
    ================================== ============================================================

    The confidence is the greatest probability of the softmax; of a binary task it is the
    probability of class 1, and the "accuracy" :math:`\mathrm{acc}(b)` is the share of class 1.
    Several data loaders are measured one by one, their names end in ``/dataloader_idx_0`` and so
    on. With several processes all figures are those of all their samples.

    **What it sees.** The model is not run again. Of a :class:`~lightning_flatmtl.MultiTaskModule`
    it sees what the metrics of the tasks get: predictions and targets of the samples that have a
    label. A module that overrides ``losses`` or ``task_loss`` calls
    :meth:`~lightning_flatmtl.MultiTaskModule.update_metrics` for that. Any other LightningModule
    returns logits and labels from its ``validation_step`` (``test_step``)::

        return {"logits": {"kind": kind_logits}, "targets": {"kind": kind}}

    and leaves out, or has ``None`` for, a task that the batch lacks. Labels below zero, NaN, and
    the ``ignore_index`` of the task's loss are those of no class and left out.

    **Which tasks.** Logits ``[n, classes, ...]`` with integer targets ``[n, ...]`` are
    ``"multiclass"``; logits with targets of their shape that are all 0 or 1 are ``"binary"``, each
    entry by itself if there are several per sample. Other tasks, and those with the loss of a
    regression, are left out, and refused if ``tasks`` names them.

    **Out of domain.** The model is run on these inputs at the end of each evaluation, which leaves
    no trace in it or in the random streams: ``predict_step`` if the module has its own, else
    ``forward`` of the inputs (the first entry of a batch that is a tuple or a list); either returns
    ``{task: logits}``. Each process goes through all of them, unless their sampler shares them out.

    Not supported: targets that are probabilities, such as those of mixup.

    Args:
        tasks: The tasks to look at, or a mapping from them to ``"binary"`` or ``"multiclass"``;
            by default all classifications.
        n_bins: The number of bins of equal width of the confidence, at least 1.
        stages: ``"val"``, ``"test"`` or both: the data to look at.
        ood: Inputs out of domain: a data loader, a data module (its ``ood_dataloader``, or else its
            ``test_dataloader``), or a function that returns an iterable of batches. By default
            ``ood_dataloader`` of the Trainer's data module or of the module, if there is one.
        ood_batches: The most batches to take of them, at least 1; by default all.
        csv: A file to write all figures and bins to: columns ``epoch``, ``step`` (optimizer steps
            done), ``data`` (``val``, ``test``, with several data loaders ``val/0`` and so on),
            ``task``, ``name``, ``bin`` and ``value``. Rows with a ``bin``, counted from 0, have the
            names ``count``, ``confidence`` and ``accuracy``. It is begun anew by a fit that does
            not resume, and by the first validation or test without a fit before it.
        png: A file to draw the latest reliability diagrams and entropies to, of the twelve tasks
            with the greatest error; needs matplotlib. With both stages the file of the test data
            has ``_test`` before its ending, with several data loaders their number follows.

    Raises:
        ValueError: If an argument is out of its bounds.
        ModuleNotFoundError: If there is to be a picture and matplotlib is not installed.

    Example:
        >>> import lightning.pytorch as pl
        >>> from lightning_flatmtl.callbacks import Calibration
        >>> callbacks = [Calibration(csv="calibration.csv"), Calibration(["kind"], stages="test")]
    """

    def __init__(
        self,
        tasks: Sequence[str] | Mapping[str, Kind] | None = None,
        *,
        n_bins: int = 10,
        stages: Stage | Sequence[Stage] = _STAGES,  # type: ignore[assignment]
        ood: Source | None = None,
        ood_batches: int | None = None,
        csv: str | Path | None = None,
        png: str | Path | None = None,
    ) -> None:
        self.tasks = _checked_tasks(tasks)
        self.n_bins = _checked_count("n_bins", n_bins)
        self.stages = _checked_stages(stages)
        self.ood = checked_source(ood)
        self.ood_batches = (
            None if ood_batches is None else _checked_count("ood_batches", ood_batches)
        )
        self._csv = checked_path("csv", csv, ".csv")
        self._png = checked_path("png", png, ".png")
        if self._png is not None:
            need_matplotlib()
        self._table: Table | None = None
        self._forget()

    def _forget(self) -> None:
        self._watch: Watch | None = None
        self._resumed = False
        self._looks = 0
        self._latest: dict[Path, list[Finding]] = {}

    @property
    @override
    def state_key(self) -> str:
        names = None if self.tasks is None else list(self.tasks)
        return self._generate_state_key(tasks=names, stages=self.stages, csv=str(self._csv))

    # Its course.

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._forget()
        if isinstance(pl_module, Host):
            known = [task.name for task in pl_module.tasks]
            unknown = [task for task in self.tasks or () if known and task not in known]
            if unknown:
                raise MisconfigurationException(
                    f"`tasks` of Calibration must be tasks of the module, got '{unknown[0]}' "
                    f"beside {known}. {nearest(unknown[0], known)}Correct the name."
                )
        prepare(self.ood, trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._csv is not None and trainer.is_global_zero:
            step = trainer.global_step if self._resumed else None
            self._table = Table(self._csv, _COLUMNS, lambda row: _is_before(row, step))

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(pl_module, "val")

    @override
    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(pl_module, "test")

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._listen(pl_module, dataloader_idx)

    @override
    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._listen(pl_module, dataloader_idx)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._look(pl_module, outputs)

    @override
    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._look(pl_module, outputs)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer, pl_module, "val")

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer, pl_module, "test")

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._close(pl_module)
        self._draw(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close(pl_module)

    # One evaluation.

    def _begin(self, module: LightningModule, stage: Stage) -> None:
        self._close(module)
        if stage in self.stages:
            self._watch = Watch(module, self.tasks, self.n_bins, module.device)

    def _listen(self, module: LightningModule, loader: int) -> None:
        if self._watch is None:
            return
        self._watch.loader = loader
        if isinstance(module, Host):
            module.listeners.append(self._watch.see)

    def _look(self, module: LightningModule, outputs: Any) -> None:
        if self._watch is None:
            return
        if isinstance(module, Host):
            module.listeners.remove(self._watch.see)
        else:
            self._watch.see_outputs(outputs)

    def _close(self, module: LightningModule) -> None:
        watch, self._watch = self._watch, None
        if watch is not None and isinstance(module, Host):
            module.listeners = [listener for listener in module.listeners if listener != watch.see]

    def _end(self, trainer: Trainer, module: LightningModule, stage: Stage) -> None:
        watch, self._watch = self._watch, None
        if watch is None:
            return
        watch.agree(trainer)
        if trainer.sanity_checking:
            return
        watch.refuse_nothing()
        ood = self._out_of_domain(trainer, module, watch)
        found: dict[str, list[Finding]] = {}
        for (loader, task), of_task in watch.sums.items():
            of_loader = found.setdefault(f"{loader}" if watch.last_loader else "", [])
            of_loader.append(of_task.finding(task, ood.get(task)))
        self._log(trainer, module, found)
        self._looks += 1
        if trainer.is_global_zero:
            self._write(trainer, stage, found)
            self._keep(stage, found)
        if trainer.state.fn != TrainerFn.FITTING:
            self._draw(trainer)

    def _out_of_domain(
        self, trainer: Trainer, module: LightningModule, watch: Watch
    ) -> dict[str, PredictiveEntropy]:
        """The entropies out of domain by task."""
        batches = batches_of(self.ood, trainer, module)
        kinds = {task: (of.kind, of.classes) for (_, task), of in watch.sums.items()}
        if batches is None or not kinds:
            return {}
        found = {task: entropy_sums(module.device) for task in kinds}

        def use(logits: Mapping[str, Any]) -> None:
            if not kinds.keys() & logits.keys():
                raise MisconfigurationException(
                    f"Expected predictions of the tasks {list(kinds)} out of domain, got those of "
                    f"{list(logits)}. Use the same names in `predict_step` or `forward`."
                )
            for task, (kind, classes) in kinds.items():
                if logits.get(task) is not None:
                    found[task].update(unlabelled(task, logits[task], kind, classes))

        limit = _batches_of_dev_run(trainer) or self.ood_batches
        predict(trainer, module, batches, limit, use)
        add_up(trainer, list(found.values()))
        return {task: of_task for task, of_task in found.items() if of_task.histogram.sum() > 0}

    # What becomes of the figures.

    def _log(
        self, trainer: Trainer, module: LightningModule, found: Mapping[str, Sequence[Finding]]
    ) -> None:
        figures: dict[str, float] = {}
        for loader, findings in found.items():
            of_loader = f"/dataloader_idx_{loader}" if loader else ""
            for finding in findings:
                for name, value in finding.figures.items():
                    suffix = "" if name == "ood_entropy" else of_loader
                    figures[f"calibration/{finding.task}/{name}{suffix}"] = value
        for name, value in figures.items():
            # The mean of equal values: they are of all processes already.
            several = trainer.world_size > 1
            module.log(name, value, sync_dist=several, add_dataloader_idx=False)

    def _write(
        self, trainer: Trainer, stage: Stage, found: Mapping[str, Sequence[Finding]]
    ) -> None:
        if self._csv is None:
            return
        if self._table is None:
            self._table = Table(self._csv, _COLUMNS, lambda row: False)
        for loader, findings in found.items():
            data = f"{stage}/{loader}" if loader else stage
            when = trainer.current_epoch, trainer.global_step, data
            for finding in findings:
                self._table.add((*when, finding.task, *row) for row in finding.rows())

    def _keep(self, stage: Stage, found: Mapping[str, Sequence[Finding]]) -> None:
        if self._png is None:
            return
        of_stage = "_test" if stage == "test" and "val" in self.stages else ""
        for loader, findings in found.items():
            of_loader = f"_{loader}" if loader else ""
            path = self._png.with_stem(f"{self._png.stem}{of_stage}{of_loader}")
            self._latest[path] = list(findings)

    def _draw(self, trainer: Trainer) -> None:
        for path, findings in self._latest.items():
            draw_calibration(findings, path)
        self._latest = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"looks": self._looks}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = True
        self._looks = int(state_dict["looks"])


def _batches_of_dev_run(trainer: Trainer) -> int:
    """How many batches a ``fast_dev_run`` is of; 0 in any other run."""
    return int(getattr(trainer, "fast_dev_run", 0))


def _is_before(row: Mapping[str, str], step: int | None) -> bool:
    """Whether a row is of the run that is resumed at ``step``."""
    return step is not None and int(row["step"]) <= step


def _checked_tasks(tasks: Any) -> dict[str, Kind | None] | None:
    if tasks is None:
        return None
    names = isinstance(tasks, Mapping) or (
        isinstance(tasks, Sequence) and not isinstance(tasks, str)
    )
    if not names or not tasks or not all(isinstance(task, str) for task in tasks):
        raise ValueError(
            "`tasks` must be names of tasks, or a mapping from them to 'binary' or 'multiclass', "
            f"got {tasks!r}."
        )
    kinds = dict(tasks) if isinstance(tasks, Mapping) else dict.fromkeys(tasks)
    for task, kind in kinds.items():
        if kind not in KINDS and (kind is not None or isinstance(tasks, Mapping)):
            raise ValueError(f"`tasks['{task}']` must be 'binary' or 'multiclass', got {kind!r}.")
    return kinds


def _checked_count(name: str, n: Any) -> int:
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(f"`{name}` must be an integer >= 1, got {n!r}.")
    return n


def _checked_stages(stages: Any) -> tuple[Stage, ...]:
    listed = (stages,) if isinstance(stages, str) else stages
    known = isinstance(listed, Sequence) and listed and all(s in _STAGES for s in listed)
    if not known:
        raise ValueError(f"`stages` must be 'val', 'test' or both, got {stages!r}.")
    return tuple(dict.fromkeys(listed))
