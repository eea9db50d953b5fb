"""Positive solutions of ``C z = t z^-p``: the equations of Nash-MTL and FairGrad."""

from __future__ import annotations

import numpy as np

from lightning_flatmtl.functional._convergence import warn_not_converged
from lightning_flatmtl.functional._gram import EPS, Array, rounding
from lightning_flatmtl.functional._nonnegative import solve_symmetric
from lightning_flatmtl.functional.min_norm import min_norm_point, vanishes

_MAX_STEPS = 150  # 3 to 10 are usual; hundreds would be where solutions span 100 decades
_LEAST, _MOST = 1e-150, 1e150  # of components: squares and quotients of them are numbers
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
    # The solution for orthogonal rows.
    z: Array = np.clip(np.exp(log_t / (1 + p)), _LEAST, _MOST)
    # A trial step may overflow where p is large; it is then too long, and is shortened.
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(_MAX_STEPS):
            target = _target(z, log_t, p)
            factor = _balance(float(z @ C @ z), float(target.sum()), p)
            z = np.clip(factor * z, _LEAST, _MOST)
            if z.max() >= _MOST:
                break
            target = _target(z, log_t, p)
            residual = z * (C @ z) - target
            noise = rounding(len(z)) * (z * (sizes @ z) + target)
            # Equations that drown in rounding error: z grows along the kernel, or is close to it.
            if not checked and (target <= noise).any():
                checked = True
                if vanishes(min_norm_point(np.ones(len(z)), C), C):
                    return None
            step = _newton_step(C, z, p * target, residual)
            if not np.isfinite(step).all():  # beyond the range of numbers
                break
            previous, longest = longest, float(np.abs(step).max())
            # Steps this short shrink quadratically: the next would be rounding error, or, if
            # the last did not even halve, they are rounding error already.
            short = longest <= _LAST_STEP or ((p + 1) * previous <= 0.2 and 2 * longest > previous)
            if short and (np.abs(residual) <= noise + 0.1 * target).all():
                return np.asarray(z * np.maximum(1 + step, 0.5))
            # Small components still move when the potential does not show it any more.
            allowed = -0.5 * float(step @ residual) + float(np.abs(step) @ noise)
            z = _damped(C, z, log_t, p, step, allowed)
    if z.max() >= _MOST or vanishes(z, C):  # it ran away along the kernel
        return None
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
    if not 0 < right < np.inf:  # beyond the range of numbers; the steps find their way back
        return 1.0
    left = max(left, right * _MAX_FACTOR ** -(1 + p))
    return float((right / left) ** (1 / (1 + p))) if left > 0 else _MAX_FACTOR


def _newton_step(C: Array, z: Array, curvature: Array, residual: Array) -> Array:
    """The relative step, from a Hessian with unit diagonal."""
    # The diagonal of C is 1, and its curvature adds to that of the barrier.
    scale = 1 / np.sqrt(z * z + curvature)
    factor = scale * z
    hessian = factor[:, None] * C * factor
    # The diagonal of the sum is 1; the ridge of rounding size keeps a kernel from stopping it.
    hessian.flat[:: len(z) + 1] = 1 + EPS
    return np.asarray(-scale * solve_symmetric(hessian, scale * residual))


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
