"""Both digits or no answer: joint predictions, and accuracy against coverage.

    python examples/joint_prediction.py             # three seeds
    python examples/joint_prediction.py --seeds 1

An image has two overlapping handwritten digits, and both are to be read. `JointPrediction`
multiplies the tasks' probabilities: how sure is the net of both at once? Below a threshold it
abstains. The table shows which share of the test images is answered (coverage) and which share of
these answers is right in both digits, for CAGrad with and without TaskSAM, with 30 % of the
training labels wrong. The area under the risk is the mean error over all coverages. Needs
scikit-learn, about two minutes on a CPU.
"""

import argparse
import logging
import warnings
from collections.abc import Callable

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_flatmtl import ClassificationTask, JointPrediction, MultiTaskModule, TaskSAM
from lightning_flatmtl.aggregators import CAGrad
from lightning_flatmtl.data import MultiDigits
from lightning_flatmtl.functional import area_under_risk, risk_coverage
from lightning_flatmtl.models import ConvEncoder

THRESHOLDS = (0.0, 0.25, 0.5, 0.7, 0.8)
TASKS = ("left", "right")
METHODS: dict[str, Callable[[], list[pl.Callback]]] = {
    "CAGrad": lambda: [CAGrad(c=0.4)],
    "F-CAGrad": lambda: [CAGrad(c=0.4), TaskSAM(rho=1.0, adaptive=True)],
}


def train_and_predict(method: str, seed: int, epochs: int) -> tuple[list, dict[str, Tensor]]:
    """Return the logits of the test images, batch by batch, and their labels."""
    pl.seed_everything(seed, verbose=False)
    data = MultiDigits(train_pairs=3000, label_noise=0.3, batch_size=64, seed=seed)
    module = MultiTaskModule(
        encoder=ConvEncoder(features=64),
        tasks=[ClassificationTask(task, 64, 10) for task in TASKS],
        optimizer=lambda params: torch.optim.Adam(params, lr=1e-3),
    )
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=METHODS[method](),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, data)
    test = data.dataset("test")
    return trainer.predict(module, DataLoader(test, 200)), test.targets


def measure(method: str, seed: int, epochs: int) -> dict[str, float]:
    """Return coverage and accuracy for every threshold, and the area under the risk."""
    predictions, targets = train_and_predict(method, seed, epochs)
    found = {}
    for threshold in THRESHOLDS:
        joint = JointPrediction(threshold)(predictions)
        correct, answered = joint.correct(targets), ~joint.abstained
        found[f"coverage {threshold}"] = 100 * joint.coverage
        found[f"accuracy {threshold}"] = 100 * float(correct[answered].double().mean())
    curve = risk_coverage(joint.log_probability, correct)
    return found | {"area": 100 * area_under_risk(curve)}


def main() -> None:
    """Train every method with every seed, print means and standard deviations."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--fast", action="store_true", help="one epoch, to see that it runs")
    arguments = parser.parse_args()
    epochs, seeds = (1, 1) if arguments.fast else (arguments.epochs, arguments.seeds)

    for method in METHODS:
        runs = [measure(method, seed, epochs) for seed in range(seeds)]

        def shown(name: str, runs: list[dict[str, float]] = runs) -> str:
            values = Tensor([run[name] for run in runs])
            return f"{values.nanmean():>10.2f} ±{values.std(correction=0):>5.2f}"

        print(f"{method:<22}{'coverage':>17}{'accuracy':>17}")
        for threshold in THRESHOLDS:
            coverage, accuracy = shown(f"coverage {threshold}"), shown(f"accuracy {threshold}")
            print(f"{f'threshold {threshold}':<22}{coverage}{accuracy}")
        print(f"{'area under the risk':<22}{'':>17}{shown('area')}\n", flush=True)


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for advice in ("does not have many workers", "LeafSpec"):
        warnings.filterwarnings("ignore", f".*{advice}.*")
    main()
