"""Losses that are refused, by the name of their task."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_flatmtl.engine import NonFiniteError
from lightning_flatmtl.engine.checks import Finite, check_graphs, check_scalars
from lightning_flatmtl.engine.errors import ScaledOverflowError

LOSS = torch.ones((), requires_grad=True) * 2


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (1.5, r"'b' must be a scalar tensor, got float\. Return the tensor itself"),
        (None, r"'b' must be a scalar tensor, got NoneType\. Return the tensor itself"),
        (LOSS[None], r"'b' must be a scalar tensor, got a tensor of shape \[1\]\. Reduce it"),
        (LOSS.expand(2, 3), r"'b' must be a scalar tensor, got a tensor of shape \[2, 3\]"),
    ],
)
def test_what_is_no_scalar_tensor(loss: Any, words: str) -> None:
    for check in (check_scalars, check_graphs):
        with pytest.raises(ValueError, match=words):
            check({"a": LOSS, "b": loss})


def test_a_loss_without_a_graph_cannot_be_trained() -> None:
    losses = {"a": LOSS, "b": LOSS.detach()}
    check_scalars(losses)
    check_graphs({"a": LOSS})
    with pytest.raises(ValueError, match="'b' must depend on a trainable parameter"):
        check_graphs(losses)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite(value: float) -> None:
    def values(last: float) -> Tensor:
        return torch.tensor([0.0, 1e308, last], dtype=torch.float64)

    for scaled in (False, True):
        Finite(("a", "b", "c"), scaled)(values(-1e308), "loss")
    with pytest.raises(NonFiniteError, match=f"The loss of task 'c' must be finite, got {value}"):
        Finite(("a", "b", "c"), scaled=False)(values(value), "loss")
    # With a loss scale it is an overflow, and the batch is skipped.
    with pytest.raises(ScaledOverflowError, match="the loss of task 'c'"):
        Finite(("a", "b", "c"), scaled=True)(values(value), "loss")
