"""What goes wrong in one process ends all of them, soon and with its reason."""

import os
import signal
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
from torch import nn

from lightning_flatmtl import TaskSAM
from lightning_flatmtl.aggregators import FAMO, CAGrad
from tests.ddp.cases import case, caught
from tests.ddp.launch import Outcome, launch
from tests.ddp.net import Batch, batches, share, trunk
from tests.ddp.training import HOSTS, train
from tests.ddp.worker import Place

pytestmark = pytest.mark.ddp

LIMIT = 60.0
METHODS: dict[str, Any] = {
    "F-CAGrad": lambda: [CAGrad(), TaskSAM(0.05)],
    "FAMO": lambda: [FAMO()],
}


class Trap(nn.Module):
    """Part of a trunk that goes off in one of the passes of the third batch."""

    def __init__(self, go_off: Any, at: int) -> None:
        super().__init__()
        self._go_off, self._at = go_off, at
        self.passes: int | None = None

    def forward(self, x: Any) -> Any:
        if self.passes is not None:
            self.passes += 1
            if self.passes == self._at:
                self._go_off()
        return x


class Arm(pl.Callback):
    """Begins to count passes with the third batch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for trap in pl_module.modules():
            if isinstance(trap, Trap) and batch_idx == 2:
                trap.passes = 0


def stumble() -> None:
    raise LookupError("the third page is missing")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def trapped(
    place: Place, host: str, go_off: Any, method: Any = METHODS["F-CAGrad"], at: int = 1
) -> Any:
    """The last process steps into a trap."""
    action = go_off if place.rank == place.size - 1 else lambda: None
    net = {"make_trunk": lambda: trunk(Trap(action, at))}
    return train(place, host, method, batches(6), net=net, more=[Arm()])


def fewer(place: Place, host: str, method: Any) -> Any:
    mine = [share(batch, place) for batch in batches(5)]
    return train(place, host, method, mine=mine[: 5 - place.rank])


def not_a_number(place: Place, host: str, method: Any) -> Any:
    mine: list[Batch] = [share(batch, place) for batch in batches(3)]
    if place.rank == 1:
        mine[1][1]["b"][0, 0] = float("nan")
    return train(place, host, method, mine=mine)


KINDS = {"raise": partial(trapped, go_off=stumble), "fewer": fewer, "nan": not_a_number}
for _host in HOSTS:
    for _name, _method in METHODS.items():
        for _kind, _run in KINDS.items():
            case(
                f"failures/{_kind}/{_host}/{_name}",
                lambda place, run=_run, host=_host, method=_method: caught(
                    partial(run, place, host=host, method=method)
                ),
                sizes=(2,),
            )
case(
    "failures/nan/module/plain",
    lambda place: caught(partial(not_a_number, place, host="module", method=list)),
    sizes=(2,),
)
HOSTS_AND_METHODS = [(host, name) for host in HOSTS for name in METHODS]


@pytest.mark.parametrize(("host", "name"), HOSTS_AND_METHODS)
def test_an_error_is_told_to_all(runs: Any, host: str, name: str) -> None:
    (kind, words), (own, own_words) = runs(2, f"failures/raise/{host}/{name}")
    assert own == "LookupError"
    assert "the third page is missing" in own_words
    assert kind == "ProcessError"
    assert "process 1: LookupError: " in words
    assert "the third page is missing" in words


@pytest.mark.parametrize(("host", "name"), HOSTS_AND_METHODS)
def test_fewer_batches(runs: Any, host: str, name: str) -> None:
    for kind, words in runs(2, f"failures/fewer/{host}/{name}"):
        assert kind == "ProcessError"
        assert "Expected all 2 processes to have the same number of batches" in words


@pytest.mark.parametrize(("host", "name"), [*HOSTS_AND_METHODS, ("module", "plain")])
def test_nan(runs: Any, host: str, name: str) -> None:
    for kind, words in runs(2, f"failures/nan/{host}/{name}"):
        assert kind == "NonFiniteError"
        assert "The loss of task 'b' must be finite, got nan" in words


# The same without anybody to catch the error: what a person sees.


def raising(place: Place) -> Any:
    return trapped(place, "module", stumble)


def raising_taken_over(place: Place) -> Any:
    return trapped(place, "taken over", stumble)


def raising_in_the_second_pass(place: Place) -> Any:
    return trapped(place, "module", stumble, at=2)


def dying(place: Place) -> Any:
    return trapped(place, "module", die)


def dying_taken_over(place: Place) -> Any:
    return trapped(place, "taken over", die)


def ended(job: str, tmp_path: Any) -> list[Outcome]:
    outcomes = launch(f"tests.ddp.test_failures:{job}", 2, tmp_path, LIMIT, retry=False)
    for outcome in outcomes:
        assert outcome.saved is None
        assert outcome.code is not None, outcome.output
        assert outcome.code != 0
    return outcomes


@pytest.mark.parametrize("job", ["raising", "raising_taken_over"])
def test_processes_that_raise(job: str, tmp_path: Any) -> None:
    for outcome in ended(job, tmp_path):
        assert "LookupError: the third page is missing" in outcome.output.replace("\n", " ")


def test_a_process_that_raises_in_the_second_pass(tmp_path: Any) -> None:
    other, raised = ended("raising_in_the_second_pass", tmp_path)
    assert "LookupError: the third page is missing" in raised.output
    assert "Error" in other.output


@pytest.mark.parametrize("job", ["dying", "dying_taken_over"])
def test_a_process_that_is_killed(job: str, tmp_path: Any) -> None:
    other, killed = ended(job, tmp_path)
    assert killed.code == -signal.SIGKILL
    assert "Error" in other.output
