"""Every aggregator on arbitrary matrices: finite, without an exception, blind to the order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.aggregators.specs import SPECS, Spec

ALL = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
# Of parallel rows several normalised weights are optimal, which give different raw sums.
SEVERAL_OPTIMA = {"MGDA-l2", "MGDA-loss", "MGDA-loss+"}
IN_ORDER = {k: s for k, s in SPECS.items() if "order_free" in s.traits and k not in SEVERAL_OPTIMA}
QUICK = settings(max_examples=40, deadline=None, derandomize=True, database=None)
pytestmark = pytest.mark.filterwarnings("ignore::lightning_flatmtl.functional.ConvergenceWarning")


@st.composite
def matrices(draw: st.DrawFn, extreme: bool = True) -> Tensor:
    """Integers, dependent rows, nearly dependent ones, and rows of all lengths."""
    m, d = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    entry = st.integers(-9, 9)
    whole = draw(st.lists(st.lists(entry, min_size=d, max_size=d), min_size=m, max_size=m))
    matrix = torch.tensor(whole, dtype=torch.float64)
    kinds = ["integer", "dependent", *(["near", "lengths"] if extreme else [])]
    kind = draw(st.sampled_from(kinds))
    if kind == "dependent":
        matrix[-1] = draw(entry) * matrix[0]
    if kind == "near":
        matrix[:, 1:] *= 10.0 ** -draw(st.integers(4, 9))
    if kind == "lengths":
        lengths = draw(st.lists(st.integers(-30, 30), min_size=m, max_size=m))
        matrix *= 10.0 ** torch.tensor(lengths, dtype=torch.float64)[:, None]
    return matrix


@ALL
@QUICK
@given(matrix=matrices())
def test_a_finite_matrix_gives_a_finite_direction(spec: Spec, matrix: Tensor) -> None:
    losses = torch.arange(1.0, len(matrix) + 1)
    assert torch.isfinite(spec.make()(matrix, losses=losses)).all()


@pytest.mark.parametrize("spec", IN_ORDER.values(), ids=IN_ORDER.keys())
@QUICK
@given(matrix=matrices(extreme=False))
def test_the_order_of_the_rows_changes_nothing(spec: Spec, matrix: Tensor) -> None:
    losses = torch.arange(1.0, len(matrix) + 1)
    direction = spec.make()(matrix, losses=losses)
    turned = spec.make()(matrix.flip(0), losses=losses.flip(0))
    bound = 1e-6 * float(matrix.norm(dim=1).max() + direction.norm())
    assert (direction - turned).norm() <= bound
