"""The task Jacobian at the encoder's output."""

import pytest
import torch
from torch import Tensor, nn

from lightning_flatmtl.aggregators import MGDA, CAGrad, GradDrop, LinearScalarization
from lightning_flatmtl.engine import ComposedPasses, MultiTaskStep, Sharpness
from tests import naive


class Net(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.heads = nn.ModuleDict({t: nn.Linear(6, 2) for t in ("a", "b", "c")})
        if tied:
            self.heads["b"].weight = self.heads["a"].weight
        self.double()


X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.randn(3, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def loss(net: Net, task: str, features: Tensor) -> Tensor:
    return nn.functional.mse_loss(net.heads[task](features), Y["abc".index(task)])


def passes(net: Net, batches: dict[str, Tensor] | None = None) -> ComposedPasses:
    return ComposedPasses(
        net.encoder,
        lambda task, features, _: loss(net, task, features),
        batches or dict.fromkeys("abc", X),
        net,
        at_features=True,
    )


def gradients(net: Net, aggregator: object) -> dict[str, Tensor]:
    net.zero_grad()
    result = MultiTaskStep()(net, passes(net), aggregator)
    result.loss.backward()
    return {name: p.grad.clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize(
    ("aggregator", "reference"),
    [(MGDA(), naive.mgda), (MGDA("l2"), naive.mgda_l2), (LinearScalarization(), naive.ls)],
)
def test_equals_aggregating_rows_at_the_features_by_hand(aggregator, reference) -> None:
    net = Net()
    got = gradients(net, aggregator)
    features = net.encoder(X)
    values = [loss(net, task, features) for task in "abc"]
    rows = torch.stack(
        [torch.autograd.grad(v, features, retain_graph=True)[0].flatten() for v in values]
    )
    direction = reference(rows, torch.stack(values).detach()).view_as(features)
    params = list(net.encoder.parameters())
    expected = torch.autograd.grad(features, params, direction, retain_graph=True)
    for p_name, g in zip(("encoder.0.weight", "encoder.0.bias"), expected, strict=True):
        torch.testing.assert_close(got[p_name], g, rtol=1e-10, atol=1e-14)
    for task, value in zip("abc", values, strict=True):
        (g,) = torch.autograd.grad(value, net.heads[task].weight, retain_graph=True)
        torch.testing.assert_close(got[f"heads.{task}.weight"], g)


def test_the_trunk_is_differentiated_once_however_many_tasks() -> None:
    net = Net()
    counted = []

    class Count(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, g: Tensor) -> Tensor:
            counted.append(1)
            return g

    inner = net.encoder
    net.encoder = nn.Sequential(*inner[:1])
    tail = inner[1]
    encode = lambda x: tail(Count.apply(net.encoder(x)))  # noqa: E731
    step = ComposedPasses(
        encode,
        lambda task, features, _: loss(net, task, features),
        dict.fromkeys("abc", X),
        net,
        at_features=True,
    )
    MultiTaskStep()(net, step, CAGrad()).loss.backward()
    assert counted == [1]


def test_methods_per_coordinate_work_too() -> None:
    assert all(torch.isfinite(g).all() for g in gradients(Net(), GradDrop()).values())


def test_one_task_is_plain_training() -> None:
    net = Net()
    single = passes(net, {"a": X})
    MultiTaskStep()(net, single, CAGrad()).loss.backward()
    expected = torch.autograd.grad(loss(net, "a", net.encoder(X)), net.encoder[0].weight)[0]
    torch.testing.assert_close(net.encoder[0].weight.grad, expected)


def test_a_frozen_encoder_is_refused() -> None:
    net = Net(tied=True)
    net.encoder.requires_grad_(False)
    with pytest.raises(ValueError, match="the features must depend on a trainable parameter"):
        MultiTaskStep()(net, passes(net), CAGrad())


def test_what_it_cannot_do_is_refused() -> None:
    net, tied = Net(), Net(tied=True)
    with pytest.raises(ValueError, match="TaskSAM perturbs parameters"):
        MultiTaskStep()(net, passes(net), CAGrad(), Sharpness())
    with pytest.raises(ValueError, match=r"must lie before the features, got 1 behind them"):
        MultiTaskStep()(tied, passes(tied), CAGrad())
    with pytest.raises(ValueError, match="must share their inputs, got 2 different inputs"):
        MultiTaskStep()(net, passes(net, {"a": X, "b": X.clone(), "c": X}), CAGrad())
