"""The dilated trunk and its head are torchvision's DeepLab v3."""

import pytest
import torch
from torchvision.models.segmentation import deeplabv3_resnet50

from lightning_flatmtl.models import DeepLabV3Head, DilatedResNetEncoder
from tests.models.test_segnet import count


def test_it_is_the_network_of_torchvision():
    with torch.device("meta"):  # whose own drawing of weights takes long
        theirs = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=13).eval()
        encoder, head = DilatedResNetEncoder().eval(), DeepLabV3Head(2048, 13).eval()
    assert count(encoder, head) == count(theirs)
    g = torch.Generator().manual_seed(0)
    state = {
        key: torch.zeros(value.shape, dtype=value.dtype)
        if key.endswith("num_batches_tracked")
        else torch.rand(value.shape, generator=g) * (1.0 if value.ndim == 1 else 0.02)
        for key, value in theirs.state_dict().items()
    }
    theirs.load_state_dict(state, assign=True)
    for ours, name in ((encoder, "backbone."), (head[0], "classifier.")):
        own = {k.removeprefix(name): v for k, v in state.items() if k.startswith(name)}
        ours.load_state_dict(own, assign=True)
    images = torch.randn(1, 3, 32, 64, generator=g)
    with torch.no_grad():
        found, expected = head(encoder(images)), theirs(images)["out"]
    assert expected.std() > 0
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("stride", [8, 16])
def test_sizes(stride):
    encoder = DilatedResNetEncoder(in_channels=1, width=2, output_stride=stride)
    features = encoder(torch.randn(2, 1, 64, 96))
    assert features.shape == (2, encoder.out_channels, 64 // stride, 96 // stride)
    assert encoder.out_channels == 64
    assert DeepLabV3Head(64, 3, stride)(features).shape == (2, 3, 64, 96)


def test_every_parameter_gets_a_gradient():
    encoder, head = DilatedResNetEncoder(width=2), DeepLabV3Head(64, 3, rates=(1, 2))
    head(encoder(torch.randn(2, 3, 32, 32))).square().sum().backward()
    for net in (encoder, head):
        assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "resnet18"}, "`name` must be 'resnet50' or deeper, got 'resnet18'"),
        ({"output_stride": 4}, "`output_stride` must be 8 or 16, got 4"),
        ({"width": 0}, "`width` must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DilatedResNetEncoder(**kwargs)


def test_bad_sizes_of_a_head_are_refused():
    with pytest.raises(ValueError, match="`scale` must be at least 1, got 0"):
        DeepLabV3Head(4, 4, 0)
    with pytest.raises(ValueError, match="`rates` must be at least 1, got 0"):
        DeepLabV3Head(4, 4, rates=(0,))
