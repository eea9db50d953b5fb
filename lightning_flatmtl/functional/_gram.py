"""The door of every function on a Gram matrix: checks, conversion, Jacobi scaling."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.intp]
Mask: TypeAlias = NDArray[np.bool_]

EPS = float(np.finfo(np.float64).eps)


class UnitGram(NamedTuple):
    """The Gram of the unit rows: ``K[rows][:, rows] = norms * cosines * norms``.

    Attributes:
        size: Number of rows m of the Gram, zero rows included.
        rows: Indices of the rows that are not zero.
        norms: Their Euclidean norms.
        cosines: Their pairwise cosines, with an exact unit diagonal.
    """

    size: int
    rows: Indices
    norms: Array
    cosines: Array

    def weights(self, unit_weights: Array, zero_rows: float = 0.0) -> Array:
        """Weights of the m raw rows from those of the unit rows; a zero row's can be anything."""
        weights = np.full(self.size, zero_rows)
        weights[self.rows] = unit_weights / self.norms
        return weights

    def padded(self) -> tuple[Array, Array]:
        """Cosines and norms of all m rows; a zero row has cosines 0, even with itself."""
        if len(self.rows) == self.size:
            return self.cosines, self.norms
        cosines, norms = np.zeros((self.size, self.size)), np.zeros(self.size)
        cosines[self.rows[:, None], self.rows], norms[self.rows] = self.cosines, self.norms
        return cosines, norms


def rounding(terms: int) -> float:
    """Relative rounding error that a sum of ``terms`` products may carry, with a margin of four."""
    return 4 * (terms + 4) * EPS


def refuse_unreadable(name: str, tensor: Any) -> None:
    """Refuse what is no tensor, or one whose entries are not there to be computed with.

    Raises:
        ValueError: If it is no tensor, sparse, complex or on the meta device.
    """
    if not isinstance(tensor, Tensor):
        raise ValueError(f"`{name}` must be a tensor, got {type(tensor).__name__}.")
    if tensor.layout != torch.strided:
        raise ValueError(
            f"`{name}` must be dense, got the layout {tensor.layout}: use `.to_dense()`."
        )
    if tensor.is_meta:
        raise ValueError(f"`{name}` must have values, got a tensor on the meta device.")
    if tensor.is_complex():
        raise ValueError(f"`{name}` must be real, got {tensor.dtype}.")


def gram_array(gram: Tensor) -> Array:
    """``gram`` as a float64 array, after the checks that all functions share.

    Raises:
        ValueError: If ``gram`` is no dense tensor, is not square, holds NaN or inf, or has a
            negative diagonal.
    """
    refuse_unreadable("gram", gram)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] == 0:
        raise ValueError(f"`gram` must have shape [m, m] with m >= 1, got {list(gram.shape)}.")
    array: Array = gram.detach().to("cpu", torch.float64).numpy()
    if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
        value = array[row][~np.isfinite(array[row])][0]
        raise ValueError(f"`gram` must be finite, got {value} in row {row}.")
    diagonal = array.diagonal()
    if diagonal.min() < 0:
        row = int(diagonal.argmin())
        raise ValueError(f"`gram` must have a diagonal >= 0, got {diagonal[row]} in row {row}.")
    return array


def unit_gram(gram: Tensor) -> UnitGram:
    """Check ``gram`` and scale it to unit rows, zero rows left out.

    Solving for weights of unit rows keeps every component accurate however far apart the norms
    of the rows are: the scaled matrix is within a factor m of the best conditioned one that a
    diagonal scaling can reach (van der Sluis, 1969).
    """
    array = gram_array(gram)
    norms = np.sqrt(array.diagonal())
    rows = norms.nonzero()[0]
    if len(rows) < len(norms):
        array, norms = array[rows[:, None], rows], norms[rows]
    # Two divisions: the product of two norms may overflow where the quotients do not.
    cosines = array / norms[:, None]
    cosines /= norms
    # Rounding may take the cosine of parallel rows past 1.
    np.minimum(cosines, 1.0, out=cosines)
    np.maximum(cosines, -1.0, out=cosines)
    cosines.flat[:: len(cosines) + 1] = 1.0
    return UnitGram(len(gram), rows, norms, cosines)


def semidefinite_unit_gram(gram: Tensor) -> UnitGram:
    """:func:`unit_gram` for solvers that need a positive semidefinite matrix.

    A Gram that was computed in single precision may have eigenvalues of -1e-7. It is replaced by
    its positive semidefinite part, which is as close to the true Gram.
    """
    unit = unit_gram(gram)
    lifted = unit.cosines.copy()
    lifted.flat[:: len(lifted) + 1] += rounding(len(lifted))
    try:
        np.linalg.cholesky(lifted)
    except np.linalg.LinAlgError:
        return unit._replace(cosines=semidefinite_part(unit.cosines))
    return unit


def semidefinite_part(cosines: Array) -> Array:
    """The cosines without their negative eigenvalues, again with a unit diagonal."""
    values, vectors = np.linalg.eigh(cosines)
    factor = vectors * np.sqrt(np.maximum(values, 0.0))
    factor /= np.linalg.norm(factor, axis=1)[:, None]
    part: Array = factor @ factor.T
    np.fill_diagonal(part, 1.0)
    return part


def to_tensor(weights: Array) -> Tensor:
    """``weights`` as a float64 CPU tensor, without a copy."""
    return torch.from_numpy(weights)


def is_number(value: float, low: float, *, low_included: bool) -> bool:
    """Whether ``value`` is finite and at least (or above) ``low``; NaN is not."""
    return math.isfinite(value) and (value >= low if low_included else value > low)
