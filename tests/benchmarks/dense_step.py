"""Time and memory of a SegNet-MTAN step at the resolution of NYUv2, on synthetic tensors.

    python -m tests.benchmarks.dense_step [--rounds 3] [--batch 1] [--height 288] [--width 384]
        [--threads 1] [--device cpu] [--compile]

Steps of LS (the plain sum), CAGrad and F-CAGrad (separate point): forward passes, losses, the
engine, ``.grad`` and Adam. Data loading, metrics and logs are not part of them. First each method
takes two steps in a process of its own, which tells its memory; then, ``--rounds`` times, all take
one in turn, A B C C B A ..., and ratios are taken round by round. On the CPU times are those of the
processor, so that a busy machine counts for little. On a GPU, ``--compile`` compiles the SegNet and
the attention of every task too (default mode).

Memory, on the CPU: what is resident at its peak and before the first step. On a GPU: the peak of
what PyTorch has allocated.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from lightning_flatmtl.aggregators import CAGrad
from lightning_flatmtl.engine import ComposedPasses, MultiTaskStep, Sharpness
from lightning_flatmtl.models import MTAN
from lightning_flatmtl.task import DepthTask, NormalsTask, SegmentationTask
from tests.benchmarks.machine import describe, keep_large_blocks

METHODS: dict[str, tuple[Any, Any]] = {
    "LS": (None, None),
    "CAGrad": (CAGrad, None),
    "F-CAGrad": (CAGrad, Sharpness(2.0, 2.0, adaptive=True)),
}


class Net(torch.nn.Module):
    """MTAN and its heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tasks = {
            "segmentation": SegmentationTask("segmentation", 13, in_channels=64),
            "depth": DepthTask("depth", in_channels=64),
            "normals": NormalsTask("normals", in_channels=64),
        }
        self.encoder = MTAN(list(self.tasks))
        self.heads = torch.nn.ModuleDict({name: task.head for name, task in self.tasks.items()})


class Setting:
    """A network, a batch, and a step of a method."""

    def __init__(self, given: argparse.Namespace) -> None:
        device, size = given.device, (given.height, given.width)
        self.net = Net().to(device)
        if given.compile:
            self.net.encoder.segnet.maps = torch.compile(self.net.encoder.segnet.maps)
            self.net.encoder.features = torch.compile(self.net.encoder.features)
        n = given.batch
        self.images = torch.rand(n, 3, *size, device=device)
        self.targets = {
            "segmentation": torch.randint(-1, 13, (n, *size), device=device),
            "depth": 10 * torch.rand(n, 1, *size, device=device),
            "normals": torch.randn(n, 3, *size, device=device),
        }
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-4)
        self.engines = {name: MultiTaskStep() for name in METHODS}

    def loss(self, task: str, features: Any, _: Any) -> torch.Tensor:
        prediction = self.net.heads[task](features[task])
        return self.net.tasks[task].loss(prediction, self.targets[task])

    def step(self, method: str) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        aggregator, sharpness = METHODS[method]
        tasks = list(self.net.tasks)
        if aggregator is None:
            features = self.net.encoder(self.images)
            sum(self.loss(task, features, None) for task in tasks).backward()
        else:
            passes = ComposedPasses(
                self.net.encoder,
                self.loss,
                dict.fromkeys(tasks, self.images),
                self.net,
                several=True,
            )
            result = self.engines[method](self.net, passes, aggregator(0.4), sharpness)
            assert result is not None
            result.loss.backward()
        self.optimizer.step()


def seconds(setting: Setting, method: str, device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    setting.step(method)
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def resident() -> float:
    """Largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def alone(given: argparse.Namespace, method: str, send: Callable[[Any], None]) -> None:
    """In a process of its own: two steps, the second of which has the optimizer's state."""
    torch.set_num_threads(given.threads)
    setting = Setting(given)
    before = resident()
    if given.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    seconds(setting, method, given.device)
    found = seconds(setting, method, given.device)
    cuda = torch.cuda.max_memory_allocated() / 2**20 if given.device != "cpu" else 0.0
    send((before, resident(), cuda, found))


def of_process(given: argparse.Namespace, method: str) -> tuple[float, float, float, float]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=alone, args=(given, method, theirs.send))
    process.start()
    found: tuple[float, float, float, float] = ours.recv()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--height", type=int, default=288)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    keep_large_blocks()
    torch.set_num_threads(given.threads)
    print(describe(given.threads))
    print(f"batch {given.batch}, {given.height} x {given.width}, {given.device}")
    for method in METHODS:
        before, peak, cuda, second = of_process(given, method)
        of_gpu = f", GPU {cuda:6.0f} MiB" if cuda else ""
        print(
            f"{method:9} resident {before:6.0f} -> {peak:6.0f} MiB{of_gpu}, second step"
            f" {second:7.2f} s",
            flush=True,
        )
    if given.rounds == 0:
        return
    setting = Setting(given)
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    for method in METHODS:
        setting.step(method)  # the first step is slower
    for i in range(given.rounds):
        for method in list(METHODS)[:: -1 if i % 2 else 1]:
            times[method].append(seconds(setting, method, given.device))
    for method, found in times.items():
        ratios = [a / b for a, b in zip(found, times["LS"], strict=True)]
        print(
            f"{method:9} {statistics.median(found):8.3f} s a step, over LS:"
            f" {min(ratios):.2f} {statistics.median(ratios):.2f} {max(ratios):.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
