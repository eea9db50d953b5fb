"""Parameters sharded over the processes (FSDP2): the result is that of one process."""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_flatmtl import MultiTaskModule, Task, TaskSAM
from lightning_flatmtl.aggregators import (
    FAMO,
    IMTLG,
    MGDA,
    CAGrad,
    ExcessMTL,
    GradDrop,
    GradNorm,
    LinearScalarization,
    NashMTL,
    PCGrad,
    UncertaintyWeighting,
)
from lightning_flatmtl.callbacks import SharpnessMonitor
from tests.ddp.cases import case, caught
from tests.ddp.net import Batches
from tests.ddp.training import HOSTS, deviation
from tests.ddp.worker import Place

pytestmark = pytest.mark.ddp

METHODS: dict[str, Callable[[], list[pl.Callback]]] = {
    "plain": list,
    "LS": lambda: [LinearScalarization()],
    "UW": lambda: [UncertaintyWeighting()],
    "FAMO": lambda: [FAMO()],
    "CAGrad": lambda: [CAGrad()],
    "PCGrad": lambda: [PCGrad()],
    "NashMTL": lambda: [NashMTL(normalize=True)],
    "GradNorm": lambda: [GradNorm()],
    "F-LS": lambda: [TaskSAM(0.1)],
    "F-CAGrad": lambda: [CAGrad(), TaskSAM(0.1)],
    "F-CAGrad joint adaptive": lambda: [CAGrad(), TaskSAM(0.5, point="joint", adaptive=True)],
    "F-MGDA adaptive": lambda: [MGDA(), TaskSAM(0.5, adaptive=True)],
    "F-IMTL-G direct": lambda: [IMTLG(), TaskSAM(0.1, aggregate="direct")],
    "F-CAGrad each": lambda: [CAGrad(), TaskSAM(0.1, aggregate="each")],
}
REFUSED = {
    "columns": (lambda: [GradDrop()], "must look at the Gram matrix only"),
    "matrix": (lambda: [ExcessMTL()], "must look at the Gram matrix only"),
    "local": (lambda: [TaskSAM(0.1, perturbation="local")], "no process has gradients of its own"),
}
BATCH, N = 12, 36


def parts() -> tuple[nn.Sequential, nn.Linear, nn.Linear]:
    """A trunk with sizes that neither two nor three processes divide."""
    torch.manual_seed(3)
    trunk = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.0), nn.Linear(5, 4), nn.Tanh())
    return trunk.double(), nn.Linear(4, 3).double(), nn.Linear(4, 2).double()


def shard(model: Any, heads: bool = True) -> None:
    if not isinstance(model.trainer.strategy, ModelParallelStrategy):
        return
    mesh = model.device_mesh["data_parallel"]
    layers = [layer for layer in model.encoder if isinstance(layer, nn.Linear)]
    for layer in (*layers, model.encoder, *(model.heads.values() if heads else ())):
        fully_shard(layer, mesh=mesh)


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


class Ours(MultiTaskModule):
    whole_heads = False

    def configure_model(self) -> None:
        shard(self, heads=not self.whole_heads)


class Foreign(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, a, b = parts()
        self.heads = nn.ModuleDict({"a": a, "b": b})

    def configure_model(self) -> None:
        shard(self)

    def training_step(self, batch, batch_idx):
        x, targets = batch
        z = self.encoder(x)
        losses = {
            "a": nn.functional.cross_entropy(self.heads["a"](z), targets["a"]),
            "b": nn.functional.mse_loss(self.heads["b"](z), targets["b"]),
        }
        return {"loss": losses["a"] + losses["b"], "losses": losses}

    def configure_optimizers(self):
        return sgd(self.parameters())


def model_of(host: str, **kwargs: Any) -> pl.LightningModule:
    if host == "taken over":
        return Foreign()
    trunk, a, b = parts()
    tasks = [Task("a", a, nn.CrossEntropyLoss()), Task("b", b, nn.MSELoss())]
    return Ours(trunk, tasks, optimizer=sgd, **kwargs)


def data(place: Place) -> Batches:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, 6, dtype=torch.float64, generator=g)
    a = torch.randint(0, 3, (N,), generator=g)
    b = torch.randn(N, 2, dtype=torch.float64, generator=g)
    share = BATCH // place.size
    slices = [
        slice(i + place.rank * share, i + (place.rank + 1) * share) for i in range(0, N, BATCH)
    ]
    return Batches((x[s], {"a": a[s], "b": b[s]}) for s in slices)


def fit(
    place: Place,
    host: str,
    callbacks: list[pl.Callback],
    epochs: int = 2,
    ckpt_path: str | None = None,
    model: pl.LightningModule | None = None,
    save: str | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    model = model_of(host, **kwargs) if model is None else model
    strategy: Any = "auto"
    if place.size > 1:
        strategy = ModelParallelStrategy(
            place.size, 1, save_distributed_checkpoint=False, process_group_backend="gloo"
        )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=place.size,
        strategy=strategy,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=callbacks,
    )
    trainer.fit(model, data(place), ckpt_path=ckpt_path)
    if save is not None:
        trainer.save_checkpoint(save)
    return {name: whole(p) for name, p in model.named_parameters()}


def whole(p: Tensor) -> Tensor:
    return p.detach().full_tensor() if isinstance(p, DTensor) else p.detach().clone()


def resumed(place: Place) -> dict[str, Tensor]:
    path = str(place.folder / f"sharded_{place.size}.ckpt")
    fit(place, "module", METHODS["F-CAGrad"](), epochs=1, save=path)
    return fit(place, "module", METHODS["F-CAGrad"](), ckpt_path=path)


def accumulated(place: Place) -> dict[str, Tensor]:
    method = METHODS["F-CAGrad"]()
    return fit(place, "module", method, accumulate_grad_batches=2, gradient_clip_val=0.05)


def with_whole_heads(place: Place) -> Any:
    model: Any = model_of("module")
    model.whole_heads = True
    return caught(lambda: fit(place, "module", [CAGrad()], model=model))


def trained(place: Place, host: str, name: str) -> dict[str, Tensor]:
    return fit(place, host, METHODS[name]())


def refused(place: Place, name: str) -> Any:
    return caught(lambda: fit(place, "module", REFUSED[name][0]()))


class Sharpnesses(pl.Callback):
    """Keeps what a SharpnessMonitor logs."""

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer, pl_module):
        logged = trainer.callback_metrics.items()
        self.found.append({k: float(v) for k, v in logged if k.startswith("sharpness/")})


def looked_at(place: Place) -> list[dict[str, float]]:
    keeps = Sharpnesses()
    fit(place, "module", [*METHODS["F-CAGrad"](), SharpnessMonitor(1), keeps])
    return keeps.found


def looked_at_by_itself(place: Place) -> Any:
    looks = SharpnessMonitor(1, top_eigenvalue=True)
    return caught(lambda: fit(place, "module", [*METHODS["F-CAGrad"](), looks]))


NAMES = [f"sharded: {host}, {name}" for host in HOSTS for name in METHODS]
for host in HOSTS:
    for name in METHODS:
        case(f"sharded: {host}, {name}", partial(trained, host=host, name=name))
for name in REFUSED:
    case(f"sharded: refused {name}", partial(refused, name=name), (2,))
case("sharded: resumed", resumed)
case("sharded: accumulated", accumulated)
case("sharded: whole heads", with_whole_heads, (2,))
case("sharded: looked at", looked_at, (1, 2))
case("sharded: looked at by itself", looked_at_by_itself, (2,))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", [*NAMES, "sharded: accumulated", "sharded: resumed"])
def test_the_result_is_that_of_one_process(runs: Any, name: str, size: int) -> None:
    unbroken = "sharded: module, F-CAGrad" if name == "sharded: resumed" else name
    (expected,) = runs(1, unbroken)
    ranks = runs(size, name)
    for found in ranks:
        assert deviation(found, expected) < 1e-10
        assert all(torch.equal(found[k], ranks[0][k]) for k in expected)


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_more_than_inner_products_is_refused(runs: Any, name: str) -> None:
    for error in runs(2, f"sharded: refused {name}"):
        assert error.kind == "ValueError"
        assert REFUSED[name][1] in error.words


def test_every_parameter_must_be_sharded(runs: Any) -> None:
    for error in runs(2, "sharded: whole heads"):
        assert "every trainable one must be sharded" in error.words
        assert "fully_shard" in error.words


def test_the_sharpness_of_the_second_pass_is_that_of_one_process(runs: Any) -> None:
    (one,), (first, second) = runs(1, "sharded: looked at"), runs(2, "sharded: looked at")
    assert first == second
    assert len(one) == 2
    for found, expected in zip(first, one, strict=True):
        assert found == pytest.approx(expected, rel=1e-6)
        assert {"sharpness/a", "sharpness/b/head"} <= found.keys()


def test_sharded_parameters_are_not_perturbed_by_a_callback(runs: Any) -> None:
    for error in runs(2, "sharded: looked at by itself"):
        assert error.kind == "MisconfigurationException"
        assert "one device or DDP, got ModelParallelStrategy" in error.words
