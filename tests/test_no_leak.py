"""Nothing of the second pass stays behind, and what a run knows survives copies and restarts."""

import copy
import functools
import io
import pickle
import random
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torchmetrics.wrappers import Running

from lightning_flatmtl import MultiTaskModule, Task, TaskSAM
from lightning_flatmtl.aggregators import IMTL, MGDA, CAGrad, PCGrad
from tests.helpers import assert_identical, data, fit, module, trainer
from tests.test_parity import Plain

SAMS = {
    "separate": TaskSAM(0.5),
    "joint": TaskSAM(0.5, point="joint"),
    "adaptive": TaskSAM(0.5, adaptive=True),
    "adaptive joint": TaskSAM(0.5, adaptive=True, point="joint"),
    "direct": TaskSAM(0.5, aggregate="direct"),
    "shared only": TaskSAM(0.5, rho_heads=0.0),
    "heads only": TaskSAM(0.5, rho_shared=0.0),
}


class MovingNorm(nn.Module):
    """A normalisation layer of one's own: one buffer changed in place, one bound anew."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("unused", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(dim=(0, 2, 3))
        return x - self.mean[:, None, None]


class Noise(nn.Module):
    """Draws from Python's and NumPy's streams."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 0.1 * random.random() + 0.1 * np.random.rand())


def zoo() -> nn.Sequential:
    torch.manual_seed(5)
    layers = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        MovingNorm(4),
        nn.Tanh(),
        Noise(),
        nn.Dropout(0.3),
        nn.Flatten(),
        spectral_norm(nn.Linear(64, 5)),
        nn.BatchNorm1d(5, momentum=None),
        nn.BatchNorm1d(5),
        nn.LayerNorm(5),
    )
    layers[-2].eval()  # frozen statistics, as in fine-tuning
    return layers


def zoo_tasks() -> list[Task]:
    head = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    return [
        Task("a", head=head, loss=nn.CrossEntropyLoss()),
        Task("b", head=nn.Sequential(Noise(), nn.Linear(5, 2)), loss=nn.MSELoss()),
    ]


class Whole(MultiTaskModule):
    """The same net as a model that does not split."""

    def losses(self, batch, batch_idx):
        return super().losses(batch, batch_idx)


def still(params: Any, lr: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr)


def zoo_module(kind: type = MultiTaskModule, lr: float = 0.0) -> Any:
    return kind(zoo(), zoo_tasks(), optimizer=functools.partial(still, lr=lr)).double()


class StillPlain(Plain):
    def configure_optimizers(self):
        return still(self.parameters())


def seed() -> None:
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)


def streams() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


def assert_same_as(ours: MultiTaskModule, plain: Plain) -> None:
    assert_identical(ours.encoder, plain.encoder)
    assert_identical(ours.heads, plain.heads)


resuming = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
eval_mode = pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")


@eval_mode
@pytest.mark.parametrize("kind", [MultiTaskModule, Whole])
@pytest.mark.parametrize("sam", SAMS)
@pytest.mark.parametrize("aggregator", [None, CAGrad])
def test_buffers_and_random_streams(kind: type, sam: str, aggregator) -> None:
    ours, plain = zoo_module(kind), StillPlain(zoo_module())
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    val = data(16, seed=1)
    seed()
    fit(ours, [SAMS[sam], *([aggregator()] if aggregator else [])], val=val, max_epochs=2)
    drawn = streams()
    seed()
    fit(plain, val=val, max_epochs=2)
    assert_same_as(ours, plain)
    assert streams() == drawn
    assert all(torch.equal(p, before[name]) for name, p in ours.named_parameters())
    assert ours.encoder[3].count == 2 * 3
    assert not ours.second_pass


class Stop(BaseException):
    """As an interrupt, caught by nobody on the way."""


class RaisesInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise Stop


class Fails(MultiTaskModule):
    """Raises in the second pass of the second batch."""

    place = "encoder"
    task = "a"

    def maybe_raise(self, place: str) -> None:
        if self.second_pass and place == self.place and self.batches == 2:
            raise Stop

    def encode(self, batch):
        self.batches += 1  # which is put back
        features = super().encode(batch)
        self.maybe_raise("encoder")
        return features

    def task_loss(self, task, features, batch):
        loss = super().task_loss(task, features, batch)
        if task == self.task:
            self.maybe_raise("loss")
            if self.second_pass and self.place == "backward" and self.batches == 2:
                return RaisesInBackward.apply(loss)
        return loss

    batches = 0


class PlainStops(StillPlain):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 1:
            raise Stop
        return loss


@eval_mode
@pytest.mark.parametrize(
    ("sam", "place"),
    [
        (sam, place)
        for sam in SAMS
        for place in ("encoder", "loss", "backward")
        if (sam, place) != ("heads only", "encoder")  # which does not run again
    ],
)
@pytest.mark.parametrize("task", ["a", "b"])
def test_after_an_exception_in_the_second_pass(sam: str, place: str, task: str) -> None:
    ours, plain = zoo_module(Fails), PlainStops(zoo_module())
    ours.place, ours.task = place, task
    seed()
    with pytest.raises(Stop):
        fit(ours, [CAGrad(), SAMS[sam]])
    drawn = streams()
    seed()
    with pytest.raises(Stop):
        fit(plain)
    assert_same_as(ours, plain)
    assert streams() == drawn
    assert not ours.second_pass
    norms = [layer for layer in ours.modules() if hasattr(layer, "track_running_stats")]
    assert len(norms) == 5
    assert all(layer.track_running_stats for layer in norms)
    ours.place = "nowhere"  # and it trains on as if nothing had happened
    fit(ours, [CAGrad(), SAMS[sam]])


@pytest.mark.parametrize("kind", [MultiTaskModule, Whole])
@pytest.mark.parametrize("point", ["separate", "joint"])
def test_both_passes_draw_the_same_masks(kind: type, point: str) -> None:
    """With rho going to 0 the second pass becomes the first one, dropout and all."""
    runs = []
    for callbacks in ([CAGrad()], [CAGrad(), TaskSAM(1e-9, point=point)]):
        seed()
        ours = zoo_module(kind, lr=0.1)
        ours.encoder[-2].train()
        ours.encoder[3] = nn.Identity()  # what depends on its buffers sees those after the
        ours.encoder[8] = nn.Linear(64, 5).double()  # clean pass, and is another function then
        fit(ours, callbacks)
        runs.append(ours)
    assert runs[1].last_step.flat_gram.diagonal().max() < 1e-12 * runs[1].last_step.gram.max()
    first, second = (nn.utils.parameters_to_vector(ours.parameters()) for ours in runs)
    assert (first - second).norm() < 1e-7 * first.norm()


class Counting(MultiTaskModule):
    """Logs and feeds metrics in ``losses``, in several ways."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.total = torchmetrics.SumMetric()
        self.seen = torchmetrics.CatMetric()
        self.recent = Running(torchmetrics.SumMetric(), window=2)
        self.pair = torchmetrics.MetricCollection(
            {"mse": torchmetrics.MeanSquaredError(), "mae": torchmetrics.MeanAbsoluteError()}
        )

    passes: ClassVar[dict[bool, int]]  # of the class: what lies in the module is put back

    def losses(self, batch, batch_idx):
        self.passes[self.second_pass] += 1
        losses = super().losses(batch, batch_idx)
        self.log("logged", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
        self.log_dict({"first": 1.0, "second": 2.0}, on_step=False, on_epoch=True, reduce_fx="sum")
        self.log("by_forward", self.total, on_step=False, on_epoch=True)
        self.total(torch.ones(()))
        self.seen.update(torch.tensor([float(batch_idx)]))
        self.recent(torch.tensor(float(batch_idx)))
        self.pair.update(losses["a"].detach()[None], losses["b"].detach()[None])
        return losses


@pytest.mark.parametrize("callbacks", [[], [CAGrad(), TaskSAM(0.5)], [TaskSAM(0.5, point="joint")]])
def test_logs_and_metrics_count_once(callbacks: list[pl.Callback]) -> None:
    ours, reference = module(kind=Counting), module(kind=Counting)

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            self.total = pl_module.total.compute().item()

    look = Look()
    Counting.passes = {False: 0, True: 0}
    done = fit(ours, [*callbacks, look])
    passes, Counting.passes = Counting.passes, {False: 0, True: 0}
    fit(reference)
    logged = {k: done.callback_metrics[k].item() for k in ("logged", "first", "second")}
    assert logged == {"logged": 3.0, "first": 3.0, "second": 6.0}
    assert look.total == done.callback_metrics["by_forward"].item() == 3.0
    assert ours.seen.compute().tolist() == [0.0, 1.0, 2.0]
    assert ours.recent.compute() == 1.0 + 2.0
    assert [m.update_count for m in ours.pair.values()] == [3, 3]
    assert passes[False] == 3
    assert (passes[True] > 0) is bool(callbacks)
    if not callbacks:
        assert ours.pair.compute() == reference.pair.compute()


def three_tasks() -> tuple[list[Task], Any]:
    torch.manual_seed(7)
    tasks = [Task(name, head=nn.Linear(5, 2), loss=nn.MSELoss()) for name in "abc"]
    loader = data()
    loader.dataset.targets = {
        name: torch.randn(24, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        for i, name in enumerate("abc")
    }
    return tasks, loader


def three(**kwargs: Any) -> tuple[MultiTaskModule, Any]:
    tasks, loader = three_tasks()
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.BatchNorm1d(5), nn.Tanh())
    adam = functools.partial(torch.optim.Adam, lr=0.01)
    return MultiTaskModule(trunk, tasks, optimizer=adam, **kwargs).double(), loader


METHODS = {
    "PCGrad": lambda: [PCGrad(seed=4)],
    "F-PCGrad": lambda: [PCGrad(seed=4), TaskSAM(0.1)],
    "IMTL": lambda: [IMTL(lr=0.1)],
    "F-IMTL": lambda: [IMTL(lr=0.1), TaskSAM(0.1)],
    "F-CAGrad": lambda: [CAGrad(), TaskSAM(1.0, adaptive=True)],
    "F-MGDA joint": lambda: [MGDA("l2"), TaskSAM(0.1, point="joint")],
}


@resuming
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_is_going_on(tmp_path: Path, method: str, accumulate: int) -> None:
    def start():
        return three(accumulate_grad_batches=accumulate)

    unbroken, loader = start()
    checkpoints = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    callbacks = [*METHODS[method](), checkpoints]
    fit(unbroken, callbacks, loader, max_epochs=4, enable_checkpointing=True)
    for epoch in (0, 1, 2):
        resumed, loader = start()
        path = tmp_path / f"epoch={epoch}.ckpt"
        done = fit(resumed, METHODS[method](), loader, max_epochs=4, ckpt_path=path)
        assert done.global_step == 4 * -(-3 // accumulate)
        assert_identical(resumed, unbroken)


def test_a_checkpoint_holds_plain_values_only(tmp_path: Path) -> None:
    ours, loader = three()
    done = fit(ours, [PCGrad(), TaskSAM()], loader)
    done.save_checkpoint(tmp_path / "x.ckpt")
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert content["callbacks"].keys() >= {"lightning_flatmtl.PCGrad"}
    assert content["lightning_flatmtl.partition"]["seen"] == ["a", "b", "c"]


def plateau(optimizer: Any) -> Any:
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau
    return scheduler(optimizer, patience=0, factor=0.5, threshold=0.5)


@resuming
@pytest.mark.parametrize("saved_at", ["validation", "training"])
def test_a_plateau_scheduler_resumes(tmp_path: Path, saved_at: str) -> None:
    """Also where the checkpoint lies between the validation and the scheduler's step."""

    def start():
        return three(lr_scheduler=plateau, lr_scheduler_config={"monitor": "val/loss"})

    checkpoints = ModelCheckpoint(
        tmp_path,
        "{epoch}",
        "val/loss",
        save_top_k=-1,
        save_on_train_epoch_end=saved_at == "training",
    )
    unbroken, loader = start()
    settings = {"val": loader, "max_epochs": 4}
    fit(unbroken, [CAGrad(), checkpoints], loader, enable_checkpointing=True, **settings)
    for epoch in (0, 1, 3):
        resumed, loader = start()
        path = tmp_path / f"epoch={epoch}.ckpt"
        done = fit(resumed, [CAGrad()], loader, ckpt_path=path, **settings)
        assert done.optimizers[0].param_groups[0]["lr"] < 0.01
        assert_identical(resumed, unbroken)


def copies(original: Any) -> list[Any]:
    buffer = io.BytesIO()
    torch.save(original, buffer)
    buffer.seek(0)
    return [
        copy.deepcopy(original),
        pickle.loads(pickle.dumps(original)),
        torch.load(buffer, weights_only=False),
    ]


def test_copies_after_a_fit_train_on(tmp_path: Path) -> None:
    ours, loader = three()
    done = fit(ours, [CAGrad(), TaskSAM()], loader)
    done.save_checkpoint(tmp_path / "x.ckpt")
    twins = copies(ours)
    blank, _ = three()
    twins.append(
        MultiTaskModule.load_from_checkpoint(
            tmp_path / "x.ckpt",
            encoder=blank.encoder.double(),
            tasks=blank.tasks,
            optimizer=blank._optimizer,
        ).double()
    )
    fit(ours, [CAGrad(), TaskSAM()], loader)
    for twin in twins:
        fit(twin, [CAGrad(), TaskSAM()], loader)
        assert_identical(twin, ours)
        assert [t.head for t in twin.tasks] == list(twin.heads.values())


def test_callbacks_can_be_copied() -> None:
    for original in (PCGrad(), IMTL(), CAGrad(), TaskSAM()):
        for twin in copies(original):
            assert repr(twin) == repr(original)


class CopiesTheModule(pl.Callback):
    def setup(self, trainer, pl_module, stage):
        self.copies = [copy.deepcopy(pl_module)]

    def on_fit_start(self, trainer, pl_module):
        self.copies.append(copy.deepcopy(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.copies.append(copy.deepcopy(pl_module))


def test_copies_in_mid_fit_train_on() -> None:
    ours, loader = three()
    taker = CopiesTheModule()
    fit(ours, [CAGrad(), TaskSAM(), taker], loader)
    assert_identical(taker.copies[-1], ours)
    for twin in taker.copies:
        fit(twin, [CAGrad(), TaskSAM()], loader)
    assert_identical(taker.copies[0], ours)


def test_an_error_before_the_fit_leaves_the_module_usable() -> None:
    class Breaks(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            raise Stop

    class BreaksLate(Checkpoint):  # comes after our own callbacks
        def setup(self, trainer, pl_module, stage):
            raise Stop

    ours, loader = three(accumulate_grad_batches=2)
    reference, _ = three(accumulate_grad_batches=2)
    for callback in (Breaks(), BreaksLate()):
        with pytest.raises(Stop):
            fit(ours, [callback], loader, enable_checkpointing=True)
        assert "configure_optimizers" not in vars(ours)
    again = trainer()
    again.fit(ours, loader)
    fit(reference, [], loader)
    assert_identical(ours, reference)
