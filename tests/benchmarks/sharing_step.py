"""What a training step takes with each way to share, on Census-Income.

    python -m tests.benchmarks.sharing_step --root data

Prints a table: milliseconds of a step, the median over rounds that go through all rows in turn, and
how far the rounds are apart. Seconds are those of the process on a CPU, which other programs do
not lengthen.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import lightning.pytorch as pl
import torch
import yaml

from lightning_flatmtl.cli import FlatMTLCLI
from lightning_flatmtl.comparison.plan import Run
from tests.benchmarks.loader_throughput import EXAMPLES, QUIET, Clock
from tests.configs.two_steps import rows

FILE = EXAMPLES / "census_income" / "compare_sharing.yaml"
METHODS = ("LS", "CAGrad", "F-LS", "F-CAGrad")
OF_COMMAND = {"ckpt_path", "weights_only"}


def trained(run: Run, data: pl.LightningDataModule, steps: int) -> float:
    """Milliseconds of a step, the median."""
    Path("run.yaml").write_text(
        yaml.safe_dump({k: v for k, v in run.config.items() if k not in OF_COMMAND})
    )
    cli = FlatMTLCLI(["--config=run.yaml", *QUIET], run=False)
    clock = Clock()
    cli.trainer.callbacks.append(clock)
    cli.trainer.fit_loop.max_epochs = 1
    cli.trainer.limit_train_batches = steps
    cli.trainer.fit(cli.model, data)
    return 1e3 * median(clock.seconds[3:])


def shown(times: Sequence[float] | None) -> str:
    if not times:
        return ""
    return f"{median(times):.0f} ({min(times):.0f} to {max(times):.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("data"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    root = arguments.root.absolute()
    os.chdir(tempfile.mkdtemp())
    runs = rows(FILE, f"--data.root={root}", "--trainer.accelerator=cpu")
    runs = {name: run for name, run in runs.items() if not run.task}
    first = next(iter(runs.values()))
    Path("run.yaml").write_text(
        yaml.safe_dump({k: v for k, v in first.config.items() if k not in OF_COMMAND})
    )
    data = FlatMTLCLI(["--config=run.yaml", *QUIET], run=False).datamodule
    data.setup("fit")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            times[name].append(trained(run, data, arguments.steps))
    ways = dict.fromkeys(name.split(" ", 1)[1] for name in runs)
    print(f"Batches of {data.batch_size}, {torch.get_num_threads()} thread(s).\n")
    print("| | " + " | ".join(f"{method} [ms]" for method in METHODS) + " |")
    print("|---|" + "---:|" * len(METHODS))
    for way in ways:
        cells = [shown(times.get(f"{method} {way}")) for method in METHODS]
        print(f"| {way} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
