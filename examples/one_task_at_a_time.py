"""Loaders that bring one task at a time: accumulated, they train as if the tasks came together.

    python examples/one_task_at_a_time.py            # three seeds each
    python examples/one_task_at_a_time.py --seeds 1

Many projects draw a batch of one task, then one of the next. An aggregator has nothing to weigh in
such a batch. With `accumulate_grad_batches=2` the gradients of both are kept, and aggregated once:
one update, as of a batch that has both. The tasks are to read a handwritten digit and to tell by
how much it is turned; each image has the label of one of the two.

The table compares this with a CombinedLoader, whose batches have a part for each task. Both see the
same number of samples of each task in every update. Needs scikit-learn, about half a minute on a
CPU.
"""

import argparse
import logging
import warnings

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_flatmtl import ClassificationTask, MultiTaskModule
from lightning_flatmtl.aggregators import CAGrad
from lightning_flatmtl.data import TaskLoader
from lightning_flatmtl.models import ConvEncoder

CLASSES = {"digit": 10, "turn": 4}
BATCH_SIZE = 32
SIZES = [650, 650, 497]  # images for the digit, for the turn, for the test


def make_data(seed: int) -> tuple[dict[str, TensorDataset], dict[str, TensorDataset]]:
    """For training and for the test, a data set for each task."""
    generator = torch.Generator().manual_seed(seed)
    digits, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=generator)
    images = torch.tensor(digits, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16
    turns = torch.randint(4, (len(images),), generator=generator)
    images = torch.stack(
        [torch.rot90(x, int(k), (1, 2)) for x, k in zip(images, turns, strict=True)]
    )
    parts = zip(
        *(t.split(SIZES) for t in (images, torch.tensor(labels)[order], turns)), strict=True
    )
    (x, digit, _), (y, _, turn), (z, *rest) = parts
    train = {"digit": TensorDataset(x, digit), "turn": TensorDataset(y, turn)}
    test = {task: TensorDataset(z, of) for task, of in zip(CLASSES, rest, strict=True)}
    return train, test


def train_and_test(one_at_a_time: bool, epochs: int, seed: int) -> dict[str, float]:
    """Return the test accuracy of each task, in percent."""
    pl.seed_everything(seed, verbose=False)
    train, test = make_data(seed)
    loaders = {t: DataLoader(part, BATCH_SIZE, shuffle=True) for t, part in train.items()}
    module = MultiTaskModule(
        encoder=ConvEncoder(features=64),
        tasks=[ClassificationTask(task, 64, classes) for task, classes in CLASSES.items()],
        optimizer=lambda params: torch.optim.Adam(params, lr=1e-3),
        accumulate_grad_batches=2 if one_at_a_time else 1,
    )
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[CAGrad(c=0.4)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    in_turn = TaskLoader(loaders, order="round_robin", seed=seed)
    trainer.fit(module, in_turn if one_at_a_time else CombinedLoader(loaders))
    whole = CombinedLoader({task: DataLoader(part, 100) for task, part in test.items()})
    (metrics,) = trainer.test(module, whole, verbose=False)
    return {task: 100 * metrics[f"test/{task}/accuracy"] for task in CLASSES}


def main() -> None:
    """Train both ways with every seed, print mean and standard deviation over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--fast", action="store_true", help="one epoch, to see that it runs")
    arguments = parser.parse_args()
    epochs, seeds = (1, 2) if arguments.fast else (arguments.epochs, arguments.seeds)

    print(f"{'test accuracy':<22}" + "".join(f"{task:>16}" for task in CLASSES))
    for name, one_at_a_time in (("both in every batch", False), ("one at a time", True)):
        runs = [train_and_test(one_at_a_time, epochs, seed) for seed in range(seeds)]
        line = f"{name:<22}"
        for task in CLASSES:
            found = Tensor([run[task] for run in runs])
            line += f"{found.mean():>9.2f} ±{found.std(correction=0):>5.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for advice in ("does not have many workers", "have no `val_dataloader`"):
        warnings.filterwarnings("ignore", f".*{advice}.*")
    main()
