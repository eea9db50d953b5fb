"""torchvision's ResNets as trunks."""

from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import ResNet18_Weights, resnet18, resnet50

from lightning_flatmtl import MultiTaskModule
from lightning_flatmtl.models import ResNetEncoder
from lightning_flatmtl.task import ClassificationTask


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def test_the_published_network_of_multi_mnist() -> None:
    encoder = ResNetEncoder(in_channels=1, features=100)
    assert count(encoder, nn.Linear(100, 10), nn.Linear(100, 10)) == 11_223_560


def test_the_published_features_of_celeba() -> None:
    encoder = ResNetEncoder(stem="small", grid=2)
    assert encoder.out_features == 2048
    assert encoder.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 2048)


@pytest.mark.parametrize(("name", "make"), [("resnet18", resnet18), ("resnet50", resnet50)])
def test_it_computes_what_torchvisions_does(name: Any, make: Any) -> None:
    torch.manual_seed(0)
    theirs = make()
    own = ResNetEncoder(name)
    state = {key: value for key, value in theirs.state_dict().items() if key[:3] != "fc."}
    own.load_state_dict(state)
    theirs.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(own.eval()(images), theirs.eval()(images), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize(("stem", "size"), [("imagenet", 36), ("small", 8)])
@pytest.mark.parametrize("width", [1, 6, 16])
@pytest.mark.parametrize("grid", [1, 2])
def test_shapes_follow_the_arguments(
    name: Any, stem: Any, size: int, width: int, grid: int
) -> None:
    encoder = ResNetEncoder(name, in_channels=2, stem=stem, width=width, grid=grid).eval()
    images = torch.zeros(1, 2, size, size)
    channels = width * 8 * (1 if name == "resnet18" else 4)
    assert encoder(images).shape == (1, channels * grid * grid) == (1, encoder.out_features)


def test_a_width_of_a_quarter_has_a_sixteenth_of_the_convolutions() -> None:
    def inner(width: int) -> int:
        encoder = ResNetEncoder(width=width)
        return sum(p.numel() for p in encoder.layer4.parameters() if p.ndim == 4)

    assert inner(64) == 16 * inner(16)


def test_weights_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    state = resnet18().state_dict()
    asked = []

    def get_state_dict(self: ResNet18_Weights, **kwargs: Any) -> dict[str, torch.Tensor]:
        asked.append(self.name)
        return dict(state)

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", get_state_dict)
    colour = ResNetEncoder(weights="IMAGENET1K_V1", features=5)
    grey = ResNetEncoder(weights="DEFAULT", in_channels=1)
    assert asked == ["IMAGENET1K_V1", "IMAGENET1K_V1"]  # the default is the first
    assert torch.equal(colour.conv1.weight, state["conv1.weight"])
    assert torch.equal(colour.layer4[1].bn2.running_var, state["layer4.1.bn2.running_var"])
    image = torch.rand(1, 1, 40, 40)
    expected = colour.conv1(image.expand(-1, 3, -1, -1))
    torch.testing.assert_close(grey.conv1(image), expected)
    with pytest.raises(ValueError, match=r"`weights` must be one of .*'DEFAULT'.*, got 'V9'"):
        ResNetEncoder(weights="V9")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet19"}, "`name` must be one of resnet18, .*, got 'resnet19'"),
        ({"stem": "large"}, "`stem` must be 'imagenet' or 'small', got 'large'"),
        ({"width": 0}, "`width` must be at least 1, got 0"),
        ({"features": 0}, "`features` must be at least 1, got 0"),
        ({"weights": "DEFAULT", "width": 32}, "width=32"),
        ({"weights": "DEFAULT", "stem": "small"}, "stem='small'"),
        ({"weights": "DEFAULT", "in_channels": 4}, "in_channels=4"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResNetEncoder(**arguments)


def test_it_is_a_trunk() -> None:
    encoder = ResNetEncoder(in_channels=1, width=2, features=4)
    tasks = [ClassificationTask(name, in_features=4, num_classes=3) for name in ("a", "b")]
    module = MultiTaskModule(encoder=encoder, tasks=tasks)
    assert {name: y.shape for name, y in module(torch.zeros(2, 1, 36, 36)).items()} == {
        "a": (2, 3),
        "b": (2, 3),
    }


def test_channels_last_computes_the_same() -> None:
    torch.manual_seed(0)
    encoder = ResNetEncoder(in_channels=1, width=4, features=3).double()
    other = ResNetEncoder(in_channels=1, width=4, features=3, channels_last=True).double()
    other.load_state_dict(encoder.state_dict())
    images = torch.rand(4, 1, 36, 36, dtype=torch.float64)
    assert other.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    for network in (encoder, other):
        network(images).square().sum().backward()
    for expected, found in zip(encoder.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-12)
