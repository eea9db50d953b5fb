"""RunRecord: what a run of a comparison tells while it trains, and its result in the end."""

import os
import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, final

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from typing_extensions import override

from lightning_flatmtl import __version__
from lightning_flatmtl.comparison.cost import Cost, trainable_parameters
from lightning_flatmtl.comparison.curves import TRAIN_LOSS, Curves
from lightning_flatmtl.comparison.directions import noted_directions
from lightning_flatmtl.comparison.folder import RunFolder
from lightning_flatmtl.comparison.metric_names import validation_loss
from lightning_flatmtl.comparison.selection import Selection
from lightning_flatmtl.hosting.callback import MethodCallback
from lightning_flatmtl.hosting.host import Host
from lightning_flatmtl.hosting.random_streams import RandomStreams
from lightning_flatmtl.hosting.trainer import processes_of

__all__ = ["ResumePoint", "RunRecord"]

_EVERY_SECONDS = 1.0
"""How often a run says where it is."""


class ResumePoint(ModelCheckpoint):
    """Keeps the end of the latest epoch, for a run that is broken off.

    Args:
        folder: The folder of the run.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(
            dirpath=RunFolder(Path(folder)).checkpoints,
            filename="resume",
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )


@final
class RunRecord(Callback):
    """Writes progress, curves, cost and test metrics of a run into its folder; it only looks.

    ``flatmtl fit`` with this callback goes on from the folder's resume point if there is one, and
    tests the selected epochs after the fit. ``flatmtl compare`` adds it to every run, ``flatmtl
    tune`` to every trial, which has no test.

    Args:
        folder: The folder of the run.
        select: Which epochs are tested: ``"last"``, ``{"monitor": ..., "mode": ...}`` or
            ``{"mean_of_last": k}``.
        test: Whether to test them; if not, no weights are kept either.
    """

    ELSEWHERE = 75
    """Exit status of a process that finds the run done, or another process at it."""

    def __init__(
        self, folder: str, select: str | dict[str, Any] = "last", test: bool = True
    ) -> None:
        self.folder = RunFolder(Path(folder))
        self.selection = Selection.of(select)
        self.test = test
        self._directions: dict[str, bool] = {}
        self._noting = ExitStack()
        self._curves, self._cost = Curves(), Cost()
        self._written: dict[str, Tensor] = {}
        self._streams = RandomStreams()
        self._keeps_streams = False
        self._told = 0.0
        self._loss: Tensor | None = None
        self._batches = 0

    # Before and after the fit; called by the command.

    def may_begin(self, trainer: Trainer) -> bool:
        """Take the run for this process; ``False`` if it is done or another process is at it."""
        if not trainer.is_global_zero:
            return True
        return self.folder.claim() and self.folder.result is None

    @property
    def resume_point(self) -> Path | None:
        """The checkpoint to go on from."""
        return self.folder.resume if self.folder.resume.is_file() else None

    def finish(self, trainer: Trainer, model: LightningModule, datamodule: Any) -> None:
        """Test the selected epochs and write the result."""
        final = {name: float(value) for name, value in trainer.callback_metrics.items()}
        epochs, steps = trainer.current_epoch, trainer.global_step
        metrics: dict[str, float] = {}
        if self.test:
            with noted_directions(model, self._directions):
                tested = [
                    _test(trainer, model, datamodule, path)
                    for path in self.selection.checkpoints(trainer)
                ]
            metrics = {n: statistics.fmean(each[n] for each in tested) for n in tested[0]}
        shown = metrics if self.test else final
        if not trainer.is_global_zero:
            return
        self.folder.result = {
            "metrics": metrics,
            "higher_is_better": {n: d for n, d in self._directions.items() if n in shown},
            "final": final,
            "seconds_per_step": self._cost.seconds_per_step,
            "peak_memory_mib": self._cost.peak_memory_mib,
            "parameters": trainable_parameters(model),
            "epochs": epochs,
            "steps": steps,
            "device": _device(trainer),
            "version": __version__,
        }
        self._tidy(trainer)
        self.folder.release()

    def _tidy(self, trainer: Trainer) -> None:
        """Keep the model that was tested, of several the last, and no more."""
        resume = self.folder.resume
        if not self.test:
            resume.unlink(missing_ok=True)
            return
        for path in self.selection.checkpoints(trainer)[:-1]:
            if path is not None:
                path.unlink()
        if resume.is_file() and self.selection.setting == "last":
            resume.replace(resume.with_name("last.ckpt"))
        resume.unlink(missing_ok=True)

    # While it trains.

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        methods = [c for c in trainer.callbacks if isinstance(c, MethodCallback)]  # type: ignore[attr-defined]
        # A module that we host or have taken over has its random streams in the checkpoints.
        self._keeps_streams = not methods and not isinstance(pl_module, Host)
        self._streams.begin()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._streams.put_back(trainer, pl_module)
        self._cost.begin(pl_module.device, trainer.global_step)
        self._tell(trainer)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if trainer.is_global_zero and isinstance(exception, Exception):
            words = str(exception).strip().splitlines() or ["without a word"]
            self.folder.failure = f"{type(exception).__name__}: {words[0]}"
        self.folder.release()
        self._noting.close()

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._loss, self._batches = None, 0

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._cost.go()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            shares = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            loss = loss.detach().float() * shares  # Lightning gives a share of it
            self._loss = loss if self._loss is None else self._loss + loss
            self._batches += 1
        if trainer.is_last_batch:
            self._exchange_streams(trainer, pl_module)
        if time.monotonic() - self._told > _EVERY_SECONDS:
            self._tell(trainer)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._cost.pause()
        if not self.test:  # the directions of what is logged in testing are noted there
            self._noting.enter_context(noted_directions(pl_module, self._directions))

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._noting.close()
        self._exchange_streams(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._cost.end_epoch(trainer.global_step)
        figures = self._new_figures(trainer) | self._mean_loss(trainer, pl_module)
        self._curves.add(trainer.current_epoch, trainer.global_step, figures)
        if trainer.is_global_zero:
            self._curves.write(self.folder.curves)
        self._tell(trainer, trainer.current_epoch + 1)

    def _new_figures(self, trainer: Trainer) -> dict[str, float]:
        """What has been logged since the last epoch's end, whatever it is called.

        Lightning keeps the figures of the last validation, which an epoch without one has not. It
        makes a new tensor of every figure, also of one that is worth the same as the last.
        """
        found = dict(trainer.callback_metrics)
        new = {n: float(v) for n, v in found.items() if v is not self._written.get(n)}
        self._written = found
        return new

    def _mean_loss(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        """The mean over the epoch's batches of all processes; nothing if there was no loss."""
        loss = torch.zeros((), device=module.device) if self._loss is None else self._loss
        sums = torch.stack([loss, torch.tensor(float(self._batches), device=loss.device)])
        # All processes come by here, also one that has had nothing to train on.
        total, count = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        return {TRAIN_LOSS: total / count} if count else {}

    def _tell(self, trainer: Trainer, epochs: int | None = None) -> None:
        """Say where the run is."""
        self._told = time.monotonic()
        if not trainer.is_global_zero:
            return
        monitor = self.selection.monitor or validation_loss(trainer.callback_metrics)
        value = trainer.callback_metrics.get(monitor or "")
        self.folder.progress = {
            "epoch": trainer.current_epoch if epochs is None else epochs,
            "epochs": trainer.max_epochs,
            "step": trainer.global_step,
            "monitor": monitor,
            "value": None if value is None else float(value),
            "process": os.getpid(),
        }

    # What goes on where a run was broken off.

    def _exchange_streams(self, trainer: Trainer, module: LightningModule) -> None:
        if self._keeps_streams and trainer.world_size > 1:
            self._streams.exchange(trainer, module, processes_of(trainer))

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._keeps_streams:
            self._streams.save(trainer, pl_module, checkpoint)

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._keeps_streams:
            self._streams.load(trainer, pl_module, checkpoint)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"curves": self._curves.state_dict(), "cost": self._cost.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._curves.load_state_dict(state_dict["curves"])
        self._cost.load_state_dict(state_dict["cost"])


def _test(
    trainer: Trainer, model: LightningModule, datamodule: Any, path: Path | None
) -> dict[str, float]:
    found = trainer.test(
        model,
        datamodule=datamodule,
        ckpt_path=path,
        weights_only=None if path is None else False,  # our own file
        verbose=False,
    )
    return {name: value for loader in found for name, value in loader.items()}


def _device(trainer: Trainer) -> str:
    if trainer.strategy.root_device.type == "cuda":
        return torch.cuda.get_device_name(trainer.strategy.root_device)
    return str(trainer.strategy.root_device)
