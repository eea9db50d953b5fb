"""Task Jacobians that solvers find hard. Dependent rows are exact: small integers times 2^k."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def hard_matrices(m: int, seed: int = 0) -> dict[str, Tensor]:
    """Named ``[m, d]`` matrices of every kind, ``m >= 2``."""
    rng = np.random.default_rng((m, seed))
    wide, narrow = 2 * m + 1, max(1, m // 2)
    normal = rng.standard_normal((m, wide))
    integers = rng.integers(-9, 10, (m, wide)).astype(float)
    deficient = rng.integers(-9, 10, (m, narrow)).astype(float)
    agreeing = rng.integers(1, 10, (m, narrow)).astype(float)
    decades = 10.0 ** rng.uniform(-8, 8, (m, 1))
    octaves = 2.0 ** rng.integers(-26, 27, (m, 1))
    common = rng.standard_normal(wide)
    found = {
        "generic": normal,
        "agreeing": normal + 0.5 * common,
        "conflicting": normal - 0.98 * normal.mean(axis=0),
        "scales": normal * decades,
        "dependent": deficient,
        "dependent, agreeing": agreeing,
        "dependent, scales": agreeing * octaves,
        "near-parallel": common + 1e-3 * normal,
        "near-parallel, scales": (common + 1e-3 * normal) * decades,
        "zero row": _with_first_row(integers, 0.0),
        "equal rows": _with_first_row(integers, 1.0),
        "parallel rows": _with_first_row(integers, 4.0),
        "opposed rows": _with_first_row(integers, -1.0),
        "opposed rows, unequal": _with_first_row(integers, -4.0),
        "all zero": 0 * normal,
    }
    return {name: torch.from_numpy(matrix) for name, matrix in found.items()}


def _with_first_row(matrix: np.ndarray, factor: float) -> np.ndarray:
    """The first row replaced by a multiple of the last."""
    matrix = matrix.copy()
    matrix[0] = factor * matrix[-1]
    return matrix


def gram(matrix: Tensor) -> Tensor:
    return matrix @ matrix.T


def gap(direction: Tensor, expected: Tensor, matrix: Tensor, weights: Tensor) -> float:
    """Distance relative to the expected direction.

    Where terms cancel, to the rounding error of the terms: a direction that is zero in exact
    arithmetic cannot come out smaller than that, so a millionth of their size is the scale.
    """
    terms = float((weights.abs() * matrix.norm(dim=1)).max())
    scale = max(float(expected.norm()), 1e-6 * terms)
    return float((direction - expected).norm()) / scale if scale > 0 else 0.0
