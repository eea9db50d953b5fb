"""A data set for each task, of very different size: one encoder, two heads, a CombinedLoader.

    python examples/two_datasets.py                          # all three modes
    python examples/two_datasets.py --modes max_size_cycle   # one of them

Of 100 handwritten digits it is known which they are. Of 1,100 others somebody noted no more than
whether they are odd or even. Lightning's CombinedLoader yields batches
`{"digit": (images, digits), "odd": (images, odd)}`, and the encoder runs once for each task. Its
mode says what happens when the small data set ends, after 4 of 35 batches:

- max_size_cycle: it starts again; every step trains both tasks
- max_size: the rest of the epoch trains odd or even alone
- min_size: the epoch ends; over the epochs every step trains both tasks

All runs take the same number of steps. The first line of the table is a net that is trained on the
small data set alone. Needs scikit-learn, about fifteen seconds on a CPU.
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

from lightning_flatmtl import ClassificationTask, MultiTaskModule, TaskSAM
from lightning_flatmtl.aggregators import CAGrad
from lightning_flatmtl.models import ConvEncoder

MODES = ("max_size_cycle", "max_size", "min_size")
CLASSES = {"digit": 10, "odd": 2}
BATCH_SIZE = 32
SIZES = [100, 1100, 597]  # images for the digit, for odd or even, for the test


class CountBatches(pl.Callback):
    """Counts in how many training batches each task was."""

    def __init__(self) -> None:
        self.batches = dict.fromkeys(CLASSES, 0)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        """Look at which tasks a batch has."""
        for task in CLASSES:
            self.batches[task] += batch.get(task) is not None


def make_data(seed: int) -> tuple[dict[str, TensorDataset], dict[str, TensorDataset]]:
    """For training and for the test, a data set for each task."""
    digits, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(digits, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16
    labels = torch.tensor(labels)[order]
    small, large, rest = zip(images.split(SIZES), labels.split(SIZES), strict=True)
    train = {"digit": TensorDataset(*small), "odd": TensorDataset(large[0], large[1] % 2)}
    test = {"digit": TensorDataset(*rest), "odd": TensorDataset(rest[0], rest[1] % 2)}
    return train, test


def combined(data: dict[str, TensorDataset], mode: str, train: bool) -> CombinedLoader:
    """One loader of batches `{task: (images, targets)}`."""
    loaders = {
        task: DataLoader(part, BATCH_SIZE if train else 100, shuffle=train)
        for task, part in data.items()
    }
    return CombinedLoader(loaders, mode=mode)


def train_and_test(
    tasks: list[str], mode: str, steps: int, seed: int
) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Return how many batches each task had, and the test metrics."""
    pl.seed_everything(seed, verbose=False)
    train, test = ({task: part[task] for task in tasks} for part in make_data(seed))
    module = MultiTaskModule(
        encoder=ConvEncoder(features=64),
        tasks=[ClassificationTask(task, 64, CLASSES[task]) for task in tasks],
        optimizer=lambda params: torch.optim.Adam(params, lr=1e-3),
    )
    count = CountBatches()
    trainer = pl.Trainer(
        max_epochs=-1,
        max_steps=steps,
        accelerator="cpu",
        callbacks=[CAGrad(c=0.4), TaskSAM(rho=0.5, adaptive=True), count],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, combined(train, mode, train=True))
    # For the test each image counts once, whatever the mode of the training.
    (metrics,) = trainer.test(module, combined(test, "max_size", train=False), verbose=False)
    return count.batches, metrics


def main() -> None:
    """Train with every mode, and without the large data set,, print the test table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="six steps, to see that it runs")
    arguments = parser.parse_args()
    steps = 6 if arguments.fast else arguments.steps

    runs = {"the digits alone": (["digit"], "max_size_cycle")}
    runs |= {mode: (list(CLASSES), mode) for mode in arguments.modes}
    print(f"{'':<23}{'batches of':<16}{'test accuracy':>21}")
    print(f"{f'{steps} steps':<23}{'digit':>6}{'odd':>7}{'digit':>14}{'odd':>12}")
    for name, (tasks, mode) in runs.items():
        batches, metrics = train_and_test(tasks, mode, steps, arguments.seed)
        line = f"{name:<23}{batches['digit']:>6}{batches['odd']:>7}"
        for task in CLASSES:
            value = metrics.get(f"test/{task}/accuracy")
            line += f"{'-':>12}" if value is None else f"{100 * value:>12.2f} %"
        print(line, flush=True)


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for advice in ("does not have many workers", "have no `val_dataloader`"):
        warnings.filterwarnings("ignore", f".*{advice}.*")
    main()
