"""What the tests of Lightning's features share: an existing module, both hosts, and how to compare.

There are two hosts. *Take-over*: an ordinary module with automatic optimization, :class:`Steps`,
with our callbacks in its Trainer. *Module*: a MultiTaskModule with the same net. Both are compared
with the ordinary module in a Trainer that has none of our callbacks.
"""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_flatmtl import MultiTaskModule, TaskSAM
from lightning_flatmtl.aggregators import CAGrad, GradDrop, LinearScalarization
from tests.helpers import assert_close, data, encoder, fit, module, sgd, tasks

Callbacks = list[pl.Callback]
Configure = Callable[[Any], Any]

SUMS: dict[str, Callable[[], Callbacks]] = {
    "losses": lambda: [LinearScalarization(), TaskSAM(0.0)],
    # The sum of the task gradients: nothing is changed, but every task is differentiated by itself.
    "gradients": lambda: [GradDrop(leak=1.0), TaskSAM(0.0)],
}
"""Methods that equal the plain sum, by the path they take through the engine."""

HOSTS = ["take-over", "module"]

BATCHES = 5


def active() -> Callbacks:
    """A method that does something, in both passes."""
    return [CAGrad(), TaskSAM(0.05)]


def default_optimizer(self: Any) -> Any:
    return sgd(self.parameters())


class Steps:
    """The steps of an existing project; mixed into the LightningModule of either package."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.encoder = encoder()
        parts = tasks()
        self.heads = nn.ModuleDict({task.name: task.head for task in parts})
        self.criteria = nn.ModuleDict({task.name: task.loss for task in parts})
        self.double()

    def losses(self, batch):
        features = self.encoder(batch[0])
        return {t: self.criteria[t](head(features), batch[1][t]) for t, head in self.heads.items()}

    def logged(self, stage, batch):
        losses = self.losses(batch)
        total = losses["a"] + losses["b"]
        self.log(f"{stage}/loss", total, prog_bar=True, batch_size=len(batch[0]))
        for task, loss in losses.items():
            self.log(f"{stage}/{task}/loss", loss, batch_size=len(batch[0]))
        return {"loss": total, "losses": losses}

    def training_step(self, batch, batch_idx):
        return self.logged("train", batch)

    def validation_step(self, batch, batch_idx):
        self.logged("val", batch)


class Existing(Steps, pl.LightningModule):
    """An existing module that knows nothing of us but returns its losses."""


def loader(n: int = 8 * BATCHES, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """Batches for both hosts."""
    batches = data(n, seed)
    batches.dataset.inputs = batches.dataset.inputs.to(dtype)
    batches.dataset.targets["b"] = batches.dataset.targets["b"].to(dtype)
    return batches


OF_THE_MODULE = ("gradient_clip_val", "gradient_clip_algorithm", "accumulate_grad_batches")
"""Settings that a MultiTaskModule takes in the place of its Trainer."""


def run(
    host: str,
    callbacks: Callbacks,
    configure: Configure | None = None,
    mixin: type = object,
    dtype: torch.dtype = torch.float64,
    prepare: Callable[[Any], Any] = lambda model: None,
    batches: Any = None,
    **settings: Any,
) -> pl.Trainer:
    """Train one host for two epochs with validation; see to it that the fit leaves no trace.

    Args:
        host: ``"take-over"`` or ``"module"``.
        callbacks: Ours and Lightning's.
        configure: ``configure_optimizers``.
        mixin: Hooks of the module.
        dtype: Of the parameters and the data.
        prepare: Called with the module before the fit.
        batches: A data module, in the place of :func:`loader` for training and validation.
        settings: Of the Trainer.
    """
    mix = type("Mix", (mixin,), {"configure_optimizers": configure or default_optimizer})
    if host == "take-over":
        model = type("Mixed", (mix, Existing), {})()
    else:
        own = {name: settings.pop(name) for name in OF_THE_MODULE if name in settings}
        model = module(kind=type("Mixed", (mix, MultiTaskModule), {}), **own)
    model.to(dtype)
    prepare(model)
    before = dict(vars(model))
    settings = {"max_epochs": 2, "num_sanity_val_steps": 1, **settings}
    if batches is None:
        batches, settings["val"] = loader(dtype=dtype), loader(16, 1, dtype)
    trainer = fit(model, callbacks, batches, **settings)
    assert vars(model).get("training_step") is before.get("training_step")
    assert "log" not in vars(model)
    return trainer


def assert_same_run(ours: pl.Trainer, plain: pl.Trainer, tolerance: float = 1e-12) -> None:
    """Parameters, learning rates, counters and metrics of two runs."""
    first, second = ours.lightning_module, plain.lightning_module
    assert_close(first.encoder, second.encoder, tolerance)
    assert_close(first.heads, second.heads, tolerance)
    assert ours.global_step == plain.global_step
    assert ours.current_epoch == plain.current_epoch
    for group, other in zip(
        ours.optimizers[0].param_groups, plain.optimizers[0].param_groups, strict=True
    ):
        assert abs(group["lr"] - other["lr"]) <= 1e-12 * other["lr"]
    assert ours.callback_metrics.keys() == plain.callback_metrics.keys()
    assert ours.progress_bar_metrics.keys() == plain.progress_bar_metrics.keys()
    for name, value in plain.callback_metrics.items():
        found = ours.callback_metrics[name]
        torch.testing.assert_close(found, value, rtol=max(10 * tolerance, 1e-12), atol=0.0)


def assert_trained(trainer: pl.Trainer) -> None:
    """Every parameter has moved and is finite.

    But for the bias in front of the batch normalisation, whose gradient is zero.
    """
    start = Existing()
    for part in ("encoder", "heads"):
        now = getattr(trainer.lightning_module, part).named_parameters()
        for (name, p), q in zip(now, getattr(start, part).parameters(), strict=True):
            assert torch.isfinite(p).all(), name
            assert name == "0.bias" or not torch.equal(p.double(), q), name
