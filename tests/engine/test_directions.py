"""The loss of a step, as data-parallel training needs it: several processes, seen by one."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lightning_flatmtl.engine.gradients.directions import surrogate
from lightning_flatmtl.engine.parameters.flat_parameters import FlatParameters


class Several:
    """Processes of which only the numbers are looked at."""

    sharded = False

    def __init__(self, size: int) -> None:
        self.size, self.ddp_mean_correction = size, float(size)


def blocks(size: int, trunk: list[Tensor], head: nn.Linear, spare: nn.Parameter) -> SimpleNamespace:
    return SimpleNamespace(
        heads={"a": FlatParameters(list(head.parameters()))},
        processes=Several(size),
        trainable=[*trunk, *head.parameters(), spare],
    )


@pytest.mark.parametrize("size", [1, 2])
def test_what_no_loss_reaches_gets_zeros_where_processes_wait_for_it(size: int) -> None:
    reached, missed, spare = (nn.Parameter(torch.ones(3)) for _ in range(3))
    head = nn.Linear(2, 1)
    params = blocks(size, [reached, missed], head, spare)
    direction, row = torch.tensor([1.0, -2.0, 4.0]), torch.tensor([0.5, 1.0, 2.0])
    losses, weights = {"a": torch.tensor(7.0)}, torch.tensor([3.0])
    of_shared = [reached, missed], [direction, None]
    loss, untouched = surrogate(
        losses, params, of_shared, {"a": row}, weights, {reached: torch.ones(3)}
    )
    loss.backward()
    assert loss.item() == 7.0
    # The mean over the processes is what data-parallel training makes of it.
    assert torch.equal(reached.grad, direction + 1)
    assert torch.equal(head.weight.grad, 3 * size * row[None, :2])
    assert torch.equal(head.bias.grad, 3 * size * row[2:])
    waited_for = [missed, spare] if size > 1 else []
    assert [id(p) for p in untouched] == [id(p) for p in waited_for]
    for p in (missed, spare):
        assert p.grad is None if size == 1 else torch.equal(p.grad, torch.zeros(3))
