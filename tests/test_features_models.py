"""Models that are compiled, checkpointed or thawed, and hooks on parameters."""

import shutil
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_flatmtl import MultiTaskModule, TaskSAM
from lightning_flatmtl.aggregators import CAGrad, LinearScalarization
from lightning_flatmtl.takeover import TakeOver
from tests.features import (
    HOSTS,
    SUMS,
    Callbacks,
    Existing,
    active,
    assert_same_run,
    assert_trained,
    default_optimizer,
    loader,
    run,
)
from tests.helpers import assert_close, fit, module, sgd

paths = pytest.mark.parametrize("path", SUMS)
hosts = pytest.mark.parametrize("host", HOSTS)


@pytest.fixture
def fresh_compiler(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Nothing compiled before, in memory or on disk."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(backend: str) -> Any:
    def prepare(model: Any) -> None:
        torch.compiler.reset()
        model.encoder.compile(backend=backend)

    return prepare


def check_compiled_encoder(host: str, backend: str) -> None:
    settings = {"prepare": compiled(backend), "max_epochs": 1}
    plain = run("take-over", [], max_epochs=1)
    for method in (list, *SUMS.values()):
        assert_same_run(run(host, method(), **settings), plain)
    # Perturbed parameters are seen by the compiled graph.
    ours = run(host, active(), **settings)
    assert_trained(ours)
    assert_same_run(ours, run(host, active(), max_epochs=1))


@hosts
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_encoder(host: str) -> None:
    check_compiled_encoder(host, "aot_eager")


def inductor(test: Any) -> Any:
    """Mark a test that needs the default backend of ``torch.compile``."""
    for mark in (
        pytest.mark.slow,
        pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler"),
        pytest.mark.usefixtures("fresh_compiler"),
        pytest.mark.filterwarnings("ignore"),  # inductor's own, different in every version
    ):
        test = mark(test)
    return test


@hosts
@inductor
def test_an_encoder_compiled_by_inductor(host: str) -> None:
    check_compiled_encoder(host, "inductor")


@hosts
@inductor
def test_an_encoder_compiled_in_an_earlier_plain_fit(host: str) -> None:
    """Its graphs reuse the memory of what they are given, and would give wrong task gradients."""
    settings = {"prepare": lambda model: model.encoder.compile(), "max_epochs": 1}
    plain = run("take-over", [], **settings)
    assert_same_run(run(host, SUMS["gradients"](), **settings), plain)


class Quiet:
    """Logs nothing: ``self.log`` takes the compiler longer than the net."""

    def logged(self, stage, batch):
        losses = self.losses(batch)
        return {"loss": losses["a"] + losses["b"], "losses": losses}

    def log(self, *args: Any, **kwargs: Any) -> None:
        pass

    def configure_optimizers(self):
        return sgd(self.parameters())


class Declares:
    def shared_parameters(self):
        return self.encoder.parameters()

    def task_parameters(self, task):
        return self.heads[task].parameters()


class Whole(Quiet, Existing):
    """To be compiled as a whole."""


class WholeDeclared(Declares, Whole):
    """The same, and it says what is shared."""


class WholeModule(Quiet, MultiTaskModule):
    """A MultiTaskModule to be compiled as a whole."""


def fit_whole(kind: type, callbacks: Callbacks, compile_it: bool = True) -> Any:
    model = module(kind=kind) if issubclass(kind, MultiTaskModule) else kind()
    given = torch.compile(model, backend="aot_eager") if compile_it else model
    fit(given, callbacks, loader(24))
    step = vars(model).get("training_step")  # Lightning has put the compiled one there
    assert (step is not None) is compile_it
    assert not isinstance(step, TakeOver)
    return model


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("path", SUMS)
def test_a_whole_existing_module_compiled(path: str) -> None:
    kind = Whole if path == "losses" else WholeDeclared
    assert_close(fit_whole(kind, SUMS[path]()), fit_whole(kind, [], compile_it=False), 1e-12)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_method_on_a_whole_existing_module_compiled() -> None:
    ours = fit_whole(WholeDeclared, active())
    assert_close(ours, fit_whole(WholeDeclared, active(), compile_it=False), 1e-12)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_whole_existing_module_compiled_must_say_what_is_shared() -> None:
    with pytest.raises(ValueError, match="Override `shared_parameters` and `task_parameters`"):
        fit_whole(Whole, active())


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("method", [list, *SUMS.values(), active], ids=["none", *SUMS, "active"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler's own look
def test_a_whole_multi_task_module_compiled(method) -> None:
    ours = fit_whole(WholeModule, method())
    assert_close(ours, fit_whole(WholeModule, method(), compile_it=False), 1e-12)


class Checkpointed(nn.Module):
    """Everything behind the first layer is computed again in the backward pass."""

    def __init__(self, trunk: nn.Sequential, use_reentrant: bool) -> None:
        super().__init__()
        self.first, self.rest = trunk[0], trunk[1:]
        self.use_reentrant = use_reentrant

    def forward(self, x):
        return checkpoint(self.rest, self.first(x), use_reentrant=self.use_reentrant)


def checkpointed(use_reentrant: bool) -> Any:
    def prepare(model: Any) -> None:
        model.encoder = Checkpointed(model.encoder, use_reentrant)

    return prepare


@hosts
@paths
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_gradient_checkpointing(host: str, path: str, use_reentrant: bool) -> None:
    settings = {"prepare": checkpointed(use_reentrant), "limit_val_batches": 0}
    # A reentrant checkpoint moves the running statistics twice a batch in plain training.
    plain = run("take-over", [], **{**settings, "prepare": checkpointed(False)})
    assert_same_run(run(host, SUMS[path](), **settings), plain)
    ours = run(host, active(), **settings)
    assert_same_run(ours, run(host, active(), limit_val_batches=0))


class Backbone:
    """The encoder under the name that BackboneFinetuning looks for."""

    @property
    def backbone(self):
        return self.encoder

    def configure_optimizers(self):
        return sgd([p for p in self.parameters() if p.requires_grad])


def thawing() -> BackboneFinetuning:
    return BackboneFinetuning(
        unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.01, train_bn=False
    )


def frozen_first(host: str, callbacks: Callbacks) -> Any:
    configure = Backbone.configure_optimizers
    return run(host, [*callbacks, thawing()], configure, Backbone, max_epochs=3)


@hosts
@paths
def test_backbone_finetuning(host: str, path: str) -> None:
    plain = frozen_first("take-over", [])
    assert len(plain.optimizers[0].param_groups) == 2
    assert_same_run(frozen_first(host, SUMS[path]()), plain)


@hosts
def test_a_method_with_backbone_finetuning(host: str) -> None:
    assert_trained(frozen_first(host, active()))


@hosts
@pytest.mark.parametrize(
    ("callbacks", "of_shared", "of_head"),
    [
        ([], 1, 1),
        ([LinearScalarization()], 1, 1),
        ([CAGrad()], 2 + 1, 1 + 1),
        ([CAGrad(), TaskSAM(0.05)], 2 + 2 + 1, 1 + 1 + 1),
        ([CAGrad(), TaskSAM(0.05, point="joint")], 2 + 2 + 1, 1 + 1 + 1),
    ],
)
def test_a_hook_on_a_parameter_fires_in_every_backward_pass(
    host: str, callbacks: Callbacks, of_shared: int, of_head: int
) -> None:
    """One per task and pass in which the parameter is differentiated, and one for the step."""
    fired = {"shared": 0, "head": 0, "accumulated": 0}

    def count(which: str) -> Any:
        def hook(_: Any) -> None:
            fired[which] += 1

        return hook

    def prepare(model: Any) -> None:
        shared, head = model.encoder[0].weight, model.heads["b"].weight
        shared.register_hook(count("shared"))
        head.register_hook(count("head"))
        shared.register_post_accumulate_grad_hook(count("accumulated"))

    run(host, callbacks, default_optimizer, prepare=prepare, max_steps=1, limit_val_batches=0)
    assert fired == {"shared": of_shared, "head": of_head, "accumulated": 1}
