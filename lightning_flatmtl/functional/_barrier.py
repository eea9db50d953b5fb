"""Positive solutions of ``C z = t z^-p``: the equations of Nash-MTL and FairGrad."""

from __future__ import annotations

import numpy as np

from lightning_flatmtl.functional._convergence import warn_not_converged
from lightning_flatmtl.functional._gram import EPS, Array, rounding
from lightning_flatmtl.functional.min_norm import min_norm_point, vanishes

_MAX_STEPS = 1000  # 3 to 10 are usual; hundreds where solutions span 100 decades
_MAX_HALVINGS = 60
_MAX_FACTOR = 100.0
_LAST_STEP = EPS**0.5
_BOUNDARY = 0.99  # the share of the way to z_i = 0 that one step may go


def solve_barrier(C: Array, log_t: Array, p: float) -> Array | None:
    r"""Solve :math:`C z = t \odot z^{-p}` for :math:`z > 0`.

    The solution is the minimiser of the strictly convex
    :math:`\tfrac12 z^\top C z - \sum_i t_i \int z_i^{-p}`, found by Newton's method in relative
    steps :math:`\delta = \Delta z / z`, so that components may differ by tens of decades.

    Args:
        C: Positive semidefinite matrix ``[n, n]`` with unit diagonal, ``n >= 1``.
        log_t: Logarithms ``[n]`` of the right-hand side.
        p: Positive exponent.

    Returns:
        The solution ``[n]``, or None if there is none: that is so exactly when some nonzero
        :math:`z \ge 0` has :math:`C z = 0`, here to within rounding.
    """
    sizes, longest, checked = np.abs(C), np.inf, False
    z: Array = np.exp(log_t / (1 + p))  # the solution for orthogonal rows
    # A trial step may overflow where p is large; it is then too long, and is shortened.
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(_MAX_STEPS):
            target = _target(z, log_t, p)
            factor = _balance(float(z @ C @ z), float(target.sum()), p)
            z, target = factor * z, factor ** (1 - p) * target
            residual = z * (C @ z) - target
            noise = rounding(len(z)) * (z * (sizes @ z) + target)
            # Equations that drown in rounding error: z grows along the kernel, or is close to it.
            if not checked and (target <= noise).any():
                checked = True
                if vanishes(min_norm_point(np.ones(len(z)), C), C):
                    return None
            step = _newton_step(C, z, p * target, residual)
            previous, longest = longest, float(np.abs(step).max())
            # Steps this short shrink quadratically: the next would be rounding error, or, if
            # the last did not even halve, they are rounding error already.
            short = longest <= _LAST_STEP or ((p + 1) * previous <= 0.2 and 2 * longest > previous)
            if short and (np.abs(residual) <= noise + 0.1 * target).all():
                return np.asarray(z * np.maximum(1 + step, 0.5))
            # Small components still move when the potential does not show it any more.
            allowed = -0.5 * float(step @ residual) + float(np.abs(step) @ noise)
            z = _damped(C, z, log_t, p, step, allowed)
    warn_not_converged("Newton's method", _MAX_STEPS)
    return z


def _target(z: Array, log_t: Array, p: float) -> Array:
    """The right-hand side times ``z``; by logarithms, as ``t`` alone may overflow."""
    return np.asarray(np.exp(log_t + (1 - p) * np.log(z)))


def _balance(left: float, right: float, p: float) -> float:
    """The factor that minimises the potential along ``z``, at most ``_MAX_FACTOR``.

    It is reached in one go where Newton's method would double ``z`` time and again: along the
    kernel of ``C``, where the balance of both sides of the equation lies at infinity.
    """
    left = max(left, right * _MAX_FACTOR ** -(1 + p))
    return float((right / left) ** (1 / (1 + p)))


def _newton_step(C: Array, z: Array, curvature: Array, residual: Array) -> Array:
    """The relative step, from a Hessian with unit diagonal."""
    # The diagonal of C is 1, and its curvature adds to that of the barrier.
    scale = 1 / np.sqrt(z * z + curvature)
    factor = scale * z
    hessian = factor[:, None] * C * factor
    # The diagonal of the sum is 1; the ridge of rounding size keeps a kernel from stopping it.
    hessian.flat[:: len(z) + 1] = 1 + EPS
    return np.asarray(-scale * np.linalg.solve(hessian, scale * residual))


def _damped(C: Array, z: Array, log_t: Array, p: float, step: Array, allowed: float) -> Array:
    """Go along ``step`` as long as the potential's slope is allowed, never to the boundary."""
    along = z * step
    length = min(1.0, _BOUNDARY / max(float(-step.min()), _BOUNDARY))
    for _ in range(_MAX_HALVINGS):
        trial: Array = z + length * along
        # The potential is convex, so its slope tells whether the minimum lies behind.
        if float(along @ (C @ trial - _target(trial, log_t, p) / trial)) <= allowed:
            break
        length *= 0.5
    return trial
