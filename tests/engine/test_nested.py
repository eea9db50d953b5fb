"""Arms that aggregate directions: weights found on inner products are those of explicit rows."""

import pytest
import torch
from torch import Tensor

from lightning_flatmtl.aggregators import (
    IMTL,
    MGDA,
    AlignedMTL,
    CAGrad,
    FairGrad,
    GradDrop,
    GradVac,
    LinearScalarization,
    NashMTL,
    UncertaintyWeighting,
    UPGrad,
)
from lightning_flatmtl.engine import NonFiniteError, Sharpness, SumOfLosses, TaskGradients
from lightning_flatmtl.engine.gradients.nested import Nested, refuse_unfit_to_nest
from tests import naive
from tests.aggregators.specs import SPECS

ARMS = ("second", "each")
TASKS = ("a", "b", "c")
FIT = {name: spec for name, spec in SPECS.items() if not spec.make().needs_tasks}


def direction(aggregation, arm: str, g: Tensor, f: Tensor) -> Tensor:
    parts = [
        TaskGradients(rows, rows @ rows.T, TASKS, part=part)
        for rows, part in ((g, "loss"), (f, "flat"))
    ]
    nested = Nested(aggregation, arm, g @ f.T, [(part, None) for part in parts])
    return sum(nested.row_weights(part) @ part.jacobian for part in parts)


def matrices(scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    g, f = torch.randn(2, 3, 20, dtype=torch.float64, generator=generator)
    return g, scale * f


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("scale", [1.0, 1e-2])
@pytest.mark.parametrize("name", FIT)
def test_as_on_explicit_rows(name: str, scale: float, arm: str) -> None:
    g, f = matrices(scale)
    expected = naive.ARMS[arm](g, f, FIT[name].make())
    found = direction(FIT[name].make(), arm, g, f)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("arm", ARMS)
def test_the_sum_is_the_same_in_all_arms(arm: str) -> None:
    g, f = matrices()
    torch.testing.assert_close(direction(SumOfLosses(), arm, g, f), (g + f).sum(0))


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("name", FIT)
def test_rows_of_zero_and_parallel_ones(name: str, arm: str) -> None:
    g, f = matrices()
    for first, second in ((g, 0 * f), (0 * g, 0 * f), (g, g), (g, -g), (g[[0, 0, 0]], f)):
        assert direction(FIT[name].make(), arm, first, second).isfinite().all()


def test_an_inner_direction_that_is_not_finite_is_named() -> None:
    class Broken(SumOfLosses):
        def row_weights(self, gradients: TaskGradients) -> Tensor:
            return torch.full((len(gradients.tasks),), torch.inf, dtype=torch.float64)

    with pytest.raises(NonFiniteError, match="The direction of .*Broken.* must be finite"):
        direction(Broken(), "second", *matrices())


REFUSED = {
    "weights": LinearScalarization({"a": 1.0, "b": 2.0}),
    "preference": UPGrad({"a": 1.0, "b": 2.0}),
    "mean of a preference": AlignedMTL(preference=[1.0, 2.0]),
    "powers": NashMTL(preference=[1.0, 2.0]),
    "kept weights": NashMTL(update_interval=2),
    "losses": MGDA("loss+"),
    "weights of losses": UncertaintyWeighting(),
    "learned scales": IMTL(),
    "targets of pairs": GradVac(),
    "entries": GradDrop(),
}


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_tasks_is_refused(name: str, arm: str) -> None:
    with pytest.raises(ValueError, match=rf"TaskSAM\(aggregate='{arm}'\) aggregates directions"):
        refuse_unfit_to_nest(REFUSED[name], Sharpness(aggregate=arm))


def test_what_does_not_nest_is_not_refused() -> None:
    still = Sharpness(0.0, 0.0, aggregate="each")
    for sharpness in (None, Sharpness(), Sharpness(aggregate="direct"), still):
        refuse_unfit_to_nest(GradDrop(), sharpness)
    for aggregation in (None, SumOfLosses(), CAGrad(), FairGrad(normalize=True)):
        refuse_unfit_to_nest(aggregation, Sharpness(aggregate="each"))
