"""When the surroundings of the parameters are looked at, and where what is found goes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from numbers import Real
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_flatmtl.callbacks._batches import batches_of
from lightning_flatmtl.callbacks._directions import displaced, trainable
from lightning_flatmtl.callbacks._evaluation import Evaluation, Explorer, Stage
from lightning_flatmtl.callbacks._pictures import checked_path, need_matplotlib
from lightning_flatmtl.callbacks._table import Table
from lightning_flatmtl.hosting.automatic import task_losses
from lightning_flatmtl.hosting.host import Host
from lightning_flatmtl.hosting.trainer import WHOLE, kinds_of, processes_of
from lightning_flatmtl.hosting.untraced import refuse_unfit_to_look_at

__all__ = ["Run", "Survey", "checked_count", "is_positive"]

Run = Literal["fit", "validate", "test"]
Findings = TypeVar("Findings")


class Survey(Callback, ABC, Generic[Findings]):
    """Looks at the surroundings of the parameters, and changes nothing.

    Args:
        runs: In which runs of the Trainer to look.
        every_n_epochs: Look after every n-th epoch of a fit, too.
        batches: The most batches of each process to look at.
        training_data: Whether a fit looks at training data.
        logged: Whether all is asked for that the evaluation step logs, or only task losses.
        seed: Seed of the directions.
        csv: A file for what is found.
        png: A file for the picture of what was found last.

    Raises:
        ValueError: If an argument is out of its bounds.
        ModuleNotFoundError: If there is to be a picture and matplotlib is not installed.
    """

    _columns: Sequence[str]

    def __init__(
        self,
        runs: Sequence[Run],
        every_n_epochs: int | None,
        batches: int | None,
        training_data: bool,
        logged: bool,
        seed: int,
        csv: str | Path | None,
        png: str | Path | None,
    ) -> None:
        self.runs = _checked_runs(runs)
        self.every_n_epochs = _checked_optional("every_n_epochs", every_n_epochs)
        self.batches = _checked_optional("batches", batches)
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise ValueError(f"`seed` must be an integer >= 0, got {seed!r}.")
        self.seed = seed
        self._training_data, self._logged = training_data, logged
        self._csv = checked_path("csv", csv, ".csv")
        self._png = checked_path("png", png, ".png")
        if self._png is not None:
            need_matplotlib()
        self._forget()

    def _forget(self) -> None:
        self._resumed = False
        self._checked = False
        self._epoch = 0
        self._seen: list[tuple[int, int]] | None = None

    @property
    @override
    def state_key(self) -> str:
        settings = {name: value for name, value in vars(self).items() if name[0] != "_"}
        return self._generate_state_key(**settings, csv=str(self._csv), png=str(self._png))

    # What is looked at: for the callbacks to say.

    @abstractmethod
    def _explore(self, explorer: Explorer, generator: torch.Generator) -> Findings:
        """Look around."""

    @abstractmethod
    def _figures(self, findings: Findings) -> dict[str, float]:
        """What is logged, by name."""

    @abstractmethod
    def _rows(self, findings: Findings) -> list[list[object]]:
        """What is written to the CSV file, behind epoch, step and run."""

    @abstractmethod
    def _draw(self, findings: Findings, data: str, path: Path) -> None:
        """Draw what was found on ``data``."""

    # When.

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._forget()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "fit" not in self.runs:
            return
        self._refuse(trainer, pl_module)
        if not self._training_data and not trainer.enable_validation:
            name = type(self).__name__
            raise MisconfigurationException(
                f"{name} looks at validation data, got a fit without any (or a module without "
                f"`validation_step`). Pass validation data to `trainer.fit`, or take 'fit' out of "
                f"`{name}(runs=...)`, got {list(self.runs)}."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "fit" in self.runs and self._csv is not None and trainer.is_global_zero:
            now = trainer.global_step if self._resumed else -1
            Table(self._csv, self._columns, lambda row: int(row["step"]) <= now)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._checked and outputs is not None and "fit" in self.runs:
            self._checked = True  # better now than when all is trained
            if not isinstance(pl_module, Host):
                task_losses(outputs, f"For {type(self).__name__}")

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch = trainer.current_epoch

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        n = self.every_n_epochs
        if "fit" in self.runs and n is not None and (self._epoch + 1) % n == 0:
            self._log(pl_module, self._look(trainer, pl_module, "fit"))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "fit" not in self.runs or self._seen == _versions(pl_module):
            return
        figures = self._look(trainer, pl_module, "fit")
        trainer.callback_metrics.update({k: torch.tensor(v) for k, v in figures.items()})
        # Too late for `log`; the step is that of the last epoch's figures.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped - 1
        logged: Any = {**figures, "epoch": self._epoch}
        trainer._logger_connector.log_metrics(logged, step=max(0, step))

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate" and "validate" in self.runs:
            self._refuse(trainer, pl_module)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate" and "validate" in self.runs:
            self._log(pl_module, self._look(trainer, pl_module, "validate"))

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "test" in self.runs:
            self._refuse(trainer, pl_module)

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "test" in self.runs:
            self._log(pl_module, self._look(trainer, pl_module, "test"))

    def _refuse(self, trainer: Trainer, module: LightningModule) -> None:
        """Refuse what cannot be looked at, before it begins."""
        name = type(self).__name__
        refuse_unfit_to_look_at(module, name)
        if not kinds_of(trainer) & {"SingleDeviceStrategy", WHOLE}:
            raise MisconfigurationException(
                f"{name} needs whole parameters on one device or with strategy='ddp', got "
                f"{type(trainer.strategy).__name__}. Remove the callback, or look at a checkpoint "
                "of the model with `trainer.validate` on one device."
            )
        if not trainable(module):
            raise MisconfigurationException(
                f"{name} moves the trainable parameters, got {type(module).__name__} without any. "
                "Set `requires_grad` of some."
            )

    # Looking.

    def _look(self, trainer: Trainer, module: LightningModule, run: Run) -> dict[str, float]:
        stage: Stage = "test" if run == "test" else "val"
        if run == "fit" and self._training_data:
            stage = "train"
        evaluation = Evaluation(trainer, module, stage, self._logged)
        batches = partial(batches_of, trainer, module, stage, self.batches)
        generator = torch.Generator().manual_seed(self.seed)
        processes = processes_of(trainer)
        try:
            with displaced(trainable(module)) as displacement, evaluation.ready():
                explorer = Explorer(evaluation, displacement, batches, processes)
                findings = self._explore(explorer, generator)
        finally:
            processes.close()
        self._seen = _versions(module)
        if trainer.is_global_zero:
            self._write(findings, trainer, run)
            if self._png is not None:
                self._png.parent.mkdir(parents=True, exist_ok=True)
                self._draw(findings, _DATA[stage], self._png)
        return self._figures(findings)

    def _write(self, findings: Findings, trainer: Trainer, run: Run) -> None:
        if self._csv is None:
            return
        # A fit adds up; what an evaluation has found before is found anew.
        keep: Callable[[dict[str, str]], bool] = lambda row: run == "fit" or row["run"] != run  # noqa: E731
        epoch = self._epoch if run == "fit" else trainer.current_epoch
        table = Table(self._csv, self._columns, keep)
        table.add([epoch, trainer.global_step, run, *row] for row in self._rows(findings))

    def _log(self, module: LightningModule, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            module.log(name, value, sync_dist=module.trainer.world_size > 1)

    # So that a fit that resumes goes on with its file.

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = True
        self._epoch = int(state_dict["epoch"])


_DATA = {"train": "training data", "val": "validation data", "test": "test data"}


def _versions(module: LightningModule) -> list[tuple[int, int]]:
    """Which parameters there are, and how often each has been changed."""
    return [(id(p), p._version) for p in module.parameters() if not p.is_inference()]


def checked_count(name: str, value: int) -> int:
    """An integer that is at least 1.

    Raises:
        ValueError: If it is something else.
    """
    if not _is_count(value):
        raise ValueError(f"`{name}` must be an integer >= 1, got {value!r}.")
    return value


def _checked_optional(name: str, value: int | None) -> int | None:
    if value is not None and not _is_count(value):
        raise ValueError(f"`{name}` must be an integer >= 1 or None, got {value!r}.")
    return value


def is_positive(value: object) -> bool:
    """Whether ``value`` is a number in ``(0, inf)``."""
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < inf


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _checked_runs(runs: Sequence[Run]) -> tuple[Run, ...]:
    known = get_args(Run)
    if isinstance(runs, str) or not runs or any(run not in known for run in runs):
        raise ValueError(f"`runs` must be one or more of {list(known)}, got {runs!r}.")
    return tuple(runs)
