"""An ordinary Lightning project, trained with CAGrad and TaskSAM by adding two callbacks.

    python examples/existing_project.py           # with the two callbacks: F-CAGrad
    python examples/existing_project.py --plain   # without: plain Lightning

The module derives from LightningModule and knows nothing of lightning_flatmtl. Automatic
optimization, OneCycleLR, gradient clipping, accumulation, checkpoints and logs stay what they were.
The changes to the project are the lines marked with "<--": two imports, two callbacks, and one more
entry in what `training_step` returns.

The data are scikit-learn's 8 x 8 handwritten digits, each turned by 0, 90, 180 or 270 degrees. The
tasks are to read the digit, for which the turn does not matter, and to tell the turn. One run is
one seed: look at several before you believe a difference. TaskSAM learns more slowly; with
`--epochs 15` plain training is not behind. Needs scikit-learn, about fifteen seconds on a CPU.
"""

import argparse
import logging
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_flatmtl import TaskSAM  # <--
from lightning_flatmtl.aggregators import CAGrad  # <--

METHOD = [CAGrad(c=0.4), TaskSAM(rho=1.0, adaptive=True)]  # <--

CLASSES = {"digit": 10, "turn": 4}


class TurnedDigits(pl.LightningDataModule):
    """Digits, each turned once by a multiple of 90 degrees: 1,000 / 300 / 497 images."""

    def __init__(self, batch_size: int = 32, seed: int = 0) -> None:
        super().__init__()
        self.batch_size, self.seed = batch_size, seed

    def setup(self, stage: str | None = None) -> None:
        """Turn and split, the same way for the same seed."""
        generator = torch.Generator().manual_seed(self.seed)
        digits, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(digits), generator=generator)
        images = torch.tensor(digits, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16
        turns = torch.randint(4, (len(images),), generator=generator)
        turned = [torch.rot90(x, int(k), (1, 2)) for x, k in zip(images, turns, strict=True)]
        data = torch.stack(turned), torch.tensor(labels)[order], turns
        parts = zip(*(tensor.split([1000, 300, 497]) for tensor in data), strict=True)
        self.train, self.val, self.test = (TensorDataset(*part) for part in parts)

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of (image, digit, turn)."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """For the choice of the checkpoint."""
        return DataLoader(self.val, batch_size=100)

    def test_dataloader(self) -> DataLoader:
        """For the table."""
        return DataLoader(self.test, batch_size=100)


class Net(pl.LightningModule):
    """An encoder and two heads."""

    def __init__(self, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(),
            nn.Dropout(0.2), nn.Linear(32 * 16, 64), nn.ReLU(),
        )  # fmt: skip
        self.heads = nn.ModuleDict({task: nn.Linear(64, n) for task, n in CLASSES.items()})
        self.accuracy = nn.ModuleDict(
            {
                f"{stage}_{task}": MulticlassAccuracy(n, average="micro")
                for stage in ("train", "val", "test")
                for task, n in CLASSES.items()
            }
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits of every task."""
        features = self.encoder(images)
        return {task: head(features) for task, head in self.heads.items()}

    def step(self, batch: tuple[Tensor, Tensor, Tensor], stage: str) -> dict[str, Tensor]:
        """The losses by task; logs them and the accuracies."""
        images, digit, turn = batch
        targets = {"digit": digit, "turn": turn}
        losses = {}
        for task, logits in self(images).items():
            losses[task] = cross_entropy(logits, targets[task])
            accuracy = self.accuracy[f"{stage}_{task}"]
            accuracy(logits, targets[task])
            self.log(f"{stage}/{task}/accuracy", accuracy, on_step=False, on_epoch=True)
        self.log(f"{stage}/loss", sum(losses.values()), on_step=False, on_epoch=True)
        return losses

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> dict:
        """The total, as before, and the losses by task."""
        losses = self.step(batch, "train")
        return {"loss": sum(losses.values()), "losses": losses}  # <-- "losses" is new

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracies."""
        self.step(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracies."""
        self.step(batch, "test")

    def configure_optimizers(self) -> dict:
        """AdamW, one cycle over the whole training."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.hparams.lr, total_steps=self.trainer.estimated_stepping_batches
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def main() -> None:
    """Train, then test the checkpoint with the smallest validation loss."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plain", action="store_true", help="train without the two callbacks")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="for logs and checkpoints")
    parser.add_argument("--fast", action="store_true", help="two epochs, to see that it runs")
    arguments = parser.parse_args()
    name = "plain" if arguments.plain else " + ".join(type(c).__name__ for c in METHOD)

    pl.seed_everything(arguments.seed, verbose=False)
    checkpoint = ModelCheckpoint(
        monitor="val/loss", filename="best-{epoch}", auto_insert_metric_name=False
    )
    trainer = pl.Trainer(
        max_epochs=2 if arguments.fast else arguments.epochs,
        accelerator="cpu",
        callbacks=[
            checkpoint,
            LearningRateMonitor(),
            *([] if arguments.plain else METHOD),  # <--
        ],
        logger=CSVLogger(arguments.out, name="existing_project"),
        gradient_clip_val=1.0,
        accumulate_grad_batches=2,
        log_every_n_steps=10,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module, data = Net(), TurnedDigits(seed=arguments.seed)
    trainer.fit(module, data)
    (test,) = trainer.test(module, data, ckpt_path="best", verbose=False)

    print(f"method: {name}")
    print(f"optimizer steps: {trainer.global_step}")
    print(f"checkpoint: {checkpoint.best_model_path}")
    print(f"\n{'test':<8}{'value':>10}")
    for task in CLASSES:
        print(f"{task:<8}{100 * test[f'test/{task}/accuracy']:>8.2f} %")
    print(f"{'loss':<8}{test['test/loss']:>10.4f}")


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    main()
