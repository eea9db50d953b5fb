"""The surrogate has the loss's value and exactly the gradients it was given."""

import torch
from torch import nn

from lightning_flatmtl.engine import surrogate_loss


def test_value_and_gradients_are_those_given() -> None:
    a, b, c = (nn.Parameter(torch.ones(n)) for n in (2, 3, 1))
    g = [torch.tensor([1.0, -2.0]), None, torch.tensor([0.5])]
    loss = surrogate_loss(torch.tensor(7.0), [a, b, c], g)
    assert loss.item() == 7.0
    loss.backward()
    assert torch.equal(a.grad, g[0])
    assert b.grad is None
    assert torch.equal(c.grad, g[2])


def test_the_incoming_gradient_multiplies() -> None:
    a = nn.Parameter(torch.zeros(2))
    (surrogate_loss(torch.tensor(1.0), [a], [torch.tensor([1.0, 2.0])]) / 4 * 1024).backward()
    assert torch.equal(a.grad, torch.tensor([256.0, 512.0]))


def test_two_backwards_accumulate_and_do_not_share_memory() -> None:
    a = nn.Parameter(torch.zeros(2))
    g = torch.tensor([1.0, 2.0])
    surrogate_loss(torch.tensor(1.0), [a], [g]).backward()
    surrogate_loss(torch.tensor(1.0), [a], [g]).backward()
    assert torch.equal(a.grad, torch.tensor([2.0, 4.0]))
    assert torch.equal(g, torch.tensor([1.0, 2.0]))


def test_hooks_on_parameters_fire_and_the_type_is_the_parameters() -> None:
    a = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    seen = []
    a.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.dtype))
    surrogate_loss(torch.tensor(1.0), [a], [torch.tensor([1.0, 2.0])]).backward()
    assert seen == [torch.bfloat16]


def test_no_gradient_at_all_can_still_be_differentiated() -> None:
    a = nn.Parameter(torch.zeros(2))
    surrogate_loss(torch.tensor(3.0), [a], [None]).backward()
    assert a.grad is None
