"""Where the losses alone decide: the step's loss is their weighted sum and nothing else."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_flatmtl.aggregators import LinearScalarization
from lightning_flatmtl.engine import Partition
from lightning_flatmtl.engine.gradients.penalty import Penalty
from lightning_flatmtl.engine.gradients.weighted_sum import weighted_sum
from lightning_flatmtl.engine.parameters.blocks import Setting
from lightning_flatmtl.engine.parameters.workspace import Workspace
from lightning_flatmtl.engine.processes.base import Processes
from lightning_flatmtl.engine.processes.failure import Failure
from lightning_flatmtl.engine.processes.single import SingleProcess

WEIGHTS = {"a": 3.0, "b": 0.5}


class Two(SingleProcess):
    """Two processes seen from one; the other's part of every sum is given."""

    size, ddp_mean_correction = 2, 2

    def __init__(self, others: list[float]) -> None:
        super().__init__()
        self.others = torch.tensor(others, dtype=torch.float64)

    @override
    def sum_on_host(self, tensor: Tensor) -> Tensor:
        return tensor + self.others


class Net(nn.Module):
    """A parameter for all tasks, one for each, one for a penalty and one for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.a, self.b, self.p, self.spare = (
            nn.Parameter(torch.tensor(float(i), dtype=torch.float64)) for i in range(2, 7)
        )

    def losses(self) -> dict[str, Tensor]:
        return {"a": self.w * self.a, "b": self.w * self.b.square()}


def setting(net: Net, shares: dict[str, float], processes: Processes) -> Setting:
    partition = Partition()
    partition.observe(net.losses())
    partition.penalise([net.p])
    failure = Failure(processes, net)
    return Setting(net, list(net.parameters()), partition, shares, processes, Workspace(), failure)


def gradients(net: Net) -> dict[str, Any]:
    return {n: None if p.grad is None else p.grad.item() for n, p in net.named_parameters()}


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_one_process_hands_out_the_sum_itself(scale: float) -> None:
    net = Net()
    term = scale * net.p.square()
    penalty = Penalty(term, 1.0)
    method = LinearScalarization(weights=WEIGHTS)
    result = weighted_sum(
        net.losses(), setting(net, {"a": 1.0, "b": 1.0}, SingleProcess()), method, penalty
    )
    result.loss.backward()
    assert result.loss.item() == 3 * 2 * 3 + 0.5 * 2 * 16 + scale * 25
    assert {task: loss.item() for task, loss in result.losses.items()} == {"a": 6, "b": 32}
    assert gradients(net) == {
        "w": 3 * 3 + 0.5 * 16, "a": 3 * 2, "b": 0.5 * 2 * 8, "p": scale * 10, "spare": None
    }  # fmt: skip
    assert list(result.untouched) == []


def test_what_an_absent_task_alone_reaches_gets_no_gradient() -> None:
    # An optimizer with momentum or weight decay moves what has a gradient of zero.
    net = Net()
    one = setting(net, {"a": 1.0}, SingleProcess())
    result = weighted_sum({"a": net.losses()["a"]}, one, LinearScalarization(weights=WEIGHTS))
    result.loss.backward()
    assert gradients(net) == {"w": 9, "a": 6, "b": None, "p": None, "spare": None}


@pytest.mark.parametrize("penalised", [False, True])
def test_of_several_processes_each_has_a_gradient_of_every_parameter(penalised: bool) -> None:
    net = Net()
    term = net.p.square()
    penalty = Penalty(term, 1.0) if penalised else None
    two = setting(net, {"a": 0.25}, Two([5.0]))
    result = weighted_sum(
        {"a": net.losses()["a"]}, two, LinearScalarization(weights=WEIGHTS), penalty
    )
    result.loss.backward()
    # The mean over both processes is the sum of their shares.
    p = 10 if penalised else 0
    assert gradients(net) == {"w": 2 * 0.25 * 9, "a": 2 * 0.25 * 6, "b": 0, "p": p, "spare": 0}
    assert result.losses["a"].item() == 0.25 * 6 + 5
    names = {id(q): n for n, q in net.named_parameters()}
    # What is not reached in any process is to lose its gradient of zero again.
    assert [names[id(q)] for q in result.untouched] == (
        ["b", "spare"] if penalised else ["b", "p", "spare"]
    )


def test_a_process_without_any_of_the_losses_goes_along() -> None:
    net = Net()
    two = setting(net, {"a": 0.0, "b": 0.0}, Two([6.0, 0.0]))
    result = weighted_sum({}, two, LinearScalarization(weights=WEIGHTS))
    result.loss.backward()
    assert result.loss.item() == 0
    assert gradients(net) == dict.fromkeys(["w", "a", "b", "p", "spare"], 0)
    assert {task: loss.item() for task, loss in result.losses.items()} == {"a": 6, "b": 0}
    assert result.zero == ("b",)
    assert [id(q) for q in result.untouched] == [id(net.p), id(net.spare)]
