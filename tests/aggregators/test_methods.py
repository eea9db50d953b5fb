"""What is particular to one method."""

import math

import pytest
import torch

from lightning_flatmtl.aggregators import IMTL, IMTLL, MGDA, CAGrad, LinearScalarization, PCGrad

G = torch.tensor([[1.0, 0.0, 2.0], [-1.0, 1.0, 0.5]], dtype=torch.float64)


def test_linear_scalarization_weights_by_name_and_in_order() -> None:
    expected = 2 * G[0] + 0.5 * G[1]
    by_name = LinearScalarization({"a": 2.0, "b": 0.5, "c": 9.0})
    torch.testing.assert_close(by_name(G, tasks=["a", "b"]), expected)
    torch.testing.assert_close(LinearScalarization([2.0, 0.5])(G), expected)
    with pytest.raises(ValueError, match=r"got none for \['z'\]"):
        by_name(G, tasks=["a", "z"])
    with pytest.raises(ValueError, match="must have 2 entries"):
        LinearScalarization([1.0])(G)
    with pytest.raises(ValueError, match=r"`weights` must be in \[0, inf\), got -1"):
        LinearScalarization([-1.0])


def test_mgda_normalisers_shape_the_weights_and_raw_gradients_are_applied() -> None:
    rows = torch.tensor([[4.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    # On the unit vectors the min-norm weights are equal; the raw rows are combined.
    torch.testing.assert_close(MGDA("l2")(rows), rows.mean(0))
    # Divided by the losses, rows (1, 0) and (0, 1/2): weights 1/5 and 4/5.
    got = MGDA("loss")(rows, losses=[4.0, 2.0])
    torch.testing.assert_close(got, 0.2 * rows[0] + 0.8 * rows[1])


def test_mgda_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="needs the losses, got none"):
        MGDA("loss")(G)
    with pytest.raises(ValueError, match="positive losses, got -1.0 for task 'b'"):
        MGDA("loss+")(G, losses=[1.0, -1.0], tasks=["a", "b"])
    with pytest.raises(ValueError, match="`normalization` must be one of"):
        MGDA("L2")


def test_pcgrad_projects_off_what_conflicts() -> None:
    rows = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    expected = (rows[0] + 0.5 * rows[1]) + (rows[1] + rows[0])
    torch.testing.assert_close(PCGrad()(rows), expected)
    torch.testing.assert_close(PCGrad("mean")(rows), expected / 2)
    with pytest.raises(ValueError, match="'sum' or 'mean', got 'max'"):
        PCGrad("max")
    with pytest.raises(ValueError, match="`seed` must be an integer >= 0, got -1"):
        PCGrad(seed=-1)


def test_pcgrad_orders_matter_with_three_tasks_and_follow_the_seed() -> None:
    rows = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    aggregator = PCGrad(seed=1)
    first, second = aggregator(rows), aggregator(rows)
    assert not torch.equal(first, second)
    assert torch.equal(PCGrad(seed=1)(rows), first)


def test_cagrad_limits() -> None:
    torch.testing.assert_close(CAGrad(0.0)(G), G.mean(0))
    for bad in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"`c` must be in \[0, inf\), got"):
            CAGrad(bad)


def test_cagrad_stays_in_its_ball_and_serves_the_worst_task_better_than_the_mean() -> None:
    rows = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mean, d = rows.mean(0), CAGrad(0.5, rescale=False)(rows)
    assert (d - mean).norm() <= 0.5 * mean.norm() * (1 + 1e-9)
    assert (rows @ d).min() >= (rows @ mean).min()


@pytest.mark.parametrize("method", [IMTLL, IMTL])
def test_learned_scales_make_scaled_losses_equal(method: type) -> None:
    aggregator = method(lr=0.05)
    losses = torch.tensor([0.1, 5.0], dtype=torch.float64)
    for _ in range(2000):
        aggregator(G, losses=losses)
        aggregator.step()
    scales = aggregator.loss_weights(("0", "1"), losses)
    torch.testing.assert_close(
        scales * losses, torch.ones(2, dtype=torch.float64), rtol=1e-2, atol=0
    )


def test_an_absent_task_keeps_its_scale() -> None:
    aggregator = IMTLL(lr=0.1)
    aggregator(G, losses=[3.0, 4.0], tasks=["a", "b"])
    aggregator.step()
    b = aggregator.state_dict()["scalars"]["b"]
    aggregator(G[:1], losses=[3.0], tasks=["a"])
    aggregator.step()
    assert aggregator.state_dict()["scalars"]["b"] == b
    with pytest.raises(ValueError, match=r"`lr` must be in \(0, inf\), got 0"):
        IMTL(lr=0)
