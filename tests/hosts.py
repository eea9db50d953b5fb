"""The same small net in both hosts: as a MultiTaskModule and as an ordinary LightningModule."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_flatmtl import MultiTaskModule
from lightning_flatmtl.engine import StepResult
from lightning_flatmtl.takeover import host_of
from tests.helpers import module, sgd


class Foreign(pl.LightningModule):
    """An ordinary module with the net of ``twin``, in automatic optimization."""

    def __init__(self, twin: MultiTaskModule, optimizer: Callable[[Any], Any] = sgd) -> None:
        super().__init__()
        self.encoder, self.heads = twin.encoder, twin.heads
        self.criteria = nn.ModuleDict({task.name: task.loss for task in twin.tasks})
        self._make_optimizer = optimizer

    def losses(self, batch: Any) -> dict[str, Tensor]:
        features = self.encoder(batch[0])
        return {t: self.criteria[t](head(features), batch[1][t]) for t, head in self.heads.items()}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        losses = self.losses(batch)
        return {"loss": sum(losses.values()), "losses": losses}

    def configure_optimizers(self) -> Any:
        return self._make_optimizer(self.parameters())


def foreign(kind: type = Foreign, trunk: nn.Module | None = None, **kwargs: Any) -> Any:
    """The net of :func:`tests.helpers.module` in an ordinary module, with the same weights."""
    return kind(module(trunk=trunk), **kwargs)


HOSTS: dict[str, Callable[..., Any]] = {"module": module, "taken over": foreign}


class Steps(pl.Callback):
    """Keeps what every step has found out."""

    def __init__(self) -> None:
        self.results: list[StepResult | None] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.results.append(host_of(pl_module).last_step)


def values(net: nn.Module) -> Tensor:
    """All parameters as one vector, a copy."""
    return nn.utils.parameters_to_vector(net.parameters()).detach().clone()


def single(loader: Any) -> Any:
    """The data in 32 bits."""
    loader.dataset.inputs = loader.dataset.inputs.float()
    targets = loader.dataset.targets
    loader.dataset.targets = {
        k: v.float() if v.is_floating_point() else v for k, v in targets.items()
    }
    return loader


def flat_share(result: StepResult) -> float:
    """Norm of the flat parts over that of the loss parts, all tasks together."""
    assert result.gram is not None
    assert result.flat_gram is not None
    return float((result.flat_gram.trace() / result.gram.trace()).sqrt())


def smooth_trunk(dropout: float = 0.0) -> nn.Sequential:
    """A trunk without batch statistics; the same weights every time."""
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(36, 8), nn.Dropout(dropout), nn.Tanh(), nn.Linear(8, 5)
    )
