"""What the second pass borrows comes back."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from lightning_flatmtl.engine import RNGReplay, frozen_buffers
from lightning_flatmtl.engine.passes.buffers import statistics_put_back


class Drifting(nn.Module):
    """Binds its buffer to a new tensor at every call, as moving averages often do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return x - self.mean


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.ModuleDict(
        {
            "bn": nn.BatchNorm1d(3),
            "eval_bn": nn.BatchNorm1d(3).eval(),
            "plain_bn": nn.BatchNorm1d(3, track_running_stats=False),
            "instance": nn.InstanceNorm1d(3, track_running_stats=True),
            "spectral": nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)),
            "drifting": Drifting(),
        }
    )
    with torch.no_grad():
        layers["eval_bn"].running_mean.fill_(0.5)
    return layers


def run(layers: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = layers["bn"](x) + layers["eval_bn"](x) + layers["plain_bn"](x)
    y = y + layers["instance"](x[:, :, None].expand(-1, -1, 4) + torch.arange(4.0))[:, :, 0]
    return layers["drifting"](layers["spectral"](y))


def test_no_buffer_moves_and_flags_return() -> None:
    layers = model()
    before = {k: v.clone() for k, v in layers.state_dict().items()}
    with frozen_buffers(layers):
        run(layers, torch.randn(8, 3))
        assert not layers["bn"].track_running_stats
    after = layers.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert layers["bn"].track_running_stats
    assert layers["eval_bn"].track_running_stats
    assert not layers["plain_bn"].track_running_stats
    run(layers, torch.randn(8, 3))
    assert layers["bn"].num_batches_tracked.item() == 1


def test_infinite_statistics_do_not_stay() -> None:
    layers = model()
    with frozen_buffers(layers):
        run(layers, torch.full((8, 3), torch.inf))
    assert all(torch.isfinite(v).all() for v in layers.state_dict().values())


def test_the_function_is_that_of_training_mode() -> None:
    bn = nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5)
    with frozen_buffers(bn):
        inside = bn(x)
    assert torch.equal(inside, bn(x))


def test_evaluation_mode_keeps_using_its_statistics() -> None:
    layers = model()
    x = torch.randn(8, 3)
    expected = layers["eval_bn"](x)
    with frozen_buffers(layers):
        assert torch.equal(layers["eval_bn"](x), expected)


def test_put_back_in_mid_block_starts_every_pass_alike() -> None:
    layers = model()
    x = torch.randn(8, 3)
    with frozen_buffers(layers) as put_back:
        first = run(layers, x)
        put_back()
        assert torch.equal(run(layers, x), first)


def test_comes_back_after_an_error() -> None:
    layers = model()
    before = {k: v.clone() for k, v in layers.state_dict().items()}

    def fail() -> None:
        with frozen_buffers(layers):
            run(layers, torch.randn(8, 3))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert layers["bn"].track_running_stats
    assert all(torch.equal(layers.state_dict()[k], v) for k, v in before.items())


def test_a_batch_norm_with_a_forward_of_its_own_is_copied() -> None:
    class Own(nn.BatchNorm1d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.running_mean.add_(1.0)
            return x

    layer = Own(3)
    with frozen_buffers(layer):
        layer(torch.zeros(2, 3))
    assert torch.equal(layer.running_mean, torch.zeros(3))


def test_random_streams_replay_and_go_on() -> None:
    def draw() -> tuple[float, float, float]:
        return torch.rand(1).item(), random.random(), float(np.random.rand())

    tape = RNGReplay(torch.device("cpu"))
    tape.mark("x")
    first = draw()
    with tape.replaying():
        tape.rewind("x")
        assert draw() == first
        tape.rewind("x")
        assert draw() == first
        draw()
    second = draw()
    tape.rewind("x")
    assert (draw(), draw()) == (first, second)


def test_statistics_are_put_back_where_they_have_moved() -> None:
    layers = model()
    frozen = ("eval_bn", "bn")
    before = {k: v.clone() for k, v in layers.state_dict().items() if k.startswith(frozen)}

    def run_and_fail() -> None:
        with statistics_put_back(layers):
            run(layers, torch.randn(8, 3))
            assert layers["bn"].num_batches_tracked.item() == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_and_fail()
    assert all(torch.equal(layers.state_dict()[k], v) for k, v in before.items())
    versions = [buffer._version for buffer in layers.buffers()]
    with statistics_put_back(layers):
        pass  # a checkpointed part would see that its inputs have been written to
    assert versions == [buffer._version for buffer in layers.buffers()]
