"""Lightning's BackboneFinetuning: the encoder is frozen, thawed, and trained on."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn
from torch.func import functional_call

from lightning_flatmtl import MultiTaskModule, TaskSAM
from lightning_flatmtl.aggregators import (
    MGDA,
    CAGrad,
    GradDrop,
    GradNorm,
    NashMTL,
    UncertaintyWeighting,
)
from tests import naive
from tests.ddp.net import Batches
from tests.helpers import assert_close, assert_identical, data, module, sgd, trainer
from tests.hosts import Foreign

# BatchNorm is trained from the beginning; Lightning says that it need not be added.
pytestmark = pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")

THAW = 1
METHODS: dict[str, Callable[[], list[pl.Callback]]] = {
    "plain": list,
    "TaskSAM": lambda: [TaskSAM(0.05)],
    "F-CAGrad": lambda: [CAGrad(), TaskSAM(0.05)],
    "F-MGDA, adaptive": lambda: [MGDA(), TaskSAM(0.5, adaptive=True)],
    "F-GradDrop": lambda: [GradDrop(), TaskSAM(0.05, point="joint")],
    "F-GradNorm": lambda: [GradNorm(), TaskSAM(0.05, refresh=1)],
    "F-UW": lambda: [UncertaintyWeighting(), TaskSAM(0.05, perturbation="common")],
    "NashMTL": lambda: [NashMTL()],
}


def without_norm() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5), nn.Tanh())


def finetuning(**settings: Any) -> BackboneFinetuning:
    given = {"lambda_func": _twice, "backbone_initial_ratio_lr": 0.1, **settings}
    return BackboneFinetuning(THAW, **given)


def _twice(epoch: int) -> float:
    return 2.0


class Look(pl.Callback):
    """Writes down, epoch by epoch, what is trained, shared, and how fast."""

    def __init__(self) -> None:
        self.trained: list[int] = []
        self.shared: list[set[str]] = []
        self.rates: list[list[float]] = []
        self.encoders: list[dict[str, torch.Tensor]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        trained = [p for p in pl_module.parameters() if p.requires_grad]
        names = {p: n for n, p in pl_module.named_parameters()}
        self.trained.append(len(trained))
        self.shared.append({names[p] for p in pl_module.engine.partition.shared(trained)})
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])
        self.encoders.append(copy.deepcopy(pl_module.encoder.state_dict()))


def fitted(model: Any, method: list[pl.Callback], loader: Any = None, **settings: Any) -> Look:
    look = Look()
    made = trainer([finetuning(), *method, look], max_epochs=3, **settings)
    made.fit(model, data() if loader is None else loader)
    return look


def test_the_backbone_is_the_encoder_unless_there_is_one() -> None:
    model = module()
    assert model.backbone is model.encoder
    assert "backbone" not in dict(model.named_modules())
    assert not any(name.startswith("backbone") for name in model.state_dict())

    class Own(MultiTaskModule):
        def __init__(self) -> None:
            super().__init__(without_norm(), module().tasks)
            self.backbone = nn.Linear(2, 2)

    assert isinstance(Own().backbone, nn.Linear)


@pytest.mark.parametrize("name", METHODS)
def test_the_encoder_stands_still_and_then_moves_and_is_shared(name: str) -> None:
    model = module(trunk=without_norm())
    start = copy.deepcopy(model.encoder.state_dict())
    look = fitted(model, METHODS[name]())
    assert look.trained == [6, 10, 10]
    encoder = {f"encoder.{n}" for n, _ in model.encoder.named_parameters()}
    assert look.shared == [set(), encoder, encoder]
    assert look.rates == [[0.1], pytest.approx([0.1, 0.01]), pytest.approx([0.1, 0.02])]
    frozen, *thawed = look.encoders
    assert all(torch.equal(frozen[n], value) for n, value in start.items())
    for later in thawed:
        assert not any(torch.equal(later[n], value) for n, value in start.items())


@pytest.mark.parametrize("name", ["plain", "TaskSAM", "F-CAGrad", "F-MGDA, adaptive"])
def test_a_frozen_encoder_is_as_good_as_features_that_are_data(name: str) -> None:
    model = module(trunk=without_norm())
    reference = copy.deepcopy(model)
    made = trainer([BackboneFinetuning(9), *METHODS[name]()], max_epochs=2)
    made.fit(model, data())
    with torch.no_grad():
        features = [(reference.encoder(x), targets) for x, targets in data()]
    reference.encoder = nn.Identity()
    trainer(METHODS[name](), max_epochs=2).fit(reference, Batches(features))
    for head, expected in zip(model.heads.values(), reference.heads.values(), strict=True):
        assert_close(head, expected, 1e-12)


AGGREGATES = {
    "TaskSAM": (lambda: [TaskSAM(0.05)], naive.ls, {"rho": 0.05}),
    "F-CAGrad": (lambda: [CAGrad(), TaskSAM(0.05)], naive.cagrad(0.4), {"rho": 0.05}),
    "F-MGDA": (
        lambda: [MGDA(), TaskSAM(0.5, adaptive=True, point="joint")],
        naive.mgda,
        {"rho": 0.5, "adaptive": True, "point": "joint"},
    ),
}


@pytest.mark.parametrize("name", AGGREGATES)
def test_frozen_and_thawed_it_is_algorithm_1_on_what_is_trained(name: str) -> None:
    method, aggregate, settings = AGGREGATES[name]
    ours = module()
    reference = copy.deepcopy(ours)
    look = fitted(ours, method())
    norm = {"encoder.1.weight", "encoder.1.bias"}
    assert look.shared[0] == norm  # BatchNorm is trained while the rest is frozen
    _naive_finetuning(reference, norm, aggregate, settings)
    assert_close(ours, reference, 1e-10)


def _naive_finetuning(model: Any, norm: set[str], aggregate: Any, settings: Any) -> None:
    named = dict(model.named_parameters())
    frozen = [n for n in named if n.startswith("encoder.") and n not in norm]
    optimizer = sgd([p for n, p in named.items() if n not in frozen])
    heads = {t: [n for n in named if n.startswith(f"heads.{t}.")] for t in ("a", "b")}
    for epoch in range(3):
        if epoch == THAW:
            optimizer.add_param_group({"params": [named[n] for n in frozen], "lr": 0.01})
        elif epoch > THAW:
            optimizer.param_groups[-1]["lr"] = 0.02
        shared = [n for n in named if n.startswith("encoder.")] if epoch >= THAW else sorted(norm)
        for inputs, targets in data():
            model(inputs)  # the running statistics of the clean pass

            def loss_of(task: str, inputs: Any = inputs, targets: Any = targets) -> Any:
                criterion = nn.CrossEntropyLoss() if task == "a" else nn.MSELoss()

                def loss(params: Any) -> torch.Tensor:
                    state = {**params, **{k: v.clone() for k, v in model.named_buffers()}}
                    return criterion(functional_call(model, state, (inputs,))[task], targets[task])

                return loss

            values = {n: p.detach().clone() for n, p in named.items()}
            losses = {t: loss_of(t) for t in ("a", "b")}
            grads = naive.f_mtl_gradients(losses, values, shared, heads, aggregate, **settings)
            for n, p in named.items():
                p.grad = grads.get(n)
            optimizer.step()


def test_statistics_of_a_frozen_batch_norm_stand_still() -> None:
    class WithNorm(BackboneFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.backbone, train_bn=False)

    model = module()
    start = copy.deepcopy(model.encoder.state_dict())
    look = Look()
    callbacks = [WithNorm(THAW, lambda_func=_twice), CAGrad(), TaskSAM(0.05), look]
    trainer(callbacks, max_epochs=3).fit(model, data())
    frozen, thawed, _ = look.encoders
    assert all(torch.equal(frozen[n], value) for n, value in start.items())
    assert thawed["1.num_batches_tracked"] == 3
    assert not torch.equal(thawed["1.running_mean"], start["1.running_mean"])


class Save(pl.Callback):
    """Writes a checkpoint after every step, and after every epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if not trainer.is_last_batch:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for p in params if p.requires_grad], lr=0.01)


def step_lr(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


@pytest.mark.parametrize("host", ["module", "taken over"])
@pytest.mark.parametrize("name", ["F-CAGrad", "F-GradNorm"])
def test_resumed_before_and_after_the_thaw_bit_for_bit(
    host: str, name: str, tmp_path: Path
) -> None:
    def run(at: int | None) -> Any:
        if host == "module":
            model = module(adam)
        else:
            model = Foreign(module(), adam)
            model.backbone = model.encoder
        more = [Save(tmp_path)] if at is None else []
        made = trainer([finetuning(), *METHODS[name](), *more], max_epochs=4)
        path = None if at is None else tmp_path / f"{at}.ckpt"
        made.fit(model, Batches(data()), ckpt_path=path, weights_only=False)
        rates = [group["lr"] for group in made.optimizers[0].param_groups]
        return model, rates

    whole, rates = run(None)
    for at in (2, 3, 4, 6, 7, 9):  # an epoch has three; the thaw is at the beginning of the second
        resumed, again = run(at)
        assert_identical(resumed, whole)
        assert again == rates
        assert all(p.requires_grad for p in resumed.parameters())


def test_a_scheduler_and_clipping_go_on_with_the_new_group() -> None:
    model = module(
        adam, trunk=without_norm(), lr_scheduler=step_lr, gradient_clip_val=0.1
    )  # fmt: skip
    look = fitted(model, [CAGrad(), TaskSAM(0.05)])
    assert [rates[0] for rates in look.rates] == pytest.approx([0.005, 0.0025, 0.00125])
    assert look.trained == [6, 10, 10]
