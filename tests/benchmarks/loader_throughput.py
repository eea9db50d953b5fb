"""How many batches a loader yields in the time of a step of the model that it feeds.

    python -m tests.benchmarks.loader_throughput multimnist --root data

Prints batches per second of the training loader, steps per second of the comparison's F-CAGrad
without a loader, and their ratio; the median of the rounds, which alternate. Seconds are those of
the process on a CPU, which other programs do not lengthen.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_flatmtl.cli import FlatMTLCLI

EXAMPLES = Path(__file__).parents[2] / "examples"
METHOD = [
    "--trainer.callbacks+=CAGrad",
    "--trainer.callbacks+=TaskSAM",
    "--trainer.callbacks.rho=0.05",
]
QUIET = [
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.limit_val_batches=0",
]


class Clock(pl.Callback):
    """Seconds of every training step, without the time that the loader takes."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.begun = time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.process_time() - self.begun)


def built(configs: list[str], arguments: list[str]) -> FlatMTLCLI:
    """The model and the data of configuration files, nothing run."""
    given = [f"--config={EXAMPLES / config}" for config in configs]
    return FlatMTLCLI([*given, *METHOD, *QUIET, *arguments], run=False)


def batches(data: pl.LightningDataModule) -> Iterator[Any]:
    """Training batches without end."""
    loader = data.train_dataloader()
    while True:
        yield from loader


def seconds_per_batch(take: Callable[[], Any], count: int) -> float:
    begun = time.process_time()
    for _ in range(count):
        take()
    return (time.process_time() - begun) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("benchmark", choices=["multimnist", "census_income"])
    parser.add_argument("--root", type=Path, default=Path("data"))
    parser.add_argument("--small", action="store_true", help="add small.yaml (multimnist)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    configs = [f"{arguments.benchmark}/base.yaml"]
    configs += [f"{arguments.benchmark}/small.yaml"] if arguments.small else []
    clock = Clock()
    root = arguments.root.absolute()
    os.chdir(tempfile.mkdtemp())  # Lightning writes config.yaml into the working directory
    cli = built(configs, [f"--data.root={root}", "--trainer.accelerator=cpu"])
    cli.datamodule.setup("fit")
    endless = batches(cli.datamodule)
    cli.trainer.callbacks.append(clock)
    loading, stepping = [], []
    for _ in range(arguments.rounds):
        loading.append(seconds_per_batch(lambda: next(endless), 5 * arguments.steps))
        clock.seconds.clear()
        cli.trainer.fit_loop.epoch_progress.reset()
        cli.trainer.fit_loop.max_epochs = 1
        cli.trainer.limit_train_batches = arguments.steps
        cli.trainer.fit(cli.model, cli.datamodule)
        stepping.append(median(clock.seconds))
    load, step = median(loading), median(stepping)
    threads = torch.get_num_threads()
    print(f"{arguments.benchmark}, F-CAGrad, batch {cli.datamodule.batch_size}, {threads} threads")
    print(f"loader   {1 / load:10.1f} batches a second")
    print(f"step     {1 / step:10.1f} a second")
    print(f"ratio    {step / load:10.1f}")


if __name__ == "__main__":
    main()
