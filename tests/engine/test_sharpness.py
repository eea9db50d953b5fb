"""Bounds of the settings, and which passes they ask for."""

import math

import pytest

from lightning_flatmtl import TaskSAM
from lightning_flatmtl.engine import Sharpness


@pytest.mark.parametrize("value", [-1.0, -1e-9, math.nan, math.inf, "0.1", True, None])
def test_a_radius_out_of_bounds_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"`rho_shared` must be in \[0, inf\), got"):
        Sharpness(rho_shared=value)
    if value is not None:
        with pytest.raises(ValueError, match=r"`rho_heads` must be in \[0, inf\), got"):
            TaskSAM(rho_heads=value)
    with pytest.raises(ValueError, match=r"`rho` must be in \[0, inf\), got"):
        TaskSAM(value)


def test_choices_are_named() -> None:
    with pytest.raises(ValueError, match="`point` must be 'separate' or 'joint', got 'both'"):
        TaskSAM(point="both")
    choices = "'split', 'direct', 'second' or 'each'"
    with pytest.raises(ValueError, match=f"`aggregate` must be {choices}, got 'mean'"):
        TaskSAM(aggregate="mean")


@pytest.mark.parametrize(
    ("shared", "heads", "point", "expected"),
    [
        (0.0, 0.0, "joint", (False, False, False)),
        (0.1, 0.0, "separate", (True, True, False)),
        (0.0, 0.1, "separate", (True, False, True)),
        (0.1, 0.0, "joint", (True, True, True)),
        (0.0, 0.1, "joint", (True, True, True)),
    ],
)
def test_which_gradients_move(shared: float, heads: float, point: str, expected: tuple) -> None:
    s = Sharpness(shared, heads, point=point)
    assert (s.active, s.moves_shared, s.moves_heads) == expected


def test_rho_sets_both_radii_unless_one_is_given() -> None:
    sam = TaskSAM(0.1, rho_heads=0.0)
    assert (sam.sharpness.rho_shared, sam.sharpness.rho_heads) == (0.1, 0.0)
