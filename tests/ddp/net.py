"""A small net with three tasks in both hosts, and the shares of its data."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import MeanSquaredError, Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_flatmtl import MultiTaskModule, Task
from tests.ddp.worker import Place

TASKS = ("a", "b", "c")
MISSING = {"a": -1, "b": float("nan"), "c": float("nan")}
LOSSES = {"a": nn.CrossEntropyLoss(), "b": nn.MSELoss(), "c": nn.MSELoss()}
ROWS = 12
UNEVEN = {1: (8,), 2: (5, 3), 3: (4, 3, 1)}
"""Samples by process in a batch of eight."""

Batch = tuple[Tensor, dict[str, Tensor]]


def batches(count: int = 4, rows: int | Sequence[int] = ROWS, seed: int = 0) -> list[Batch]:
    """Whole batches, that is of all processes, with a label of every task for every sample."""
    g = torch.Generator().manual_seed(seed)
    sizes = [rows] * count if isinstance(rows, int) else rows

    def batch(n: int) -> Batch:
        x = torch.randn(n, 6, dtype=torch.float64, generator=g)
        return x, {
            "a": torch.randint(0, 3, (n,), generator=g),
            "b": torch.randn(n, 2, dtype=torch.float64, generator=g),
            "c": torch.randn(n, 1, dtype=torch.float64, generator=g),
        }

    return [batch(n) for n in sizes]


def without(batch: Batch, task: str, rows: Any) -> None:
    """Take the labels of a task from some samples, in place."""
    batch[1][task][rows] = MISSING[task]


def share(batch: Batch, place: Place, keys: bool = False) -> Batch:
    """What one process gets of a whole batch.

    Args:
        batch: The whole batch.
        place: The process.
        keys: Whether a task that has no label here is missing from the targets.
    """
    x, targets = batch
    n = len(x)
    sizes = UNEVEN[place.size] if n == 8 else [n // place.size] * place.size
    rows = slice(sum(sizes[: place.rank]), sum(sizes[: place.rank + 1]))
    mine = {task: target[rows] for task, target in targets.items()}
    if keys:
        mine = {task: y for task, y in mine.items() if _labelled(task, y).any()}
    return x[rows], mine


def _labelled(task: str, target: Tensor) -> Tensor:
    return target != -1 if task == "a" else ~target.isnan().all(1)


class Batches:
    """Batches one by one; a checkpoint in the middle of an epoch says where to go on."""

    def __init__(self, items: Iterable[Batch]) -> None:
        self.items = list(items)
        self._next = 0

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Batch]:
        begin, self._next = self._next, 0
        for i in range(begin, len(self.items)):
            self._next = (i + 1) % len(self.items)
            yield self.items[i]

    def state_dict(self) -> dict[str, int]:
        return {"next": self._next}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._next = state["next"]


# The net: 59 shared parameters, which neither two nor three processes can share out evenly.


def trunk(*between: nn.Module) -> nn.Sequential:
    """The encoder, with layers of the caller's after the first one."""
    return nn.Sequential(nn.Linear(6, 5), *between, nn.Tanh(), nn.Linear(5, 4), nn.Tanh())


def parts(make_trunk: Callable[[], nn.Module], tasks: Sequence[str] = TASKS) -> Any:
    torch.manual_seed(3)
    encoder = make_trunk()
    heads = {
        "a": nn.Linear(4, 3),
        "b": nn.Linear(4, 2),
        "c": nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)),
    }
    return encoder, {task: heads[task] for task in tasks}


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def still(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.0)


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)


def module(
    optimizer: Callable[[Any], Any] = sgd,
    make_trunk: Callable[[], nn.Module] = trunk,
    tasks: Sequence[str] = TASKS,
    heads: Mapping[str, nn.Module] | None = None,
    kind: type[MultiTaskModule] = MultiTaskModule,
    measured: bool = False,
    **settings: Any,
) -> MultiTaskModule:
    encoder, made = parts(make_trunk, tasks)
    made.update(heads or {})
    metrics = {task: metric() if measured else None for task, metric in METRICS.items()}
    listed = [Task(t, made[t], LOSSES[t], metrics[t], MISSING[t]) for t in tasks]
    return kind(encoder, listed, optimizer, **settings).double()


METRICS: dict[str, Callable[[], dict[str, Metric]]] = {
    "a": lambda: {"accuracy": MulticlassAccuracy(3, average="micro")},
    "b": lambda: {"mse": MeanSquaredError()},
    "c": lambda: {"mse": MeanSquaredError()},
}


class Foreign(pl.LightningModule):
    """The same net in an ordinary module that knows nothing of the package."""

    def __init__(
        self,
        optimizer: Callable[[Any], Any] = sgd,
        make_trunk: Callable[[], nn.Module] = trunk,
        tasks: Sequence[str] = TASKS,
        counts: bool = False,
        heads: Mapping[str, nn.Module] | None = None,
        silent: bool = False,
    ) -> None:
        super().__init__()
        self._silent = silent
        self.encoder, made = parts(make_trunk, tasks)
        made.update(heads or {})
        self.heads = nn.ModuleDict(made)
        self._optimizer, self._counts = optimizer, counts
        self.double()

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        x, targets = batch
        features = self.encoder(x)
        losses, counts = {}, {}
        for task, target in targets.items():
            keep = _labelled(task, target)
            if task in self.heads and keep.any():
                predictions = self.heads[task](features)
                losses[task] = LOSSES[task](predictions[keep], target[keep])
                counts[task] = int(keep.sum())
        if not losses and self._silent:
            return None
        total = torch.stack([*losses.values(), torch.zeros((), dtype=x.dtype)]).sum()
        self.log("train/loss", total)
        extra = {"counts": counts} if self._counts else {}
        return {"loss": total, "losses": losses, **extra}

    def configure_optimizers(self) -> Any:
        return self._optimizer(self.parameters())
