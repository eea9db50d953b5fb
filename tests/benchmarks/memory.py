"""What the task gradients of a step cost in memory and in time, ours and TorchJD's.

    python -m tests.benchmarks.memory [--networks mlp lenet transformer resnet18] [--tasks 2 10 40]
        [--rounds 3] [--threads 1] [--limit 4] [--fits resnet18] [--flat]

Every setting runs a whole step, from the batch to the ``.grad`` of every parameter, with
Aligned-MTL, which looks at the Gram matrix only. Printed for each network and number of tasks:

- the peak of a step less that of plain training on the summed loss, from the profiler's record of
  all allocations, in units of the d shared parameters (of 4 bytes each);
- the median time of a step, of the processor, which other programs do not disturb much, and its
  ratio to plain training; the settings take turns.

``--fits`` adds the largest number of tasks whose step stays below ``--limit`` GiB: the line through
two peaks is prolonged, and the peak at the number so found is measured if it is below 1000.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_flatmtl.aggregators import AlignedMTL
from lightning_flatmtl.engine import ComposedPasses, MultiTaskStep, Sharpness
from lightning_flatmtl.models import LeNetEncoder
from tests.benchmarks.machine import describe, keep_large_blocks
from tests.benchmarks.networks import TwoHeads, resnet18
from tests.benchmarks.step_cost import peak_bytes

GIB = 2**30


def mlp() -> tuple[nn.Module, Tensor]:
    layers = (nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU())
    return nn.Sequential(*layers), torch.randn(64, 1024)


def transformer() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
    return nn.Sequential(encoder, nn.Flatten()), torch.randn(4, 16, 256)


def small_images() -> tuple[nn.Module, Tensor]:
    trunk = resnet18(64)
    for layer in trunk.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = False  # TorchJD's hooks on modules ask for it
    return trunk, torch.randn(4, 3, 32, 32)


def lenet() -> tuple[nn.Module, Tensor]:
    return LeNetEncoder(), torch.randn(64, 1, 36, 36)


NETWORKS = {"mlp": mlp, "lenet": lenet, "transformer": transformer, "resnet18": small_images}


class Network:
    """A network with ``tasks`` linear heads, and a batch."""

    def __init__(self, name: str, tasks: int) -> None:
        torch.manual_seed(0)
        encoder, self.x = NETWORKS[name]()
        features = encoder(self.x[:2]).shape[1]
        self.model = TwoHeads(encoder, features, tasks)
        self.trunk = list(encoder.parameters())
        self.d = sum(p.numel() for p in self.trunk)
        self.y = torch.randint(0, 10, (len(self.x),))
        self.tasks = tasks

    def loss(self, i: int, features: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.model.heads[i](features), self.y)

    def forward(self) -> tuple[Tensor, list[Tensor]]:
        self.model.zero_grad(set_to_none=True)
        features = self.model.encoder(self.x)
        return features, [self.loss(i, features) for i in range(self.tasks)]


Step = Callable[[], object]


def plain(net: Network) -> Step:
    return lambda: torch.stack(net.forward()[1]).sum().backward()


def ours(
    gradients: str, sharpness: Sharpness | None = None, linear: bool = False
) -> Callable[[Network], Step]:
    def make(net: Network) -> Step:
        engine, aggregator = MultiTaskStep(), None if linear else AlignedMTL()

        def step() -> None:
            net.model.zero_grad(set_to_none=True)
            passes = ComposedPasses(
                lambda x: net.model.encoder(x),
                lambda task, features, _: net.loss(int(task), features),
                {str(i): net.x for i in range(net.tasks)},
                net.model,
                at_features=gradients == "features",
            )
            passes.without_matrix = gradients == "gram"
            result = engine(net.model, passes, aggregator, sharpness)
            assert result is not None
            assert result.loss is not None
            result.loss.backward()

        return step

    return make


def autojac(chunk: int | None) -> Callable[[Network], Step]:
    """TorchJD's matrix, differentiated task by task or all tasks at once."""

    def make(net: Network) -> Step:
        from torchjd.aggregation import AlignedMTL as TheirAlignedMTL
        from torchjd.autojac import jac_to_grad, mtl_backward

        def step() -> None:
            features, losses = net.forward()
            mtl_backward(losses, features=[features], parallel_chunk_size=chunk)
            jac_to_grad(net.trunk, TheirAlignedMTL())

        return step

    return make


def autogram(net: Network) -> Step:
    """TorchJD's Gram without a matrix; its heads get the weights, too."""
    from torchjd.aggregation import AlignedMTLWeighting
    from torchjd.autogram import Engine

    engine, weighting = Engine(net.model.encoder, batch_dim=None), AlignedMTLWeighting()

    def step() -> None:
        losses = torch.stack(net.forward()[1])
        losses.backward(weighting(engine.compute_gramian(losses)))

    return step


SETTINGS: dict[str, Callable[[Network], Step]] = {
    "plain training": plain,
    "gradients='parameters'": ours("parameters"),
    "gradients='gram'": ours("gram"),
    "gradients='features'": ours("features"),
    "TorchJD jac, task by task": autojac(1),
    "TorchJD jac, at once": autojac(None),
    "TorchJD autogram": autogram,
}
"""What is measured; the first is what the others are compared with."""

FLAT: dict[str, Callable[[Network], Step]] = {
    "plain training": plain,
    "TaskSAM()": ours("parameters", Sharpness()),
    "rows='bfloat16'": ours("parameters", Sharpness(rows="bfloat16")),
    "refresh=1": ours("parameters", Sharpness(refresh=1)),
    "sum, TaskSAM()": ours("parameters", Sharpness(), linear=True),
    "sum, common": ours("parameters", Sharpness(perturbation="common"), linear=True),
}
"""The same with the second pass, and with the sum of the losses."""


def seconds(step: Step) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def peak(name: str, setting: str, tasks: int) -> tuple[int, int]:
    """The peak of a first step in bytes, and the number of shared parameters."""
    net = Network(name, tasks)
    step = (SETTINGS | FLAT)[setting](net)
    return peak_bytes(step, "cpu"), net.d  # type: ignore[arg-type]


def table(name: str, tasks: int, rounds: int, settings: list[str]) -> None:
    base, d = peak(name, settings[0], tasks)
    extra = {s: (peak(name, s, tasks)[0] - base) / 4 / d for s in settings}
    steps = {s: (SETTINGS | FLAT)[s](Network(name, tasks)) for s in settings}
    times: dict[str, list[float]] = {s: [] for s in settings}
    for i in range(rounds + 1):
        for s, step in steps.items():
            took = seconds(step)
            if i:  # memory is touched for the first time in the first
                times[s].append(took)
    print(f"\n{name}, {tasks} tasks, d = {d:,}; plain training's peak {base / 4 / d:.2f} d")
    for s in settings:
        ratio = statistics.median(a / b for a, b in zip(times[s], times[settings[0]], strict=True))
        print(
            f"  {s:28}{extra[s]:8.2f} d{1e3 * statistics.median(times[s]):10.0f} ms{ratio:8.2f} x",
            flush=True,
        )


def fits(name: str, limit: float, settings: list[str]) -> None:
    print(f"\n{name}: the largest number of tasks below {limit:g} GiB")
    for s in settings:
        few, many = peak(name, s, 10)[0], peak(name, s, 20)[0]
        found = 10 + int((limit * GIB - few) * 10 / (many - few))
        print(f"  {s:28}{found:8d} tasks", end="", flush=True)
        if found < 1000:
            print(f", peak {peak(name, s, found)[0] / GIB:.2f} GiB", end="", flush=True)
        print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--tasks", nargs="*", type=int, default=[2, 10, 40])
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--flat", action="store_true", help="the settings of TaskSAM instead")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=float, default=4.0)
    parser.add_argument("--fits", nargs="*", default=[])
    arguments = parser.parse_args()
    if arguments.flat:
        arguments.settings = list(FLAT)
    keep_large_blocks()
    torch.set_num_threads(arguments.threads)
    print(describe(arguments.threads))
    for name in arguments.networks:
        for tasks in arguments.tasks:
            table(name, tasks, arguments.rounds, arguments.settings)
    for name in arguments.fits:
        fits(name, arguments.limit, arguments.settings[1:])


if __name__ == "__main__":
    main()
