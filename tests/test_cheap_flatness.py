"""The cheaper second passes equal a naive re-implementation, in float64, over many steps."""

import copy
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from lightning_flatmtl import MultiTaskModule, TaskSAM
from lightning_flatmtl.aggregators import MGDA, CAGrad, GradDrop, LinearScalarization
from lightning_flatmtl.engine import MultiTaskStep, Sharpness, WholePasses
from tests import naive
from tests.helpers import Calls, assert_close, assert_identical, data, fit, module
from tests.hosts import HOSTS, smooth_trunk, values
from tests.naive_flatness import Flatness, kinds

VARIANTS: dict[str, dict[str, Any]] = {
    "refresh": {"refresh": 1},
    "refresh adaptive": {"refresh": 1, "adaptive": True, "rho": 0.5},
    "refresh joint": {"refresh": 1, "point": "joint"},
    "refresh second": {"refresh": 1, "arm": "second"},
    "refresh each": {"refresh": 1, "arm": "each"},
    "refresh all": {"refresh": 2},
    "refresh now and then": {"refresh": 0.4},
    "refresh more": {"refresh": 7},
    "common": {"perturbation": "common"},
    "common adaptive": {"perturbation": "common", "adaptive": True, "rho": 0.5},
    "common joint": {"perturbation": "common", "point": "joint"},
    "common direct": {"perturbation": "common", "arm": "direct"},
    "common refresh": {"perturbation": "common", "refresh": 1},
    "samo": {"perturbation": "samo"},
    "samo published": {"perturbation": "samo", "arm": "direct", "point": "joint", "beta": 0.1},
    "samo adaptive": {"perturbation": "samo", "adaptive": True, "rho": 0.5, "step": 0.001},
    "samo refresh": {"perturbation": "samo", "refresh": 1},
}
STEPS = 6


def losses_of(model: MultiTaskModule, batch: Any) -> dict[str, Any]:
    """The losses of a batch as functions of the parameters."""
    inputs, targets = batch
    criteria = {"a": nn.CrossEntropyLoss(), "b": nn.MSELoss()}

    def loss_of(task: str) -> Any:
        def loss(params: dict[str, Tensor]) -> Tensor:
            state = {**params, **{k: v.clone() for k, v in model.named_buffers()}}
            return criteria[task](functional_call(model, state, (inputs,))[task], targets[task])

        return loss

    return {task: loss_of(task) for task in criteria if task in targets}


def naive_fit(
    model: MultiTaskModule,
    aggregate: Any,
    batches: Sequence[Any],
    share: int = 1,
    radii: Sequence[float] = (),
    weights: dict[str, float] | None = None,
    **settings: Any,
) -> Flatness:
    """Train a copy by hand; BatchNorm in training mode uses batch statistics in every pass."""
    names = dict(model.named_parameters())
    shared = [n for n in names if n.startswith("encoder.")]
    heads = {t: [n for n in names if n.startswith(f"heads.{t}.")] for t in ("a", "b")}
    flatness = Flatness(shared, heads, lambda rows: aggregate(rows, rows.sum(1)), **settings)
    optimizer = model.configure_optimizers()
    model.train()
    for i in range(0, len(batches), share):
        if radii:
            flatness.rho = radii[i]
        at = {n: p.detach().clone() for n, p in names.items()}
        losses = [losses_of(model, batch) for batch in batches[i : i + share]]
        grads = flatness.directions(losses, at)
        for task, weight in (weights or {}).items():
            grads |= {n: weight * grads[n] for n in heads[task]}
        for n, p in names.items():
            p.grad = grads.get(n)
        optimizer.step()
    return flatness


@pytest.mark.parametrize("make", ["CAGrad", "MGDA"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_equal_the_naive_ones(variant: str, make: str) -> None:
    settings = {"rho": 0.05, **VARIANTS[variant]}
    aggregate = {"CAGrad": naive.cagrad(0.4), "MGDA": naive.mgda}[make]
    method = {"CAGrad": CAGrad, "MGDA": MGDA}[make]()
    ours = module()
    reference = copy.deepcopy(ours)
    trained = fit(ours, [method, TaskSAM(**kinds(**settings))], max_epochs=2)
    assert trained.global_step == STEPS
    flatness = naive_fit(reference, aggregate, [*data(), *data()], **settings)
    if settings.get("refresh") == 1:
        assert flatness.renewed == [["a", "b"], ["a"], ["b"], ["a"], ["b"], ["a"]]
    if settings.get("refresh") == 0.4:
        assert flatness.renewed == [["a", "b"], [], ["a"], [], ["b"], []]
    assert_close(ours, reference, 1e-10)


LINEAR = ["", "joint", *(name for name in VARIANTS if name[:4] in {"comm", "samo"})]


@pytest.mark.parametrize("variant", LINEAR)
@pytest.mark.parametrize("weights", [{}, {"a": 0.3, "b": 2.5}, {"a": 0.0, "b": 1.0}])
def test_weighted_losses_take_what_linearity_gives(variant: str, weights: dict[str, float]) -> None:
    settings = {"rho": 0.05, **VARIANTS.get(variant, {"point": variant or "separate"})}
    w = torch.tensor([weights.get(task, 1.0) for task in "ab"], dtype=torch.float64)
    ours = module()
    reference = copy.deepcopy(ours)
    method = LinearScalarization(weights) if weights else LinearScalarization()
    fit(ours, [method, TaskSAM(**kinds(**settings))], max_epochs=2)
    batches = [*data()] * 2
    naive_fit(reference, lambda rows, _: w @ rows, batches, weights=weights, **settings)
    assert_close(ours, reference, 1e-10)


@pytest.mark.parametrize(
    "variant", ["", "joint", "common", "common direct", "samo", "samo published"]
)
@pytest.mark.parametrize("make", [LinearScalarization, MGDA])
def test_a_watched_step_trains_the_same_to_the_last_bit(variant: str, make: Any) -> None:
    settings = kinds(**{"rho": 0.05, **VARIANTS.get(variant, {"point": variant or "separate"})})
    watched, left_alone = module(), module()

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.engine.watched = True

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            step = pl_module.last_step
            grams.append((step.gram, step.flat_gram, step.cross_gram))

    grams: list[tuple[Any, Any, Any]] = []
    for model, more in ((watched, [Watch()]), (left_alone, [])):
        torch.manual_seed(0)
        fit(model, [make(), TaskSAM(**settings), *more])
    assert_identical(watched, left_alone)
    split = settings.get("aggregate") != "direct"
    for gram, flat, cross in grams:
        assert gram.diagonal().min() > 0
        assert (flat is not None) == (cross is not None) == split
        assert flat is None or cross.square().max() <= (gram.max() * flat.max()) * (1 + 1e-9)


def test_weighted_losses_with_one_perturbation_take_two_backward_passes() -> None:
    passes = {}
    for name, sam in {"plain": [], "common": [TaskSAM(0.05, perturbation="common")]}.items():
        model = module(trunk=smooth_trunk())
        seen: list[Tensor] = []

        def watch(layer: nn.Module, inputs: Any, output: Tensor, seen: list[Tensor] = seen) -> None:
            output.register_hook(seen.append)

        model.encoder.register_forward_hook(watch)
        fit(model, [LinearScalarization(), *sam])
        passes[name] = len(seen)
    assert passes == {"plain": 3, "common": 6}


@pytest.mark.parametrize("variant", ["refresh", "common", "common joint", "samo", "samo refresh"])
def test_both_hosts_train_alike(variant: str) -> None:
    settings = kinds(**{"rho": 0.05, **VARIANTS[variant]})
    found = {name: make(trunk=smooth_trunk()) for name, make in HOSTS.items()}
    for model in found.values():
        fit(model, [CAGrad(), TaskSAM(**settings)], max_epochs=2)
    assert (values(found["module"]) - values(found["taken over"])).norm() < 1e-12


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("variant", ["refresh", "common", "common refresh", "samo"])
def test_accumulated_batches(variant: str, host: str) -> None:
    settings = {"rho": 0.05, **VARIANTS[variant]}
    reference = module(trunk=smooth_trunk())
    accumulated = {"accumulate_grad_batches": 3}
    kwargs = accumulated if host == "module" else {}
    ours = HOSTS[host](trunk=smooth_trunk(), **kwargs)
    callbacks = [CAGrad(), TaskSAM(**kinds(**settings))]
    trained = fit(ours, callbacks, max_epochs=4, **({} if kwargs else accumulated))
    assert trained.global_step == 4
    flatness = naive_fit(reference, naive.cagrad(0.4), [*data()] * 4, share=3, **settings)
    if "refresh" in settings:
        assert flatness.renewed == [["a", "b"], ["a"], ["b"], ["a"]]
    assert_close(ours, reference, 1e-10)


@pytest.mark.parametrize("variant", ["refresh", "refresh joint", "common refresh", "samo"])
def test_a_task_that_is_absent_now_and_then(variant: str) -> None:
    settings = {"rho": 0.05, **VARIANTS[variant]}
    present = ["ab", "ab", "a", "ab", "b", "b", "ab", "a", "ab", "ab"]
    batches = [
        (inputs, {t: y for t, y in targets.items() if t in tasks})
        for (inputs, targets), tasks in zip([*data()] * 4, present, strict=False)
    ]
    ours = module(trunk=smooth_trunk(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    reference = copy.deepcopy(ours)
    loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    fit(ours, [MGDA(), TaskSAM(**kinds(**settings))], loader)
    flatness = naive_fit(reference, naive.mgda, batches, **settings)
    if settings.get("refresh") == 1:
        turns = [["a", "b"], ["a"], ["a"], ["b"], ["b"], ["b"], ["a"], ["a"], ["b"], ["a"]]
        assert flatness.renewed == turns
    assert_close(ours, reference, 1e-10)


PASSES = {
    "full": ({}, 6 * 3),
    "refresh": ({"refresh": 1}, 6 + 2 + 5),
    "common": ({"perturbation": "common"}, 6 * 2),
    "samo": ({"perturbation": "samo"}, 6 * (1 + 4 + 2)),
    "last third": ({"start": 2 / 3}, 4 + 2 * 3),
    "refresh in the last half": ({"start": 0.5, "refresh": 1}, 3 + 3 + 2 + 1 + 1),
}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", PASSES)
def test_passes_of_the_encoder(name: str, host: str) -> None:
    settings, expected = PASSES[name]
    model = HOSTS[host]()
    calls = Calls(model.encoder)
    fit(model, [CAGrad(), TaskSAM(0.05, **settings)], max_epochs=2)
    # Where the model does not split, the heads' second pass runs all of it.
    heads = {"full": 12, "refresh": 7, "common": 12, "samo": 12, "last third": 4}
    own = heads.get(name, 4) if host == "taken over" else 0
    assert calls.count == expected + own


def test_the_plain_method_until_the_start() -> None:
    ours, plain = module(), module()
    seen: list[Tensor] = []

    class Seen(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(values(pl_module))

    fit(ours, [CAGrad(), TaskSAM(0.05, start=0.5), Seen()], max_epochs=2)
    ours_at, seen = seen, []
    fit(plain, [CAGrad(), Seen()], max_epochs=2)
    same = [torch.equal(a, b) for a, b in zip(ours_at, seen, strict=True)]
    assert same == [True, True, True, False, False, False]


def test_an_endless_fit_has_no_share() -> None:
    with pytest.raises(MisconfigurationException, match="Set one of the two, or start=0"):
        fit(module(), [TaskSAM(start=0.5)], max_epochs=-1)


def test_the_radius_grows() -> None:
    ours = module(trunk=smooth_trunk())
    reference = copy.deepcopy(ours)
    fit(ours, [CAGrad(), TaskSAM(0.4, rho_warmup=3)], max_epochs=2)
    radii = [0.1, 0.2, 0.3, 0.4, 0.4, 0.4]
    naive_fit(reference, naive.cagrad(0.4), [*data()] * 2, radii=radii)
    assert_close(ours, reference, 1e-10)


@pytest.mark.parametrize("refresh", [None, 1])
@pytest.mark.parametrize("method", [CAGrad, GradDrop, LinearScalarization])
def test_rows_on_the_host_change_nothing(refresh: int | None, method: Any) -> None:
    ours, plain = module(), module()
    fit(ours, [method(), TaskSAM(0.05, rows="cpu", refresh=refresh)], max_epochs=2)
    fit(plain, [method(), TaskSAM(0.05, refresh=refresh)], max_epochs=2)
    assert_close(ours, plain, 1e-13)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_rows_in_bfloat16_are_as_good_as_16_bits(accumulate: int) -> None:
    def trained(**settings: Any) -> Tensor:
        model = module(trunk=smooth_trunk(), accumulate_grad_batches=accumulate)
        fit(model, [CAGrad(), *([TaskSAM(0.1, **settings)] if settings else [])])
        return values(model)

    exact, rounded = trained(rows="float32"), trained(rows="bfloat16")
    flat = (exact - trained()).norm()
    assert 0 < (exact - rounded).norm() < flat * 2.0**-7


REFRESH = r"`refresh` must be an integer >= 1, a number in \(0, 1\) or None, got "
BAD = {
    "refresh=0": ({"refresh": 0}, REFRESH + "0"),
    "refresh=True": ({"refresh": True}, REFRESH + "True"),
    "refresh=1.0": ({"refresh": 1.0}, REFRESH + "1.0"),
    "start=1": ({"start": 1.0}, r"`start` must be in \[0, 1\), got 1.0"),
    "start=nan": ({"start": float("nan")}, r"`start` must be in \[0, 1\), got nan"),
    "warmup": ({"rho_warmup": -1}, "`rho_warmup` must be an integer >= 0, got -1"),
    "rows": ({"rows": "int8"}, "`rows` must be 'float32', 'bfloat16' or 'cpu', got 'int8'"),
    "perturbation": ({"perturbation": "none"}, "'global', 'local', 'common' or 'samo', got 'none'"),
    "beta": ({"samo_beta": 1.5}, r"`samo_beta` must be in \[0, 1\], got 1.5"),
    "step": ({"samo_step": 0.0}, r"`samo_step` must be in \(0, inf\), got 0.0"),
    "direct": ({"refresh": 1, "aggregate": "direct"}, "refresh=1 is about flat parts"),
    "direct rows": ({"rows": "cpu", "aggregate": "direct"}, "rows='cpu' is about flat parts"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_refused_in_one_sentence(name: str) -> None:
    settings, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        TaskSAM(0.05, **settings)


@pytest.mark.parametrize("settings", [{"perturbation": "common"}, {"refresh": 1}])
def test_an_error_in_the_second_pass_leaves_the_parameters(settings: dict[str, Any]) -> None:
    model = module(trunk=smooth_trunk())
    before = copy.deepcopy(model)
    calls = Calls(model.encoder)

    def stop(*_: Any) -> None:
        if calls.count == 2:
            raise KeyError("in the second pass")

    model.encoder.register_forward_hook(stop)
    with pytest.raises(KeyError):
        fit(model, [CAGrad(), TaskSAM(0.05, **settings)])
    assert_identical(model, before)


def test_what_an_overflow_has_left_is_not_used_again() -> None:
    """Flat parts that were not finite under a loss scale are renewed in the next update."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"trunk": nn.Linear(3, 4), "a": nn.Linear(4, 1), "b": nn.Linear(4, 1)})
    x = torch.randn(8, 3)
    huge = {"now": False}

    def losses() -> dict[str, Tensor]:
        features = net["trunk"](x)
        found = {task: net[task](features).square().mean() for task in "ab"}
        if huge["now"] and passes.repeated:
            found["a"] = found["a"] * torch.tensor(float("inf"))
        return found

    class Passes(WholePasses):
        repeated = False

        @contextmanager
        def repeating(self):
            with super().repeating():
                self.repeated = True
                yield

    step, sharpness = MultiTaskStep(), Sharpness(0.05, 0.05, refresh=1)
    scale = torch.tensor(4.0)
    turns = []
    for huge["now"] in (False, True, False, False):
        passes = Passes(losses, net)
        result = step(net, passes, None, sharpness, scale)
        assert result is not None
        turns.append("overflow" if result.overflow else sorted(result.perturbed.shared))
    assert turns == [["a", "b"], "overflow", ["a"], ["b"]]
