"""A term that belongs to no task: its gradient enters the step as it is, in both hosts."""

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_flatmtl import MultiTaskModule, TaskSAM
from lightning_flatmtl.aggregators import FAMO, CAGrad, GradDrop, LinearScalarization, PCGrad
from lightning_flatmtl.engine import NonFiniteError
from lightning_flatmtl.takeover import host_of
from tests.helpers import assert_close, assert_identical, data, fit, module
from tests.hosts import Foreign, foreign, single, values
from tests.test_bad_input import says

STRENGTH = 0.05
METHODS: dict[str, Any] = {
    "CAGrad": lambda: [CAGrad()],
    "F-CAGrad": lambda: [CAGrad(), TaskSAM(0.05)],
    "F-PCGrad joint": lambda: [PCGrad(), TaskSAM(0.5, point="joint", adaptive=True)],
    "F-GradDrop": lambda: [GradDrop(), TaskSAM(0.05)],
    "FAMO": lambda: [FAMO(lr=0.1)],
    "LS": lambda: [LinearScalarization()],
    "SAM": lambda: [TaskSAM(0.05)],
}


def weights(net: nn.Module) -> Tensor:
    """Half the squared norm of all weights, encoder and heads."""
    return STRENGTH / 2 * sum(p.square().sum() for p in net.parameters() if p.requires_grad)


class Penalised(MultiTaskModule):
    def penalty(self, batch, batch_idx):
        return weights(self)


class WholePenalised(Penalised):
    """Of losses that do not split."""

    def losses(self, batch, batch_idx):
        features = self.encoder(batch[0])
        return {t.name: t.loss(self.heads[t.name](features), batch[1][t.name]) for t in self.tasks}


class ForeignPenalised(Foreign):
    def penalty(self, batch: Any) -> Tensor:
        return weights(self)

    def training_step(self, batch, batch_idx):
        losses, penalty = self.losses(batch), self.penalty(batch)
        return {"loss": sum(losses.values()) + penalty, "losses": losses, "penalty": penalty}


HOSTS: dict[str, Any] = {
    "module": lambda **kw: module(kind=Penalised, **kw),
    "losses": lambda **kw: module(kind=WholePenalised, **kw),
    "taken over": lambda **kw: foreign(ForeignPenalised, **kw),
}


def decaying(params: Any) -> torch.optim.Optimizer:
    """The optimizer of the tests, with the gradient of the penalty as its weight decay."""
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=STRENGTH)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", METHODS)
def test_a_penalty_on_weights_is_weight_decay(host: str, name: str) -> None:
    """What the optimizer adds to the finished direction, it adds to the finished direction."""
    penalised, decayed = HOSTS[host](), module(optimizer=decaying)
    for net in (penalised, decayed):
        fit(net, METHODS[name](), max_epochs=2)
    assert_close(penalised, decayed, 1e-10)
    plain = module()
    fit(plain, METHODS[name](), max_epochs=2)
    assert (values(plain) - values(penalised)).norm() > 1e-3 * values(plain).norm()


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", ["CAGrad", "F-CAGrad", "LS"])
def test_it_makes_no_head_shared(host: str, name: str) -> None:
    owners: dict[str, Any] = {}

    class Look(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            named = dict(pl_module.named_parameters())
            owners.update(host_of(pl_module).engine.partition.state_dict(named)["owners"])

    fit(HOSTS[host](), [*METHODS[name](), Look()])
    heads = {name: owner for name, owner in owners.items() if name.startswith("heads.")}
    assert set(heads.values()) == {"a", "b"}
    assert {owner for name, owner in owners.items() if name not in heads} == {None}


@pytest.mark.parametrize("host", ["module", "taken over"])
@pytest.mark.parametrize("name", ["F-CAGrad", "FAMO"])
def test_with_accumulation_and_clipping(host: str, name: str) -> None:
    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3}
    net, reference = HOSTS[host](**(settings if host == "module" else {})), module(**settings)

    fit(net, METHODS[name](), data(40), **({} if host == "module" else settings))

    class Decay(pl.Callback):
        """Adds the penalty's gradient to each update; the last one has one batch of two."""

        def on_after_backward(self, trainer, pl_module):
            share = (trainer.fit_loop.batch_idx % 2 + 1) / 2
            for p in pl_module.parameters():
                p.grad += STRENGTH * p.detach() * share

    fit(reference, [*METHODS[name](), Decay()], data(40))
    assert_close(net, reference, 1e-10)


class Noted(Penalised):
    """Penalises features and its own weights, and starts from a parameter no task reaches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spare = nn.Parameter(torch.ones(2))

    def encode(self, batch):
        self.features = super().encode(batch)
        return self.features

    def penalty(self, batch, batch_idx):
        if batch_idx == 1:
            return None
        return self.features.square().mean() + self.spare.square().sum()


@pytest.mark.parametrize("gradients", ["parameters", "features"])
def test_a_penalty_on_features_as_in_a_sum(gradients: str) -> None:
    """It shares its graph with the losses; without a method the step is that of their sum."""
    plain, linear = module(kind=Noted), module(kind=Noted, gradients=gradients)

    class Mean(LinearScalarization):
        """The same by way of the gradients."""

        needs_gradients = True

    fit(plain, [], max_epochs=2)
    fit(linear, [Mean()], max_epochs=2)
    assert_close(linear, plain, 1e-10)
    assert not torch.equal(plain.spare, torch.ones(2))


def test_a_penalty_is_logged_apart() -> None:
    net = module(kind=Noted)
    done = fit(net, [CAGrad()])
    assert float(done.callback_metrics["train/penalty"]) > 0
    shown = {k: float(v) for k, v in done.callback_metrics.items()}
    assert shown["train/loss"] == pytest.approx(shown["train/a/loss"] + shown["train/b/loss"])


@pytest.mark.parametrize("host", ["module", "taken over"])
@pytest.mark.parametrize("name", ["F-CAGrad", "FAMO"])
def test_under_a_loss_scale(host: str, name: str) -> None:
    """The penalty's gradient is divided by the scale like those of the tasks."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled, whole = HOSTS[host]().float(), module(optimizer=decaying).float()
    start = values(scaled)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    fit(scaled, METHODS[name](), single(data()), plugins=plugins)
    fit(whole, METHODS[name](), single(data()))
    assert (values(scaled) - values(whole)).norm() < 0.01 * (values(whole) - start).norm()


@pytest.mark.parametrize("host", ["module", "taken over"])
@pytest.mark.parametrize("name", ["F-CAGrad", "FAMO"])
def test_one_that_is_not_finite(host: str, name: str) -> None:
    net = HOSTS[host]()
    net.penalty = lambda *_: weights(net) * float("inf")
    kept = copy.deepcopy(net.state_dict())
    with says(NonFiniteError, "The penalty and its gradient must be finite"):
        fit(net, METHODS[name]())
    assert all(torch.equal(p, kept[n]) for n, p in net.named_parameters())


@pytest.mark.parametrize("host", ["module", "taken over"])
@pytest.mark.parametrize(
    ("given", "words"),
    [(torch.ones(3, requires_grad=True), "shape [3]"), ("no", "got str"), ([], "got list")],
)
def test_one_that_is_no_scalar(host: str, given: Any, words: str) -> None:
    net = HOSTS[host]()
    if host == "module":
        net.penalty = lambda *_: given
    else:
        own = net.losses
        net.training_step = lambda batch, batch_idx: {"losses": own(batch), "penalty": given}
    with says(ValueError, "The penalty must be a scalar tensor or None", words):
        fit(net, [CAGrad()])


# A penalty that warms up.


class WarmsUp(ForeignPenalised):
    """The penalty begins with the second epoch."""

    names_it = True

    def training_step(self, batch, batch_idx):
        out = super().training_step(batch, batch_idx)
        factor = float(self.current_epoch >= 1)
        out["loss"] = sum(out["losses"].values()) + factor * out["penalty"]
        out["penalty"] = factor * out["penalty"]
        if not self.names_it:
            del out["penalty"]
        return out


class Unnamed(WarmsUp):
    names_it = False


@pytest.mark.parametrize("name", ["CAGrad", "F-CAGrad"])
def test_a_penalty_that_warms_up(name: str) -> None:
    """It is trained from the epoch on in which plain training would begin with it."""
    net, reference = foreign(WarmsUp), foreign()

    class Decay(pl.Callback):
        def on_after_backward(self, trainer, pl_module):
            for p in pl_module.parameters() if trainer.current_epoch >= 1 else ():
                p.grad += STRENGTH * p.detach()

    fit(net, METHODS[name](), max_epochs=3)
    fit(reference, [*METHODS[name](), Decay()], max_epochs=3)
    assert_close(net, reference, 1e-10)


@pytest.mark.parametrize("every", [1, 2, 50])
def test_a_term_that_comes_later_is_noticed_where_the_step_logs(every: int) -> None:
    """The first batch has none; with three batches an epoch step 50 is never logged."""
    noticed: list[int] = []

    class When(Unnamed):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            noticed.append(host_of(self)._total_told)

    net = foreign(When)
    if every == 50:
        fit(net, [CAGrad()], max_epochs=3, log_every_n_steps=every)
        assert not any(noticed)
        return
    with pytest.warns(UserWarning, match="of the total is not trained") as told:
        fit(net, [CAGrad()], max_epochs=3, log_every_n_steps=every)
    assert len([w for w in told if "not trained" in str(w.message)]) == 1
    assert noticed.index(True) == 3


def test_a_constant_share_of_less_than_a_percent_is_noticed() -> None:
    class Small(Foreign):
        def training_step(self, batch, batch_idx):
            losses = self.losses(batch)
            total = sum(losses.values())
            extra = 1e-6 * self.encoder[0].weight.square().sum()
            return {"loss": total + extra, "losses": losses}

    net = foreign(Small)
    with pytest.warns(UserWarning, match="of the total is not trained") as told:
        fit(net, [CAGrad()], max_epochs=2)
    (message,) = [str(w.message) for w in told if "not trained" in str(w.message)]
    assert "penalty" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_not_noticed(dtype: torch.dtype) -> None:
    """Terms of any size, summed in another order: a warning would be an error."""

    class Sums(ForeignPenalised):
        def training_step(self, batch, batch_idx):
            out = super().training_step(batch, batch_idx)
            out["losses"] = {t: loss * 10.0 ** (batch_idx - 1) for t, loss in out["losses"].items()}
            terms = [out["penalty"], *reversed(out["losses"].values())]
            return {**out, "loss": torch.stack(terms).sum()}

    net = foreign(Sums)
    loader = data(64)
    if dtype == torch.float32:
        net, loader = net.float(), single(loader)
    fit(net, [LinearScalarization()], loader, log_every_n_steps=1)


def test_without_callbacks_it_is_plain_lightning() -> None:
    plain, linear = foreign(ForeignPenalised), foreign(ForeignPenalised)
    fit(plain, [], max_epochs=2)
    fit(linear, [LinearScalarization()], max_epochs=2)
    assert_identical(plain, linear)
