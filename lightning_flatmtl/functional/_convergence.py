"""The one warning of the iterative solvers."""

from __future__ import annotations

import warnings

_counted = [0]


class ConvergenceWarning(RuntimeWarning):
    """An iterative solver stopped at its iteration limit; the best iterate was returned."""


def warn_not_converged(solver: str, iterations: int) -> None:
    """Count, and emit a :class:`ConvergenceWarning` that names the solver and its limit."""
    _counted[0] += 1
    warnings.warn(
        f"{solver} did not converge in {iterations} iterations; the best iterate is returned.",
        ConvergenceWarning,
        stacklevel=3,
    )


def not_converged() -> int:
    """How often an iteration has stopped at its limit in this process.

    A warning is shown once for each place in the code; the count goes on.
    """
    return _counted[0]
