"""SharpnessMonitor: its figures against a computation by hand, and that it only looks."""

import csv
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_flatmtl import MultiTaskModule, Task, TaskSAM
from lightning_flatmtl.aggregators import FAMO, CAGrad
from lightning_flatmtl.callbacks import GradientConflict, SharpnessMonitor
from lightning_flatmtl.callbacks._eigenvalue import top_eigenvalue
from lightning_flatmtl.engine import FlatMTLError
from tests.helpers import Calls, assert_identical, data, fit, module, tasks
from tests.hosts import HOSTS, Foreign, foreign, smooth_trunk

RHO = 0.3
CRITERIA = {"a": nn.CrossEntropyLoss(), "b": nn.MSELoss()}
Vector = Callable[[Tensor], Tensor]


class OfTask:
    """The loss of a task as a function of a vector, of the shared parameters and of its head."""

    def __init__(self, net: Any, batch: Any, task: str) -> None:
        self.named = {f"encoder.{n}": p for n, p in net.encoder.named_parameters()}
        self.shared = sum(p.numel() for p in self.named.values())
        self.named |= {f"heads.{task}.{n}": p for n, p in net.heads[task].named_parameters()}
        self.net, self.task, self.batch = net, task, batch
        self.at = torch.cat([p.detach().reshape(-1) for p in self.named.values()])

    def __call__(self, vector: Tensor) -> Tensor:
        pieces = torch.split(vector, [p.numel() for p in self.named.values()])
        values = [v.view(p.shape) for v, p in zip(pieces, self.named.values(), strict=True)]
        values = dict(zip(self.named, values, strict=True))

        def part(prefix: str) -> dict[str, Tensor]:
            return {
                name.removeprefix(prefix): value
                for name, value in values.items()
                if name.startswith(prefix)
            }

        x, targets = self.batch
        head = f"heads.{self.task}."
        features = functional_call(self.net.encoder, part("encoder."), (x,))
        outputs = functional_call(self.net.heads[self.task], part(head), (features,))
        return CRITERIA[self.task](outputs, targets[self.task])

    def step(self, block: slice, adaptive: bool) -> Tensor:
        """The perturbation of some of the parameters, by their own norm."""
        at = self.at.clone().requires_grad_()
        (g,) = torch.autograd.grad(self(at), at)
        w = self.at.abs() if adaptive else torch.ones_like(g)
        only = torch.zeros_like(g)
        only[block] = (w.square() * g)[block] * RHO / (w * g)[block].norm()
        return only

    def rise(self, step: Tensor) -> float:
        return float(self(self.at + step) - self(self.at))

    def eigenvalue(self) -> float:
        hessian = torch.autograd.functional.hessian(self, self.at, vectorize=True)
        return float(torch.linalg.eigvalsh((hessian + hessian.T) / 2)[-1])


def by_hand(net: Any, batch: Any, kind: str, adaptive: bool, curved: bool) -> dict[str, float]:
    found = {}
    for task in CRITERIA:
        loss = OfTask(net, batch, task)
        shared, head, both = slice(0, loss.shared), slice(loss.shared, None), slice(None)
        if kind == "own":
            found[f"sharpness/{task}"] = loss.rise(loss.step(both, adaptive))
        else:
            steps = [loss.step(shared, adaptive), loss.step(head, adaptive)]
            if kind == "joint":
                found[f"sharpness/{task}"] = loss.rise(sum(steps))
            else:
                found[f"sharpness/{task}"] = loss.rise(steps[0])
                found[f"sharpness/{task}/head"] = loss.rise(steps[1])
        if curved:
            found[f"sharpness/{task}/top_eigenvalue"] = loss.eigenvalue()
    return found


class ByHand(pl.Callback):
    """Before every batch: the figures, by nothing but autograd."""

    def __init__(self, kind: str, adaptive: bool = False, curved: bool = True) -> None:
        self.settings = kind, adaptive, curved
        self.expected: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer, net, batch, batch_idx):
        self.expected.append(by_hand(net, batch, *self.settings))


EXACTLY = {"top_eigenvalue": True, "iterations": 1000, "tolerance": 1e-6}


def rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def by_step(path: Path) -> list[dict[str, float]]:
    steps: dict[int, dict[str, float]] = {}
    for row in rows(path):
        steps.setdefault(int(row["step"]), {})[row["name"]] = float(row["value"])
    return list(steps.values())


CASES: dict[str, tuple[str, Callable[[bool], list[pl.Callback]], dict[str, Any]]] = {
    "F-CAGrad": ("separate", lambda a: [TaskSAM(rho=RHO, adaptive=a), CAGrad()], {}),
    "F-LS, joint": ("joint", lambda a: [TaskSAM(rho=RHO, adaptive=a, point="joint")], {}),
    "F-LS, own": ("own", lambda a: [TaskSAM(rho=0.1)], {"own": True}),
    "TaskSAM(0)": ("own", lambda a: [TaskSAM(rho=0.0)], {}),
    "CAGrad": ("own", lambda a: [CAGrad()], {}),
    "none": ("own", lambda a: [], {}),
}


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("host", HOSTS)
def test_the_figures_are_those_of_a_computation_by_hand(host, case, adaptive, tmp_path) -> None:
    kind, method, settings = CASES[case]
    file, hand = tmp_path / "new" / "sharpness.csv", ByHand(kind, adaptive)
    looks = SharpnessMonitor(
        1, rho=RHO, adaptive=adaptive, csv=file, **settings, **EXACTLY
    )  # fmt: skip
    net = HOSTS[host](trunk=smooth_trunk())
    fit(net, [looks, hand, *method(adaptive)], data(n=24), max_epochs=2)
    assert len(hand.expected) == 6
    written = by_step(file)
    assert [*map(set, written)] == [*map(set, hand.expected)]
    for found, expected in zip(written, hand.expected, strict=True):
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-8, abs=1e-10), name
    assert {float(row["epoch"]) for row in rows(file)} == {0.0, 1.0}


def test_the_largest_eigenvalue_is_not_the_one_of_largest_magnitude(tmp_path) -> None:
    class Saddle(MultiTaskModule):
        """Losses whose Hessians have large negative eigenvalues; those of "b" are all negative."""

        def losses(self, batch: Any, batch_idx: int) -> Any:
            at = torch.cat([p.reshape(-1) for p in self.encoder.parameters()])
            curvature = torch.linspace(-9.0, 2.0, len(at), dtype=at.dtype)
            lower = curvature - 4
            return {"a": (curvature * at.square()).sum() / 2, "b": (lower * at.square()).sum() / 2}

    net = Saddle(nn.Linear(6, 3), optimizer=lambda p: torch.optim.SGD(p, lr=0.01)).double()
    file = tmp_path / "sharpness.csv"
    fit(net, [SharpnessMonitor(1, csv=file, **EXACTLY)])
    for found in by_step(file):
        assert found["sharpness/a/top_eigenvalue"] == pytest.approx(2.0, rel=1e-8)
        assert found["sharpness/b/top_eigenvalue"] == pytest.approx(-2.0, rel=1e-8)


SPECTRA = {
    "opposed": torch.linspace(-1, 1, 60),
    "mostly negative": torch.cat([torch.linspace(-100, -1, 59), torch.tensor([0.5])]),
    "negative": torch.linspace(-3, -2, 60),
    "decaying": 0.8 ** torch.arange(60),
    "twice": torch.cat([torch.linspace(0, 1, 58), torch.tensor([4.0, 4.0])]),
    "one": torch.tensor([-2.0]),
    "zero": torch.zeros(7),
}


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_an_eigenvalue_is_found(spectrum, kind) -> None:
    eigenvalues = SPECTRA[spectrum].double()
    g = torch.Generator().manual_seed(3)
    n = len(eigenvalues)
    turn, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=g))
    matrix = (turn * eigenvalues @ turn.T).to(kind)
    start = torch.randn(n, generator=g, dtype=kind)
    tolerance = 1e-4 if kind == torch.float32 else 1e-8
    found = top_eigenvalue(lambda v: matrix @ v, start, 400, tolerance)
    assert found.converged
    assert found.value == pytest.approx(float(eigenvalues.max()), rel=1e-5, abs=1e-6)


def test_a_search_that_ends_early_says_so_once_and_is_below() -> None:
    net = module(trunk=smooth_trunk())
    looks = SharpnessMonitor(1, top_eigenvalue=True, iterations=1, tolerance=1e-9)
    hand = ByHand("own")
    with pytest.warns(UserWarning, match="Allow more iterations or a larger tolerance") as said:
        made = fit(net, [looks, hand])
    assert len([w for w in said if "iterations" in str(w.message)]) == 1
    for task in CRITERIA:
        name = f"sharpness/{task}/top_eigenvalue"
        assert made.callback_metrics[name] < hand.expected[-1][name]


class Busy(Foreign):
    """Draws, counts and logs in its step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        found = super().training_step(batch, batch_idx)
        self.runs = getattr(self, "runs", 0) + 1
        self.log("noise", torch.rand(()), on_step=True, on_epoch=True)
        self.log("loss", found["loss"].detach(), on_epoch=True)
        return found

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        for task, loss in self.losses(batch).items():
            self.log(f"val/{task}/loss", loss)


class BusyModule(MultiTaskModule):
    def losses(self, batch: Any, batch_idx: int) -> Any:
        found = super().losses(batch, batch_idx)
        self.runs = getattr(self, "runs", 0) + 1
        self.log("noise", torch.rand(()), on_epoch=True)
        return found


class Drawn(pl.Callback):
    """Where the random streams have come to, and what was logged."""

    def on_fit_end(self, trainer, net):
        self.found = torch.rand(3).tolist(), getattr(net, "runs", None)


def noisy(host: str) -> Any:
    trunk = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.4), nn.Tanh(), nn.Flatten(),
        nn.Linear(64, 5),
    )  # fmt: skip
    return HOSTS[host](trunk=trunk, kind={"module": BusyModule, "taken over": Busy}[host])


SETTINGS = {
    "as it comes": {},
    "own": {"own": True, "adaptive": True},
    "curved": {"top_eigenvalue": True, "iterations": 3, "tolerance": 1.0},
    "val": {"data": "val", "top_eigenvalue": True, "iterations": 3, "tolerance": 1.0},
}
METHODS = {
    "none": list,
    "F-CAGrad": lambda: [TaskSAM(rho=RHO), CAGrad()],
    "FAMO": lambda: [FAMO()],
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("host", HOSTS)
def test_training_is_the_same_bit_for_bit(host, method, settings) -> None:
    nets, logs, drawn = [], [], []
    looks = SharpnessMonitor(2, **SETTINGS[settings])
    for first in ([looks], []):
        torch.manual_seed(6)
        net, draws = noisy(host), Drawn()
        torch.manual_seed(7)
        callbacks = [*first, draws, *METHODS[method]()]
        made = fit(net, callbacks, data(n=40), data(seed=2), max_epochs=2)
        nets.append(net)
        logged = {k: v.item() for k, v in made.callback_metrics.items()}
        logs.append({k: v for k, v in logged.items() if not k.startswith("sharpness")})
        drawn.append(draws.found)
        assert (logs[-1] == logged) is (first == [])
    assert_identical(*nets)
    assert logs[0] == logs[1]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("point", ["separate", "joint"])
@pytest.mark.parametrize("host", HOSTS)
def test_no_pass_is_added_where_there_is_a_second_one(host, point) -> None:
    counts = []
    for looks in ([SharpnessMonitor(1)], []):
        net = HOSTS[host](trunk=smooth_trunk())
        calls = [Calls(net.encoder), Calls(net.heads["a"]), Calls(net.heads["b"])]
        fit(net, [TaskSAM(point=point), *looks])
        counts.append([c.count for c in calls])
    assert counts[0] == counts[1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("host", HOSTS)
def test_in_the_steps_between_nothing_is_done_on_a_device(host, method) -> None:
    class Operations(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.found += 1
            return function(*args, **(kwargs or {}))

    looks, counts = SharpnessMonitor(3, top_eigenvalue=True, iterations=2, tolerance=1.0), []

    def counted(hook: Callable[..., None]) -> Callable[..., None]:
        def called(*args: Any) -> None:
            with Operations() as operations:
                hook(*args)
            counts.append(operations.found > 0)

        return called

    for name in ("on_train_batch_start", "on_train_batch_end"):
        setattr(looks, name, counted(getattr(looks, name)))
    fit(HOSTS[host](trunk=smooth_trunk()), [*METHODS[method](), looks], data(n=56))
    due = [True, False, False, True, False, False, True]
    assert counts[::2] == due
    if method == "F-CAGrad":
        assert counts[1::2] == due


@pytest.mark.parametrize("host", HOSTS)
def test_it_logs_to_every_logger_where_the_trainer_logs(host, tmp_path) -> None:
    loggers = [CSVLogger(tmp_path / "one"), CSVLogger(tmp_path / "two")]
    file, hand = tmp_path / "all.csv", ByHand("separate")
    callbacks = [TaskSAM(rho=RHO), CAGrad(), SharpnessMonitor(csv=file, **EXACTLY), hand]
    net = HOSTS[host](trunk=smooth_trunk())
    made = fit(net, callbacks, data(n=48), max_epochs=2, logger=loggers, log_every_n_steps=4)
    # The steps that log, and the first of each epoch.
    steps = [int(r["step"]) for r in rows(file) if r["name"] == "sharpness/a"]
    assert steps == [1, 4, 7, 8, 12]
    for logger in loggers:
        table = rows(Path(logger.log_dir) / "metrics.csv")
        in_steps = [row for row in table if row["sharpness/a"]]
        assert [int(row["step"]) for row in in_steps] == [3, 7, 11]
        for row, i in zip(in_steps, (3, 7, 11), strict=True):
            for name, value in hand.expected[i].items():
                assert float(row[name]) == pytest.approx(value, rel=1e-5), name
        assert len([row for row in table if row["sharpness/epoch/b/top_eigenvalue"]]) == 2
    of_last = [hand.expected[i] for i in (6, 7, 11)]
    for end in ("", "/head", "/top_eigenvalue"):
        mean = sum(e[f"sharpness/b{end}"] for e in of_last) / 3
        logged = made.callback_metrics[f"sharpness/epoch/b{end}"].item()
        assert logged == pytest.approx(mean, rel=1e-5)


class Validations(pl.Callback):
    """The means over the validation batches by hand, weighted by their samples."""

    def __init__(self, every: int = 1) -> None:
        self.every, self.epochs, self.logged = every, [], []

    def on_validation_epoch_start(self, trainer, net):
        self.batches: list[tuple[int, dict[str, float]]] = []

    def on_validation_batch_start(self, trainer, net, batch, batch_idx, dataloader_idx=0):
        if batch_idx % self.every == 0:
            with torch.inference_mode(False), torch.enable_grad():
                own = batch[0].clone(), {k: v.clone() for k, v in batch[1].items()}
                self.batches.append((len(own[0]), by_hand(net, own, "own", False, True)))

    def on_validation_epoch_end(self, trainer, net):
        n = sum(n for n, _ in self.batches)
        names = self.batches[0][1]
        means = {name: sum(k * f[name] for k, f in self.batches) / n for name in names}
        if not trainer.sanity_checking:
            self.epochs.append(means)


@pytest.mark.parametrize("every", [None, 2])
@pytest.mark.parametrize("method", ["none", "F-CAGrad"])
@pytest.mark.parametrize("host", HOSTS)
def test_on_validation_batches_it_is_the_mean_over_samples(host, method, every, tmp_path) -> None:
    file, hand = tmp_path / "sharpness.csv", Validations(every or 1)
    kinds = {"module": MultiTaskModule, "taken over": Busy}
    net = HOSTS[host](trunk=smooth_trunk(), kind=kinds[host])
    looks = SharpnessMonitor(every, data="val", rho=RHO, csv=file, **EXACTLY)
    callbacks = [looks, hand, *METHODS[method]()]
    made = fit(net, callbacks, val=data(n=21, seed=3), max_epochs=2)
    written = by_step(file)
    assert len(written) == len(hand.epochs) == 2
    for found, expected in zip(written, hand.epochs, strict=True):
        assert found == pytest.approx(expected, rel=1e-8)
    for name, value in hand.epochs[-1].items():
        assert made.callback_metrics[name].item() == pytest.approx(value, rel=1e-5)


def test_it_looks_in_a_validation_by_itself_and_at_several_loaders() -> None:
    net, loaders = module(trunk=smooth_trunk()), [data(n=21), data(n=8, seed=1)]
    trainer = fit(net, [SharpnessMonitor(data="val", rho=RHO)], val=loaders)
    before = dict(trainer.callback_metrics)
    (found, _) = trainer.validate(net, loaders, verbose=False)
    for i in (0, 1):
        name = f"sharpness/a/dataloader_idx_{i}"
        assert found[name] == pytest.approx(before[name].item(), rel=1e-6)
    assert "sharpness/a" not in before


def test_the_samples_that_have_a_label_count() -> None:
    net = MultiTaskModule(
        smooth_trunk(),
        [Task(t.name, t.head, t.loss, missing=-100 if t == "a" else None) for t in tasks()],
    ).double()
    loader = data(n=16)
    loader.dataset.targets["a"][:6] = -100
    found: dict[str, float] = {}

    class Each(pl.Callback):
        def on_validation_batch_start(self, trainer, net, batch, batch_idx, dataloader_idx=0):
            with torch.inference_mode(False), torch.enable_grad():
                labelled = batch[1]["a"] != -100
                own = batch[0].clone()[labelled], {"a": batch[1]["a"].clone()[labelled]}
                loss = OfTask(net, own, "a")
                n = int(labelled.sum())
                found["a"] = found.get("a", 0) + n * loss.rise(loss.step(slice(None), False)) / 10

    made = fit(
        net, [SharpnessMonitor(data="val", rho=RHO), Each()], val=loader, limit_train_batches=0
    )
    del made
    found.clear()
    (logged,) = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[SharpnessMonitor(data="val", rho=RHO), Each()],
    ).validate(net, loader, verbose=False)  # fmt: skip
    assert logged["sharpness/a"] == pytest.approx(found["a"], rel=1e-6)


def test_an_absent_task_has_no_figures(tmp_path) -> None:
    class Alone(MultiTaskModule):
        def losses(self, batch: Any, batch_idx: int) -> Any:
            found = super().losses(batch, batch_idx)
            return {"a": found["a"]} if batch_idx == 1 else found

    for method in ([TaskSAM()], []):
        file = tmp_path / "sharpness.csv"
        fit(module(kind=Alone), [*method, SharpnessMonitor(1, csv=file)])
        assert ["sharpness/b" in found for found in by_step(file)] == [True, False, True]


@pytest.mark.parametrize("sam", [{}, {"rho_heads": 0.0}, {"rho_shared": 0.0}])
def test_what_does_not_move_has_no_figure(sam) -> None:
    logged = fit(module(), [TaskSAM(**sam), SharpnessMonitor(1)]).callback_metrics
    assert logged["sharpness/a"] > 0
    assert ("sharpness/a/head" in logged) is (sam != {"rho_heads": 0.0})
    same = logged["sharpness/a"] == logged.get("sharpness/a/head", math.nan)
    assert same.item() is (sam == {"rho_shared": 0.0}) if sam != {"rho_heads": 0.0} else True


@pytest.mark.parametrize("method", ["none", "F-CAGrad"])
@pytest.mark.parametrize("host", HOSTS)
def test_accumulated_batches_are_looked_at_one_by_one(host, method, tmp_path) -> None:
    own = {"module": {"accumulate_grad_batches": 2}, "taken over": {}}
    trainers = {"module": {}, "taken over": {"accumulate_grad_batches": 2}}
    kind = "own" if method == "none" else "separate"
    file, hand = tmp_path / "sharpness.csv", ByHand(kind)
    net = HOSTS[host](trunk=smooth_trunk(), **own[host])
    looks = SharpnessMonitor(1, rho=RHO, csv=file, **EXACTLY)
    fit(net, [looks, hand, *METHODS[method]()], data(n=40), **trainers[host])
    names = [*hand.expected[0]]
    found = {name: [float(r["value"]) for r in rows(file) if r["name"] == name] for name in names}
    for name in names:
        assert found[name] == pytest.approx([e[name] for e in hand.expected], rel=1e-8), name


@pytest.mark.parametrize("at", ["loss", "perturbed"])
@pytest.mark.parametrize("host", HOSTS)
def test_parameters_come_back_after_an_error(host, at) -> None:
    class Breaks(nn.Sequential):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Breaks.calls += 1
            if Breaks.calls == {"loss": 1, "perturbed": 3}[at]:
                raise RuntimeError("power cut")
            return super().forward(x)

    net = HOSTS[host](trunk=Breaks(*smooth_trunk()))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(RuntimeError, match="power cut"):
        fit(net, [SharpnessMonitor(1, rho=5.0)])
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert "training_step" not in vars(net)
    assert net.training


def test_a_figure_that_is_not_finite_is_left_out() -> None:
    class Lost(Foreign):
        def losses(self, batch: Any) -> Any:
            found = super().losses(batch)
            return {**found, "b": found["b"] * math.nan}

    looks = SharpnessMonitor(1, top_eigenvalue=True, iterations=3, tolerance=1.0)
    made = fit(foreign(kind=Lost), [looks])
    assert made.global_step == 3
    assert "sharpness/a" in made.callback_metrics
    assert not {n for n in made.callback_metrics if n.startswith("sharpness/b")}


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Passes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x)


def test_a_layer_without_a_second_derivative_is_noticed() -> None:
    # Torch leaves it out of the products in silence.
    net = module(trunk=nn.Sequential(*smooth_trunk(), Passes()))
    fit(net, [SharpnessMonitor(1)])
    with pytest.raises(FlatMTLError, match="The Hessian of task 'a' must be symmetric") as said:
        fit(net, [SharpnessMonitor(1, top_eigenvalue=True)])
    assert "`top_eigenvalue=False`" in str(said.value)


def test_a_compiled_model_has_no_second_derivative() -> None:
    net = module(trunk=smooth_trunk())
    net.encoder.compile(backend="aot_eager")
    fit(net, [SharpnessMonitor(1)])
    with pytest.raises(FlatMTLError, match="needs a loss that can be differentiated twice") as e:
        fit(net, [SharpnessMonitor(1, top_eigenvalue=True)])
    assert "`top_eigenvalue=False`" in str(e.value)


def test_attention_is_differentiated_twice() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.of, self.out = nn.Linear(6, 18), nn.Linear(36, 5)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.of(x[:, 0]).chunk(3, -1)
            return self.out(nn.functional.scaled_dot_product_attention(q, k, v).flatten(1))

    hand = ByHand("own")
    hand.settings = "own", False, False
    looks = SharpnessMonitor(1, rho=RHO, top_eigenvalue=True)
    made = fit(module(trunk=Attends()), [looks, hand])
    assert made.callback_metrics["sharpness/a/top_eigenvalue"].isfinite()
    expected = hand.expected[-1]["sharpness/a"]
    assert made.callback_metrics["sharpness/a"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("host", HOSTS)
def test_in_16_bits_the_figures_are_near(host) -> None:
    found = []
    for precision in ("32-true", "bf16-mixed"):
        net = HOSTS[host](trunk=smooth_trunk()).float()
        loader = data(n=8)
        loader.dataset.inputs = loader.dataset.inputs.float()
        loader.dataset.targets["b"] = loader.dataset.targets["b"].float()
        looks = SharpnessMonitor(1, rho=RHO, top_eigenvalue=True, tolerance=0.15)
        made = fit(net, [looks], loader, precision=precision)
        names = [f"sharpness/{task}{end}" for task in "ab" for end in ("", "/top_eigenvalue")]
        found.append([made.callback_metrics[name].item() for name in names])
    assert found[0] == pytest.approx(found[1], rel=0.1)
    assert found[0] != found[1]


@pytest.mark.parametrize("host", HOSTS)
def test_it_stands_beside_a_gradient_conflict(host, tmp_path) -> None:
    files = {}
    for name, looks in (("both", [SharpnessMonitor(1)]), ("one", [])):
        files[name] = tmp_path / f"{name}.csv"
        conflict = GradientConflict(1, csv=files[name])
        fit(HOSTS[host](trunk=smooth_trunk(dropout=0.3)), [conflict, *looks])
    texts = [file.read_text("utf-8") for file in files.values()]
    assert texts[0] == texts[1]


def test_a_resumed_fit_goes_on_where_it_was(tmp_path) -> None:
    def callbacks(file: str) -> list[pl.Callback]:
        looks = SharpnessMonitor(2, csv=tmp_path / file, top_eigenvalue=True)
        return [TaskSAM(rho=RHO), CAGrad(), looks]

    fit(module(), callbacks("whole.csv"), max_epochs=4)
    net = module()
    first = fit(net, callbacks("parts.csv"), max_epochs=2)
    first.save_checkpoint(tmp_path / "half.ckpt")
    fit(module(), callbacks("parts.csv"), max_epochs=3, ckpt_path=tmp_path / "half.ckpt")
    # Once more from the same place: the rows of the third epoch are not there twice.
    looks = callbacks("parts.csv")
    fit(module(), looks, max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    whole, parts = (tmp_path / name for name in ("whole.csv", "parts.csv"))
    assert whole.read_text("utf-8") == parts.read_text("utf-8")
    assert [e["step"] for e in looks[-1].state_dict()["drawn"]] == [3, 6, 9, 12]


def test_a_fit_that_does_not_resume_begins_its_file_anew(tmp_path) -> None:
    file = tmp_path / "sharpness.csv"
    looks = SharpnessMonitor(1, csv=file)
    fit(module(), [CAGrad(), looks], max_epochs=2)
    fit(module(), [CAGrad(), looks])
    assert len(by_step(file)) == 3


@pytest.mark.parametrize("settings", SETTINGS)
def test_it_draws_a_picture(settings, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "new" / "sharpness.png"
    looks = SharpnessMonitor(1, png=str(file), **SETTINGS[settings])
    fit(module(), [CAGrad(), TaskSAM(), looks], val=data(seed=1), max_epochs=2)
    assert file.read_bytes().startswith(b"\x89PNG")


def test_a_broken_fit_has_its_picture_too(tmp_path) -> None:
    pytest.importorskip("matplotlib")

    class Breaks(pl.Callback):
        def on_train_epoch_start(self, trainer, net):
            if trainer.current_epoch == 2:
                raise RuntimeError("power cut")

    file = tmp_path / "sharpness.png"
    with pytest.raises(RuntimeError, match="power cut"):
        fit(module(), [CAGrad(), SharpnessMonitor(png=file), Breaks()], max_epochs=3)
    assert file.exists()


def test_a_picture_without_matplotlib_is_refused_at_once(monkeypatch) -> None:
    monkeypatch.setattr("lightning_flatmtl.callbacks._pictures.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-flatmtl\[plots\]"'):
        SharpnessMonitor(png="sharpness.png")
    SharpnessMonitor(csv="sharpness.csv")  # needs none


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` must be an integer >= 1 or None, got 0"),
        ({"every_n_steps": True}, "`every_n_steps` must be an integer >= 1 or None, got True"),
        ({"data": "test"}, "`data` must be 'train' or 'val', got 'test'"),
        ({"rho": 0.0}, r"`rho` must be in \(0, inf\), got 0.0"),
        ({"rho": -1.0}, r"`rho` must be in \(0, inf\), got -1.0"),
        ({"rho": math.nan}, r"`rho` must be in \(0, inf\), got nan"),
        ({"rho": math.inf}, r"`rho` must be in \(0, inf\), got inf"),
        ({"rho": "1"}, r"`rho` must be in \(0, inf\), got '1'"),
        ({"adaptive": 1}, "`adaptive` must be True or False, got 1"),
        ({"own": "no"}, "`own` must be True or False, got 'no'"),
        ({"top_eigenvalue": None}, "`top_eigenvalue` must be True or False, got None"),
        ({"iterations": 0}, "`iterations` must be an integer >= 1, got 0"),
        ({"tolerance": math.nan}, r"`tolerance` must be in \(0, inf\), got nan"),
        ({"tolerance": 0}, r"`tolerance` must be in \(0, inf\), got 0"),
        ({"seed": -1}, "`seed` must be an integer >= 0, got -1"),
        ({"seed": 0.5}, "`seed` must be an integer >= 0, got 0.5"),
        ({"csv": "sharpness.txt"}, "`csv` must be the path of a .csv file, got 'sharpness.txt'"),
        ({"png": 3}, "`png` must be the path of a .png file, got 3"),
    ],
)
def test_bad_arguments_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        SharpnessMonitor(**settings)


def test_a_module_that_it_cannot_run_is_refused_before_the_first_batch() -> None:
    net = foreign()
    net.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="automatic_optimization = False"):
        fit(net, [SharpnessMonitor()])

    class Silent(Foreign):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx)["loss"]

    message = "To look at the losses of tasks `training_step` must return"
    with pytest.raises(MisconfigurationException, match=message):
        fit(foreign(kind=Silent), [SharpnessMonitor()])


def test_it_is_pickled_and_found_by_its_class_name() -> None:
    from jsonargparse import ArgumentParser

    import lightning_flatmtl.cli  # noqa: F401

    copied = pickle.loads(pickle.dumps(SharpnessMonitor(7, rho=0.5)))
    assert copied.ascent.rho == 0.5
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=pl.Callback)
    given = {"class_path": "SharpnessMonitor", "init_args": {"data": "val", "rho": 0.2}}
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    made = instantiate(parser.parse_object({"callback": given})).callback
    assert isinstance(made, SharpnessMonitor)
    assert (made.data, made.ascent.rho) == ("val", 0.2)
