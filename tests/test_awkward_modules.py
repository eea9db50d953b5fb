"""Modules that do more in a step than compute losses, and what they are told."""

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_flatmtl import MultiTaskModule, Task, TaskSAM
from lightning_flatmtl.aggregators import FAMO, CAGrad
from lightning_flatmtl.engine import FlatMTLError
from tests.helpers import assert_close, data, fit, module, trainer
from tests.hosts import HOSTS, Foreign, foreign, values
from tests.test_bad_input import says

METHOD = [CAGrad(), TaskSAM(0.1)]


def method() -> list[pl.Callback]:
    return copy.deepcopy(METHOD)


class Centred(nn.Module):
    """An encoder with a moving mean, which the heads' losses read."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        z = self.inner(x)
        self.mean = 0.5 * self.mean + 0.5 * z.detach().mean(0)
        return z


class ReadsTheMean(MultiTaskModule):
    def task_loss(self, task: Task, features: Any, batch: Any) -> Tensor | None:
        return super().task_loss(task, features - self.encoder.mean, batch)


class ReadsItWhole(ReadsTheMean):
    def losses(self, batch, batch_idx):
        return super().losses(batch, batch_idx)


@pytest.mark.parametrize("sam", [{}, {"rho_heads": 0.0}, {"point": "joint"}])
def test_a_buffer_that_the_encoder_moves_and_a_loss_reads(sam: dict[str, Any]) -> None:
    runs = []
    for kind in (ReadsTheMean, ReadsItWhole):
        ours = module(kind=kind)
        ours.encoder = Centred(ours.encoder).double()
        fit(ours, [CAGrad(), TaskSAM(0.1, **sam)])
        runs.append(ours)
    assert_close(*runs, 1e-12)


class Teacher(Foreign):
    """Moves an averaged copy of the trunk in every step."""

    guarded = False

    def training_step(self, batch, batch_idx):
        if not hasattr(self, "teacher"):
            self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)
        from lightning_flatmtl.takeover import second_pass

        if not (self.guarded and second_pass(self)):
            with torch.no_grad():
                for p, q in zip(self.teacher.parameters(), self.encoder.parameters(), strict=True):
                    p.lerp_(q, 0.1)
        return super().training_step(batch, batch_idx)


def test_frozen_parameters_that_move_in_a_second_pass() -> None:
    with says(FlatMTLError, "changed a parameter that is not trained", "second_pass"):
        fit(foreign(Teacher), method())
    guarded = foreign(Teacher)
    guarded.guarded = True
    fit(guarded, method())
    fit(foreign(Teacher), [CAGrad()])  # no second pass


def test_sparse_gradients() -> None:
    class Sparse(Foreign):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.table = nn.Embedding(3, 5, sparse=True).double()

        def losses(self, batch):
            z = self.encoder(batch[0]) + self.table(batch[1]["a"])
            return {t: self.criteria[t](head(z), batch[1][t]) for t, head in self.heads.items()}

    with says(ValueError, "must be dense, got a sparse one", "sparse=False"):
        fit(foreign(Sparse), method())


def test_complex_parameters() -> None:
    class Complex(Foreign):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.phase = nn.Parameter(torch.ones(5, dtype=torch.complex128))

        def losses(self, batch):
            z = (self.encoder(batch[0]) * self.phase).real
            return {t: self.criteria[t](head(z), batch[1][t]) for t, head in self.heads.items()}

    with says(ValueError, "complex parameters are not supported", "two real parameters"):
        fit(foreign(Complex), method())


class Fails(pl.Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        raise RuntimeError("in the batch")

    def on_exception(self, *_: Any) -> None:
        raise RuntimeError("once more")


def test_a_fit_that_could_not_give_the_step_back() -> None:
    ours, plain = foreign(), foreign()
    with pytest.raises(RuntimeError, match="once more"):
        fit(ours, [Fails(), *method()])
    state = copy.deepcopy(ours.state_dict())
    plain.load_state_dict(state)
    fit(ours), fit(plain)
    assert torch.equal(values(ours), values(plain))
    ours.load_state_dict(state)
    plain.load_state_dict(state)
    fit(ours, method()), fit(plain, method())
    assert torch.equal(values(ours), values(plain))
    assert "training_step" not in vars(ours)


def test_callbacks_know_nothing_of_the_module_after_a_fit() -> None:
    callbacks = method()
    before = [repr(c) for c in callbacks]
    fit(foreign(), callbacks)
    assert [repr(c) for c in callbacks] == before
    assert "log" not in vars(copy.deepcopy(callbacks[0]))


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return out


@pytest.mark.parametrize("host", HOSTS)
def test_a_checkpointed_batch_norm_moves_once_a_batch(host: str) -> None:
    ours = HOSTS[host]()
    ours.encoder = Checkpointed(ours.encoder)
    fit(ours, method())
    norm = next(m for m in ours.modules() if isinstance(m, nn.BatchNorm2d))
    assert norm.num_batches_tracked == 3
    reference = HOSTS[host]()
    fit(reference, method())
    assert_close(ours, reference, 1e-12)
    other = next(m for m in reference.modules() if isinstance(m, nn.BatchNorm2d))
    assert torch.equal(norm.running_mean, other.running_mean)


def stepping(change: Any) -> Any:
    """A module whose step returns something changed."""

    class Changed(Foreign):
        def training_step(self, batch, batch_idx):
            return change(self, super().training_step(batch, batch_idx))

    return foreign(Changed)


def test_tasks_are_named_by_strings() -> None:
    with says(MisconfigurationException, "named by strings, got [0, 1]"):
        fit(stepping(lambda _, out: {"losses": dict(enumerate(out["losses"].values()))}), method())


@pytest.mark.parametrize("counts", [None, torch.tensor(3), "many"])
def test_counts_of_the_modules_own(counts: Any) -> None:
    fit(stepping(lambda _, out: {**out, "counts": counts}), method())


def test_counts_that_lack_a_task() -> None:
    with says(MisconfigurationException, '"counts"', "without task 'b'"):
        fit(stepping(lambda _, out: {**out, "counts": {"a": 3}}), method())


def test_a_count_of_zero_leaves_the_loss_out() -> None:
    def change(_: Any, out: Any) -> Any:
        losses = {**out["losses"], "c": out["losses"]["a"] * float("nan")}
        return {**out, "losses": losses, "counts": {"a": 8, "b": 8, "c": 0}}

    ours, reference = stepping(change), foreign()
    fit(ours, method()), fit(reference, method())
    assert torch.equal(values(ours), values(reference))


def test_a_total_that_is_no_scalar() -> None:
    with says(MisconfigurationException, '"loss" must be a scalar', "[2]"):
        fit(stepping(lambda _, out: {**out, "loss": torch.ones(2)}), method())


def test_a_loss_that_vanishes_in_the_second_pass() -> None:
    from lightning_flatmtl.takeover import second_pass

    def change(ours: Any, out: Any) -> Any:
        if second_pass(ours):
            out["losses"].pop("a")
        return out

    with says(FlatMTLError, "task 'a' was there at first", "the same losses"):
        fit(stepping(change), method())


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("shared_parameters", lambda self: self.encoder, "a list of"),
        ("shared_parameters", lambda self: self.encoder.named_parameters(), "['tuple']"),
        ("shared_parameters", lambda self: 3, "not iterable"),
        ("task_parameters", lambda self: {}, "Rename"),
    ],
)
def test_declarations_of_another_form(name: str, given: Any, words: str) -> None:
    kind = type("Declares", (Foreign,), {name: given})
    with says(MisconfigurationException, name, words):
        fit(foreign(kind), method())


def test_missing_labels_that_no_target_can_be() -> None:
    head = nn.Linear(5, 2)
    with pytest.raises(TypeError, match="which no target of type torch.int64 can be"):
        Task("a", head, missing=float("nan")).labelled(torch.ones(2), torch.ones(2).long())
    with pytest.raises(TypeError, match="which no target of type torch.bool can be"):
        Task("a", head, missing=-1).labelled(torch.ones(2), torch.ones(2).bool())


def test_only_a_method_that_looks_again_keeps_the_batch() -> None:
    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_: Any) -> None:
            self.kept = bool(pl_module.training_step.fit._latest)

    looks = Looks()
    for callbacks, kept in (([CAGrad()], False), ([FAMO()], True)):
        trainer([*callbacks, looks]).fit(foreign(), data())
        assert looks.kept is kept
