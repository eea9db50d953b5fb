"""Rows that depend on each other, exactly or nearly: a defined answer, in bounded time."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_flatmtl import functional
from lightning_flatmtl.aggregators import IMTL, IMTLG, CAGrad, ConFIG, FairGrad
from lightning_flatmtl.functional import ConvergenceWarning, config_weights, imtl_g_weights
from tests.functional.matrices import gram

SOLVERS: dict[str, Callable[[Tensor], Tensor]] = {
    "min_norm": functional.min_norm_weights,
    "cagrad": lambda K: functional.cagrad_weights(K, 1.0),
    "cagrad, wide": lambda K: functional.cagrad_weights(K, 3.0),
    "nash": functional.nash_weights,
    "fairgrad": functional.fairgrad_weights,
    "fairgrad, alpha 20": lambda K: functional.fairgrad_weights(K, 20.0),
    "fairgrad, alpha 0.05": lambda K: functional.fairgrad_weights(K, 0.05),
    "upgrad": functional.upgrad_weights,
    "aligned_mtl": functional.aligned_mtl_weights,
    "imtl_g": imtl_g_weights,
    "config": config_weights,
}


def config(jacobian: np.ndarray) -> np.ndarray:
    """By the pseudo-inverse of the unit rows themselves, which keeps all digits."""
    lengths = np.linalg.norm(jacobian, axis=1)
    rows = jacobian[lengths > 0]
    point = np.linalg.pinv(rows / lengths[lengths > 0, None], rcond=1e-10).sum(axis=1)
    length = np.linalg.norm(point)
    if length < 1e-10:
        return np.zeros(jacobian.shape[1])
    return (rows @ point).sum() / length**2 * point


def dependent(seed: int) -> Tensor:
    """More rows than columns, of integers or normally distributed."""
    rng = np.random.default_rng(seed)
    m, d = ((3, 2), (4, 2), (4, 3), (5, 4), (9, 8))[seed % 5]
    integers = rng.integers(-9, 10, (m, d)).astype(float)
    return torch.from_numpy(integers if seed % 3 else rng.standard_normal((m, d)))


def test_config_is_the_pseudo_inverse_whatever_the_order_of_the_rows() -> None:
    for seed in range(2000):
        jacobian = dependent(seed)
        expected = torch.from_numpy(config(jacobian.numpy()))
        bound = 1e-6 * max(float(expected.norm()), 1e-6 * float(jacobian.norm()))
        for rows in (jacobian, jacobian.flip(0)):
            assert (config_weights(gram(rows)) @ rows - expected).norm() <= bound, jacobian


def test_imtl_g_never_takes_dependent_rows_for_independent() -> None:
    for seed in range(2000):
        rows = dependent(seed)
        rows = rows[rows.any(dim=1)]
        units = rows / rows.norm(dim=1, keepdim=True)
        equal = units @ torch.linalg.pinv(units, rtol=1e-10).sum(dim=1)
        if (equal - 1).abs().max() < 1e-6:  # equal projections exist, as for equal rows
            continue
        weights = imtl_g_weights(gram(rows))
        # Equal projections on rows that span too little are those of zero.
        assert (weights @ rows).norm() <= 1e-7 * (weights.abs() @ rows.norm(dim=1)), rows


@pytest.mark.parametrize("flip", [False, True])
def test_the_matrices_of_the_report(flip: bool) -> None:
    def rows(*values: list[float]) -> Tensor:
        return torch.tensor(values[::-1] if flip else values)

    opposed = rows([7.0, -6.0], [-8.0, 7.0], [-9.0, 1.0])
    torch.testing.assert_close(
        ConFIG()(opposed), torch.tensor([-3.3378, -3.8205]), rtol=1e-4, atol=0
    )
    balanced = rows([1.0, 1.0], [2.0, 2.0], [-1.0, -1.0], [-5.0, -5.0])
    assert not ConFIG()(balanced).any()
    raised = rows([2.0, 3.0], [3.0, 5.0], [1.0, -8.0])
    for method in (IMTLG(), IMTL()):
        direction = method(raised, losses=[1.0, 1.0, 1.0])
        torch.testing.assert_close(direction, torch.zeros(2), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore::lightning_flatmtl.functional.ConvergenceWarning")
def test_near_singular_matrices_of_the_report() -> None:
    t = torch.tensor
    cagrad = CAGrad(1.0)(t([[-1.0, -5e-7], [4.0, 1e-7], [-5.0, -2e-7]]))
    fair = FairGrad()(t([[-4.0, 3e-7], [-4.0, -3e-7], [1.0, 1e-7]]))
    assert torch.isfinite(cagrad).all()
    assert torch.isfinite(fair).all()


def near_singular(m: int, seed: int) -> Tensor:
    """Rows of one of five kinds that leave little of a direction."""
    rng = np.random.default_rng((m, seed))
    rows = rng.integers(-5, 6, (m, max(2, m - 1))).astype(float)
    match seed % 5:
        case 0:  # almost on a line
            rows[:, 1:] *= 10.0 ** -rng.integers(4, 9)
        case 1:  # almost parallel
            rows = rows[:1] + rows * 10.0 ** -rng.integers(4, 10)
        case 2:  # of all lengths
            rows *= 10.0 ** rng.integers(-30, 30, (m, 1))
        case 3:  # of half the rank, almost
            thin = rng.standard_normal((m, max(1, m // 2)))
            rows = thin @ rng.standard_normal((thin.shape[1], rows.shape[1])) + 1e-8 * rows
        case _:  # almost without a mean
            rows -= 0.999999 * rows.mean(axis=0)
    return torch.from_numpy(rows)


@pytest.mark.filterwarnings("ignore::lightning_flatmtl.functional.ConvergenceWarning")
@pytest.mark.parametrize("name", SOLVERS)
def test_no_finite_matrix_raises(name: str) -> None:
    for seed in range(300):
        K = gram(near_singular(2 + seed % 4, seed))
        assert torch.isfinite(SOLVERS[name](K)).all(), K


def test_an_exhausted_iteration_warns_and_gives_a_feasible_point() -> None:
    rows = torch.tensor([[-3e-6, 3e-6], [-1e-5, -1e-5], [-2e22, 5e22]], dtype=torch.float64)
    with pytest.warns(ConvergenceWarning, match="did not converge"):
        weights = functional.fairgrad_weights(gram(rows), 20.0)
    assert torch.isfinite(weights).all()
    assert (weights > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVERS)
def test_no_solve_of_forty_rows_takes_long(name: str) -> None:
    for seed in range(40):
        K = gram(near_singular(40, seed))
        times = []
        for _ in range(3):
            start = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                SOLVERS[name](K)
            times.append(time.perf_counter() - start)
        assert min(times) <= 0.05, seed
