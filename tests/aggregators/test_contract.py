"""Contracts that every public aggregator keeps, driven by the table in ``specs.py``."""

import copy
import inspect
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_flatmtl import aggregators
from lightning_flatmtl.aggregators import Aggregator
from lightning_flatmtl.aggregators._wrapping import Wrapping
from lightning_flatmtl.engine import NonFiniteError, TaskGradients
from tests.aggregators.specs import SPECS, Spec

GOLDEN = json.loads((Path(__file__).parents[1] / "vectors" / "aggregators.json").read_text())[
    "cases"
]
ALL = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


def having(trait: str, *, absent: str = "") -> pytest.MarkDecorator:
    chosen = {
        k: s for k, s in SPECS.items() if trait in s.traits and not (absent and absent in s.traits)
    }
    return pytest.mark.parametrize("spec", chosen.values(), ids=chosen.keys())


def rows(m: int, d: int = 12, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(m, d, dtype=torch.float64, generator=g)


def losses(m: int) -> Tensor:
    return torch.arange(1.0, m + 1, dtype=torch.float64) / 3


def call(spec: Spec, matrix: Tensor) -> Tensor:
    return spec.make()(matrix, losses=losses(len(matrix)))


def test_every_public_aggregator_has_a_spec() -> None:
    public = {
        name
        for name in aggregators.__all__
        if not inspect.isabstract(getattr(aggregators, name))
        and inspect.isclass(getattr(aggregators, name))
    }
    public.remove("TorchJD")  # as many methods as TorchJD has; see test_torchjd.py
    assert public == {type(spec.make()).__name__ for spec in SPECS.values()}


@ALL
def test_one_that_needs_no_tasks_decides_by_the_gram(spec: Spec) -> None:
    """So that it can aggregate directions, of which nothing else is known."""
    method = spec.make()
    if method.needs_tasks:
        return
    gram = rows(3) @ rows(3).T
    nothing = TaskGradients(torch.empty(3, 0), gram, ("x", "y", "z"))
    all_known = TaskGradients(rows(3), gram, ("0", "1", "2"), losses(3), part="flat")
    assert method.requires == "gram"
    assert method.loss_weights(("0", "1", "2"), losses(3)) is None
    assert torch.equal(spec.make().row_weights(nothing), method.row_weights(all_known))


def test_who_needs_no_tasks() -> None:
    found = {name for name, spec in SPECS.items() if not spec.make().needs_tasks}
    assert {"LinearScalarization", "MGDA", "PCGrad", "CAGrad", "IMTLG", "UPGrad"} <= found
    assert not found & {"GradVac", "IMTL", "GradDrop", "DBMTL", "MGDA-loss", "FAMO", "ExcessMTL"}


@ALL
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 5), (2, 1), (3, 12), (7, 3), (20, 40)])
def test_shape_type_and_finiteness(spec: Spec, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    matrix = rows(*shape).to(dtype)
    before = matrix.clone()
    direction = call(spec, matrix)
    assert direction.shape == shape[1:]
    assert direction.dtype == dtype
    assert torch.isfinite(direction).all()
    assert torch.equal(matrix, before), "the matrix was changed"
    assert not direction.requires_grad


@pytest.mark.parametrize(
    "spec", [pytest.param(s, id=k) for k, s in SPECS.items() if s.identical is not None]
)
def test_identical_rows(spec: Spec) -> None:
    for m in (1, 2, 5):
        g = rows(1)
        direction = spec.make()(g.expand(m, -1), losses=torch.ones(m))
        torch.testing.assert_close(direction, spec.identical(m) * g[0], rtol=1e-9, atol=1e-12)


@ALL
def test_zero_matrix_gives_zero(spec: Spec) -> None:
    assert torch.equal(call(spec, torch.zeros(3, 4)), torch.zeros(4))


@ALL
@pytest.mark.parametrize(
    "matrix",
    [
        torch.tensor([[1.0, 2.0], [0.0, 0.0]]),
        torch.tensor([[1.0, 2.0], [-1.0, -2.0]]),
        torch.tensor([[1.0, 2.0], [-3.0, -6.0], [0.5, 1.0]]),
        torch.tensor([[1e-8, 0.0], [0.0, 1e8], [1.0, 1.0]]),
        torch.tensor([[1.0, 0.0], [1.0, 1e-7]]),
    ],
    ids=["zero row", "opposed", "rank one", "scales", "near parallel"],
)
def test_degenerate_matrices_are_finite(spec: Spec, matrix: Tensor) -> None:
    assert torch.isfinite(call(spec, matrix.double())).all()


@having("homogeneous")
@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e8])
def test_scaling_the_matrix_scales_the_direction(spec: Spec, scale: float) -> None:
    matrix = rows(4)
    expected = scale * call(spec, matrix)
    torch.testing.assert_close(call(spec, scale * matrix), expected, rtol=1e-7, atol=0)


@having("order_free")
def test_permuting_the_rows_changes_nothing(spec: Spec) -> None:
    matrix, order = rows(5), torch.tensor([3, 0, 4, 1, 2])
    shuffled = spec.make()(matrix[order], losses=losses(5)[order])
    torch.testing.assert_close(shuffled, call(spec, matrix), rtol=1e-8, atol=1e-12)


@having("descent")
def test_no_task_is_harmed(spec: Spec) -> None:
    for seed in range(20):
        matrix = rows(4, 6, seed)
        direction = call(spec, matrix)
        slack = matrix.norm(dim=1) * direction.norm() * 1e-9
        assert (matrix @ direction >= -slack).all()


@pytest.mark.parametrize(
    "spec", [pytest.param(s, id=k) for k, s in SPECS.items() if s.golden is not None]
)
def test_golden_vectors(spec: Spec) -> None:
    for case in GOLDEN:
        matrix = torch.tensor(case["gradients"], dtype=torch.float64)
        expected = torch.tensor(case["expected"][spec.golden], dtype=torch.float64)
        error = (call(spec, matrix) - expected).norm() / expected.norm()
        # The golden CAGrad comes from an iterative solver; ours satisfies the KKT conditions.
        assert error < (1e-4 if "CAGrad" in spec.golden else 1e-8), (case["name"], error)


@ALL
def test_a_nan_is_refused_and_the_task_named(spec: Spec) -> None:
    matrix = rows(3)
    matrix[1, 4] = torch.nan
    with pytest.raises(NonFiniteError, match="gradient of task 'depth' must be finite"):
        spec.make()(matrix, losses=losses(3), tasks=["seg", "depth", "normal"])


@ALL
def test_a_row_too_long_for_its_square_is_not_called_nan(spec: Spec) -> None:
    matrix = torch.tensor([[1.0, 0.0], [0.0, 2e160]], dtype=torch.float64)
    with pytest.raises(NonFiniteError, match=r"task 'depth' must be shorter than .* of 2e\+160"):
        spec.make()(matrix, losses=losses(2), tasks=["seg", "depth"])


@ALL
@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.ones(3), r"shape \[tasks, parameters\] .* got \[3\]"),
        (torch.ones(2, 3, 4), r"got \[2, 3, 4\]"),
        (torch.ones(0, 3), r"at least one row, got \[0, 3\]"),
        ([[1.0]], "got list"),
        (torch.ones(2, 3, dtype=torch.int64), "floating type among .*, got torch.int64"),
        (torch.ones(2, 3).to(torch.float8_e4m3fn), "float64, got torch.float8_e4m3fn"),
        (torch.eye(2).to_sparse(), r"dense, got the layout torch.sparse_coo: use `.to_dense\(\)`"),
        (torch.ones(2, 3, device="meta"), "must have values, got a tensor on the meta device"),
    ],
)
def test_wrong_matrices_are_refused(spec: Spec, matrix: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec.make()(matrix)


@ALL
def test_wrong_companions_are_refused(spec: Spec) -> None:
    with pytest.raises(ValueError, match=r"`losses` must have shape \[2\], got \[3\]"):
        spec.make()(rows(2), losses=losses(3))
    with pytest.raises(ValueError, match="`tasks` must name 2 rows, got 1"):
        spec.make()(rows(2), tasks=["a"])


def run(aggregator: Aggregator, steps: range) -> list[Tensor]:
    found = []
    for i in steps:
        found.append(aggregator(rows(4, seed=i), losses=losses(4) + i))
        if hasattr(aggregator, "step"):
            aggregator.step()
    return found


@ALL
@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_goes_on_from_a_copy_bit_for_bit(spec: Spec, how: str) -> None:
    unbroken = run(spec.make(), range(6))
    first = spec.make()
    run(first, range(3))
    if how == "state_dict":
        second = spec.make()
        second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    elif how == "pickle":
        second = pickle.loads(pickle.dumps(first))
    else:
        second = copy.deepcopy(first)
    for got, expected in zip(run(second, range(3, 6)), unbroken[3:], strict=True):
        assert torch.equal(got, expected)


@having("random")
def test_random_methods_leave_the_global_stream_alone(spec: Spec) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    call(spec, rows(5))
    assert torch.equal(torch.rand(1), expected)


@ALL
def test_state_keys_differ_and_repr_names_the_arguments(spec: Spec) -> None:
    aggregator = spec.make()
    key, _, parts = aggregator.state_key.partition("(")
    assert key == f"lightning_flatmtl.{type(aggregator).__name__}"
    assert bool(parts) == isinstance(aggregator, Wrapping)
    for name in inspect.signature(type(aggregator)).parameters:
        assert f"{name}=" in repr(aggregator)
