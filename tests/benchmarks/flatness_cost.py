"""What the settings of TaskSAM cost, over the plain gradient method and over plain training.

    python -m tests.benchmarks.flatness_cost [--tasks 2 10 40] [--rounds 11] [--threads 1]
        [--network digits] [--csv FILE]

The network is that of examples/multidigits on 64 images of 8 x 16, or with ``--network resnet18``
one of 16 first channels on 64 images of 32 x 32; each task has a linear head of ten classes. Timed
is the engine's whole step up to the ``.grad`` of every
parameter. In a round everything is run once, in an order that changes from round to round; the
ratios are taken round by round, and their medians are printed. ``passes`` are forward passes of
the trunk and backward passes through it in one step, counted and not timed.

A setting that begins after a share s of the fit costs s + (1 - s) r of the plain method over the
whole fit, with r its ratio from then on: that is what is printed for it.
"""

import argparse
import csv
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatmtl.aggregators import CAGrad
from lightning_flatmtl.engine import ComposedPasses, MultiTaskStep, Sharpness
from lightning_flatmtl.models import ConvEncoder
from tests.benchmarks.machine import describe, keep_large_blocks
from tests.benchmarks.networks import TwoHeads, resnet18


@dataclass(frozen=True)
class Method:
    """What is timed.

    Args:
        sam: Settings of the perturbations; ``None`` for a plain method.
        start: The share of the fit before which they begin.
        linear: Whether the losses are summed up, or CAGrad aggregates.
    """

    sam: dict[str, Any] | None = field(default_factory=dict)
    start: float = 0.0
    linear: bool = False

    @property
    def cycle(self) -> int:
        """After how many steps it does the same again, as far as the time goes."""
        refresh = (self.sam or {}).get("refresh") or 1
        return max(1, round(1 / refresh))


METHODS = {
    "LS": Method(None, linear=True),
    "F-LS": Method(linear=True),
    "F-LS (common)": Method({"perturbation": "common"}, linear=True),
    "F-LS (refresh 1)": Method({"refresh": 1}, linear=True),
    "F-LS (last half)": Method(start=0.5, linear=True),
    "CAGrad": Method(None),
    "F-CAGrad": Method(),
    "F-CAGrad (common)": Method({"perturbation": "common"}),
    "F-CAGrad (refresh 1)": Method({"refresh": 1}),
    "F-CAGrad (refresh 0.5)": Method({"refresh": 0.5}),
    "F-CAGrad (refresh 0.25)": Method({"refresh": 0.25}),
    "F-CAGrad (refresh 0.5, rho 1.5)": Method({"refresh": 0.5}),
    "F-LS (common, rho 1.5)": Method({"perturbation": "common"}, linear=True),
    "F-CAGrad (common, refresh 1)": Method({"perturbation": "common", "refresh": 1}),
    "F-CAGrad (last third)": Method(start=0.667),
    "F-CAGrad (last half)": Method(start=0.5),
    "F-CAGrad (refresh 1, last two thirds)": Method({"refresh": 1}, start=0.333),
    "F-CAGrad (refresh 1, last half)": Method({"refresh": 1}, start=0.5),
    "F-CAGrad (samo)": Method({"perturbation": "samo"}),
    "SAMO-CAGrad": Method({"perturbation": "samo", "aggregate": "direct", "point": "joint"}),
    "F-CAGrad (bfloat16 rows)": Method({"rows": "bfloat16"}),
}
PLAIN = "CAGrad"


class Setting:
    """A network and a batch, and the engine of one method on them."""

    def __init__(self, method: Method, tasks: int, device: str, network: str) -> None:
        torch.manual_seed(0)
        if network == "resnet18":
            self.model = TwoHeads(resnet18(16), 128, tasks).to(device)
            self.x = torch.rand(64, 3, 32, 32, device=device)
        else:
            self.model = TwoHeads(ConvEncoder(features=64), 64, tasks).to(device)
            self.x = torch.rand(64, 1, 8, 16, device=device)
        self.y = [torch.randint(0, 10, (64,), device=device) for _ in range(tasks)]
        self.engine = MultiTaskStep()
        self.aggregation = None if method.linear else CAGrad(0.4)
        sam = method.sam
        self.sharpness = None if sam is None else Sharpness(1.0, 1.0, adaptive=True, **sam)

    def loss(self, task: str, features: Tensor, _: Any) -> Tensor:
        return nn.functional.cross_entropy(self.model.heads[int(task)](features), self.y[int(task)])

    def step(self) -> None:
        self.model.zero_grad(set_to_none=True)
        batches = {str(i): self.x for i in range(len(self.y))}
        passes = ComposedPasses(lambda x: self.model.encoder(x), self.loss, batches, self.model)
        result = self.engine(self.model, passes, self.aggregation, self.sharpness)
        assert result is not None
        assert result.loss is not None
        result.loss.backward()

    def passes(self, steps: int) -> tuple[float, float]:
        """Forward and backward passes of the trunk in a step, the mean of several."""
        forward, backward = 0, 0

        def count(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            nonlocal forward
            forward += 1
            if output.requires_grad:
                output.register_hook(count_back)

        def count_back(gradient: Tensor) -> None:
            nonlocal backward
            backward += 1

        hook = self.model.encoder.register_forward_hook(count)
        for _ in range(steps):
            self.step()
        hook.remove()
        return forward / steps, backward / steps


def timed(function: Callable[[], None], steps: int, device: str) -> float:
    """Seconds of one of so many steps."""
    start = time.perf_counter()
    for _ in range(steps):
        function()
    if device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def measured(tasks: int, rounds: int, device: str, network: str) -> list[dict[str, Any]]:
    settings = {name: Setting(method, tasks, device, network) for name, method in METHODS.items()}
    for setting in settings.values():
        setting.step()
        setting.step()
    order = list(settings)
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    shuffler = random.Random(0)
    for _ in range(rounds):
        shuffler.shuffle(order)
        for name in order:
            steps = max(2, METHODS[name].cycle)
            seconds[name].append(timed(settings[name].step, steps, device))
    rows = []
    for name, method in METHODS.items():
        row: dict[str, Any] = {"tasks": tasks, "method": name}
        row["ms"] = 1e3 * statistics.median(seconds[name])
        for other, column in ((PLAIN, "over plain"), ("LS", "over training")):
            ratio = statistics.median(
                a / b for a, b in zip(seconds[name], seconds[other], strict=True)
            )
            before = statistics.median(
                a / b
                for a, b in zip(
                    seconds["LS" if method.linear else PLAIN], seconds[other], strict=True
                )
            )
            row[column] = method.start * before + (1 - method.start) * ratio
        row["forward"], row["backward"] = settings[name].passes(method.cycle)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 10, 40])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--network", default="digits", choices=["digits", "resnet18"])
    parser.add_argument("--csv", type=Path, help="write the rows here, too")
    arguments = parser.parse_args()
    keep_large_blocks()
    torch.set_num_threads(arguments.threads)
    print(describe(arguments.threads))
    rows = []
    for tasks in arguments.tasks:
        print(f"{tasks:3d} tasks: of a step   ms   over CAGrad   over LS   passes (F, B)")
        for row in measured(tasks, arguments.rounds, arguments.device, arguments.network):
            rows.append(row)
            print(
                f"{row['method']:38} {row['ms']:7.1f} {row['over plain']:8.2f} "
                f"{row['over training']:10.2f} {row['forward']:6g}, {row['backward']:g}",
                flush=True,
            )
    if arguments.csv is not None:
        arguments.csv.parent.mkdir(parents=True, exist_ok=True)
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            for row in rows:
                writer.writerow(
                    {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
                )


if __name__ == "__main__":
    main()
