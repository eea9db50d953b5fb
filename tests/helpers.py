"""What several tests of the Lightning side share: tiny data, tiny nets, a quiet Trainer."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_flatmtl import MultiTaskModule, Task

Optimizers = Callable[[Any], torch.optim.Optimizer]


class Pairs(Dataset):
    """Items ``(inputs[i], {task: target[i]})``."""

    def __init__(self, inputs: Tensor, targets: dict[str, Tensor]) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int):
        return self.inputs[i], {k: v[i] for k, v in self.targets.items()}


def data(n: int = 24, seed: int = 0, batch_size: int = 8) -> DataLoader:
    """Images with a class for task "a" and two values for task "b"."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 6, 6, dtype=torch.float64, generator=g)
    classes = torch.randint(0, 3, (n,), generator=g)
    values = torch.randn(n, 2, dtype=torch.float64, generator=g)
    return DataLoader(Pairs(x, {"a": classes, "b": values}), batch_size=batch_size)


def encoder() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5), nn.Tanh()
    )


def tasks() -> list[Task]:
    return [
        Task(
            "a",
            head=nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)),
            loss=nn.CrossEntropyLoss(),
        ),
        Task("b", head=nn.Linear(5, 2), loss=nn.MSELoss()),
    ]


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def module(
    optimizer: Optimizers | None = None,
    kind: type[MultiTaskModule] = MultiTaskModule,
    trunk: nn.Module | None = None,
    **kwargs: Any,
) -> Any:
    """A module in float64 for :func:`data`; the same weights every time."""
    torch.manual_seed(3)
    made = trunk or encoder()
    return kind(made, tasks(), optimizer=optimizer or sgd, **kwargs).double()


def trainer(callbacks: list[pl.Callback] | None = None, **kwargs: Any) -> pl.Trainer:
    """A Trainer on the CPU that writes nothing, for one epoch."""
    settings: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": callbacks or [],
    }
    return pl.Trainer(**{**settings, **kwargs})


def fit(
    model: pl.LightningModule,
    callbacks: list[pl.Callback] | None = None,
    loader: Any = None,
    val: Any = None,
    ckpt_path: Any = None,
    **kwargs: Any,
) -> pl.Trainer:
    """Train ``model`` and return the Trainer."""
    made = trainer(callbacks, **kwargs)
    made.fit(model, data() if loader is None else loader, val, ckpt_path=ckpt_path)
    return made


def assert_close(a: nn.Module, b: nn.Module, tolerance: float) -> None:
    """Parameters equal up to a relative norm."""
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        difference = (p - q).norm() / q.norm()
        assert difference < tolerance, (name, difference.item())


def assert_identical(a: nn.Module, b: nn.Module) -> None:
    """Parameters and buffers equal bit for bit."""
    state, other = a.state_dict(), b.state_dict()
    assert state.keys() == other.keys()
    for name, value in state.items():
        assert torch.equal(value, other[name]), name


class Calls:
    """Counts the calls of a module's forward."""

    def __init__(self, layer: nn.Module) -> None:
        self.count = 0
        layer.register_forward_hook(self._note)

    def _note(self, *_: Any) -> None:
        self.count += 1
