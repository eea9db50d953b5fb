"""Which task looks at which: attention between four tasks on handwritten digits.

    python examples/task_attention.py --picture attention.png

The images are scikit-learn's handwritten digits. The tasks: which digit it is, whether it is even,
whether it has a loop (0, 6, 8, 9), and how much ink it has. A digit says the next two answers, but
not how much ink there is. All tasks share a trunk; each extracts features of its own and attends to
those of all (TaskAttention). Printed are the test figures of the tasks and the mean attention
weights, a row for the task that looks. Needs scikit-learn, and matplotlib for the picture; half a
minute on a CPU.
"""

import argparse
import logging
import warnings

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_flatmtl import BinaryTask, ClassificationTask, MultiTaskModule, RegressionTask
from lightning_flatmtl.aggregators import CAGrad
from lightning_flatmtl.models import MLPEncoder, TaskAttention, attention_picture

TASKS = ("digit", "even", "loop", "ink")
WIDTH = 32
TRAINING = 1200


class Digits(Dataset):
    """Items (pixels, {"digit": ..., "even": ..., "loop": ..., "ink": ...})."""

    def __init__(self, pixels: Tensor, digit: Tensor) -> None:
        ink = pixels.mean(1)
        self.pixels = pixels
        self.targets = {
            "digit": digit,
            "even": (digit % 2 == 0).float(),
            "loop": torch.isin(digit, torch.tensor([0, 6, 8, 9])).float(),
            "ink": (ink - ink.mean()) / ink.std(),
        }

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.pixels)

    def __getitem__(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return one image and its labels."""
        return self.pixels[i], {task: labels[i] for task, labels in self.targets.items()}


def make_data(seed: int) -> tuple[Digits, Digits]:
    """Images for training and for testing."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(pixels, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    return Digits(x[:TRAINING], y[:TRAINING]), Digits(x[TRAINING:], y[TRAINING:])


def make_module() -> MultiTaskModule:
    """Four tasks that attend to each other."""
    encoder = TaskAttention(
        TASKS,
        trunk=MLPEncoder(64, widths=[64]),
        extractor=lambda: MLPEncoder(64, widths=[WIDTH]),
        features=WIDTH,
    )
    tasks = [
        ClassificationTask("digit", in_features=WIDTH, num_classes=10),
        BinaryTask("even", in_features=WIDTH),
        BinaryTask("loop", in_features=WIDTH),
        RegressionTask("ink", in_features=WIDTH),
    ]
    return MultiTaskModule(encoder, tasks, lambda params: torch.optim.Adam(params, lr=0.003))


def main() -> None:
    """Train, and say who has looked at whom."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="train for a moment")
    parser.add_argument("--picture", help="a .png file to draw the weights to")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    pl.seed_everything(0)
    train, test = make_data(0)
    module = make_module()
    trainer = pl.Trainer(
        max_epochs=1 if args.fast else 25,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[CAGrad()],
    )
    trainer.fit(module, DataLoader(train, batch_size=50, shuffle=True))
    (found,) = trainer.test(module, DataLoader(test, batch_size=200), verbose=False)
    for name, value in found.items():
        if not name.endswith("loss"):
            print(f"{name:<24}{value:.3f}")
    module.eval()
    weights = module.encoder.attention_weights(test.pixels)
    print("\nlooks      at " + "".join(f"{task:>8}" for task in TASKS))
    for task, row in zip(TASKS, weights.mean((0, 1)).tolist(), strict=True):
        print(f"{task:<14}" + "".join(f"{value:>8.2f}" for value in row))
    if args.picture:
        attention_picture(weights, TASKS, args.picture)
        print(f"\nThe map is in {args.picture}.")


if __name__ == "__main__":
    main()
