"""GradientConflict: its figures against a computation by hand, and that it only looks."""

import csv
import math
import pickle
from itertools import combinations, product
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.utils.checkpoint
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_flatmtl import TaskSAM
from lightning_flatmtl.aggregators import CAGrad, UncertaintyWeighting
from lightning_flatmtl.callbacks import GradientConflict
from lightning_flatmtl.engine.gradients.gram import cross_gram
from tests.helpers import assert_identical, data, fit, module
from tests.hosts import HOSTS, foreign, smooth_trunk

RHO = 0.3


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


class ByHand(pl.Callback):
    """Before every batch: the gradients of the shared parameters, by nothing but autograd."""

    def __init__(self, flat: bool = False) -> None:
        self.flat = flat
        self.expected: list[dict[str, float]] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer, net, batch, batch_idx):
        shared = list(net.encoder.parameters())
        criteria = {"a": nn.CrossEntropyLoss(), "b": nn.MSELoss()}

        def gradient(task: str) -> Tensor:
            loss = criteria[task](net.heads[task](net.encoder(batch[0])), batch[1][task])
            return nn.utils.parameters_to_vector(torch.autograd.grad(loss, shared)).detach()

        at = nn.utils.parameters_to_vector(shared).detach().clone()
        loss_parts, flat_parts = {}, {}
        for task in criteria:
            g = loss_parts[task] = gradient(task)
            with torch.no_grad():
                nn.utils.vector_to_parameters(at + RHO * g / g.norm(), shared)
            flat_parts[task] = gradient(task) - g
            with torch.no_grad():
                nn.utils.vector_to_parameters(at.clone(), shared)
        found = self.of("conflict", combinations("ab", 2), loss_parts, loss_parts)
        if self.flat:
            found |= self.of("conflict/flat", combinations("ab", 2), flat_parts, flat_parts)
            found |= self.of("conflict/between", product("ab", "ab"), loss_parts, flat_parts)
        self.expected.append(found)

    def of(self, prefix, pairs, left, right):
        cosines = {f"{prefix}/cosine/{a}/{b}": cosine(left[a], right[b]) for a, b in pairs}
        n = len(cosines)
        rate = sum(c < 0 for c in cosines.values()) / n
        mean = sum(cosines.values()) / n
        return {f"{prefix}/rate": rate, f"{prefix}/mean_cosine": mean, **cosines}

    def on_train_batch_end(self, trainer, net, outputs, batch, batch_idx):
        logged = trainer.callback_metrics.items()
        self.logged.append({k: v.item() for k, v in logged if k.startswith("conflict/")})


def rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def by_step(path: Path) -> list[dict[str, float]]:
    steps: dict[int, dict[str, float]] = {}
    for row in rows(path):
        steps.setdefault(int(row["step"]), {})[row["name"]] = float(row["value"])
    return list(steps.values())


METHODS = {
    "CAGrad": lambda: [CAGrad()],
    "F-CAGrad": lambda: [TaskSAM(rho=RHO), CAGrad()],
    "F-LS": lambda: [TaskSAM(rho=RHO)],
    "none": list,
    "UW": lambda: [UncertaintyWeighting()],
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("host", HOSTS)
def test_the_figures_are_those_of_a_computation_by_hand(host, method, tmp_path) -> None:
    callbacks, hand = METHODS[method](), ByHand(flat=method.startswith("F-"))
    file = tmp_path / "new" / "conflict.csv"
    # Listed before the method, which takes the module over in its turn.
    looks = [GradientConflict(every_n_steps=1, csv=file), hand]
    net = HOSTS[host](trunk=smooth_trunk())
    fit(net, [*looks, *callbacks], data(n=40), max_epochs=2, logger=False)
    assert len(hand.expected) == 10
    written = by_step(file)
    assert [*map(set, written)] == [*map(set, hand.expected)]
    for found, expected in zip(written, hand.expected, strict=True):
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, abs=1e-10), name
    assert {float(row["epoch"]) for row in rows(file)} == {0.0, 1.0}
    cosines = [e["conflict/cosine/a/b"] for e in hand.expected]
    assert min(cosines) < 0 < max(cosines)  # both signs were there to be told apart


@pytest.mark.parametrize("host", HOSTS)
def test_it_logs_to_every_logger_where_the_trainer_logs(host, tmp_path) -> None:
    loggers = [CSVLogger(tmp_path / "one"), CSVLogger(tmp_path / "two")]
    file, hand = tmp_path / "all.csv", ByHand(flat=True)
    callbacks = [TaskSAM(rho=RHO), CAGrad(), GradientConflict(csv=file), hand]
    net = HOSTS[host](trunk=smooth_trunk())
    made = fit(net, callbacks, data(n=48), max_epochs=2, logger=loggers, log_every_n_steps=4)
    # The steps that log, and the first of each epoch.
    assert [int(r["step"]) for r in rows(file) if r["name"] == "conflict/rate"] == [1, 4, 7, 8, 12]
    for logger in loggers:
        table = rows(Path(logger.log_dir) / "metrics.csv")
        in_steps = [row for row in table if row["conflict/rate"]]
        assert [int(row["step"]) for row in in_steps] == [3, 7, 11]
        for row, i in zip(in_steps, (3, 7, 11), strict=True):
            for name, value in hand.expected[i].items():
                assert float(row[name]) == pytest.approx(value, abs=1e-6), name
        of_epochs = [row for row in table if row["conflict/epoch/rate"]]
        assert len(of_epochs) == 2
    of_last = [hand.expected[i] for i in (6, 7, 11)]
    for series in ("", "/flat", "/between"):
        mean = sum(e[f"conflict{series}/rate"] for e in of_last) / 3
        logged = made.callback_metrics[f"conflict/epoch{series}/rate"].item()
        assert logged == pytest.approx(mean, abs=1e-6)


def test_single_pairs_may_be_left_out(tmp_path) -> None:
    callbacks = [CAGrad(), GradientConflict(every_n_steps=1, pairs=False)]
    logged = fit(module(), callbacks).callback_metrics
    names = {name for name in logged if name.startswith("conflict/")}
    assert names == {"conflict/rate", "conflict/mean_cosine", "conflict/epoch/rate"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("host", HOSTS)
def test_training_is_the_same_bit_for_bit(host, method) -> None:
    nets = [HOSTS[host](trunk=None) for _ in range(2)]
    fit(nets[0], METHODS[method](), max_epochs=3)
    fit(nets[1], [*METHODS[method](), GradientConflict(every_n_steps=2)], max_epochs=3)
    assert_identical(*nets)


@pytest.mark.parametrize("host", HOSTS)
def test_training_without_a_method_is_the_same_with_checkpoints_and_accumulation(host) -> None:
    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)

    nets, looks = [], GradientConflict(every_n_steps=1)
    for callbacks in ([], [looks]):
        trunk = Checkpointed(*smooth_trunk(dropout=0.4), nn.BatchNorm1d(5))
        net, settings = accumulating(host, 2, trunk=trunk)
        torch.manual_seed(8)
        fit(net, callbacks, data(n=40), max_epochs=2, **settings)
        nets.append(net)
    assert_identical(*nets)
    assert len(looks.state_dict()["epochs"]) == 2


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("method", ["none", "UW"])
def test_steps_in_between_have_no_rows(host, method) -> None:
    calls: list[int] = []

    class Counts(pl.Callback):
        def on_train_batch_start(self, trainer, net, batch, batch_idx):
            calls.append(0)

    net = HOSTS[host](trunk=smooth_trunk())
    net.encoder[4].register_full_backward_hook(lambda *_: calls.append(calls.pop() + 1))
    fit(net, [Counts(), *METHODS[method](), GradientConflict(every_n_steps=3)], data(n=40))
    assert calls == [3, 1, 1, 3, 1]


def test_a_module_that_returns_no_losses_is_told_how() -> None:
    class Silent(type(foreign())):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx)["loss"]

    net = foreign(kind=Silent)
    message = "To look at the gradients of tasks `training_step` must return"
    with pytest.raises(MisconfigurationException, match=message):
        fit(net, [GradientConflict()])
    assert "training_step" not in vars(net)


def test_a_module_with_manual_optimization_is_refused_before_the_first_batch() -> None:
    net = foreign()
    net.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="automatic_optimization = False"):
        fit(net, [GradientConflict()])


def test_a_loss_that_is_not_finite_is_not_for_it_to_refuse() -> None:
    class Lost(type(foreign())):
        def losses(self, batch: Any) -> Any:
            return {task: loss * math.nan for task, loss in super().losses(batch).items()}

    made = fit(foreign(kind=Lost), [GradientConflict(every_n_steps=1)])
    assert made.global_step == 3
    assert "conflict/rate" not in made.callback_metrics


@pytest.mark.parametrize("host", HOSTS)
def test_a_compiled_trunk_is_left_alone_without_a_method(host) -> None:
    # Its backward pass may run once only.
    nets = [HOSTS[host](trunk=smooth_trunk()) for _ in range(2)]
    for net in nets:
        net.encoder.compile(backend="aot_eager")
    fit(nets[0])
    with pytest.warns(UserWarning, match="GradientConflict sees no gradients of single tasks"):
        fit(nets[1], [GradientConflict(every_n_steps=1)])
    assert_identical(*nets)


@pytest.mark.parametrize("host", HOSTS)
def test_it_says_that_a_graph_is_hidden(host) -> None:
    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = x.requires_grad_()
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=True)

    nets = [HOSTS[host](trunk=Checkpointed(*smooth_trunk())) for _ in range(2)]
    fit(nets[0])
    with pytest.warns(UserWarning, match="GradientConflict sees no gradients of single tasks"):
        fit(nets[1], [GradientConflict(every_n_steps=1)])
    assert_identical(*nets)


def accumulating(host: str, n: int, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    if host == "module":
        return module(accumulate_grad_batches=n, **kwargs), {}
    return foreign(**kwargs), {"accumulate_grad_batches": n}


@pytest.mark.parametrize("host", HOSTS)
def test_accumulated_batches_count_once(host, tmp_path) -> None:
    # Three batches of eight make an update: that of one batch of 24.
    net, settings = accumulating(host, 3, trunk=smooth_trunk())
    callbacks = [CAGrad(), GradientConflict(every_n_steps=2, csv=tmp_path / "a.csv")]
    fit(net, callbacks, data(n=48), **settings)
    whole = HOSTS[host](trunk=smooth_trunk())
    callbacks = [CAGrad(), GradientConflict(every_n_steps=1, csv=tmp_path / "b.csv")]
    fit(whole, callbacks, data(n=48, batch_size=24))
    accumulated, at_once = by_step(tmp_path / "a.csv"), by_step(tmp_path / "b.csv")
    assert len(accumulated) == len(at_once) == 2
    for found, expected in zip(accumulated, at_once, strict=True):
        assert found == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("host", HOSTS)
def test_what_it_asks_for_is_measured_in_its_steps_only(host) -> None:
    class Noted(pl.Callback):
        def __init__(self) -> None:
            self.crossed: list[bool] = []

        def on_train_batch_end(self, trainer, net, outputs, batch, batch_idx):
            from lightning_flatmtl.takeover import host_of

            self.crossed.append(host_of(net).last_step.cross_gram is not None)

    noted = Noted()
    callbacks = [TaskSAM(), GradientConflict(every_n_steps=3), noted]
    fit(HOSTS[host](), callbacks, data(n=56))
    assert noted.crossed == [True, False, False, True, False, False, True]


@pytest.mark.parametrize("sam", [{"aggregate": "direct"}, {"rho_shared": 0.0}])
def test_without_flat_parts_there_are_no_figures_of_them(sam) -> None:
    logged = fit(module(), [TaskSAM(**sam), GradientConflict(every_n_steps=1)]).callback_metrics
    assert "conflict/rate" in logged
    assert not {n for n in logged if n.startswith(("conflict/flat", "conflict/between"))}


def test_an_absent_task_has_no_figures(tmp_path) -> None:
    class Alone(type(module())):
        def losses(self, batch: Any, batch_idx: int) -> Any:
            found = super().losses(batch, batch_idx)
            return {"a": found["a"]} if batch_idx == 1 else found

    file = tmp_path / "conflict.csv"
    fit(module(kind=Alone), [CAGrad(), GradientConflict(every_n_steps=1, csv=file)])
    pairs = ["conflict/cosine/a/b" in found for found in by_step(file)]
    assert pairs == [True, False, True]
    assert by_step(file)[1] == {"conflict/rate": 0.0}


def test_a_resumed_fit_goes_on_where_it_was(tmp_path) -> None:
    def callbacks(file: str) -> list[pl.Callback]:
        return [TaskSAM(rho=RHO), CAGrad(), GradientConflict(every_n_steps=2, csv=tmp_path / file)]

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
    assert [e["epoch"] for e in looks[-1].state_dict()["epochs"]] == [0, 1, 2, 3]


def test_a_fit_that_does_not_resume_begins_its_file_anew(tmp_path) -> None:
    file = tmp_path / "conflict.csv"
    looks = GradientConflict(every_n_steps=1, csv=file)
    fit(module(), [CAGrad(), looks], max_epochs=2)
    fit(module(), [CAGrad(), looks])
    assert len(by_step(file)) == 3


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("epochs", [1, 3])
def test_it_draws_a_picture(flat, epochs, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "new" / "conflict.png"
    method = [CAGrad(), *([TaskSAM()] if flat else [])]
    fit(module(), [*method, GradientConflict(png=str(file))], max_epochs=epochs)
    assert file.read_bytes().startswith(b"\x89PNG")


def test_a_broken_fit_has_its_picture_too(tmp_path) -> None:
    pytest.importorskip("matplotlib")

    class Breaks(pl.Callback):
        def on_train_epoch_start(self, trainer, net):
            if trainer.current_epoch == 2:
                raise RuntimeError("power cut")

    file = tmp_path / "conflict.png"
    with pytest.raises(RuntimeError, match="power cut"):
        fit(module(), [CAGrad(), GradientConflict(png=file), Breaks()], max_epochs=3)
    assert file.exists()


def test_a_picture_without_matplotlib_is_refused_at_once(monkeypatch) -> None:
    monkeypatch.setattr("lightning_flatmtl.callbacks._pictures.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-flatmtl\[plots\]"'):
        GradientConflict(png="conflict.png")
    GradientConflict(csv="conflict.csv")  # needs none


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` must be an integer >= 1 or None, got 0"),
        ({"every_n_steps": True}, "`every_n_steps` must be an integer >= 1 or None, got True"),
        ({"every_n_steps": math.nan}, "`every_n_steps` must be an integer >= 1 or None, got nan"),
        ({"pairs": "no"}, "`pairs` must be True or False, got 'no'"),
        ({"csv": "conflict.txt"}, "`csv` must be the path of a .csv file, got 'conflict.txt'"),
        ({"png": 3}, "`png` must be the path of a .png file, got 3"),
    ],
)
def test_bad_arguments_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        GradientConflict(**settings)


def test_it_is_pickled_and_found_by_its_class_name(tmp_path) -> None:
    from jsonargparse import ArgumentParser

    import lightning_flatmtl.cli  # noqa: F401

    assert pickle.loads(pickle.dumps(GradientConflict(7))).every_n_steps == 7
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=pl.Callback)
    given = {"class_path": "GradientConflict", "init_args": {"csv": "a.csv", "every_n_steps": 5}}
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    made = instantiate(parser.parse_object({"callback": given})).callback
    assert isinstance(made, GradientConflict)
    assert made.every_n_steps == 5


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_products_of_two_matrices(kind) -> None:
    g = torch.Generator().manual_seed(1)
    left = torch.randn(3, 70_001, generator=g).to(kind)
    right = 1e-3 * torch.randn(4, 70_001, generator=g).to(kind)
    expected = left.double() @ right.double().T
    torch.testing.assert_close(cross_gram(left, right), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(cross_gram(left[:, :0], right[:, :0]), torch.zeros(3, 4).double())
