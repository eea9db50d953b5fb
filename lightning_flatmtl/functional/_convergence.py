"""The one warning of the iterative solvers."""

from __future__ import annotations

import warnings


class ConvergenceWarning(RuntimeWarning):
    """An iterative solver stopped at its iteration limit; the best iterate was returned."""


def warn_not_converged(solver: str, iterations: int) -> None:
    """Emit a :class:`ConvergenceWarning` that names the solver and its limit."""
    warnings.warn(
        f"{solver} did not converge in {iterations} iterations; the best iterate is returned.",
        ConvergenceWarning,
        stacklevel=3,
    )
