"""What goes wrong in one process ends all of them, soon and with its reason."""

import os
import signal
from functools import partial
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_flatmtl import TaskSAM
from lightning_flatmtl.aggregators import FAMO, CAGrad
from tests.ddp.cases import case, caught
from tests.ddp.launch import Outcome, launch
from tests.ddp.net import Batch, batches, sgd, share, trunk
from tests.ddp.training import HOSTS, batch_norm, train
from tests.ddp.worker import Place

pytestmark = pytest.mark.ddp

LIMIT = 60.0
METHODS: dict[str, Any] = {
    "F-CAGrad": lambda: [CAGrad(), TaskSAM(0.05)],
    "FAMO": lambda: [FAMO()],
}


PASSES: dict[int, int] = {}
"""The passes of each trap that is armed; an attribute of a module would be put back."""


class Trap(nn.Module):
    """Part of a trunk that goes off in one of the passes of the third batch."""

    def __init__(self, go_off: Any, at: int) -> None:
        super().__init__()
        self._go_off, self._at = go_off, at

    def forward(self, x: Any) -> Any:
        if id(self) in PASSES:
            PASSES[id(self)] += 1
            if PASSES[id(self)] == self._at:
                self._go_off()
        return x


class BackwardTrap(Trap):
    """The same in one of the backward passes."""

    def forward(self, x: Any) -> Any:
        return _Passed.apply(x, super().forward) if id(self) in PASSES else x


class _Passed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, passed: Any) -> Any:
        ctx.passed = passed
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return ctx.passed(gradients[0]), None


class Arm(pl.Callback):
    """Begins to count passes with the third batch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for trap in pl_module.modules():
            if isinstance(trap, Trap) and batch_idx == 2:
                PASSES[id(trap)] = 0


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


def in_between(
    place: Place, host: str, trap: type[Trap], at: int, flat: bool = True, share: int = 1
) -> Any:
    """The last process steps into a trap after the processes have agreed on the tasks."""
    action = stumble if place.rank == place.size - 1 else lambda: None
    net = {"make_trunk": lambda: trunk(trap(action, at))}
    settings = {"net": net, "more": [Arm()], "accumulate_grad_batches": share}
    method = METHODS["F-CAGrad"] if flat else lambda: [CAGrad()]
    return train(place, host, method, batches(4), **settings)


def fewer(place: Place, host: str, method: Any) -> Any:
    mine = [share(batch, place) for batch in batches(5)]
    return train(place, host, method, mine=mine[: 5 - place.rank])


def not_a_number(place: Place, host: str, method: Any) -> Any:
    mine: list[Batch] = [share(batch, place) for batch in batches(3)]
    if place.rank == 1:
        mine[1][1]["b"][0, 0] = float("nan")
    return train(place, host, method, mine=mine)


def unreadable(place: Place, host: str, method: Any, synced: bool = False) -> Any:
    """The last process gets a batch of another form."""
    mine: list[Any] = [share(batch, place) for batch in batches(3)]
    if place.rank == place.size - 1:
        mine[1] = [mine[1][0]]
    net = {"make_trunk": lambda: trunk(batch_norm(place)(5))} if synced else None
    # DDP does not know that our layers can work on the CPU.
    with patch.object(DistributedDataParallel, "_passing_sync_batchnorm_handle"):
        return train(place, host, method, mine=mine, net=net)


def unregistered(place: Place, host: str) -> Any:
    """The optimizer trains a parameter that the module does not know."""

    def optimizer(params: Any) -> torch.optim.Optimizer:
        return sgd([*params, nn.Parameter(torch.ones(3, dtype=torch.float64))])

    return train(place, host, METHODS["F-CAGrad"], batches(2), net={"optimizer": optimizer})


KINDS = {
    "raise": partial(trapped, go_off=stumble),
    "fewer": fewer,
    "nan": not_a_number,
    "unreadable": unreadable,
}
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
case(
    "failures/unreadable/module/synced",
    lambda place: caught(partial(unreadable, place, "module", METHODS["F-CAGrad"], synced=True)),
    sizes=(2,),
)
case(
    "failures/looking again",
    lambda place: caught(partial(trapped, place, "module", stumble, METHODS["FAMO"], at=2)),
    sizes=(2,),
)
case(
    "failures/looking again, taken over",
    lambda place: caught(partial(trapped, place, "taken over", stumble, METHODS["FAMO"], at=2)),
    sizes=(2,),
)
IN_BETWEEN: dict[str, Any] = {
    "first": (BackwardTrap, 2),
    "second": (Trap, 3),
    "first, accumulated": (BackwardTrap, 2, False, 2),  # nothing is summed with this batch
    "second, accumulated": (Trap, 3, True, 2),
}
for _host in HOSTS:
    for _name, _arguments in IN_BETWEEN.items():
        case(
            f"failures/{_name}/{_host}",
            lambda place, host=_host, arguments=_arguments: caught(
                partial(in_between, place, host, *arguments)
            ),
            sizes=(2,),
        )
for _host in HOSTS:
    case(
        f"failures/unregistered/{_host}",
        lambda place, host=_host: caught(partial(unregistered, place, host)),
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


@pytest.mark.parametrize(
    "name", [*(f"{host}/{name}" for host, name in HOSTS_AND_METHODS), "module/synced"]
)
def test_a_batch_that_cannot_be_read_is_told_of(runs: Any, name: str) -> None:
    (kind, words), (own, own_words) = runs(2, f"failures/unreadable/{name}")
    assert own == "ValueError"
    assert kind == "ProcessError"
    assert f"process 1: ValueError: {own_words}" in words


@pytest.mark.parametrize("name", ["looking again", "looking again, taken over"])
def test_an_error_of_looking_again_is_told_of(runs: Any, name: str) -> None:
    (kind, words), (own, _) = runs(2, f"failures/{name}")
    assert (own, kind) == ("LookupError", "ProcessError")
    assert "process 1: LookupError: " in words


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", IN_BETWEEN)
def test_an_error_between_two_exchanges_is_told_to_all(runs: Any, host: str, name: str) -> None:
    (kind, words), (own, own_words) = runs(2, f"failures/{name}/{host}")
    assert (own, own_words) == ("LookupError", "the third page is missing")
    assert kind == "ProcessError"
    assert "process 1: LookupError: the third page is missing" in words


@pytest.mark.parametrize("host", HOSTS)
def test_what_only_the_optimizer_knows_is_refused(runs: Any, host: str) -> None:
    for kind, words in runs(2, f"failures/unregistered/{host}"):
        assert kind == "ValueError"
        assert "got 1 that it does not know: one of shape [3]" in words
        assert "nn.ParameterDict" in words


# The same without anybody to catch the error: what a person sees.


def raising(place: Place) -> Any:
    return trapped(place, "module", stumble)


def raising_taken_over(place: Place) -> Any:
    return trapped(place, "taken over", stumble)


def raising_in_the_second_pass(place: Place) -> Any:
    return trapped(place, "module", stumble, at=2)


def raising_before_a_layer_that_waits(place: Place) -> Any:
    action = stumble if place.rank == place.size - 1 else lambda: None
    net = {"make_trunk": lambda: trunk(Trap(action, 1), batch_norm(place)(5))}
    with patch.object(DistributedDataParallel, "_passing_sync_batchnorm_handle"):
        return train(place, "taken over", METHODS["F-CAGrad"], batches(6), net=net, more=[Arm()])


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
    assert "This is a second pass" in raised.output
    assert "process 1: LookupError: the third page is missing" in other.output.replace("\n", " ")


def test_nobody_waits_in_a_layer_for_a_process_that_has_failed(tmp_path: Any) -> None:
    other, raised = ended("raising_before_a_layer_that_waits", tmp_path)
    assert "LookupError: the third page is missing" in raised.output
    assert "Error" in other.output


@pytest.mark.parametrize("job", ["dying", "dying_taken_over"])
def test_a_process_that_is_killed(job: str, tmp_path: Any) -> None:
    other, killed = ended(job, tmp_path)
    assert killed.code == -signal.SIGKILL
    assert "Error" in other.output
