from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch

from lightning_flatmtl.functional._gram import unit_gram
from lightning_flatmtl.functional._jacobi import gram_eigenpairs


def exact_eigenvalues(rows: np.ndarray) -> np.ndarray:
    """Those of ``rows rows'`` that are not zero, in 60 digits, in ascending order."""
    with mpmath.workdps(60):
        matrix = mpmath.matrix(rows.tolist())
        values = mpmath.eigsy(matrix * matrix.T, eigvals_only=True)
        top = max(values)
        return np.array(sorted(float(v) for v in values if v > top * mpmath.mpf(10) ** -45))


@pytest.mark.parametrize("angle", [2.0**-k for k in (3, 8, 13, 17)])
@pytest.mark.parametrize("length", [2.0**-k for k in (20, 30, 40)])
@pytest.mark.parametrize("seed", range(4))
def test_a_short_row_that_depends_on_near_parallel_ones_is_no_eigenvalue(
    angle: float, length: float, seed: int
) -> None:
    # Two columns, so the rank is 2. The third row is a combination of the long ones with
    # coefficients of 1 / angle: its remainder carries their rounding error, squared.
    a, b, c = np.random.default_rng(seed).integers(-99, 100, (3, 2)).astype(float)
    rows = np.array([a, a + angle * b, length * angle * c])
    values, vectors = gram_eigenpairs(unit_gram(torch.from_numpy(rows @ rows.T)))
    expected = exact_eigenvalues(rows)
    assert len(expected) == 2
    assert len(values) == 2
    assert vectors.shape == (3, 2)
    np.testing.assert_allclose(values.max(), expected.max(), rtol=1e-12)
