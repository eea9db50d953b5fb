"""Rows hold the parameters in order; moving and restoring is exact."""

import pytest
import torch
from torch import nn

from lightning_flatmtl.engine.gradients.perturbed import moved
from lightning_flatmtl.engine.gradients.radius import Move
from lightning_flatmtl.engine.parameters.flat_parameters import FlatParameters


def params() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [
        nn.Parameter(torch.randn(3, 2)),
        nn.Parameter(torch.randn(())),
        nn.Parameter(torch.randn(4)),
    ]


def test_write_and_views_are_inverse() -> None:
    ps = params()
    layout = FlatParameters(ps)
    row = layout.flatten([p.detach() * 2 for p in ps])
    assert row.shape == (11,)
    for view, p in zip(layout.views(row), ps, strict=True):
        assert torch.equal(view, p.detach() * 2)


def test_a_missing_gradient_is_zero_in_rows_and_minus_the_base_in_differences() -> None:
    layout = FlatParameters(params())
    gradients = [torch.ones(3, 2), None, torch.ones(4)]
    row = layout.flatten(gradients)
    assert row.tolist() == [1.0] * 6 + [0.0] + [1.0] * 4
    base, out = torch.full((11,), 3.0), torch.empty(11)
    layout.write_difference(gradients, base, out)
    assert out.tolist() == [-2.0] * 6 + [-3.0] + [-2.0] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_moved_comes_back_bit_for_bit_after_an_error(dtype: torch.dtype) -> None:
    ps = [nn.Parameter(p.detach().to(dtype)) for p in params()]
    layout = FlatParameters(ps)
    before = [p.detach().clone() for p in ps]
    row = torch.rand(11).to(layout.dtype) + 0.5

    def move_and_fail() -> None:
        with moved(layout, layout.values(), Move(row, 0.3)):
            assert not any(torch.equal(p, b) for p, b in zip(ps, before, strict=True))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        move_and_fail()
    assert all(torch.equal(p, b) for p, b in zip(ps, before, strict=True))


def test_autocast_casts_the_moved_weights_anew() -> None:
    layer, x = nn.Linear(4, 3, bias=False), torch.eye(4)
    layout = FlatParameters([layer.weight])
    plain = layer.weight.detach().clone()
    row = torch.ones(12)
    with torch.autocast("cpu", torch.bfloat16):
        before = layer(x)  # autocast keeps the weight that it has cast
        with moved(layout, layout.values(), Move(row, 0.5)):
            inside = layer(x)
        after = layer(x)
    assert torch.equal(before, plain.bfloat16().T)
    assert torch.equal(inside, (plain + 0.5).bfloat16().T)
    assert torch.equal(after, before)


def test_adaptive_move_scales_by_the_squared_values() -> None:
    ps = params()
    layout = FlatParameters(ps)
    row, values = torch.arange(11.0), layout.values()
    with moved(layout, values, Move(row, 0.1, values**2)):
        torch.testing.assert_close(layout.values(), values + 0.1 * values**2 * row)


def test_half_precision_rows_are_float32() -> None:
    assert (
        FlatParameters([nn.Parameter(torch.ones(2, dtype=torch.bfloat16))]).dtype == torch.float32
    )
    assert FlatParameters([nn.Parameter(torch.ones(2, dtype=torch.float64))]).dtype == torch.float64


def test_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="on one device, got \\['cpu', 'meta'\\]"):
        FlatParameters([nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1, device="meta"))])
