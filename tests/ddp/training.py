"""One fit in each of several processes, and what is kept of it."""

import hashlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_flatmtl.takeover import host_of
from tests.ddp.net import Batch, Batches, Foreign, module, share
from tests.ddp.worker import Place

HOSTS = ("module", "taken over")
PATIENCE = timedelta(seconds=10)
Callbacks = Callable[[], list[pl.Callback]]


def digest(tensors: Any) -> str:
    """A hash over the bytes of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


class Diary(pl.Callback):
    """Writes down what every batch has done."""

    def __init__(self) -> None:
        self.hashes: list[str] = []
        self.moved: list[set[str]] = []
        self.losses: list[float] = []
        self.owners: list[dict[str, Any]] = []
        self._before: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._before = {n: p.detach().clone() for n, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.hashes.append(digest(pl_module.parameters()))
        self.moved.append(
            {n for n, p in pl_module.named_parameters() if not torch.equal(p, self._before[n])}
        )
        self.losses.append(float(trainer.callback_metrics.get("train/loss", "nan")))
        host = host_of(pl_module)
        if hasattr(host, "engine"):
            named = dict(pl_module.named_parameters())
            self.owners.append(host.engine.partition.state_dict(named))


def trainer(place: Place, callbacks: Sequence[pl.Callback], **settings: Any) -> pl.Trainer:
    several = (
        {"strategy": DDPStrategy(process_group_backend="gloo", timeout=PATIENCE)}
        if place.size > 1
        else {}
    )
    defaults: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": place.size,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **several, **settings})


def train(
    place: Place,
    host: str,
    method: Callbacks,
    whole: Sequence[Batch] | None = None,
    *,
    mine: Sequence[Batch] | None = None,
    val: Sequence[Batch] | None = None,
    keys: bool = False,
    seed: int | None = None,
    net: dict[str, Any] | None = None,
    accumulate_grad_batches: int = 1,
    gradient_clip_val: float | None = None,
    more: Sequence[pl.Callback] = (),
    ckpt_path: Any = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train on this process's share of whole batches (or on ``mine``).

    Returns:
        Parameters, buffers, metrics and the diary of the fit.
    """
    if mine is None:
        assert whole is not None
        mine = [share(batch, place, keys) for batch in whole]
    manual = {
        "accumulate_grad_batches": accumulate_grad_batches,
        "gradient_clip_val": gradient_clip_val,
    }
    net = dict(net or {})
    model: pl.LightningModule
    if host == "module":
        net.pop("counts", None)
        model = module(**net, **manual)
    else:
        model = Foreign(**net)
        settings = {**manual, **settings}
    if seed is not None:
        torch.manual_seed(seed)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    diary = Diary()
    made = trainer(place, [*method(), diary, *more], **settings)
    validation = None if val is None else Batches(share(batch, place, keys) for batch in val)
    made.fit(model, Batches(mine), validation, ckpt_path=ckpt_path)
    return {
        "start": start,
        "params": copies(model.named_parameters()),
        "buffers": copies(model.named_buffers()),
        "metrics": {k: float(v) for k, v in made.callback_metrics.items()},
        "steps": made.global_step,
        "scale": getattr(getattr(made.precision_plugin, "scaler", None), "get_scale", float)(),
        "diary": {k: v for k, v in vars(diary).items() if not k.startswith("_")},
    }


def copies(named: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in named}


def deviation(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference of all parameters."""
    assert found.keys() == expected.keys()
    return max(
        float((found[k] - v).norm() / max(float(v.norm()), 1e-300)) for k, v in expected.items()
    )


class SyncedBatchNorm(nn.SyncBatchNorm):
    """SyncBatchNorm in plain torch, since torch's own takes tensors on accelerators only."""

    def forward(self, x: Tensor) -> Tensor:
        from torch.distributed.nn.functional import all_reduce

        self._check_input_dim(x)
        if not self.training:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        n = torch.tensor(float(len(x)), dtype=x.dtype)
        torch.distributed.all_reduce(n)
        mean = all_reduce(x.sum(0)) / n
        variance = all_reduce((x - mean).square().sum(0)) / n
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * n / (n - 1), self.momentum)
        return (x - mean) / (variance + self.eps).sqrt() * self.weight + self.bias


def batch_norm(place: Place) -> type[nn.Module]:
    """Statistics of the whole batch, in one process and in several."""
    return nn.BatchNorm1d if place.size == 1 else SyncedBatchNorm
