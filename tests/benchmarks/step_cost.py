"""What one F-step costs beyond the autograd calls that it cannot do without.

    python -m tests.benchmarks.step_cost [--pairs 15] [--threads 1] [--device cpu]

Two things are timed in turn, A B A B ..., and the ratio is taken pair by pair:

- *needed*: one trunk forward, m backward passes of single losses, m forward-backward passes of the
  trunk for the second pass, m head passes on cached features; nothing is perturbed, kept or added;
- *step*: the engine's whole step with CAGrad and TaskSAM(separate, split), up to the ``.grad`` of
  every parameter.

The C library's allocator is told to keep large blocks, or else the page faults of fresh ones, a
tenth of the time and very uneven, drown what is measured.

Memory: the peak of the step less the peak of plain training on the summed loss, and less the peak
of the needed calls (which keep the graph for m backward passes), from the profiler's record of all
allocations, in units of the d shared parameters.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_flatmtl.aggregators import CAGrad
from lightning_flatmtl.engine import ComposedPasses, MultiTaskStep, Sharpness
from tests.benchmarks.machine import describe, keep_large_blocks
from tests.benchmarks.networks import two_heads


class Setting:
    """A network, a batch, and the two things to time."""

    def __init__(self, width: int, batch: int, tasks: int, device: str, adaptive: bool) -> None:
        self.model = two_heads(width, tasks).to(device)
        self.x = torch.randn(batch, 3, 32, 32, device=device)
        self.y = [torch.randint(0, 10, (batch,), device=device) for _ in range(tasks)]
        self.trunk = list(self.model.encoder.parameters())
        self.d = sum(p.numel() for p in self.trunk)
        self.engine = MultiTaskStep()
        self.aggregator = CAGrad(0.4)
        rho = 1.0 if adaptive else 0.05
        self.sharpness = Sharpness(rho, rho, adaptive=adaptive)

    def loss(self, i: int, features: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.model.heads[i](features), self.y[i])

    def needed(self) -> None:
        tasks = range(len(self.y))
        features = self.model.encoder(self.x)
        losses = [self.loss(i, features) for i in tasks]
        for i in tasks:
            head = list(self.model.heads[i].parameters())
            torch.autograd.grad(losses[i], [*self.trunk, *head], retain_graph=i < tasks[-1])
        cached = features.detach()
        del features, losses
        for i in tasks:
            torch.autograd.grad(self.loss(i, self.model.encoder(self.x)), self.trunk)
            torch.autograd.grad(self.loss(i, cached), list(self.model.heads[i].parameters()))

    def step(self) -> None:
        self.model.zero_grad(set_to_none=True)
        passes = ComposedPasses(
            lambda x: self.model.encoder(x),
            lambda task, features, _: self.loss(int(task), features),
            {str(i): self.x for i in range(len(self.y))},
            self.model,
        )
        result = self.engine(self.model, passes, self.aggregator, self.sharpness)
        assert result is not None
        result.loss.backward()

    def plain(self) -> None:
        self.model.zero_grad(set_to_none=True)
        features = self.model.encoder(self.x)
        sum(self.loss(i, features) for i in range(len(self.y))).backward()


def seconds(function: Callable[[], None], device: str) -> float:
    start = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratios(setting: Setting, pairs: int, device: str) -> tuple[list[float], float]:
    """Step over needed, pair by pair, and the median time of the needed calls."""
    for _ in range(3):
        setting.needed()
        setting.step()
    found, needed = [], []
    for i in range(pairs):
        # The order alternates, so that a drift of the machine's speed favours neither.
        if i % 2:
            b, a = seconds(setting.step, device), seconds(setting.needed, device)
        else:
            a, b = seconds(setting.needed, device), seconds(setting.step, device)
        found.append(b / a)
        needed.append(a)
    return found, statistics.median(needed)


def peak_bytes(function: Callable[[], None], device: str) -> int:
    """Largest sum of live allocations that ``function`` makes."""
    if device != "cpu":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    totals = [e for e in events if e.get("name") == "[memory]"]
    totals.sort(key=lambda e: e["ts"])
    live = peak = 0
    for event in totals:
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    keep_large_blocks()
    torch.set_num_threads(arguments.threads)
    print(describe(arguments.threads))
    print(
        "width batch  m         d  mode      needed   ratio: min median   max"
        "   extra memory / d: over plain, over needed"
    )
    for width, batch in ((16, 64), (64, 8)):
        for adaptive in (False, True):
            memory_of = Setting(width, batch, 2, arguments.device, adaptive)
            plain = peak_bytes(memory_of.plain, arguments.device)
            bare = peak_bytes(memory_of.needed, arguments.device)
            peak = peak_bytes(memory_of.step, arguments.device)
            setting = Setting(width, batch, 2, arguments.device, adaptive)
            found, needed = ratios(setting, arguments.pairs, arguments.device)
            print(
                f"{width:5d} {batch:5d}  2 {setting.d:9d}  {'adaptive' if adaptive else 'plain':8}"
                f" {1e3 * needed:6.0f} ms         {min(found):.3f}  {statistics.median(found):.3f}"
                f" {max(found):.3f}   {(peak - plain) / 4 / setting.d:5.2f}"
                f" {(peak - bare) / 4 / setting.d:12.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
