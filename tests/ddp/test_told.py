"""An error between two exchanges: all processes raise in the same step, and none is out of step."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_flatmtl.aggregators import CAGrad, ExcessMTL, GradDrop
from lightning_flatmtl.engine import ComposedPasses, MultiTaskStep, Passes, Sharpness, WholePasses
from lightning_flatmtl.engine.processes.distributed import DataParallel
from tests.ddp.cases import Caught, case, caught
from tests.ddp.net import LOSSES, TASKS, Batch, batches, parts, share, trunk
from tests.ddp.training import PATIENCE, digest
from tests.ddp.worker import Place

pytestmark = pytest.mark.ddp


class Stumbling(GradDrop):
    """Looks at every column by itself and fails on those of the last process, if told to."""

    fails = False

    def aggregate(self, gradients: Any) -> Tensor:
        if self.fails:
            stumble()
        return super().aggregate(gradients)


AGGREGATORS: dict[str, Callable[[], Any]] = {
    "gram": CAGrad,
    "columns": GradDrop,
    "matrix": ExcessMTL,
    "stumbling": Stumbling,
}
SHARPNESS = {
    "plain": None,
    "separate": Sharpness(),
    "joint": Sharpness(point="joint", adaptive=True),
    "local": Sharpness(perturbation="local"),
    "shared": Sharpness(rho_heads=0.0),
    "heads": Sharpness(rho_shared=0.0),
    "direct": Sharpness(aggregate="direct"),
}


def stumble() -> None:
    raise LookupError("the third page is missing")


LEFT: dict[tuple[str, str], int] = {}
"""By place and kind, how many passes are left; what a module has would be put back."""


def count(where: str, kind: str) -> None:
    LEFT[where, kind] = LEFT.get((where, kind), 0) - 1
    if LEFT[where, kind] == 0:
        stumble()


class Trap(nn.Module):
    """Goes off in one of the passes, forward or backward."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self._where = where

    def forward(self, x: Tensor) -> Tensor:
        count(self._where, "forward")
        return _Noticed.apply(x, self._where)


class _Noticed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, where: str) -> Tensor:
        ctx.where = where
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        count(ctx.where, "backward")
        return gradient, None


class Net(nn.Module):
    """The net of the other tests with traps in the trunk and in a head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, heads = parts(lambda: trunk(Trap("trunk")))
        self.heads = nn.ModuleDict({**heads, "b": nn.Sequential(heads["b"], Trap("head"))})
        self.double()

    def arm(self, where: str, kind: str, at: int) -> None:
        trap: Any = self.encoder[1] if where == "trunk" else self.heads["b"][1]
        trap.left[kind] = at


@dataclass(frozen=True)
class Scenario:
    """What the step is, and where the last process fails in it."""

    aggregator: str = "gram"
    sharpness: str = "plain"
    passes: str = "whole"
    where: str = "trunk"
    kind: str = "backward"
    at: int = 1


SCENARIOS = [
    # The first backward passes: the others have sent as many rows, or one more.
    *(Scenario(a, at=at) for a in ("gram", "columns", "matrix") for at in (1, 2, 3)),
    *(Scenario(sharpness=s, at=2) for s in SHARPNESS),
    # The second forward passes, those of the trunk and that of a head.
    *(Scenario("gram", s, p, kind="forward", at=2 + i)
      for s in ("separate", "joint") for p in ("whole", "composed") for i in range(3)),
    *(Scenario(a, s, "composed", kind="forward", at=3)
      for a in ("columns", "matrix") for s in SHARPNESS if s not in ("plain", "heads")),
    *(Scenario("gram", s, "composed", kind="forward", at=3)
      for s in ("local", "shared", "direct")),
    *(Scenario("gram", s, "composed", "head", "forward", 2)
      for s in ("separate", "heads", "joint")),
    # The second backward passes.
    Scenario("gram", "separate", at=5),
    Scenario("matrix", "joint", "composed", at=6),
    # What else is between two exchanges.
    Scenario(passes="penalty"),
    Scenario("gram", "separate", where="around", kind="before"),
    Scenario("gram", "joint", where="around", kind="after"),
    Scenario("stumbling"),
    Scenario(passes="features", where="head"),
    Scenario(passes="features", where="trunk"),
    Scenario(passes="features", where="encoder"),
]  # fmt: skip
"""With three tasks: three backward passes, then those of the second pass."""


class Model(nn.Module):
    """The net of the other tests, with traps in the trunk and in a head."""

    def __init__(self, scenario: Scenario, place: Place) -> None:
        super().__init__()
        self.encoder, heads = parts(lambda: trunk(Trap("trunk")))
        self.heads = nn.ModuleDict({**heads, "b": nn.Sequential(heads["b"], Trap("head"))})
        self.double()
        self.aggregator = AGGREGATORS[scenario.aggregator]()
        self.armed = False
        self._scenario, self._last = scenario, place.rank == place.size - 1
        self._batch = share(batches(1)[0], place)

    def arm(self, armed: bool) -> None:
        self.armed = armed and self._last
        LEFT.clear()
        if self.armed:
            LEFT[self._scenario.where, self._scenario.kind] = self._scenario.at
        self.aggregator.fails = self.armed

    def passes(self) -> Passes:
        batch, kind = self._batch, self._scenario.passes
        if kind in ("whole", "penalty"):
            made: Passes = WholePasses(self.losses, self, self.around)
            if kind == "penalty":
                made.penalty = lambda: self.encoder[:2](batch[0]).square().mean()
            return made
        given = dict.fromkeys(TASKS, batch)
        return ComposedPasses(
            self.encode, self.task_loss, given, self, self.around, kind == "features", True
        )

    def encode(self, batch: Batch) -> Tensor:
        features: Tensor = self.encoder(batch[0])
        return features.detach() if self.armed and self._scenario.where == "encoder" else features

    def task_loss(self, task: str, features: Tensor, batch: Batch) -> Tensor:
        return LOSSES[task](self.heads[task](features), batch[1][task])

    def losses(self) -> dict[str, Tensor]:
        features = self.encode(self._batch)
        return {task: self.task_loss(task, features, self._batch) for task in TASKS}

    @contextmanager
    def around(self) -> Iterator[None]:
        mine = self.armed and self._scenario.where == "around"
        if mine and self._scenario.kind == "before":
            stumble()
        yield
        if mine:
            stumble()

    def gradients(self, processes: DataParallel) -> str:
        """A step and the hash of what this process gives to it."""
        for p in self.parameters():
            p.grad = None
        step = MultiTaskStep(processes=processes)
        result = step(self, self.passes(), self.aggregator, SHARPNESS[self._scenario.sharpness])
        assert result is not None
        result.loss.backward()
        return digest(torch.zeros(1) if p.grad is None else p.grad for p in self.parameters())


def all_of_them(place: Place) -> dict[Scenario, tuple[Caught, bool]]:
    """For each scenario the error, and whether the next step is as if there had been none."""
    if not dist.is_initialized():
        os.environ["WORLD_SIZE"] = str(place.size)  # a Trainer takes it away after a fit
        dist.init_process_group("gloo", timeout=PATIENCE)
    processes = DataParallel(PATIENCE.total_seconds())
    found = {}
    for scenario in SCENARIOS:
        model, fresh = Model(scenario, place), Model(scenario, place)
        fresh.arm(False)
        model.arm(True)
        try:
            error = caught(partial(model.gradients, processes))
        except AssertionError:
            error = Caught("", "none")
        model.arm(False)
        found[scenario] = error, model.gradients(processes) == fresh.gradients(processes)
    processes.close()
    return found


case("told", all_of_them, sizes=(2, 3))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: "-".join(map(str, astuple(s))))
def test_all_raise_in_the_same_step(runs: Any, scenario: Scenario, size: int) -> None:
    *others, ((own, own_words), same) = [run[scenario] for run in runs(size, "told")]
    if scenario.where == "encoder":
        assert own == "ValueError"
        assert "got features without a graph" in own_words
    else:
        assert (own, own_words) == ("LookupError", "the third page is missing")
    assert same
    for (kind, words), same in others:
        assert kind == "ProcessError"
        assert f"process {size - 1}: {own}: {own_words}" in words
        assert same
