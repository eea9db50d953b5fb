"""The LeNet of Multi-MNIST."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_flatmtl.models import LeNetEncoder


def test_the_published_network() -> None:
    modules = [LeNetEncoder(), nn.Linear(50, 10), nn.Linear(50, 10)]
    assert sum(p.numel() for m in modules for p in m.parameters()) == 31_910


@pytest.mark.parametrize("size", [18, 28, 36, 37])
def test_shapes_follow_the_arguments(size: int) -> None:
    encoder = LeNetEncoder(in_channels=3, widths=[4, 5], kernels=[3, 5], features=7, size=size)
    assert encoder(torch.zeros(2, 3, size, size)).shape == (2, 7)
    assert encoder.out_features == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": []}, "`widths` and `kernels` must have one entry for each block"),
        ({"widths": [3]}, r"got \[3\] and \[9, 5\]"),
        ({"kernels": [0, 5]}, "`kernels` must be at least 1, got 0"),
        ({"features": 0}, "`features` must be at least 1, got 0"),
        ({"size": 17}, r"`size` must leave a pixel behind kernels \[9, 5\], got 17"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LeNetEncoder(**arguments)
