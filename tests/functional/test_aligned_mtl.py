from __future__ import annotations

import pytest
import torch

from lightning_flatmtl.functional import ConvergenceWarning, _jacobi, aligned_mtl_weights
from tests.functional import reference
from tests.functional.matrices import gap, gram, hard_matrices

# Near-parallel rows are left out: the Gram itself holds only half of their digits.
KINDS = [kind for kind in hard_matrices(2) if not kind.startswith("near")]


@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
@pytest.mark.parametrize("m", [2, 3, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_direction_is_the_exact_one(kind: str, m: int, scale: str) -> None:
    jacobian = hard_matrices(m)[kind]
    weights = aligned_mtl_weights(gram(jacobian), scale)  # type: ignore[arg-type]
    expected = reference.aligned_mtl(jacobian, scale)
    assert gap(weights @ jacobian, expected, jacobian, weights) <= 1e-8


@pytest.mark.parametrize("m", [2, 9, 40])
def test_orthogonal_rows_of_all_scales_become_equally_long(m: int) -> None:
    norms = torch.logspace(-8, 8, m, dtype=torch.float64)
    weights = aligned_mtl_weights(torch.diag(norms**2))
    torch.testing.assert_close(weights * norms, torch.full_like(norms, norms[0] / m))


@pytest.mark.parametrize("m", [9, 16])
def test_small_eigenvalues_keep_their_digits_whatever_the_scales(m: int) -> None:
    generator = torch.Generator().manual_seed(m)
    units = torch.randn(m, 2 * m, dtype=torch.float64, generator=generator)
    jacobian = units * torch.logspace(-8, 8, m, dtype=torch.float64)[:, None]
    weights = aligned_mtl_weights(gram(jacobian))
    expected = reference.aligned_mtl(jacobian, "min")
    assert (weights @ jacobian - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", ["scales", "dependent, scales"])
def test_small_eigenvalues_that_a_plain_solver_makes_negative_count(kind: str, seed: int) -> None:
    jacobian = hard_matrices(3, seed)[kind]
    weights = aligned_mtl_weights(gram(jacobian))
    expected = reference.aligned_mtl(jacobian, "min")
    assert (weights @ jacobian - expected).norm() <= 1e-10 * expected.norm()


def test_running_out_of_sweeps_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_jacobi, "_MAX_SWEEPS", 1)
    with pytest.warns(ConvergenceWarning, match="did not converge in 1 iterations"):
        aligned_mtl_weights(gram(hard_matrices(7)["scales"]))


def test_bad_scale_is_refused() -> None:
    with pytest.raises(ValueError, match=r'"min", "median" or "rmse", got \'max\'\.'):
        aligned_mtl_weights(torch.eye(2), "max")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("preference", "message"),
    [
        (torch.ones(3), r"shape \[2\], got \[3\]"),
        (torch.ones(1), r"shape \[2\], got \[1\]"),
        (torch.tensor([1.0, -1.0]), r"in \[0, inf\), got -1.0 at 1"),
        (torch.tensor([torch.nan, 1.0]), r"in \[0, inf\), got nan at 0"),
        (torch.tensor([1.0, torch.inf]), r"in \[0, inf\), got inf at 1"),
    ],
)
def test_a_bad_preference_is_refused(preference, message):
    for matrix in (torch.eye(2), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match=message):
            aligned_mtl_weights(matrix, preference=preference)
