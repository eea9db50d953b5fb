"""Several accumulated batches train as one batch that holds all their samples."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_flatmtl import MultiTaskModule, TaskSAM
from lightning_flatmtl.aggregators import (
    FAMO,
    IMTL,
    MGDA,
    AlignedMTL,
    CAGrad,
    DynamicWeightAverage,
    GradDrop,
    GradNorm,
    LinearScalarization,
    NashMTL,
    PCGrad,
    ScaleInvariant,
    UncertaintyWeighting,
    UPGrad,
)
from lightning_flatmtl.takeover import host_of
from tests import naive
from tests.ddp.net import LOSSES, Batch, Batches, Foreign, module, without
from tests.ddp.net import batches as whole_batches
from tests.ddp.training import HOSTS, copies, deviation, train
from tests.ddp.worker import Place
from tests.helpers import trainer

TOLERANCE = 1e-10
SHARE = 3
HERE = Place(0, 1, Path())
METHODS: dict[str, Callable[[], list[pl.Callback]]] = {
    "MGDA": lambda: [MGDA()],
    "PCGrad": lambda: [PCGrad(seed=7)],
    "CAGrad": lambda: [CAGrad(0.5)],
    "NashMTL": lambda: [NashMTL()],
    "UPGrad": lambda: [UPGrad()],
    "IMTL": lambda: [IMTL(lr=0.1)],
    "AlignedMTL": lambda: [AlignedMTL()],
    "GradDrop": lambda: [GradDrop(seed=3)],
    "ScaleInvariant": lambda: [ScaleInvariant()],
    "UncertaintyWeighting": lambda: [UncertaintyWeighting(lr=0.1)],
    "DynamicWeightAverage": lambda: [DynamicWeightAverage()],
    "GradNorm": lambda: [GradNorm(lr=0.1)],
    "FAMO": lambda: [FAMO(lr=0.1)],
}


def partly() -> list[Batch]:
    """Batches of twelve; in every third of each there is another number of labels."""
    made = whole_batches(4)
    without(made[0], "a", [1, 2, 5])
    without(made[0], "b", [0, 4, 5, 6, 11])
    without(made[1], "b", slice(4, 8))  # none in the second third
    without(made[1], "c", [0, 1, 2, 3, 8, 9, 10, 11])  # only there
    without(made[2], "a", slice(None))  # in no third
    for task in "abc":
        without(made[3], task, slice(8, 12))  # nothing at all in the last third
    return made


def thirds(whole: Sequence[Batch]) -> list[Batch]:
    """The samples in batches of four."""
    return [
        (x[rows], {task: y[rows] for task, y in targets.items()})
        for x, targets in whole
        for rows in (slice(0, 4), slice(4, 8), slice(8, 12))
    ]


def run(
    host: str,
    method: Any,
    items: Sequence[Batch],
    share: int,
    slow: float = 1.0,
    **more: Any,
) -> dict[str, Any]:
    def optimizer(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1 * slow, momentum=0.9)

    return train(
        HERE,
        host,
        method,
        mine=copy.deepcopy(list(items)),
        net={"counts": True, "optimizer": optimizer},
        accumulate_grad_batches=share,
        **{"max_epochs": 1, **more},
    )


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", METHODS)
def test_as_one_large_batch(host: str, name: str) -> None:
    large = run(host, METHODS[name], partly(), 1)
    small = run(host, METHODS[name], thirds(partly()), SHARE)
    assert small["steps"] == large["steps"] == 4
    assert deviation(large["params"], large["start"]) > 1e-2
    assert deviation(small["params"], large["params"]) < TOLERANCE


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("left", [1, 2])
def test_a_short_last_group_is_divided_by_the_full_number(host: str, left: int) -> None:
    """As in automatic optimization: one batch of its samples, at a smaller learning rate."""
    items = thirds(whole_batches(1))[:left]
    end = [torch.cat([x for x, _ in items])]
    end.append({task: torch.cat([y[task] for _, y in items]) for task in "abc"})
    large = run(host, METHODS["CAGrad"], [tuple(end)], 1, slow=left / SHARE)
    small = run(host, METHODS["CAGrad"], items, SHARE)
    assert small["steps"] == large["steps"] == 1
    assert deviation(small["params"], small["start"]) > 1e-3
    assert deviation(small["params"], large["params"]) < TOLERANCE


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", ["MGDA", "CAGrad", "UPGrad", "GradNorm"])
def test_loaders_that_bring_one_task_at_a_time(host: str, name: str) -> None:
    """The tasks of a batch in three batches, each with the labels of one."""

    def apart(batch: Batch) -> list[Batch]:
        x, targets = batch
        return [(x, {task: y}) for task, y in targets.items()]

    items = whole_batches(3)
    large = run(host, METHODS[name], items, 1)
    small = run(host, METHODS[name], [part for batch in items for part in apart(batch)], SHARE)
    assert small["steps"] == large["steps"]
    assert deviation(small["params"], large["params"]) < TOLERANCE


@pytest.mark.parametrize("host", HOSTS)
def test_the_plain_sum_is_accumulated_as_in_plain_training(host: str) -> None:
    """One backward pass for all tasks; with all labels it is one large batch, too."""
    large = run(host, lambda: [LinearScalarization()], whole_batches(2), 1)
    results = Results()
    items = thirds(whole_batches(2))
    small = run(host, lambda: [LinearScalarization()], items, SHARE, more=[results])
    assert all(result.gram is None for result in results.found)
    assert deviation(small["params"], large["params"]) < TOLERANCE


# With TaskSAM every batch is perturbed along its own gradient.


def naive_update(
    net: Any, items: Sequence[Batch], direction: Any, sam: dict[str, Any]
) -> dict[str, Tensor]:
    """The gradient of an update, by Algorithm 1 written naively; it is left in no ``.grad``."""
    params = {n: p.detach().clone() for n, p in net.named_parameters()}
    shared = [n for n in params if n.startswith("encoder")]
    tasks = ("a", "b", "c")
    heads = {t: [n for n in params if n.startswith(f"heads.{t}")] for t in tasks}

    def loss_of(batch: Batch, task: str) -> Callable[[dict[str, Tensor]], Tensor]:
        def loss(at: dict[str, Tensor]) -> Tensor:
            own = [f"heads.{task}.", "encoder."]
            z = torch.func.functional_call(
                net.encoder,
                {n.removeprefix("encoder."): v for n, v in at.items() if n.startswith(own[1])},
                batch[0],
            )
            out = torch.func.functional_call(
                net.heads[task],
                {n.removeprefix(own[0]): v for n, v in at.items() if n.startswith(own[0])},
                z,
            )
            keep = labelled(batch, task)
            return LOSSES[task](out[keep], batch[1][task][keep])

        return loss

    settings = {"adaptive": False, "point": "separate", "aggregate": "split", **sam}
    totals = {t: sum(int(labelled(b, t).sum()) for b in items) for t in tasks}
    present = [t for t in tasks if totals[t]]
    clean = {t: {n: torch.zeros_like(params[n]) for n in (*shared, *heads[t])} for t in present}
    moved = copy.deepcopy(clean)
    for batch in items:
        for task in present:
            n = int(labelled(batch, task).sum())
            if n == 0:
                continue
            loss, names = loss_of(batch, task), [*shared, *heads[task]]
            g = naive.gradient(loss, params, names)
            rho, adaptive = settings["rho"], settings["adaptive"]
            at_shared = naive.perturb(params, {k: g[k] for k in shared}, rho, adaptive)
            at_head = naive.perturb(params, {k: g[k] for k in heads[task]}, rho, adaptive)
            if settings["point"] == "joint":
                both = {k: at_shared[k] if k in shared else at_head[k] for k in params}
                at_shared = at_head = both
            s = {
                **naive.gradient(loss, at_shared, shared),
                **naive.gradient(loss, at_head, heads[task]),
            }
            for k in names:
                clean[task][k] += g[k] * n / totals[task]
                moved[task][k] += s[k] * n / totals[task]
    rows = torch.stack([naive.vector({k: clean[t][k] for k in shared}) for t in present])
    sam_rows = torch.stack([naive.vector({k: moved[t][k] for k in shared}) for t in present])
    nothing = torch.zeros(len(present), dtype=torch.float64)
    arm = naive.ARMS[settings["aggregate"]]
    found = arm(rows, sam_rows - rows, lambda rows: direction(rows, nothing))
    result = {k: moved[t][k] for t in present for k in heads[t]}
    pieces = torch.split(found, [params[k].numel() for k in shared])
    result.update({k: piece.view_as(params[k]) for k, piece in zip(shared, pieces, strict=True)})
    return result


def labelled(batch: Batch, task: str) -> Tensor:
    target = batch[1][task]
    return target != -1 if task == "a" else ~target.isnan().all(1)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    ("make", "direction"),
    [(MGDA, naive.mgda), (LinearScalarization, naive.ls)],
    ids=["MGDA", "LinearScalarization"],
)
@pytest.mark.parametrize(
    "sam",
    [
        {"rho": 0.1},
        {"rho": 0.1, "point": "joint"},
        {"rho": 0.5, "adaptive": True},
        {"rho": 0.1, "aggregate": "direct"},
        {"rho": 0.1, "aggregate": "second"},
        {"rho": 0.5, "aggregate": "each", "adaptive": True, "point": "joint"},
    ],
    ids=lambda s: " ".join(map(str, s.values())),
)
def test_a_flat_update_against_the_naive_one(
    host: str, make: Any, direction: Any, sam: dict[str, Any]
) -> None:
    items = thirds(partly())

    def callbacks() -> list[pl.Callback]:
        return [make(), TaskSAM(**sam)]

    found = run(host, callbacks, items, SHARE)
    reference = module()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    for start in range(0, len(items), SHARE):
        gradients = naive_update(reference, items[start : start + SHARE], direction, sam)
        for name, p in reference.named_parameters():
            p.grad = gradients.get(name)
        optimizer.step()
    expected = {n: p.detach() for n, p in reference.named_parameters()}
    assert deviation(found["params"], found["start"]) > 1e-2
    assert deviation(found["params"], expected) < TOLERANCE


# What is found out while batches come in.


class Late(nn.Module):
    """Uses its second layer from the third call on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) if x.abs().sum() < 1e3 else self.first(x) + self.second(x)


@pytest.mark.filterwarnings("ignore:Expected every trainable parameter to be reached")
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("sam", [None, TaskSAM(0.1)], ids=["plain", "flat"])
def test_a_parameter_that_appears_within_a_group(host: str, sam: Any) -> None:
    """The partition is found in the middle of a group, or known before it: no difference."""
    items = thirds(whole_batches(1))
    items[2][0].mul_(1e3)

    def callbacks(known: bool) -> list[pl.Callback]:
        return [CAGrad(), *([] if sam is None else [copy.deepcopy(sam)])]

    found = []
    for known in (False, True):
        done = declared(host, known, callbacks(known), items)
        found.append({n: p.detach() for n, p in done.named_parameters()})
    assert deviation(found[0], found[1]) < TOLERANCE


def declared(host: str, known: bool, callbacks: Any, items: Sequence[Batch]) -> Any:
    base: Any = MultiTaskModule if host == "module" else Foreign

    class Says(base):  # type: ignore[misc]
        def shared_parameters(self):
            return list(self.encoder.parameters()) if known else None

    if host == "module":
        model, settings = module(make_trunk=Late, kind=Says, **grouped(SHARE)), {}
    else:
        model, settings = Says(make_trunk=Late, counts=True), grouped(SHARE)
    trainer(callbacks, max_epochs=1, **settings).fit(model, one_by_one(items))
    return model


def one_by_one(items: Sequence[Batch]) -> DataLoader:
    return DataLoader(copy.deepcopy(list(items)), batch_size=None)


def grouped(share: int) -> dict[str, Any]:
    return {"accumulate_grad_batches": share}


class Calls(CAGrad):
    """Notes what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def weights(self, gram, gradients):
        self.asked.append(gradients.part)
        return super().weights(gram, gradients)


@pytest.mark.parametrize("host", HOSTS)
def test_one_aggregation_for_an_update(host: str) -> None:
    method = Calls()
    run(host, lambda: [method, TaskSAM(0.1)], thirds(whole_batches(2)), SHARE)
    assert method.asked == ["loss", "flat"] * 2


class Results(pl.Callback):
    """Keeps the result of every batch."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.found.append(host_of(pl_module).last_step)


@pytest.mark.parametrize("host", HOSTS)
def test_the_result_of_the_last_batch_is_that_of_the_update(host: str) -> None:
    small, large = Results(), Results()
    run(host, METHODS["MGDA"], thirds(partly()), SHARE, more=[small])
    run(host, METHODS["MGDA"], partly(), 1, more=[large])
    of_updates = small.found[SHARE - 1 :: SHARE]
    for found, expected in zip(of_updates, large.found, strict=True):
        assert torch.allclose(found.gram, expected.gram, rtol=1e-12)
        assert list(found.update_losses) == list(expected.losses)
        for task, loss in expected.losses.items():
            assert torch.allclose(found.update_losses[task].double(), loss, rtol=1e-12), task
    assert all(result.gram is None for result in small.found[::SHARE])
    last = small.found[SHARE - 1].losses
    x, targets = thirds(partly())[SHARE - 1]
    assert set(last) == {task for task in targets if labelled((x, targets), task).any()}


@pytest.mark.parametrize("host", HOSTS)
def test_a_task_that_is_not_finite_is_named(host: str) -> None:
    items = thirds(whole_batches(1))
    items[1][1]["b"][2] = torch.inf
    with pytest.raises(ValueError, match="loss of task 'b' must be finite"):
        run(host, METHODS["CAGrad"], items, SHARE)


def test_lbfgs_is_refused() -> None:
    model = Foreign(optimizer=torch.optim.LBFGS, counts=True)
    made = trainer([CAGrad()], max_epochs=1, **grouped(2))
    with pytest.raises(MisconfigurationException, match="LBFGS runs a batch several times"):
        made.fit(model, Batches(whole_batches(2)))


def test_features_are_refused() -> None:
    model = module(gradients="features", **grouped(2))
    with pytest.raises(MisconfigurationException, match="accumulate_grad_batches=1"):
        trainer([CAGrad()], max_epochs=1).fit(model, Batches(whole_batches(2)))


@pytest.mark.parametrize("host", HOSTS)
def test_a_broken_off_group_is_forgotten(host: str) -> None:
    """An epoch that is left between updates; the next one begins a group of its own."""
    items = thirds(whole_batches(2))

    def skip(batch: Batch, batch_idx: int) -> int | None:
        return -1 if batch_idx == SHARE + 1 else None

    found, expected = made(host), made(host)
    found[0].on_train_batch_start = skip
    for (model, settings), data in ((found, items), (expected, items[:SHARE])):
        trainer([CAGrad()], max_epochs=2, **settings).fit(model, one_by_one(data))
    one, other = (copies(model.named_parameters()) for model, _ in (found, expected))
    assert deviation(one, other) == 0.0


def made(host: str) -> tuple[Any, dict[str, Any]]:
    if host == "module":
        return module(**grouped(SHARE)), {}
    return Foreign(counts=True), grouped(SHARE)
