"""RhoFinder sees the samples of all processes, and only looks."""

from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist

from lightning_flatmtl import MultiTaskModule, TaskSAM
from lightning_flatmtl.aggregators import CAGrad
from lightning_flatmtl.callbacks import RhoFinder, find_rho
from tests.ddp.cases import Caught, case, caught
from tests.ddp.net import Batches, batches, module, share, still, without
from tests.ddp.training import HOSTS, train, trainer
from tests.ddp.worker import Place

pytestmark = pytest.mark.ddp


def finder(**settings: Any) -> RhoFinder:
    return RhoFinder(num_radii=3, warmup_steps=1, batches=9, verbose=False, **settings)


def found(place: Place) -> list[tuple[Any, ...]]:
    """Halves of batches, either all in one process or those of one rank in each of two."""
    halves = [share(batch, Place(rank, 2, place.folder)) for batch in labels() for rank in (0, 1)]
    if place.size == 2:
        halves = halves[place.rank :: 2]
    looks = finder()
    made = trainer(place, [looks, CAGrad()], max_epochs=1)
    mine = [share(batch, place) for batch in batches(2)]
    made.fit(module(still), Batches(mine), Batches(halves))
    assert looks.results is not None
    return [tuple(row.values()) for row in looks.results.table()]


def labels() -> Any:
    """The second process has no label of "b" in the first batch, and fewer of "a"."""
    whole = batches(2, rows=12, seed=5)
    without(whole[0], "b", slice(6, 12))
    without(whole[1], "a", slice(8, 12))
    return whole


case("rho/found", found, (1, 2))


def test_the_figures_are_those_of_all_samples(runs: Any) -> None:
    (one,) = runs(1, "rho/found")
    first, second = runs(2, "rho/found")
    assert first == second
    keyed = {row[:5]: row[5:] for row in one}
    assert {row[1] for row in first} == {"a", "b", "c"}
    assert {row[:5] for row in first} == keyed.keys()
    for row in first:
        assert row[5:] == pytest.approx(keyed[row[:5]], rel=1e-6, abs=1e-9)


def callbacks(looks: bool) -> list[pl.Callback]:
    return [CAGrad(), TaskSAM(0.05), *([finder()] if looks else [])]


for _host in HOSTS:
    for _looks in (True, False):
        _case = partial(train, host=_host, whole=batches(3), method=partial(callbacks, _looks))
        case(f"rho/{_host}/{_looks}", partial(_case, val=batches(2, seed=3)), (2,))


@pytest.mark.parametrize("host", HOSTS)
def test_training_is_the_same_bit_for_bit(runs: Any, host: str) -> None:
    with_it, without_it = (runs(2, f"rho/{host}/{looks}") for looks in (True, False))
    for a, b in zip(with_it, without_it, strict=True):
        for key, value in b["params"].items():
            assert torch.equal(a["params"][key], value), key
        assert a["metrics"] == b["metrics"]


class Stumbles(MultiTaskModule):
    """The last process fails where it is looked at, at the fourth time."""

    runs = 0

    def losses(self, batch: Any, batch_idx: int) -> Any:
        if self.second_pass and dist.get_rank() == dist.get_world_size() - 1:
            Stumbles.runs += 1
            if Stumbles.runs == 4:
                raise LookupError("the third page is missing")
        return super().losses(batch, batch_idx)


def stumbling(place: Place) -> Caught:
    Stumbles.runs = 0
    net = {"kind": Stumbles, "optimizer": still}
    job = partial(train, place, "module", lambda: [finder()], whole=batches(3), net=net)
    return caught(job)


case("rho/told", stumbling, (2,))


def test_an_error_of_one_process_is_told(runs: Any) -> None:
    first, second = runs(2, "rho/told")
    assert second.kind == "LookupError"
    assert first.kind == "ProcessError"
    assert "process 1: LookupError: the third page is missing" in first.words


def updated(place: Place) -> tuple[float, float]:
    sam, looks = TaskSAM(0.0), finder(update_attr=True)
    train(place, "module", lambda: [sam, looks], whole=batches(3), val=batches(2, seed=3))
    assert looks.results is not None
    return sam.sharpness.rho_shared, looks.results.suggestion() or 0.0


case("rho/updated", updated, (2,))


def test_all_processes_go_on_with_the_same_radius(runs: Any) -> None:
    first, second = runs(2, "rho/updated")
    assert first == second
    assert first[0] == first[1] > 0


def found_before(place: Place, find: bool) -> tuple[Any, Any]:
    """Parameters after a fit that a radius was looked for before, and the radius."""
    made, net, radius = trainer(place, [CAGrad(), TaskSAM(0.05)]), module(), None
    loaders = [Batches(share(batch, place) for batch in batches(2, seed=s)) for s in (0, 3)]
    if find:
        results = find_rho(made, net, *loaders, warmup_steps=1, num_radii=3, verbose=False)
        radius = results.suggestion()
    made.fit(net, *loaders)
    return {name: p.detach().clone() for name, p in net.named_parameters()}, radius


for _find in (True, False):
    case(f"rho/before/{_find}", partial(found_before, find=_find), (2,))


def test_a_fit_after_find_rho_is_the_same(runs: Any) -> None:
    found, plain = (runs(2, f"rho/before/{find}") for find in (True, False))
    assert found[0][1] == found[1][1] > 0
    for (params, _), (expected, _) in zip(found, plain, strict=True):
        for name, value in expected.items():
            assert torch.equal(params[name], value), name
