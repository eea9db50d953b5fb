"""What NoiseRobustness and LossLandscape have in common: they look, and leave no trace."""

import random
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_flatmtl import TaskSAM
from lightning_flatmtl.aggregators import CAGrad
from lightning_flatmtl.callbacks import (
    Calibration,
    GradientConflict,
    LossLandscape,
    NoiseRobustness,
)
from lightning_flatmtl.takeover import second_pass
from tests.callbacks.surroundings import MEASURED, Ordinary, everything, measured, ordinary
from tests.helpers import assert_identical, data, encoder, fit, trainer

LOOKS: dict[str, Any] = {
    "noise": lambda **kwargs: NoiseRobustness((0.5, 2.0), 2, **kwargs),
    "relative noise": lambda **kwargs: NoiseRobustness((0.5,), 1, relative=True, **kwargs),
    "landscape": lambda **kwargs: LossLandscape(1, 1.0, 3, **kwargs),
    "landscape of training data": lambda **kwargs: LossLandscape(
        2, 1.0, 3, data="train", biases=True, **kwargs
    ),
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*shuffling enabled.*"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*"),
]


class Moody(nn.Module):
    """A layer with a moving buffer, a counter and a private generator, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1, dtype=torch.float64))
        self.calls, self.history = 0, []
        self.generator = torch.Generator().manual_seed(2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.seen += x.mean()
        self.calls += 1
        self.history.append(self.calls)
        noise = torch.rand(1, generator=self.generator, dtype=x.dtype)
        return x + 0.01 * noise + 0.01 * torch.rand(1, dtype=x.dtype)


def trunk() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(encoder(), nn.BatchNorm1d(5), nn.Dropout(0.3), Moody())


def loaders(workers: int = 0) -> tuple[DataLoader, DataLoader]:
    """Both shuffle, one by a generator of its own."""
    train = DataLoader(data(n=40).dataset, batch_size=8, shuffle=True, num_workers=workers)
    g = torch.Generator().manual_seed(7)
    dataset = data(n=20, seed=1).dataset
    return train, DataLoader(dataset, batch_size=8, shuffle=True, generator=g)


class Diary(pl.Callback):
    """The parameters after every batch, and the random streams."""

    def __init__(self) -> None:
        self.pages: list[Any] = []

    def on_train_batch_end(self, trainer, net, outputs, batch, batch_idx):
        self.pages.append((batch[0].sum().item(), net.encoder[0][0].weight.sum().item()))

    def on_validation_batch_end(self, trainer, net, outputs, batch, batch_idx):
        self.pages.append((batch[0].sum().item(), net.encoder[3].calls))

    def on_train_end(self, trainer, net):
        self.pages.append((torch.rand(1).item(), random.random(), np.random.rand()))


METHODS = {"none": list, "F-CAGrad": lambda: [CAGrad(), TaskSAM(0.1)]}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("host", MEASURED)
def test_training_is_the_same_bit_for_bit(host, method, look, tmp_path) -> None:
    nets, logs, diaries = [], [], []
    for callbacks in ([], [LOOKS[look](every_n_epochs=1)]):
        net, diary = MEASURED[host](trunk=trunk()), Diary()
        torch.manual_seed(8)
        random.seed(8)
        np.random.seed(8)
        logger = CSVLogger(tmp_path / str(len(nets)))
        train, val = loaders()
        settings = {"max_epochs": 3, "logger": logger, "log_every_n_steps": 1}
        made = fit(net, [*METHODS[method](), *callbacks, diary], train, val, **settings)
        nets.append(net)
        diaries.append(diary.pages)
        logs.append({k: v.item() for k, v in made.callback_metrics.items()})
    assert_identical(*nets)
    assert diaries[0] == diaries[1]
    without, with_it = logs
    ours = {k for k in with_it if k.startswith(("noise/", "landscape/"))}
    assert ours
    assert {k: v for k, v in with_it.items() if k not in ours} == without
    moody = [net.encoder[3] for net in nets]
    assert moody[0].history == moody[1].history
    assert torch.equal(moody[0].generator.get_state(), moody[1].generator.get_state())


@pytest.mark.parametrize("look", list(LOOKS)[:3])
@pytest.mark.parametrize("host", MEASURED)
def test_an_evaluation_logs_the_same_beside_it(host, look) -> None:
    found, states = [], []
    for callbacks in ([], [LOOKS[look]()]):
        net = MEASURED[host](trunk=trunk())
        net.encoder[0].eval()  # a frozen part has a mode of its own
        torch.manual_seed(8)
        made = trainer(callbacks)
        (logged,) = made.validate(net, loaders()[1], verbose=False)
        found.append({k: v for k, v in logged.items() if not k.startswith(("noise", "land"))})
        states.append((torch.rand(1).item(), [layer.training for layer in net.modules()]))
        fit(net, [])  # parameters and metrics can still be trained and fed
    assert found[0] == found[1]
    assert states[0] == states[1]


class Before(pl.Callback):
    """What there is before the look, in whose fifth pass the module then fails."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.left = error, -1

    def on_validation_epoch_end(self, trainer, net):
        self.state = {name: value.clone() for name, value in net.state_dict().items()}
        self.modules = [(id(part), part.training) for part in net.modules()]
        self.streams = torch.get_rng_state(), random.getstate()
        self.left = 5
        net.encoder.register_forward_hook(self.count)

    def count(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error


@pytest.mark.parametrize("error", [RuntimeError("power cut"), KeyboardInterrupt()])
@pytest.mark.parametrize("look", list(LOOKS)[:3])
@pytest.mark.parametrize("host", MEASURED)
def test_all_comes_back_after_an_error(host, look, error) -> None:
    net, before = MEASURED[host](trunk=trunk()), Before(error)
    made = trainer([before, LOOKS[look]()])
    with pytest.raises((RuntimeError, SystemExit)):
        made.validate(net, loaders()[1], verbose=False)
    assert before.left == 0
    for name, value in net.state_dict().items():
        assert torch.equal(value, before.state[name]), name
    assert [(id(part), part.training) for part in net.modules()] == before.modules
    assert torch.equal(torch.get_rng_state(), before.streams[0])
    assert random.getstate() == before.streams[1]
    assert "log" not in vars(net)
    assert not second_pass(net)


@pytest.mark.parametrize("look", list(LOOKS)[:3])
@pytest.mark.parametrize("host", MEASURED)
def test_an_own_log_and_metrics_of_the_module_stay(host, look) -> None:
    net = MEASURED[host]()
    own = net.log

    def log(*args: Any, **kwargs: Any) -> None:
        own(*args, **kwargs)

    net.log = log
    metric = MulticlassAccuracy(3)
    metric.update(torch.eye(3), torch.arange(3))
    net.further = nn.ModuleList([metric])
    trainer([LOOKS[look]()]).validate(net, loaders()[1], verbose=False)
    assert net.log is log
    assert net.further[0] is metric
    assert metric.compute() == 1.0


@pytest.mark.parametrize("look", list(LOOKS)[:3])
@pytest.mark.parametrize("host", MEASURED)
def test_it_looks_in_evaluation_mode_with_the_trainer_saying_so(host, look) -> None:
    stages: list[tuple[str, bool, bool]] = []

    class Asks:
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            stages.append((self.trainer.state.stage.value, self.training, second_pass(self)))
            return super().validation_step(batch, batch_idx)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            stages.append((self.trainer.state.stage.value, self.training, second_pass(self)))
            return super().training_step(batch, batch_idx)

    if host == "module":
        net = measured(kind=type("Both", (Asks, type(measured())), {}))
    else:
        net = ordinary(kind=type("Both", (Asks, Ordinary), {}))
    made = fit(net, [LOOKS[look]()], val=data(n=8), num_sanity_val_steps=0)
    own = [("train", True, False)] * 3 + [("validate", False, False)]
    assert stages[:4] == own
    looked = set(stages[4:])
    if look == "landscape":
        expected = set() if host == "module" else {("validate", False, True)}
    else:
        expected = {("validate", False, False)}
        expected |= set() if host == "module" else {("validate", False, True)}
    assert looked == expected
    assert made.state.stage is None


class Resumable:
    """Batches one by one, and where to go on."""

    def __init__(self, items: list[Any]) -> None:
        self.items, self.next = items, 0

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Any]:
        begin, self.next = self.next, 0
        for i in range(begin, len(self.items)):
            self.next = (i + 1) % len(self.items)
            yield self.items[i]

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


def test_a_loader_with_a_state_goes_on_where_it_was() -> None:
    nets = []
    for callbacks in ([], [LossLandscape(1, 1.0, 3, data="train", batches=2, every_n_epochs=1)]):
        net = measured()
        fit(net, callbacks, Resumable(list(data(n=40))), max_epochs=3)
        nets.append(net)
    assert_identical(*nets)


def test_several_data_sets_in_one_batch_are_looked_at(tmp_path) -> None:
    from lightning.pytorch.utilities import CombinedLoader

    def single(task: str, seed: int, n: int) -> DataLoader:
        items = [(x, y[task]) for x, y in data(n=n, seed=seed).dataset]
        return DataLoader(items, batch_size=8)

    val = CombinedLoader({"a": single("a", 1, 16), "b": single("b", 2, 24)}, "max_size")
    net = measured()
    made = fit(net, [LOOKS["noise"](), LOOKS["landscape"]()], val=val)
    logged = made.callback_metrics
    for task in ("a", "b"):
        value = logged[f"val/{task}/loss"].item()
        assert logged[f"noise/{task}/loss/radius_0"].item() == pytest.approx(value, rel=1e-6)
        assert logged[f"landscape/{task}/loss"].item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("look", ["noise", "landscape"])
@pytest.mark.parametrize("host", MEASURED)
def test_nothing_but_the_parameters_differs_between_points(host, look, tmp_path) -> None:
    class Spoils:
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            x, targets = batch
            outputs = super().validation_step(batch, batch_idx)
            x.mul_(1.5)
            targets["b"] = targets.pop("b") + 1.0
            return outputs

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            outputs = super().training_step(batch, batch_idx)
            batch[0].mul_(1.5)
            return outputs

    kinds = {"module": (type(measured()), measured), "taken over": (Ordinary, ordinary)}
    kind, make = kinds[host]
    net = make(trunk=trunk(), kind=type("Both", (Spoils, kind), {})).requires_grad_(False)
    net.still = nn.Parameter(torch.zeros(3, 2))  # a filter without a length does not move
    settings = {"batches": 2, "csv": tmp_path / "look.csv"}
    if look == "noise":
        callback: Any = NoiseRobustness((0.5, 2.0), 3, relative=True, **settings)
    else:
        callback = LossLandscape(2, 1.0, 3, **settings)
    trainer([callback]).validate(net, loaders()[1], verbose=False)
    found: dict[tuple[str, str], set[float]] = {}
    for row in (tmp_path / "look.csv").read_text("utf-8").splitlines()[1:]:
        values = row.split(",")
        if look == "noise":
            *_, task, metric, _, mean, std = values
            assert float(std) < 1e-15, row
        else:
            *_, task, _, _, mean = values
            metric = "loss"
        found.setdefault((task, metric), set()).add(float(mean))
    assert {("a", "loss"), ("b", "loss")} <= found.keys()
    # What the mean of equal numbers may be off by.
    assert all(max(means) - min(means) < 1e-15 for means in found.values()), found


def test_all_diagnostics_stand_beside_each_other() -> None:
    def made() -> list[pl.Callback]:
        return [
            Calibration(),
            GradientConflict(every_n_steps=1),
            LOOKS["noise"](every_n_epochs=1),
            LOOKS["landscape"](every_n_epochs=1),
        ]

    together: dict[str, float] = {}
    alone: dict[str, float] = {}
    for callbacks, found in [(made(), together), *(([each], alone) for each in made())]:
        net = measured()
        val = data(n=20, seed=1)
        logged = fit(net, [CAGrad(), *callbacks], val=val, max_epochs=2).callback_metrics
        found.update({name: value.item() for name, value in logged.items()})
    assert together == alone
    assert {name.partition("/")[0] for name in alone} == {
        *("calibration", "conflict", "noise", "landscape", "train", "val")
    }


@pytest.mark.parametrize("look", list(LOOKS)[:3])
@pytest.mark.parametrize("host", MEASURED)
def test_batches_that_are_kept_are_as_one_evaluation_leaves_them(host, look) -> None:
    class Spoils:
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            batch[0].mul_(1.5)
            return super().validation_step(batch, batch_idx)

    kinds = {"module": (type(measured()), measured), "taken over": (Ordinary, ordinary)}
    kind, make = kinds[host]
    kept = []
    for callbacks in ([], [LOOKS[look]()]):
        batches = list(data(n=16))
        net = make(kind=type("Both", (Spoils, kind), {}))
        trainer(callbacks).validate(net, Resumable(batches), verbose=False)
        kept.append(torch.cat([x for x, _ in batches]))
    assert torch.equal(*kept)


def test_several_of_a_kind_go_together(tmp_path) -> None:
    def callbacks() -> list[pl.Callback]:
        relative = NoiseRobustness((0.5, 2.0), 2, relative=True)
        return [LOOKS["noise"](), relative, LOOKS["landscape"](), LossLandscape(2, 1.0, 3)]

    made = fit(measured(), callbacks(), val=data(n=8), max_epochs=2)
    made.save_checkpoint(tmp_path / "half.ckpt")
    made = fit(
        measured(),
        callbacks(),
        val=data(n=8),
        max_epochs=3,
        ckpt_path=tmp_path / "half.ckpt",
    )
    assert {"noise/a/loss/radius_2", "noise/a/loss/relative_2"} <= made.callback_metrics.keys()


@pytest.mark.parametrize("look", ["noise", "landscape"])
def test_parameters_in_parts_are_refused(look) -> None:
    class FSDPStrategy:
        pass

    message = "needs whole parameters on one device or with strategy='ddp', got FSDPStrategy"
    with pytest.raises(MisconfigurationException, match=message):
        LOOKS[look]().on_validation_start(Evaluating(FSDPStrategy()), measured())


class Evaluating:
    """What is asked of a Trainer before an evaluation begins."""

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy
        self.state = trainer().state
        self.state.fn = "validate"


@pytest.mark.parametrize("before", [True, False])
def test_averaged_weights_are_looked_at_where_they_come_first(before, tmp_path) -> None:
    from lightning.pytorch.callbacks import EMAWeightAveraging

    file, val = tmp_path / "noise.csv", data(n=20, seed=1)
    callbacks: list[pl.Callback] = [NoiseRobustness((0.5,), 1, csv=file)]
    callbacks.insert(0 if before else 1, EMAWeightAveraging(decay=0.5))
    net = measured()
    fit(net, callbacks, val=val, max_epochs=2)
    (row,) = [r for r in file.read_text("utf-8").splitlines() if ",a,loss,0.0," in r]
    averaged = everything(net.eval(), val.dataset)["a/loss"]
    assert (abs(float(row.split(",")[-2]) - averaged) < 1e-9) is before
