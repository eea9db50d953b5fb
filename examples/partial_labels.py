"""Most images have the label of one task only: train on all of them together.

    python examples/partial_labels.py

The images are scikit-learn's handwritten digits, each turned by an angle between -45 and 45
degrees. The tasks are to read the digit (classification) and to tell the angle (regression). Of
the 1,000 training images only one in ten has both labels; the others have the one or the other, as
if two people had worked through different parts of the pile. The label that is not there is -1 for
the digit and NaN for the angle:

    Task("digit", ..., missing=-1)
    Task("angle", ..., missing=float("nan"))

A task's loss and metrics then see the images with its label only; a batch with none for a task
trains the other task alone. The table compares this with training on the images that have both
labels, and with a net of its own for each task on all labels of that task. All take the same
number of steps. Needs scikit-learn, about ten seconds on a CPU.
"""

import argparse
import logging
import math
import warnings

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanAbsoluteError
from torchmetrics.classification import MulticlassAccuracy

from lightning_flatmtl import MultiTaskModule, Task, TaskSAM
from lightning_flatmtl.aggregators import CAGrad
from lightning_flatmtl.models import ConvEncoder

NO_DIGIT, NO_ANGLE = -1, float("nan")
DEGREES = 45  # the angles of the data are in units of this
BATCH_SIZE = 50


class Images(Dataset):
    """Items (image, {"digit": label, "angle": label})."""

    def __init__(self, images: Tensor, digit: Tensor, angle: Tensor) -> None:
        self.images, self.digit, self.angle = images, digit, angle

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return one image and its labels."""
        return self.images[i], {"digit": self.digit[i], "angle": self.angle[i]}

    def subset(self, rows: Tensor) -> "Images":
        """Return the images of the given rows."""
        return Images(self.images[rows], self.digit[rows], self.angle[rows])


def make_data(seed: int) -> tuple[Images, Images]:
    """1,000 training images of which most lack a label, and 797 test images with both."""
    generator = torch.Generator().manual_seed(seed)
    digits, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=generator)
    images = torch.tensor(digits, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16
    angle = 2 * torch.rand(len(images), generator=generator) - 1
    data = Images(turn(images, angle), torch.tensor(labels)[order], angle[:, None])
    train, test = data.subset(torch.arange(1000)), data.subset(torch.arange(1000, len(data)))
    train.digit[550:] = NO_DIGIT  # rows 0 to 99 keep both,
    train.angle[100:550] = NO_ANGLE  # the next 450 the digit, the last 450 the angle
    return train, test


def turn(images: Tensor, angle: Tensor) -> Tensor:
    """Turn every image by its angle, in units of 45 degrees, about its centre."""
    cos, sin = torch.cos(angle * math.pi / 4), torch.sin(angle * math.pi / 4)
    zero = torch.zeros_like(angle)
    matrix = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
    grid = affine_grid(matrix, list(images.shape), align_corners=False)
    return grid_sample(images, grid, align_corners=False)


def make_task(name: str) -> Task:
    """Return one of the two tasks; `missing` says how a label looks that is not there."""
    if name == "digit":
        return Task(
            "digit",
            head=nn.Linear(64, 10),
            loss=nn.CrossEntropyLoss(),
            metrics={"accuracy": MulticlassAccuracy(10, average="micro")},
            missing=NO_DIGIT,
        )
    return Task(
        "angle",
        head=nn.Linear(64, 1),
        loss=nn.MSELoss(),
        metrics={"mae": MeanAbsoluteError()},
        missing=NO_ANGLE,
    )


def train_and_test(tasks: list[str], train: Images, test: Images, steps: int, seed: int) -> dict:
    """Return the test metrics after so many steps on `train`."""
    pl.seed_everything(seed, verbose=False)
    module = MultiTaskModule(
        encoder=ConvEncoder(features=64),
        tasks=[make_task(name) for name in tasks],
        optimizer=lambda params: torch.optim.Adam(params, lr=2e-3),
        lr_scheduler=lambda optimizer: CosineAnnealingLR(optimizer, T_max=steps),
        lr_scheduler_config={"interval": "step"},
    )
    trainer = pl.Trainer(
        max_epochs=-1,
        max_steps=steps,
        accelerator="cpu",
        callbacks=[CAGrad(c=0.4), TaskSAM(rho=0.5, adaptive=True)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(train, BATCH_SIZE, shuffle=True))
    (metrics,) = trainer.test(module, DataLoader(test, batch_size=100), verbose=False)
    return metrics


def counts(digit: Tensor, angle: Tensor) -> str:
    """Say how many labels there are."""
    has_digit, has_angle = digit != NO_DIGIT, ~angle.isnan().flatten()
    both = int((has_digit & has_angle).sum())
    return f"{int(has_digit.sum()):>5}{int(has_angle.sum()):>7}{both:>6}"


def main() -> None:
    """Count the labels, train three ways, print the test table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=12, help="passes over all training images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="one epoch, to see that it runs")
    arguments = parser.parse_args()
    seed = arguments.seed
    train, test = make_data(seed)
    steps = (1 if arguments.fast else arguments.epochs) * math.ceil(len(train) / BATCH_SIZE)

    pl.seed_everything(seed, verbose=False)
    print("labels                  digit  angle  both")
    print(f"{len(train)} training images  {counts(train.digit, train.angle)}")
    batches = iter(DataLoader(train, BATCH_SIZE, shuffle=True))
    for number in range(3):
        _, targets = next(batches)
        print(f"a batch of {BATCH_SIZE}  ({number + 1})      {counts(**targets)}")

    has_both = (train.digit != NO_DIGIT) & ~train.angle.isnan().flatten()
    both = train_and_test(["digit", "angle"], train.subset(has_both), test, steps, seed)
    alone = {
        **train_and_test(["digit"], train, test, steps, seed),
        **train_and_test(["angle"], train, test, steps, seed),
    }
    every = train_and_test(["digit", "angle"], train, test, steps, seed)

    print(f"\n{f'test, after {steps} steps':<42}{'digit accuracy':>15}{'angle error':>15}")
    for name, metrics in (
        ("one net, images with both labels", both),
        ("a net for each task, all its labels", alone),
        ("one net, all labels", every),
    ):
        accuracy = 100 * metrics["test/digit/accuracy"]
        print(f"{name:<42}{accuracy:>13.2f} %{DEGREES * metrics['test/angle/mae']:>9.2f} deg.")


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for advice in ("does not have many workers", "have no `val_dataloader`"):
        warnings.filterwarnings("ignore", f".*{advice}.*")
    main()
