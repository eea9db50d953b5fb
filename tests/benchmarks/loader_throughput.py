"""What data takes: to be read, to be loaded batch by batch beside a step of the model, and room.

    python -m tests.benchmarks.loader_throughput multimnist --root data --method F-CAGrad

Prints milliseconds of a batch of the training loader and of a step without a loader, and their
ratio, each the median of the rounds, which alternate; an epoch of both; and the process's largest
memory. Seconds are those of the process on a CPU, which other programs do not lengthen.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
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


def built(configs: list[str], method: str, arguments: list[str]) -> FlatMTLCLI:
    """The model and the data of configuration files with a method, nothing run."""
    given = [f"--config={EXAMPLES / config}" for config in configs]
    plain = method.removeprefix("F-")
    callbacks = [] if plain == "LS" else [f"--trainer.callbacks+={plain}"]
    if plain != method:
        callbacks += ["--trainer.callbacks+=TaskSAM", "--trainer.callbacks.rho=0.05"]
    return FlatMTLCLI([*given, *callbacks, *QUIET, *arguments], run=False)


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
    parser.add_argument("--method", default="F-CAGrad", help="LS, an aggregator, or F- with either")
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
    cli = built(configs, arguments.method, [f"--data.root={root}", "--trainer.accelerator=cpu"])
    begun = time.process_time()
    cli.datamodule.setup("fit")
    setup = time.process_time() - begun
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
    count = len(cli.datamodule.train_dataloader())
    threads, size = torch.get_num_threads(), cli.datamodule.batch_size
    print(f"{arguments.benchmark}, {arguments.method}, batch {size}, {threads} threads")
    print(f"setup    {setup:10.1f} s")
    print(f"loader   {1e3 * load:10.2f} ms a batch")
    print(f"step     {1e3 * step:10.2f} ms")
    print(f"ratio    {step / load:10.1f}")
    print(f"epoch    {count * (load + step):10.1f} s, {count} steps")
    print(f"memory   {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:10.2f} GiB")


if __name__ == "__main__":
    main()
