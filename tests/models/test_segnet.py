import pytest
import torch
from torch import nn

from lightning_flatmtl.models import DenseHead, SegNet


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def test_as_many_parameters_as_the_published_network():
    """The number that the published code divides all others by."""
    with torch.device("meta"):
        assert count(SegNet(), DenseHead(64, 13)) == 24_981_069


@pytest.mark.parametrize(
    ("filters", "size"), [((4,), (2, 6)), ((4, 6), (8, 4)), ((2, 3, 4, 5, 5), (32, 64))]
)
def test_features_have_the_size_of_the_image(filters, size):
    features = SegNet(1, filters)(torch.randn(2, 1, *size))
    assert features.shape == (2, filters[0], *size)


def test_every_parameter_gets_a_gradient():
    net = SegNet(filters=(4, 6, 8))
    net(torch.randn(2, 3, 16, 16)).square().sum().backward()
    # A bias before a normalisation has the gradient 0.
    assert all(p.grad.abs().sum() > 0 for n, p in net.named_parameters() if n[-6:] != "0.bias")


def test_values_come_back_to_where_their_maxima_were():
    maps = (
        SegNet(filters=(3, 4))(torch.randn(1, 3, 8, 8)).shape,
        SegNet(filters=(3, 4)).maps(torch.randn(1, 3, 8, 8)),
    )
    _, found = maps
    largest = nn.functional.max_pool2d(found.encoded[1], 2)
    back = found.unpooled[1]
    assert torch.equal(nn.functional.max_pool2d(back, 2), largest)
    # Where something has come back, it is the value that had been there; elsewhere is 0.
    assert torch.equal(back[back != 0], found.encoded[1][back != 0])
    assert (back != 0).sum() <= largest.numel()


def test_the_weights_are_drawn_as_published():
    torch.manual_seed(0)
    net = SegNet(filters=(16, 32, 64, 64, 64))
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 26  # VGG-16's thirteen, down and up
    for conv in convs:
        deviation = (2 / (9 * (conv.in_channels + conv.out_channels))) ** 0.5
        assert conv.weight.std().item() == pytest.approx(deviation, rel=0.1)
        assert not conv.bias.any()


@pytest.mark.parametrize("shape", [(1, 3, 8, 12), (1, 3, 9, 8), (3, 8, 8)])
def test_images_of_other_sizes_are_refused(shape):
    with pytest.raises(ValueError, match="with multiples of 8, got"):
        SegNet(filters=(2, 2, 2))(torch.zeros(shape))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"filters": ()}, "`filters` must name at least one level"),
        ({"filters": (4, 0)}, "`filters` must be at least 1, got 0"),
        ({"in_channels": 0}, "`in_channels` must be at least 1, got 0"),
    ],
)
def test_bad_sizes_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SegNet(**kwargs)
