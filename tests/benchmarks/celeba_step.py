"""Time and memory of a step on CelebA's network: ResNet-18 at 64 x 64 with forty heads.

    python -m tests.benchmarks.celeba_step [--method F-CAGrad] [--batch 4] [--steps 3] [--threads 1]

The module is that of examples/celeba, the images are random. Printed are the median step without
the first one, by the clock and in time of the processor (which other processes on the machine do
not lengthen), and the peak of memory: of tensors on a GPU (where there is one), on a CPU of the
process above what it had when the fit began.
"""

import argparse
import itertools
import resource
import statistics
import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_flatmtl import ClassificationTask, MultiTaskModule, TaskSAM
from lightning_flatmtl.aggregators import CAGrad
from lightning_flatmtl.data import CelebA
from lightning_flatmtl.models import ResNetEncoder
from tests.benchmarks.machine import describe

METHODS: dict[str, Any] = {
    "LS": list,
    "CAGrad": lambda: [CAGrad(0.4)],
    "F-CAGrad": lambda: [CAGrad(0.4), TaskSAM(2.0, adaptive=True)],
}


class Clock(pl.Callback):
    """Takes the time of every step."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []
        self.before = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self._mark()

    def on_train_end(self, *_: Any) -> None:
        self._mark()

    def on_fit_start(self, *_: Any) -> None:
        self.before = _resident()

    def _mark(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append((time.perf_counter(), time.process_time()))


class Noise(Dataset[Any]):
    """Random images with random labels."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        labels = torch.randint(0, 2, (len(CelebA.ATTRIBUTES),))
        return torch.rand(3, 64, 64), dict(zip(CelebA.ATTRIBUTES, labels, strict=True))


def _resident() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=METHODS, default="F-CAGrad")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    encoder = ResNetEncoder(stem="small", grid=2)
    tasks = [
        ClassificationTask(name, encoder.out_features, 2, metric="error_rate")
        for name in CelebA.ATTRIBUTES
    ]
    module = MultiTaskModule(encoder, tasks, lambda params: torch.optim.Adam(params, lr=5e-4))
    clock = Clock()
    trainer = pl.Trainer(
        max_steps=arguments.steps,
        callbacks=[*METHODS[arguments.method](), clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(Noise(arguments.batch * arguments.steps), arguments.batch))
    pairs = list(itertools.pairwise(clock.marks))[1:]
    seconds, of_processor = (statistics.median(b[k] - a[k] for a, b in pairs) for k in (0, 1))
    peak = _resident() - clock.before
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**20
    print(
        f"{arguments.method}, batch {arguments.batch}: {seconds:.2f} s a step, "
        f"{of_processor:.2f} s of the processor, {peak:,.0f} MiB ({describe(arguments.threads)})"
    )


if __name__ == "__main__":
    main()
