"""Solver times against the published figures of the field's Gram-based library, one thread.

The figures were taken on one machine and are compared with this one's; run by ``-m slow``.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from lightning_flatmtl import functional
from tests.functional.matrices import gram
from tests.functional.test_pcgrad import random_order

Solver = Callable[[Tensor, Tensor], object]

SOLVERS: dict[str, Solver] = {
    "min_norm": lambda K, order: functional.min_norm_weights(K),
    "cagrad": lambda K, order: functional.cagrad_weights(K, 0.4),
    "pcgrad": functional.pcgrad_weights,
    "imtl_g": lambda K, order: functional.imtl_g_weights(K),
    "nash": lambda K, order: functional.nash_weights(K),
    "upgrad": lambda K, order: functional.upgrad_weights(K),
    "aligned_mtl": lambda K, order: functional.aligned_mtl_weights(K),
    "fairgrad": lambda K, order: functional.fairgrad_weights(K),
    "gradvac": lambda K, order: functional.gradvac_weights(K, order, torch.zeros_like(K)),
}
# Microseconds at m = 3 and m = 40, and how many times faster we want to be.
PEERS = {
    "min_norm": ((358, 2882), 3),
    "cagrad": ((3684, 6415), 10),
    "pcgrad": ((165, 19632), 1),
    "imtl_g": ((86, 305), 1),
    "nash": ((8892, 76627), 50),
    "upgrad": ((209, 4788), 1),
    "gradvac": ((452, 82698), 1),
}
LIMITS = {3: 200.0, 40: 2000.0}

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("m", LIMITS)
@pytest.mark.parametrize("name", SOLVERS)
def test_one_call_is_cheap(name: str, m: int) -> None:
    generator = torch.Generator().manual_seed(m)
    K = gram(torch.randn(m, 100, dtype=torch.float64, generator=generator))
    order = random_order(m)
    times = timeit.repeat(lambda: SOLVERS[name](K, order), number=20, repeat=20)
    microseconds = min(times) / 20 * 1e6
    assert microseconds <= LIMITS[m]
    if name in PEERS:
        (small, large), factor = PEERS[name]
        assert factor * microseconds <= (small if m == 3 else large)
