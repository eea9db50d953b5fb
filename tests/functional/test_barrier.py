from __future__ import annotations

import numpy as np
import pytest

from lightning_flatmtl.functional._barrier import _damped


@pytest.mark.parametrize("size", [1.5, 4.0, 1e9, 1e100])
def test_a_step_ends_short_of_the_boundary_however_long_it_is(size: float) -> None:
    # Newton's steps are relative: -1 takes a component to zero. An unbounded slope is allowed, so
    # that nothing else shortens the step.
    z, step = np.array([2.0, 3.0, 5.0]), np.array([-1.0, 0.5, -0.25]) * size
    reached = _damped(np.eye(3), z, np.zeros(3), 1.0, step, np.inf)
    np.testing.assert_allclose(reached[0], 0.01 * z[0], rtol=1e-9)
    share = 0.99 / size  # of the way that the step would go
    np.testing.assert_allclose(reached, z * (1 + share * step), rtol=1e-9)


def test_a_step_that_leaves_every_component_positive_is_taken_whole() -> None:
    z, step = np.array([2.0, 3.0]), np.array([-0.9, 40.0])
    reached = _damped(np.eye(2), z, np.zeros(2), 1.0, step, np.inf)
    np.testing.assert_allclose(reached, z * (1 + step), rtol=1e-12)


def test_a_step_past_the_minimum_is_shortened() -> None:
    # One row alone: the potential is z^2 / 2 - log z, its minimum lies at 1.
    z = np.array([0.5])
    reached = _damped(np.eye(1), z, np.zeros(1), 1.0, np.array([30.0]), 0.0)
    assert 0.5 < reached[0] <= 1.0
