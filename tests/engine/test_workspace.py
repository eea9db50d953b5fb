"""What lies in the memory that steps use again has no part in them."""

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_flatmtl.aggregators import CAGrad, GradDrop, LinearScalarization, PCGrad
from lightning_flatmtl.engine import Aggregation, ComposedPasses, MultiTaskStep, Sharpness

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two tasks; with ``opposed`` their gradients of the encoder nearly cancel."""

    def __init__(self, opposed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(4, 4)
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 1), "b": nn.Linear(4, 1)})
        self.opposed = opposed

    def loss(self, task: str, z: Tensor, _: Tensor) -> Tensor:
        loss = self.heads[task](z).square().mean()
        if self.opposed:
            common = z.square().sum()
            return 1e-3 * loss + (common if task == "a" else -common)
        return loss


def gradients(
    engine: MultiTaskStep, aggregator: Aggregation, sharp: bool, opposed: bool
) -> list[Tensor]:
    net = Net(opposed)
    passes = ComposedPasses(net.encoder, net.loss, dict.fromkeys("ab", X), net)
    result = engine(net, passes, aggregator, Sharpness(0.05, 0.05) if sharp else None)
    assert result is not None
    result.loss.backward()
    return [p.grad for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("opposed", [False, True])
@pytest.mark.parametrize("sharp", [False, True])
@pytest.mark.parametrize("method", [CAGrad, PCGrad, GradDrop, LinearScalarization])
def test_rubbish_in_the_buffers_changes_nothing(
    method: type[Aggregation], sharp: bool, opposed: bool
) -> None:
    expected = gradients(MultiTaskStep(), method(), sharp, opposed)
    engine = MultiTaskStep()
    gradients(engine, method(), sharp, opposed)
    for buffer in engine._workspace._buffers.values():
        buffer.fill_(math.nan)
    again = gradients(engine, method(), sharp, opposed)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
