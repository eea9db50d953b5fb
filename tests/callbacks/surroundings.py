"""What the tests of NoiseRobustness and LossLandscape share: nets that log, and a brute force."""

import copy
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import MeanSquaredError, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_flatmtl import MultiTaskModule, Task
from tests.helpers import Pairs, encoder, sgd


def measured(trunk: nn.Module | None = None, kind: type = MultiTaskModule, **kwargs: Any) -> Any:
    """A MultiTaskModule with metrics; the same weights every time."""
    torch.manual_seed(3)
    made = trunk or encoder()
    heads = {"a": nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), "b": nn.Linear(5, 2)}
    metrics = {
        # In one compute group.
        "a": MetricCollection(
            {
                "accuracy": MulticlassAccuracy(3, average="micro"),
                "f1": MulticlassF1Score(3, average="micro"),
            }
        ),
        "b": {"mse": MeanSquaredError()},
    }
    losses = {"a": nn.CrossEntropyLoss(), "b": nn.MSELoss()}
    tasks = [Task(t, heads[t], losses[t], metrics[t]) for t in heads]
    return kind(made, tasks, optimizer=kwargs.pop("optimizer", sgd), **kwargs).double()


class Ordinary(pl.LightningModule):
    """The same net in an ordinary module, which logs a metric, a mean and something else."""

    def __init__(self, twin: MultiTaskModule) -> None:
        super().__init__()
        self.encoder, self.heads = twin.encoder, twin.heads
        self.criteria = nn.ModuleDict({task.name: task.loss for task in twin.tasks})
        self.accuracy = MulticlassAccuracy(3, average="micro")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        features = self.encoder(batch[0])
        losses = {
            t: self.criteria[t](head(features), batch[1][t]) for t, head in self.heads.items()
        }
        total = sum(losses.values())
        self.log("train/loss", total)
        return {"loss": total, "losses": losses}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        features = self.encoder(batch[0])
        self.accuracy.update(self.heads["a"](features), batch[1]["a"])
        self.log("val/a/accuracy", self.accuracy)
        error = (self.heads["b"](features) - batch[1]["b"]).square().mean()
        self.log_dict({"val/b/mse": error, "val_odd": float(error)}, batch_size=len(batch[0]))
        self.log("val/worst", error, reduce_fx="max")

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return sgd(self.parameters())


def ordinary(trunk: nn.Module | None = None, kind: type = Ordinary) -> Any:
    """The net of :func:`measured` in an ordinary module, with the same weights."""
    return kind(measured(trunk)).double()


MEASURED = {"module": measured, "taken over": ordinary}


def everything(net: Any, data: Pairs) -> dict[str, float]:
    """Losses and metrics of the whole data at once, by nothing but torch."""
    with torch.no_grad():
        features = net.encoder(data.inputs)
        a, b = net.heads["a"](features), net.heads["b"](features)
        logits = a - a.logsumexp(1, keepdim=True)
        classes, values = data.targets["a"], data.targets["b"]
        return {
            "a/loss": float(-logits[torch.arange(len(a)), classes].mean()),
            "a/accuracy": float((a.argmax(1) == classes).double().mean()),
            "b/loss": float((b - values).square().mean()),
            "b/mse": float((b - values).square().mean()),
        }


def at(net: Any, data: Pairs, step: Iterable[Tensor]) -> dict[str, float]:
    """The same at perturbed parameters, of a copy in evaluation mode."""
    moved = copy.deepcopy(net)
    moved.eval()
    for p, s in zip(moved.parameters(), step, strict=True):
        p.data += s
    return everything(moved, data)


def gaussian(net: nn.Module, seed: int, count: int) -> list[list[Tensor]]:
    """Standard normal numbers for all parameters, ``count`` times."""
    g = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(p.shape, generator=g).double() for p in net.parameters()] for _ in range(count)
    ]


def by_filter(net: nn.Module, drawn: list[Tensor], vectors: bool) -> list[Tensor]:
    """The numbers of every filter as long as the filter, one after the other."""
    steps = []
    for p, z in zip(net.parameters(), drawn, strict=True):
        step = z.clone()
        if p.ndim > 1:
            for f in range(len(p)):
                step[f] *= p.detach()[f].norm() / z[f].norm()
        else:
            step *= p.detach().norm() / z.norm() if vectors else 0.0
        steps.append(step)
    return steps
