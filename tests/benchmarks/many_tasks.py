"""What a step costs with a hundred and more tasks in an existing project.

    python -m tests.benchmarks.many_tasks [--tasks 200] [--steps 4] [--threads 1]

An ordinary LightningModule (fingerprints of 1,024 bits, two layers, a head of one layer per task,
half of the labels missing) is taken over by the callbacks. Printed per method: the median step
without the first two, in which memory is touched for the first time; the calls of ``training_step``
in a step; and the peak of the process's memory above what it had when the fit began.
"""

import argparse
import os
import resource
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_flatmtl import TaskSAM
from lightning_flatmtl.aggregators import CAGrad, LinearScalarization
from tests.benchmarks.machine import describe, keep_large_blocks

METHODS: dict[str, Callable[[], list[pl.Callback]]] = {
    "plain": list,
    "LinearScalarization": lambda: [LinearScalarization()],
    "CAGrad": lambda: [CAGrad(0.4)],
    "F-CAGrad, joint": lambda: [CAGrad(0.4), TaskSAM(0.05, point="joint")],
    "F-CAGrad, rho_heads=0": lambda: [CAGrad(0.4), TaskSAM(0.05, rho_heads=0.0)],
    "F-CAGrad": lambda: [CAGrad(0.4), TaskSAM(0.05)],
    "CAGrad, 10 groups": lambda: [CAGrad(0.4)],
    "F-CAGrad, 10 groups": lambda: [CAGrad(0.4), TaskSAM(0.05)],
}


CALLS: Counter[str] = Counter()
"""Calls of ``training_step``."""


class Assays(pl.LightningModule):
    """Many labels of molecules, most of them not known."""

    def __init__(self, tasks: int, groups: int | None) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU()
        )
        self.heads = nn.ModuleList(nn.Linear(512, 1) for _ in range(tasks))
        self.groups = groups or tasks

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        CALLS.update(["step"])  # a number of the module would be put back after the second pass
        x, y = batch
        features = self.encoder(x)
        losses: dict[str, Tensor] = {}
        for i, head in enumerate(self.heads):
            known = ~torch.isnan(y[:, i])
            loss = nn.functional.binary_cross_entropy_with_logits(
                head(features[known])[:, 0], y[known, i]
            )
            group = f"group {i % self.groups}"
            losses[group] = losses[group] + loss if group in losses else loss
        return {"loss": torch.stack(list(losses.values())).sum(), "losses": losses}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Clock(pl.Callback):
    """Times every step, and counts the calls in it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        CALLS.clear()
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        self.calls = CALLS["step"]


def peak() -> float:
    """The most memory that the process has had, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def measure(name: str, tasks: int, steps: int) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 1024), (torch.rand(64, tasks) > 0.5).float()
    y[torch.rand(64, tasks) > 0.5] = float("nan")
    clock = Clock()
    trainer = pl.Trainer(
        max_steps=steps + 2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*METHODS[name](), clock],
    )
    before = peak()
    module = Assays(tasks, 10 if "groups" in name else None)
    trainer.fit(module, DataLoader([(x, y)] * (steps + 2), batch_size=None))
    seconds = statistics.median(clock.seconds[2:])
    print(f"{name:24}{seconds:9.3f} s{clock.calls:8d}{peak() - before:10.2f} GB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    arguments = parser.parse_args()
    keep_large_blocks()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    pl.utilities.rank_zero.rank_zero_module.log.setLevel("ERROR")
    print(describe(arguments.threads))
    print(f"{arguments.tasks} tasks           a step of    calls       memory")
    for name in arguments.methods:
        child = os.fork()  # every method has a peak of its own
        if child == 0:
            measure(name, arguments.tasks, arguments.steps)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
