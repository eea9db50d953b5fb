"""Transfer learning: an encoder trained on seven digits, for three others with 20 images each.

    python examples/transfer.py               # three seeds
    python examples/transfer.py --epochs 20   # longer on the target

The images are scikit-learn's handwritten digits, each turned by 0, 90, 180 or 270 degrees. The two
tasks are to read the digit and to tell the turn. The source has the digits 0 to 6, some 1,260
images; the target the digits 7, 8 and 9, with 20 training images of each, and all others for the
test.

The first table trains the target from nothing, or on the encoder of the source: `load_encoder`
takes it out of the checkpoint and cuts its last layer, new heads come on, and Lightning's
`BackboneFinetuning` keeps it frozen, or thaws it after three epochs. With and without TaskSAM, in
the source and in the target.

Transfer may harm, too. The second table does the same with the labels of the source put on other
images. The third trains two tasks together on a very small encoder, and shows Delta_m of each task
against training it alone, as the callback `TaskDeltaM` logs it: the mean over the tasks does not
say who pays. The coin is a task of which nothing can be learned. Needs scikit-learn, about two
minutes on a CPU.
"""

import argparse
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_flatmtl import ClassificationTask, MultiTaskModule, TaskSAM, load_encoder
from lightning_flatmtl.callbacks import TaskDeltaM
from lightning_flatmtl.data import split
from lightning_flatmtl.models import ConvEncoder

SOURCE, TARGET = range(7), range(7, 10)
SHOTS = 20  # training images of every digit of the target
FEATURES, LAST = 256, "project.2"  # of the encoder without its last layer
METHODS: dict[str, Callable[[], list[pl.Callback]]] = {
    "plain sum": list,
    "TaskSAM": lambda: [TaskSAM(rho=0.5, adaptive=True)],
}


class Digits(Dataset):
    """Items (image, {"digit": ..., "turn": ..., "coin": ...}); the coin is a label of nothing."""

    def __init__(self, digits: range, seed: int, wrong: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        images, labels = load_digits(return_X_y=True)
        rows = [i for i, label in enumerate(labels) if label in digits]
        images = torch.tensor(images[rows], dtype=torch.float32).view(-1, 1, 8, 8) / 16
        turn = torch.randint(4, (len(rows),), generator=generator)
        turned = [torch.rot90(x, int(k), (1, 2)) for x, k in zip(images, turn, strict=True)]
        self.images = torch.stack(turned)
        self.labels = {"digit": torch.tensor(labels[rows]) - digits.start, "turn": turn}
        if wrong:
            order = torch.randperm(len(rows), generator=generator)
            self.labels = {task: label[order] for task, label in self.labels.items()}
        self.labels["coin"] = torch.randint(2, (len(rows),), generator=generator)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return an image and its labels."""
        return self.images[i], {task: label[i] for task, label in self.labels.items()}


def make_module(
    encoder: nn.Module, features: int, tasks: list[str], digits: range, **settings
) -> MultiTaskModule:
    """Return an encoder with a head for each task."""
    classes = {"digit": len(digits), "turn": 4, "coin": 2}
    return MultiTaskModule(
        encoder=encoder,
        tasks=[ClassificationTask(task, features, classes[task]) for task in tasks],
        optimizer=lambda params: torch.optim.Adam(params, lr=2e-3),
        **settings,
    )


def fit(module: MultiTaskModule, data: Dataset, epochs: int, callbacks: list) -> pl.Trainer:
    """Train in batches of 20 images, or of 64 where there are many."""
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    size = 20 if len(data) <= 200 else 64
    trainer.fit(module, DataLoader(data, size, shuffle=True, drop_last=True))
    return trainer


def train_source(path: Path, method: str, seed: int, epochs: int, wrong: bool) -> None:
    """Train both tasks on the digits of the source and keep the checkpoint."""
    pl.seed_everything(seed, verbose=False)
    module = make_module(ConvEncoder(features=64), 64, ["digit", "turn"], SOURCE)
    fit(module, Digits(SOURCE, seed, wrong), epochs, METHODS[method]()).save_checkpoint(path)


def train_target(
    source: Path | None, thaw: bool, method: str, seed: int, epochs: int
) -> dict[str, float]:
    """Train on a few images of the target; return the test accuracies in percent."""
    pl.seed_everything(seed, verbose=False)
    data = Digits(TARGET, seed)
    share = SHOTS * len(TARGET) / len(data)
    train, test = split(data, (share, 1 - share), stratify=data.labels["digit"], seed=seed)
    encoder, callbacks = ConvEncoder(features=64), METHODS[method]()
    if source is None:
        encoder.project[2] = nn.Identity()  # the same net
    else:
        load_encoder(source, encoder, cut=LAST)
        at = 3 if thaw else epochs
        callbacks.append(
            BackboneFinetuning(at, lambda_func=lambda _: 1.0, backbone_initial_ratio_lr=1.0)
        )
    module = make_module(encoder, FEATURES, ["digit", "turn"], TARGET)
    trainer = fit(module, train, epochs, callbacks)
    (metrics,) = trainer.test(module, DataLoader(test, 200), verbose=False)
    return {task: 100 * metrics[f"test/{task}/accuracy"] for task in ("digit", "turn")}


def train_together(tasks: list[str], baselines: dict | None, seed: int, epochs: int) -> dict:
    """Train tasks from the beginning on four features; return the test metrics."""
    pl.seed_everything(seed, verbose=False)
    train, test = split(Digits(SOURCE, seed), (0.5, 0.5), seed=seed)
    encoder = ConvEncoder(widths=(4, 4), features=4)
    module = make_module(encoder, 4, tasks, SOURCE, baselines=baselines)
    trainer = fit(module, train, epochs, [TaskDeltaM()] if baselines else [])
    (metrics,) = trainer.test(module, DataLoader(test, 200), verbose=False)
    return metrics


def line(name: str, runs: list[dict[str, float]]) -> str:
    """Mean and standard deviation over the seeds."""
    text = f"{name:<40}"
    for task in runs[0]:
        values = Tensor([run[task] for run in runs])
        text += f"{values.mean():>9.2f} ±{values.std(correction=0):>5.2f}"
    return text


def transfer(folder: Path, method: str, seeds: range, epochs: int, wrong: bool) -> None:
    """Print the rows of one method."""
    rows = [("encoder frozen", True, False), ("encoder thawed", True, True)]
    for name, load, thaw in rows if wrong else [("from nothing", False, False), *rows]:
        runs = [
            train_target(folder / f"{seed}.ckpt" if load else None, thaw, method, seed, epochs)
            for seed in seeds
        ]
        print(line(f"{name}, {method}", runs), flush=True)


def together(seeds: range, epochs: int) -> None:
    """Print Delta_m by task of pairs of tasks."""
    alone = {
        (task, seed): train_together([task], None, seed, epochs)[f"test/{task}/accuracy"]
        for task in ("digit", "turn")
        for seed in seeds
    }
    for pair in (["digit", "turn"], ["digit", "coin"], ["turn", "coin"]):
        runs = []
        for seed in seeds:
            base = {f"{task}/accuracy": alone.get((task, seed), 0.5) for task in pair}
            metrics = train_together(pair, base, seed, epochs)
            found = {task: metrics[f"test/{task}/delta_m"] for task in pair}
            runs.append({**found, "mean": metrics["test/delta_m"]})
        print(line(" and ".join(pair), runs), flush=True)


def main() -> None:
    """Train and print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--epochs", type=int, default=10, help="on the target")
    parser.add_argument("--fast", action="store_true", help="one epoch, to see that it runs")
    arguments = parser.parse_args()
    epochs, seeds = (1, 1) if arguments.fast else (arguments.epochs, arguments.seeds)
    others = 1 if arguments.fast else 40

    with tempfile.TemporaryDirectory() as folder:
        for wrong, title in ((False, "test accuracy"), (True, "source with wrong labels")):
            print(f"{title:<40}{'digit':>16}{'turn':>16}")
            for method in ("plain sum",) if wrong else METHODS:
                for seed in range(seeds):
                    path = Path(folder) / f"{seed}.ckpt"
                    train_source(path, method, seed, others, wrong)
                transfer(Path(folder), method, range(seeds), epochs, wrong)
            print()
    print(f"{'Delta_m':<40}{'first':>16}{'second':>16}{'mean':>16}")
    together(range(seeds), others)


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for advice in (
        "does not have many workers",
        "have no `val_dataloader`",
        "params to be frozen",  # BatchNorm is trained from the beginning
        "LeafSpec",
    ):
        warnings.filterwarnings("ignore", f".*{advice}.*")
    main()
