"""The Gram is float64-exact whatever the type of the rows, and needs no second copy of them."""

import pytest
import torch

from lightning_flatmtl.engine import gram_matrix
from lightning_flatmtl.engine.gradients.gram import cross_gram, squared_norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "shape", [(1, 1), (2, 70_001), (5, 200_000), (40, 3), (130, 4_000), (170, 2_500)]
)
def test_equals_the_product_of_widened_rows(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    wide = rows.double()
    torch.testing.assert_close(gram_matrix(rows), wide @ wide.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 0), (2, 70_001), (40, 3)])
def test_inner_products_of_two_matrices(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    rows, others = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    expected = rows.double() @ others.double().T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cross_gram(rows, others)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_is_exact_where_float32_is_not() -> None:
    rows = torch.tensor([[1e4, 1.0, -1e4], [1e4, 1.0, 1e4]])
    assert gram_matrix(rows)[0, 1].item() == 1.0


@pytest.mark.parametrize("m", [2, 170])
def test_nearly_parallel_rows_keep_what_sets_them_apart(m: int) -> None:
    generator = torch.Generator().manual_seed(2)
    noise = 1e-5 * torch.randn(m, 20_000, generator=generator)
    rows = torch.randn(1, 20_000, generator=generator) + noise
    gram = gram_matrix(rows)
    assert torch.equal(gram, gram.T)
    # |a - b|^2 = <a, a> + <b, b> - 2 <a, b>, about 4e-6: below the rounding of 2e4 in 32 bits.
    apart = gram.diagonal() + gram.diagonal()[:, None] - 2 * gram
    for i in (0, m // 2, m - 1):
        expected = (rows[i].double() - rows.double()).square().sum(1)
        torch.testing.assert_close(apart[i], expected, rtol=0, atol=1e-9)


def test_ignores_autocast() -> None:
    rows = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gram_matrix(rows)
    assert inside.dtype == torch.float64
    assert torch.equal(inside, gram_matrix(rows))


def test_no_columns_is_zero() -> None:
    assert torch.equal(gram_matrix(torch.empty(3, 0)), torch.zeros(3, 3, dtype=torch.float64))


def test_squared_norms_with_and_without_scale() -> None:
    rows = torch.randn(4, 150_000, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(150_000, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(squared_norms(rows), rows.double().square().sum(1))
    expected = (rows.double() * scale.double()).square().sum(1)
    torch.testing.assert_close(squared_norms(rows, scale), expected)
