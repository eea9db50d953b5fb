"""A project that exists: an ordinary LightningModule, its data and callbacks, and its files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError
from torchmetrics.classification import BinaryAccuracy

from lightning_flatmtl.cli import main
from lightning_flatmtl.comparison.folder import RunFolder
from lightning_flatmtl.comparison.launchers.base import Launcher, Process


class Net(pl.LightningModule):
    """Two tasks, `size` and `sign`, with names of logs of its own."""

    def __init__(self, width: int = 8, lr: float = 0.05) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Tanh())
        self.drop = nn.Dropout(0.2)
        self.heads = nn.ModuleDict({task: nn.Linear(width, 1) for task in ("size", "sign")})
        self.mse, self.accuracy = MeanSquaredError(), BinaryAccuracy()
        self.lr = lr

    def _losses(self, batch: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        x, size, sign = batch
        features = self.drop(self.trunk(x))
        outputs = {task: head(features).squeeze(1) for task, head in self.heads.items()}
        losses = {
            "size": nn.functional.mse_loss(outputs["size"], size),
            "sign": nn.functional.binary_cross_entropy_with_logits(outputs["sign"], sign),
        }
        return outputs, losses

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        _, losses = self._losses(batch)
        total = torch.stack(list(losses.values())).sum()
        self.log("train_loss", total)
        return {"loss": total, "losses": losses}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        _, losses = self._losses(batch)
        self.log("val/loss", torch.stack(list(losses.values())).sum())
        for task, loss in losses.items():
            self.log(f"val/{task}/loss", loss)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        outputs, losses = self._losses(batch)
        self.mse(outputs["size"], batch[1])
        self.accuracy(outputs["sign"].sigmoid(), batch[2].int())
        self.log("test_size_error", self.mse)
        self.log("test/sign/hits", self.accuracy)
        self.log("test/loss", torch.stack(list(losses.values())).sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Data(pl.LightningDataModule):
    """Points of a plane; `seed` is that of the data, `path` a file that must be there."""

    def __init__(self, seed: int = 0, size: int = 64, path: str | None = None) -> None:
        super().__init__()
        self.seed, self.size, self.path = seed, size, path

    def setup(self, stage: str) -> None:
        if self.path is not None:
            Path(self.path).read_text()
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.size, 4, generator=generator)
        size = x.square().sum(1).sqrt()
        self.set = TensorDataset(x, size, (x.sum(1) > 0).float())

    def train_dataloader(self) -> Any:
        return DataLoader(self.set, batch_size=16, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.set, batch_size=32)

    test_dataloader = val_dataloader


class Raises(pl.Callback):
    """Fails in the epoch that it is told."""

    def __init__(self, epoch: int = 0, error: str = "ValueError") -> None:
        self.epoch, self.error = epoch, error

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            kinds = {"ValueError": ValueError("a fault"), "OSError": OSError(28, "No space left")}
            raise kinds[self.error]


class Slow(pl.Callback):
    """Takes its time over every batch."""

    def __init__(self, seconds: float = 0.05) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, *_: Any) -> None:
        import time

        time.sleep(self.seconds)


class FullDisk(pl.Callback):
    """Lets files of this process grow to a bound, as a full disk would."""

    def __init__(self, kib: int) -> None:
        self.kib = kib

    def on_fit_start(self, *_: Any) -> None:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.kib * 1024, self.kib * 1024))


BASE = {
    "trainer": {
        "max_epochs": 3,
        "accelerator": "cpu",
        "logger": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    },
    "model": {"class_path": "tests.comparison.project.Net"},
    "data": {"class_path": "tests.comparison.project.Data"},
}
SAM = {"class_path": "TaskSAM", "init_args": {"rho": 0.1}}
COMPARISON = {
    "config": "base.yaml",
    "methods": {"LS": [], "CAGrad": ["CAGrad"], "F-CAGrad": ["CAGrad", SAM]},
    "single_task": True,
    "tasks": ["size", "sign"],
    "seeds": [3, 4],
    "seed_keys": ["seed_everything", "data.seed"],
    "select": {"monitor": "val/loss", "mode": "min"},
    "output": "out",
    "resources": {"cpu": 1},
}


def write(folder: Path, base: Mapping[str, Any] = BASE, **changes: Any) -> Path:
    """The files of a comparison; returns that of `flatmtl compare`."""
    (folder / "base.yaml").write_text(yaml.safe_dump(dict(base)))
    path = folder / "compare.yaml"
    content = {**COMPARISON, "output": str(folder / "out"), **changes}
    path.write_text(
        yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False)
    )
    return path


SEARCH = {
    "config": "base.yaml",
    "methods": {"LS": [], "F-LS": [SAM]},
    "seeds": [3],
    "metric": "val/loss",
    "search": {
        "model.lr": {"low": 0.01, "high": 0.1, "log": True},
        "TaskSAM.rho": {"low": 0, "high": 1},
    },
    "trials": 2,
    "resources": {"cpu": 1},
}


def write_search(folder: Path, base: Mapping[str, Any] = BASE, **changes: Any) -> Path:
    """The files of a search; returns that of `flatmtl tune`."""
    (folder / "base.yaml").write_text(yaml.safe_dump(dict(base)))
    path = folder / "tune.yaml"
    content = {**SEARCH, "output": str(folder / "out"), **changes}
    path.write_text(
        yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False)
    )
    return path


class _Ended(Process):
    def __init__(self, code: int) -> None:
        self.code = code

    def status(self) -> int | None:
        return self.code

    def stop(self) -> None:
        return None


class InProcess(Launcher):
    """Runs in this process: a second less for each."""

    def __init__(self) -> None:
        self.started: list[str] = []

    def has_room(self, running: int) -> bool:
        return running < 1

    def start(self, folder: RunFolder) -> Process:
        self.started.append(folder.path.name)
        try:
            main(["fit", f"--config={folder.config}"])
        except SystemExit as stopped:
            return _Ended(int(stopped.code or 0))
        except Exception as error:
            folder.log.write_text(f"{type(error).__name__}: {error}\n")
            return _Ended(1)
        return _Ended(0)

    def close(self) -> None:
        return None
