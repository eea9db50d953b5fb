import pytest
import torch
from torch import nn

from lightning_flatmtl.models import ConvEncoder


@pytest.mark.parametrize("size", [(12, 12), (8, 8), (1, 1), (36, 36), (64, 48), (5, 3)])
def test_images_of_any_size_give_the_same_features(size):
    encoder = ConvEncoder(in_channels=3, widths=(4, 8), features=10)
    features = encoder(torch.rand(2, 3, *size))
    assert features.shape == (2, 10)
    assert features.dtype == torch.float32
    assert (features >= 0).all()


@pytest.mark.parametrize(("widths", "grid"), [((4,), 1), ([4, 8], 2), ((2, 3, 4, 5), 3)])
def test_one_block_per_width(widths, grid):
    encoder = ConvEncoder(widths=widths, features=6, grid=grid)
    convs = [m for m in encoder.modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convs] == list(widths)
    assert [c.in_channels for c in convs] == [1, *widths[:-1]]
    assert [m.num_features for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)] == list(
        widths
    )
    assert encoder(torch.rand(2, 1, 12, 12)).shape == (2, 6)


def test_every_parameter_gets_a_gradient():
    encoder = ConvEncoder()
    encoder(torch.rand(8, 1, 12, 12)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


def test_the_place_in_the_image_matters():
    encoder = ConvEncoder().eval()
    top_left, bottom_right = torch.zeros(1, 1, 12, 12), torch.zeros(1, 1, 12, 12)
    top_left[..., 2:5, 2:5] = bottom_right[..., 7:10, 7:10] = 1.0
    assert not torch.allclose(encoder(top_left), encoder(bottom_right))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"widths": ()}, "`widths` must name at least one block"),
        ({"widths": (4, 0)}, "`widths` must be at least 1, got 0"),
        ({"in_channels": 0}, "`in_channels` must be at least 1, got 0"),
        ({"features": -1}, "`features` must be at least 1, got -1"),
        ({"grid": 0}, "`grid` must be at least 1, got 0"),
    ],
)
def test_bad_sizes_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ConvEncoder(**kwargs)
