"""What data-parallel training sends and how long its steps take, with real gloo processes.

    python -m tests.benchmarks.processes [--processes 2 3] [--tasks 2 3 8] [--pairs 7]
    python -m tests.benchmarks.processes --paper [--node 8] [--within 450] [--between 50]
                                                 [--latency 5] [--hidden 1.0]

Compared on the same ResNet-18 trunk with linear heads, on the same batches:

- *sum*: plain DistributedDataParallel on the sum of the losses;
- *obvious*: a reference of some thirty lines, written here. All rows of the task Jacobian are
  all-reduced after the last backward pass, with TaskSAM a second time after the second pass; the
  direction goes through DistributedDataParallel like every gradient. It checks nothing;
- *ours*: the engine, with a method on the Gram matrix (CAGrad) or on the columns (GradDrop), or one
  that sees the whole matrix; with TaskSAM along the gradient of all processes (global) or of each
  process's own batch (local).

*Sent*: in one step that is not timed every collective is caught, that of DistributedDataParallel by
a communication hook, and its payload turned into what one process sends in a ring of R:
2 n (R-1)/R for an all-reduce of n bytes, n (R-1)/R for a reduce-scatter or an all-gather. Shown in
units of d (R-1)/R floats, beside what the model says. Buffers are not synchronised here, which is
the same for all. That obvious and ours compute the same gradients is checked in float64.

*Time*: steps in turn, A B C ... C B A, each as long as its slowest process takes; one thread each.
With more processes than cores, and gloo's copies on the same cores, the times say what a step costs
on this machine and little about GPUs.

``--paper`` prints the same model for many GPUs, with no measurement in it, see :func:`paper`.
"""

import argparse
import copy
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_flatmtl.aggregators import Aggregator, CAGrad, GradDrop
from lightning_flatmtl.engine import (
    ComposedPasses,
    MultiTaskStep,
    Sharpness,
    TaskGradients,
    surrogate_loss,
)
from lightning_flatmtl.engine.processes.distributed import DataParallel
from tests.benchmarks.machine import describe, keep_large_blocks
from tests.benchmarks.networks import TwoHeads, two_heads

RHO = 0.05


class MeanOfMatrix(Aggregator):
    """The mean of the rows, by one that requires the whole matrix (the default)."""

    def aggregate(self, gradients: TaskGradients) -> Tensor:
        return gradients.jacobian.mean(dim=0)


@dataclass(frozen=True)
class Case:
    """One way to train; what it sends in floats (R-1)/R, by tasks m, trunk d and heads h."""

    name: str
    make: Callable[[TwoHeads, list[Tensor]], nn.Module]
    model: Callable[[int, float, float], float]


def cases() -> list[Case]:
    found = [
        Case("sum", Sum, lambda m, d, h: 2 * (d + h)),
        Case("obvious", Obvious, lambda m, d, h: 2 * m * d + 2 * (d + h)),
        Case("ours", _ours(lambda: CAGrad(0.4)), lambda m, d, h: m * d + 2 * (d + h)),
        Case("ours, columns", _ours(GradDrop), lambda m, d, h: m * d + 2 * (d + h)),
        Case("ours, matrix", _ours(MeanOfMatrix), lambda m, d, h: 2 * m * d + 2 * (d + h)),
    ]
    along, own = Sharpness(RHO, RHO), Sharpness(RHO, RHO, perturbation="local")
    nested = Sharpness(RHO, RHO, aggregate="each")
    return [
        *found,
        Case(
            "obvious, SAM",
            lambda net, y: Obvious(net, y, sam=True),
            lambda m, d, h: 4 * m * d + 2 * h + 2 * (d + h),
        ),
        Case(
            "ours, SAM global",
            _ours(lambda: CAGrad(0.4), along),
            lambda m, d, h: 3 * m * d + 2 * h + 2 * (d + h),
        ),
        Case(
            "ours, SAM nested",
            _ours(lambda: CAGrad(0.4), nested),
            lambda m, d, h: 3 * m * d + 2 * h + 2 * (d + h),
        ),
        Case(
            "ours, SAM local",
            _ours(lambda: CAGrad(0.4), own),
            lambda m, d, h: 2 * m * d + 2 * (d + h),
        ),
        Case(
            "ours, SAM global, matrix",
            _ours(MeanOfMatrix, along),
            lambda m, d, h: 5 * m * d + 2 * h + 2 * (d + h),
        ),
    ]


class Training(nn.Module):
    """Its ``forward`` maps a batch to the loss that DistributedDataParallel differentiates."""

    def __init__(self, net: TwoHeads, y: list[Tensor]) -> None:
        super().__init__()
        self.net, self.y = net, y

    def loss(self, i: int, features: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.net.heads[i](features), self.y[i])


class Sum(Training):
    def forward(self, x: Tensor) -> Tensor:
        features = self.net.encoder(x)
        return torch.stack([self.loss(i, features) for i in range(len(self.y))]).sum()


class Ours(Training):
    def __init__(
        self, net: TwoHeads, y: list[Tensor], aggregator: Aggregator, sharpness: Sharpness | None
    ) -> None:
        super().__init__(net, y)
        self.engine = MultiTaskStep(processes=DataParallel())
        self.aggregator, self.sharpness = aggregator, sharpness

    def forward(self, x: Tensor) -> Tensor:
        passes = ComposedPasses(
            self.net.encoder,
            lambda task, features, _: self.loss(int(task), features),
            {str(i): x for i in range(len(self.y))},
            self.net,
        )
        result = self.engine(self.net, passes, self.aggregator, self.sharpness)
        assert result is not None
        return result.loss


def _ours(
    aggregator: Callable[[], Aggregator], sharpness: Sharpness | None = None
) -> Callable[[TwoHeads, list[Tensor]], nn.Module]:
    return lambda net, y: Ours(net, y, aggregator(), sharpness)


class Obvious(Training):
    """Rows are all-reduced, one after the other, when all of them are there."""

    def __init__(self, net: TwoHeads, y: list[Tensor], sam: bool = False) -> None:
        super().__init__(net, y)
        self.sam = sam
        self.aggregator = CAGrad(0.4)
        self.trunk = list(net.encoder.parameters())
        self.heads = [list(head.parameters()) for head in net.heads]

    def forward(self, x: Tensor) -> Tensor:
        tasks = range(len(self.y))
        features = self.net.encoder(x)
        losses = [self.loss(i, features) for i in tasks]
        rows, heads = [], []
        for i in tasks:
            params = [*self.trunk, *self.heads[i]]
            grads = torch.autograd.grad(losses[i], params, retain_graph=i < tasks[-1])
            rows.append(_flat(grads[: len(self.trunk)]))
            heads.append(_flat(grads[len(self.trunk) :]))
        clean = _mean_over_processes(torch.stack(rows))
        direction = self.aggregator(clean)
        if self.sam:
            heads = list(_mean_over_processes(torch.cat(heads)[None])[0].split(heads[0].numel()))
            cached = features.detach()
            second = []
            for i in tasks:
                with _moved(self.heads[i], heads[i]):
                    grads = torch.autograd.grad(self.loss(i, cached), self.heads[i])
                heads[i] = _flat(grads)
                with _moved(self.trunk, clean[i]):
                    grads = torch.autograd.grad(self.loss(i, self.net.encoder(x)), self.trunk)
                second.append(_flat(grads))
            flat = _mean_over_processes(torch.stack(second)) - clean
            direction = direction + self.aggregator(flat, part="flat")
        params = [*self.trunk, *(p for head in self.heads for p in head)]
        gradient = torch.cat([direction, *heads])
        pieces = gradient.split([p.numel() for p in params])
        views = [piece.view_as(p) for piece, p in zip(pieces, params, strict=True)]
        return surrogate_loss(torch.stack(losses).sum().detach(), params, views)


def _flat(gradients: Any) -> Tensor:
    return torch.cat([g.flatten() for g in gradients])


def _mean_over_processes(rows: Tensor) -> Tensor:
    for row in rows:
        dist.all_reduce(row)
    return rows.div_(dist.get_world_size())


@contextmanager
def _moved(params: list[nn.Parameter], gradient: Tensor) -> Iterator[None]:
    saved = [p.detach().clone() for p in params]
    with torch.no_grad():
        step = gradient * (RHO / gradient.norm())
        for p, move in zip(params, step.split([p.numel() for p in params]), strict=True):
            p.add_(move.view_as(p))
    try:
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(params, saved, strict=True):
                p.copy_(old)


# Counting.

RING = {"all_reduce": 2, "reduce_scatter_tensor": 1, "all_gather_into_tensor": 1}
"""What a process sends in a ring, times (R-1)/R, for each byte of the payload."""


class Traffic:
    """Bytes by kind that this process sends, times R/(R-1), while it counts."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.counting = False

    def note(self, kind: str, tensor: Tensor) -> None:
        if self.counting:
            self.bytes[kind] += RING[kind] * tensor.numel() * tensor.element_size()

    def hook(self, _: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Does what DistributedDataParallel does by itself, and notes it."""
        buffer = bucket.buffer()
        self.note("all_reduce", buffer)
        with torch.no_grad():
            work = self._all_reduce(buffer.div_(dist.get_world_size()), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Catch the collectives that are called by name."""
        originals = {kind: getattr(dist, kind) for kind in RING}
        self._all_reduce = originals["all_reduce"]
        for kind, original in originals.items():

            def watched(*args: Any, kind: str = kind, call: Any = original, **kwargs: Any) -> Any:
                whole = args[1] if kind == "reduce_scatter_tensor" else args[0]
                self.note(kind, whole)
                return call(*args, **kwargs)

            setattr(dist, kind, watched)
        try:
            yield
        finally:
            for kind, original in originals.items():
                setattr(dist, kind, original)


# What a process does.


def work(rank: int, size: int, m: int, folder: str, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    results = torch.zeros(len(cases()), 4 + arguments.pairs)
    torch.manual_seed(rank + 1)
    x = torch.randn(arguments.batch, 3, 32, 32)
    y = [torch.randint(0, 10, (arguments.batch,)) for _ in range(m)]
    net = two_heads(arguments.width, m)
    traffic = Traffic()
    with traffic.watching():
        for i, case in enumerate(cases()):
            training = case.make(copy.deepcopy(net), y)
            ddp = DistributedDataParallel(training, broadcast_buffers=False)
            ddp.register_comm_hook(None, traffic.hook)
            for turn in range(3):
                traffic.counting = turn == 2
                step(ddp, x)
            for j, kind in enumerate(RING):
                results[i, j] = float(traffic.bytes[kind])
            traffic.bytes.clear()
            del ddp, training
    for a, b in (("obvious", "ours"), ("obvious, SAM", "ours, SAM global")):
        results[_index(b), 3] = difference(a, b, copy.deepcopy(net).double(), x.double(), y)
    models = [
        DistributedDataParallel(case.make(copy.deepcopy(net), y), broadcast_buffers=False)
        for case in (cases() if arguments.pairs else ())
    ]
    for turn in range(arguments.pairs + 1):
        order = range(len(models))
        for i in order if turn % 2 else reversed(order):
            dist.barrier()
            start = time.perf_counter()
            step(models[i], x)
            seconds = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
            if turn:
                results[i, 3 + turn] = seconds
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.barrier()
    dist.destroy_process_group()


def difference(a: str, b: str, net: TwoHeads, x: Tensor, y: list[Tensor]) -> float:
    """Relative difference of the gradients of two cases, in float64 (round-off is out of sight)."""
    gradients = []
    for name in (a, b):
        training = cases()[_index(name)].make(copy.deepcopy(net), y)
        step(DistributedDataParallel(training, broadcast_buffers=False), x)
        gradients.append(_flat([p.grad for p in training.parameters()]))
    return float((gradients[0] - gradients[1]).norm() / gradients[0].norm())


def _index(name: str) -> int:
    return [case.name for case in cases()].index(name)


def step(ddp: nn.Module, x: Tensor) -> None:
    ddp.zero_grad(set_to_none=True)
    ddp(x).backward()


# What is printed.


def measure(size: int, m: int, arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(size, m, folder, arguments), nprocs=size)
        results = torch.load(Path(folder) / "results.pt")
    net = two_heads(arguments.width, m)
    d = sum(p.numel() for p in net.encoder.parameters())
    h = sum(p.numel() for p in net.heads.parameters())
    print(f"\nR = {size}, m = {m}, d = {d}, heads {h}")
    print(
        "                            sent / (d (R-1)/R floats)                    MiB a"
        "    ms a    over    over    gradient, less"
    )
    print(
        "                          reduce  scatter  gather    sum   model         step"
        "    step     sum obvious    that of obvious"
    )
    for case, row in zip(cases(), results, strict=True):
        units = row[:3] / 4 / d
        sent = float(row[:3].sum()) * (size - 1) / size / 2**20
        line = (
            f"{case.name:24} {units[0]:7.3f} {units[1]:8.3f} {units[2]:7.3f} {units.sum():7.3f}"
            f" {case.model(m, d, h) / d:7.3f} {sent:12.1f}"
        )
        if arguments.pairs:
            other = "obvious, SAM" if "SAM" in case.name else "obvious"
            line += f" {1e3 * row[4:].median():7.0f}"
            for base in ("sum", other):
                ratio = (row[4:] / results[_index(base)][4:]).median()
                line += f" {ratio:7.2f}"
        if row[3]:
            line += f"   {row[3]:.0e}"
        print(line, flush=True)


def paper(
    node: int, within: float, between: float, latency: float, hidden: float, size: int = 4
) -> None:
    """Print times of the traffic alone for many GPUs; nothing is measured.

    A collective of n bytes among N GPUs takes ``k n (N-1)/N / bandwidth + k (N-1) latency`` with
    k = 2 for an all-reduce and 1 for the others, the bandwidth that of the slowest link of the
    ring: within a node for N <= node, else between nodes. That is a flat ring; NCCL's trees have
    less latency. What can hide behind computation, on the assumption that the backward pass of a
    task takes at least as long as the transfer of a row:

    - sum: all but the last bucket of 25 MB;
    - obvious: nothing, its rows are sent after the last backward pass, and the last all-reduce
      follows a backward pass of no work;
    - ours: all rows but the last of a pass, all rows brought back but the first. The last
      all-reduce hides behind nothing either, and neither do whole matrices.

    Args:
        node: GPUs of a node.
        within: GB/s of a GPU within a node.
        between: GB/s of a GPU between nodes.
        latency: Microseconds of one hop.
        hidden: The share of what can hide that does, in [0, 1].
        size: Bytes of a number.
    """
    print(
        f"{node} GPUs a node, {within:g} GB/s within, {between:g} GB/s between, {latency:g} us a "
        f"hop, {hidden:.0%} of what can hide hides, {size} bytes a number.\n"
        "Milliseconds of a step: "
        "traffic (of it in the way of computation)."
    )
    print(
        "    N  m      d |              sum          obvious             ours |"
        "     obvious, SAM ours, SAM global  ours, SAM local"
    )
    for processes in (8, 64, 512):
        for m in (3, 10):
            for d in (25e6, 1e9):
                bandwidth = (within if processes <= node else between) * 1e9

                def one(
                    n: float, k: int = 1, processes: int = processes, bandwidth: float = bandwidth
                ) -> float:
                    volume = k * n * size * (processes - 1) / processes
                    return 1e3 * (volume / bandwidth + k * (processes - 1) * latency * 1e-6)

                row, whole = one(d), one(d, 2)
                bucket = one(min(d, 25e6 / size), 2)
                columns = [
                    (whole, whole - bucket),
                    (m * whole + whole, 0.0),
                    (m * row + whole, (m - 1) * row),
                    (2 * m * whole + whole, 0.0),
                    (3 * m * row + whole, 3 * (m - 1) * row),
                    (2 * m * row + whole, 2 * (m - 1) * row),
                ]
                cells = [f"{t:8.1f} ({t - hidden * hides:6.1f})" for t, hides in columns]
                line = f"{processes:5d} {m:2d} {d / 1e6:5.0f}M | "
                print(line + " ".join(cells[:3]) + " | " + " ".join(cells[3:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 3, 8])
    parser.add_argument("--pairs", type=int, default=7, help="0 counts only")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--paper", action="store_true")
    parser.add_argument("--node", type=int, default=8)
    parser.add_argument("--within", type=float, default=450.0)
    parser.add_argument("--between", type=float, default=50.0)
    parser.add_argument("--latency", type=float, default=5.0)
    parser.add_argument("--hidden", type=float, default=1.0)
    arguments = parser.parse_args()
    if arguments.paper:
        a = arguments
        paper(a.node, a.within, a.between, a.latency, a.hidden)
        return
    keep_large_blocks()
    print(describe(1) + ", gloo")
    for size in arguments.processes:
        for m in arguments.tasks:
            measure(size, m, arguments)


if __name__ == "__main__":
    main()
