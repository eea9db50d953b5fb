"""What the take-over of an existing project costs, over a MultiTaskModule of the same network.

    python -m tests.benchmarks.takeover [--pairs 7] [--steps 5] [--threads 1]

Whole fits through the Trainer, A B A B ..., of the same network on the same batch: a
MultiTaskModule (manual optimization), and an ordinary LightningModule that the callbacks take over
(automatic optimization). Both log the same losses; the learning rate is 0, so that all steps cost
the same. A step is timed from ``on_train_batch_start`` to ``on_train_batch_end``: forward and
backward passes, solver, the hand-over to Lightning and the optimizer's step. A fit counts with the
median of its steps after the first two, a pair with the ratio of its two fits.

The take-over knows no encoder and no heads. In every second pass a foreign ``training_step`` runs
the encoder, all heads and all losses; these calls are counted in both hosts. The surplus of the
take-over is timed by itself, once a pair, and taken away for the last column: what is left is the
overhead of the machinery, to be at most 1.05.
"""

import argparse
import functools
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_flatmtl import MultiTaskModule, Task, TaskSAM
from lightning_flatmtl.aggregators import CAGrad
from tests.benchmarks.machine import describe, keep_large_blocks
from tests.benchmarks.networks import two_heads

METHODS: dict[str, Callable[[], list[pl.Callback]]] = {
    "CAGrad": lambda: [CAGrad(0.4)],
    "F, separate": lambda: [CAGrad(0.4), TaskSAM(0.05)],
    "F, joint": lambda: [CAGrad(0.4), TaskSAM(0.05, point="joint")],
}


class Calls:
    """Counts the calls of encoder, heads and losses."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin again."""
        self.found = {"encoder": 0, "heads": 0, "losses": 0}

    def of(self, name: str, module: nn.Module) -> nn.Module:
        """Let ``module`` count."""
        run = module.forward

        @functools.wraps(run)
        def forward(x: Tensor) -> Tensor:
            self.found[name] += 1
            return run(x)

        module.forward = forward
        return module

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy."""
        self.found["losses"] += 1
        return nn.functional.cross_entropy(output, target)


class Project(pl.LightningModule):
    """An ordinary project."""

    def __init__(self, encoder: nn.Module, heads: dict[str, nn.Module], calls: Calls) -> None:
        super().__init__()
        self.encoder, self.heads, self.loss = encoder, nn.ModuleDict(heads), calls.loss

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x, targets = batch
        features = self.encoder(x)
        losses = {t: self.loss(head(features), targets[t]) for t, head in self.heads.items()}
        total = torch.stack(list(losses.values())).sum()
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=len(x))
        for task, loss in losses.items():
            self.log(f"train/{task}/loss", loss.detach(), batch_size=len(x))
        return {"loss": total, "losses": losses}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Clock(pl.Callback):
    """Times every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)


class Setting:
    """One network, as a MultiTaskModule and as an ordinary project."""

    def __init__(self, width: int, batch: int, tasks: int, heavy: bool) -> None:
        net = two_heads(width, tasks)
        self.features = 8 * width
        self.calls = Calls()
        self.heads: dict[str, nn.Module] = {}
        for i in range(tasks):
            head: nn.Module = net.heads[i]
            if heavy:
                head = nn.Sequential(
                    nn.Linear(self.features, 2048),
                    nn.ReLU(),
                    nn.Linear(2048, 2048),
                    nn.ReLU(),
                    nn.Linear(2048, 10),
                )
            self.heads[str(i)] = self.calls.of("heads", head)
        self.encoder = self.calls.of("encoder", net.encoder)
        x = torch.randn(batch, 3, 32, 32)
        self.y = {t: torch.randint(0, 10, (batch,)) for t in self.heads}
        self.batch = x, self.y
        self.module = MultiTaskModule(
            self.encoder,
            [Task(t, head=head, loss=self.calls.loss) for t, head in self.heads.items()],
            optimizer=lambda params: torch.optim.SGD(params, lr=0.0),
        )
        self.project = Project(self.encoder, self.heads, self.calls)

    def fit(self, module: pl.LightningModule, method: str, steps: int) -> list[float]:
        clock = Clock()
        trainer = pl.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[*METHODS[method](), clock],
        )
        trainer.fit(module, DataLoader([self.batch] * steps, batch_size=None))
        return clock.seconds

    def counts(self, module: pl.LightningModule, method: str) -> dict[str, int]:
        """Calls in one step."""
        self.calls.forget()
        self.fit(module, method, 1)
        return self.calls.found

    def surplus(self, encoder: int, heads: int, losses: int) -> float:
        """Seconds for so many more calls, with their graphs."""
        features = torch.randn(len(self.batch[0]), self.features, requires_grad=True)
        modules = list(self.heads.values())
        start = time.perf_counter()
        for _ in range(encoder):
            self.encoder(self.batch[0])
        output = None
        for i in range(heads):
            output = modules[i % len(modules)](features)
            if losses > i:
                self.calls.loss(output, self.y["0"])
        if losses > heads:
            output = torch.randn(len(features), 10, requires_grad=True)
        for _ in range(losses - heads):
            assert output is not None
            self.calls.loss(output, self.y["0"])
        return time.perf_counter() - start


def measure(setting: Setting, method: str, pairs: int, steps: int) -> None:
    mine, foreign = (setting.counts(m, method) for m in (setting.module, setting.project))
    more = {name: foreign[name] - mine[name] for name in mine}
    ratios, left, base, surplus = [], [], [], []
    setting.surplus(**more)
    for i in range(pairs):
        # The order alternates, so that a drift of the machine's speed favours neither.
        order = [setting.module, setting.project]
        times = {
            module: statistics.median(setting.fit(module, method, steps + 2)[2:])
            for module in (order if i % 2 else reversed(order))
        }
        a, b = times[setting.module], times[setting.project]
        extra = statistics.median(setting.surplus(**more) for _ in range(3))
        ratios.append(b / a)
        left.append((b - extra) / a)
        base.append(a)
        surplus.append(extra)
    print(
        f" {method:12} {1e3 * statistics.median(base):9.1f} ms"
        f" {more['encoder']:7d} {more['heads']:5d} {more['losses']:6d}"
        f" {1e3 * statistics.median(surplus):8.1f} ms"
        f"   {min(ratios):.3f}  {statistics.median(ratios):.3f}  {max(ratios):.3f}"
        f"   {statistics.median(left):.3f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    arguments = parser.parse_args()
    keep_large_blocks()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    pl.utilities.rank_zero.rank_zero_module.log.setLevel("ERROR")
    print(describe(arguments.threads))
    print(f"ResNet-18 of width {arguments.width}, batch {arguments.batch}")
    print(
        "                       a step of   further calls of                       "
        "ratio: min  median  max    less the"
    )
    print(
        "heads  m method         the module  encoder heads losses   their time      "
        "                       further calls"
    )
    for heavy in (False, True):
        for tasks in (2, 3):
            setting = Setting(arguments.width, arguments.batch, tasks, heavy)
            for method in arguments.methods:
                print(f"{'heavy' if heavy else 'small'} {tasks:2d}", end="")
                measure(setting, method, arguments.pairs, arguments.steps)


if __name__ == "__main__":
    main()
