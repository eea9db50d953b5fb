from __future__ import annotations

import pytest
import torch

from lightning_flatmtl.functional import graddrop_direction


def naive(rows: list[list[float]], draws: list[float], leak: float) -> list[float]:
    """Algorithm 1 of the paper, number by number."""
    direction = []
    for column, u in zip(zip(*rows, strict=True), draws, strict=True):
        size = sum(abs(g) for g in column)
        purity = 0.5 * (1 + sum(column) / size) if size else 0.5
        mask = [(g > 0 and purity > u) or (g < 0 and purity <= u) for g in column]
        kept = sum(g * (leak + (1 - leak) * keep) for g, keep in zip(column, mask, strict=True))
        direction.append(kept)
    return direction


@pytest.mark.parametrize("leak", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("m", [1, 2, 5])
def test_direction_is_that_of_the_paper(m: int, leak: float) -> None:
    generator = torch.Generator().manual_seed(m)
    jacobian = torch.randn(m, 200, dtype=torch.float64, generator=generator)
    jacobian[:, :20] = 0
    jacobian[0, 20:40] = 0
    draws = torch.rand(200, dtype=torch.float64, generator=generator)
    expected = naive(jacobian.tolist(), draws.tolist(), leak)
    torch.testing.assert_close(
        graddrop_direction(jacobian, draws, leak), torch.tensor(expected, dtype=torch.float64)
    )


def test_the_mean_over_the_draws_is_that_of_the_purity() -> None:
    # P = 3/4 for (3, -1): 3 in three of four draws, else -1.
    jacobian = torch.tensor([[3.0], [-1.0]]).expand(2, 4)
    draws = torch.tensor([0.0, 0.25, 0.5, 0.75])
    assert graddrop_direction(jacobian, draws).tolist() == [3, 3, 3, -1]


def test_half_precision_is_summed_in_single_and_comes_back() -> None:
    jacobian = torch.cat([torch.ones(1, 2), torch.full((300, 2), 2.0**-8)]).bfloat16()
    direction = graddrop_direction(jacobian, torch.zeros(2))
    assert direction.dtype == torch.bfloat16
    assert direction.tolist() == [2.171875] * 2  # ones added up in bfloat16 would stay 1


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`jacobian` must have shape \[m, d\], got \[3\]"):
        graddrop_direction(torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError, match=r"`draws` must have shape \[3\], got \[2\]"):
        graddrop_direction(torch.ones(2, 3), torch.ones(2))
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"`leak` must be in \[0, 1\], got"):
            graddrop_direction(torch.ones(2, 3), torch.ones(3), bad)
