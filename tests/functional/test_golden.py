"""The published directions of every deterministic method."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_flatmtl import functional
from tests.functional.matrices import gram

CASES = json.loads((Path(__file__).parents[1] / "vectors" / "aggregators.json").read_text())[
    "cases"
]

SOLVERS: dict[str, Callable[[Tensor], Tensor]] = {
    "MGDA": functional.min_norm_weights,
    "CAGrad(c=0.4, rescale=True)": lambda K: functional.cagrad_weights(K, 0.4),
    "CAGrad(c=0.4, rescale=False)": lambda K: functional.cagrad_weights(K, 0.4, rescale=False),
    "IMTLG": functional.imtl_g_weights,
    "NashMTL (one exact solve, no norm clip)": functional.nash_weights,
    "UPGrad": functional.upgrad_weights,
    "AlignedMTL (min)": functional.aligned_mtl_weights,
    "FairGrad(alpha=2)": functional.fairgrad_weights,
    "PCGrad (sum)": lambda K: functional.pcgrad_weights(K, torch.arange(2).repeat(2, 1)),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
@pytest.mark.parametrize("method", SOLVERS)
def test_direction_is_the_golden_one(method: str, case: dict) -> None:
    if method not in case["expected"]:
        pytest.skip("the direction depends on a random order")
    jacobian = torch.tensor(case["gradients"], dtype=torch.float64)
    expected = torch.tensor(case["expected"][method], dtype=torch.float64)
    direction = SOLVERS[method](gram(jacobian)) @ jacobian
    assert (direction - expected).norm() <= 1e-8 * expected.norm()


def test_every_golden_method_is_tested() -> None:
    assert {name for case in CASES for name in case["expected"]} == set(SOLVERS)
