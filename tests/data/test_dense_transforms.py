"""What transforms of torchvision v2 do to segmentation, depth and normals."""

import copy
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision import tv_tensors
from torchvision.transforms import v2

from lightning_flatmtl.data import Depth, Normals, RandomScaleCrop, Segmentation

SIZES = [(288, 384), (128, 256), (31, 17)]


def sample(height=6, width=8, seed=0):
    """Image and targets, a fifth of the pixels without a label."""
    random = np.random.default_rng(seed)
    known = random.uniform(size=(3, height, width)) > 0.2
    normals = random.normal(size=(3, height, width))
    normals /= np.linalg.norm(normals, axis=0)
    parts = (
        random.uniform(size=(3, height, width)).astype("f4"),
        np.where(known[0], random.integers(0, 13, size=(height, width)), -1),
        (random.uniform(0.5, 10, size=(1, height, width)) * known[1]).astype("f4"),
        (normals * known[2]).astype("f4"),
    )
    kinds = (tv_tensors.Image, Segmentation, Depth, Normals)
    return tuple(kind(torch.from_numpy(part)) for kind, part in zip(kinds, parts, strict=True))


def arrays(parts):
    return [part.numpy() for part in parts]


def kinds(parts):
    return [type(part) for part in parts]


# --- an independent RandomScaleCrop, in NumPy ----------------------------------------------------


def bilinear(image, height, width):
    """Enlarge ``[C, h, w]``; the borders of both images lie on each other."""

    def at(old, new):
        place = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.floor(place).astype(int)
        return low, np.minimum(low + 1, old - 1), place - low

    (top, bottom, down), (left, right, across) = (
        at(old, new) for old, new in zip(image.shape[1:], (height, width), strict=True)
    )
    rows = image[:, top] * (1 - down)[:, None] + image[:, bottom] * down[:, None]
    return rows[:, :, left] * (1 - across) + rows[:, :, right] * across


def nearest(values, height, width):
    rows = np.arange(height) * values.shape[-2] // height
    columns = np.arange(width) * values.shape[-1] // width
    return values[..., rows, :][..., columns]


def expected_scale_crop(parts, scales):
    """The published augmentation, with the same draws."""
    image, labels, depth, normals = arrays(parts)
    height, width = labels.shape
    scale = scales[torch.randint(len(scales), ()).item()]
    h, w = int(height / scale), int(width / scale)
    top, left = (torch.randint(room + 1, ()).item() for room in (height - h, width - w))
    cut = (..., slice(top, top + h), slice(left, left + w))
    return [
        bilinear(image[cut].astype("f8"), height, width),
        nearest(labels[cut], height, width),
        nearest(depth[cut] / np.float32(scale), height, width),
        nearest(normals[cut], height, width),
    ]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(6))
def test_scale_crop_is_the_published_augmentation(size, seed):
    parts = sample(*size, seed=seed)
    torch.manual_seed(seed)
    image, *targets = RandomScaleCrop()(*parts)
    torch.manual_seed(seed)
    expected, *expected_targets = expected_scale_crop(parts, (1.0, 1.2, 1.5))
    assert kinds((image, *targets)) == kinds(parts)
    # Places between pixels are float32 numbers of up to the image's size.
    assert np.abs(image.numpy() - expected).max() < max(size) * np.finfo("f4").eps
    for target, array in zip(targets, expected_targets, strict=True):
        assert target.dtype == torch.from_numpy(array).dtype
        assert np.array_equal(target.numpy(), array)


def test_scale_crop_draws_every_scale_and_place_equally_often():
    columns = torch.arange(12.0).expand(1, 8, 12)
    torch.manual_seed(0)
    drawn = [RandomScaleCrop([1.0, 1.5])(Depth(columns))[0, 0] for _ in range(900)]
    whole = [depth for depth in drawn if depth[-1] == 11]
    enlarged = [depth for depth in drawn if depth[-1] != 11]
    assert abs(len(whole) - 450) < 5 * 15  # standard deviations
    # Of 12 columns 8 remain, in five places.
    places = Counter(round(depth[0].item() * 1.5) for depth in enlarged)
    assert set(places) == {0, 1, 2, 3, 4}
    assert all(abs(count - 90) < 5 * 9 for count in places.values())


def test_depth_is_divided_and_pixels_without_a_label_stay_so():
    depth = Depth(torch.tensor([0.0, 3.0, 6.0]).repeat(2).view(1, 1, 6).expand(1, 4, 6))
    for _ in range(9):
        nearer = RandomScaleCrop([1.5])(depth)
        assert set(nearer.unique().tolist()) <= {0.0, 2.0, 4.0}
        assert (nearer == 0).any()


def test_scale_crop_takes_a_dictionary_and_a_batch():
    image, _, depth, _ = sample()
    batch = tv_tensors.Image(image.expand(4, -1, -1, -1))
    out, targets = RandomScaleCrop([1.2])((batch, {"depth": depth, "name": "room"}))
    assert out.shape == (4, 3, 6, 8)
    assert type(targets["depth"]) is Depth
    assert targets["name"] == "room"


@pytest.mark.parametrize("scales", [(), (0.5,), (1.0, float("nan")), (float("inf"),), (-1.0,)])
def test_scales_out_of_bounds(scales):
    with pytest.raises(ValueError, match=r"`scales` must be numbers in \[1, inf\)"):
        RandomScaleCrop(scales)


def test_image_and_targets_of_two_sizes():
    image, _, depth, _ = sample()
    with pytest.raises(ValueError, match=r"must be of one size, got \[\(6, 7\), \(6, 8\)\]"):
        RandomScaleCrop()(image, Depth(depth[..., :-1]))


# --- torchvision's own transforms ----------------------------------------------------------------


def test_a_horizontal_flip_negates_x():
    parts = sample()
    flipped = v2.RandomHorizontalFlip(p=1)(*parts)
    image, labels, depth, normals = (array[..., ::-1] for array in arrays(parts))
    normals = np.stack([-normals[0], normals[1], normals[2]])
    for out, expected in zip(arrays(flipped), (image, labels, depth, normals), strict=True):
        assert np.array_equal(out, expected)
    assert kinds(flipped) == kinds(parts)


def test_a_vertical_flip_negates_y():
    parts = sample()
    flipped = v2.RandomVerticalFlip(p=1)(*parts)
    image, labels, depth, normals = (array[..., ::-1, :] for array in arrays(parts))
    normals = np.stack([normals[0], -normals[1], normals[2]])
    for out, expected in zip(arrays(flipped), (image, labels, depth, normals), strict=True):
        assert np.array_equal(out, expected)


@given(st.integers(0, 99), st.integers(1, 9), st.integers(1, 9))
def test_flipping_twice_changes_nothing_and_the_first_flip_leaves_its_input(seed, height, width):
    parts = sample(height, width, seed)
    before = copy.deepcopy(arrays(parts))
    for flip in (v2.RandomHorizontalFlip(p=1), v2.RandomVerticalFlip(p=1)):
        for out, expected in zip(arrays(flip(*flip(*parts))), before, strict=True):
            assert np.array_equal(out, expected)
    assert all(map(np.array_equal, arrays(parts), before))


def normals_of(depth):
    """Normals that a depth map of a pinhole camera has, x to the right, y up, z to the camera."""
    height, width = depth.shape
    across, up = np.arange(width) - (width - 1) / 2, (height - 1) / 2 - np.arange(height)[:, None]
    points = np.stack([depth * across / width, depth * up / width, -depth])
    right, down = np.gradient(points, axis=2), np.gradient(points, axis=1)
    normals = np.cross(down, right, axis=0)
    return normals / np.linalg.norm(normals, axis=0)


def test_flipped_normals_are_those_of_the_flipped_depth():
    # A wall on the left, going away from the camera, above a floor that falls away.
    rows, columns = np.mgrid[:24, :32]
    depth = 4 + 0.05 * columns + 0.002 * rows * columns
    normals = normals_of(depth)
    assert (normals[0] > 0.2).all()  # it looks to the right
    assert (normals[2] > 0).all()  # and to the camera
    for flip in (v2.RandomHorizontalFlip(p=1), v2.RandomVerticalFlip(p=1)):
        flipped_depth, flipped = flip(
            Depth(torch.from_numpy(depth[None])), Normals(torch.from_numpy(normals))
        )
        assert np.abs(flipped.numpy() - normals_of(flipped_depth[0].numpy())).max() < 1e-12


@pytest.mark.parametrize("padding_mode", ["constant", "edge"])
@pytest.mark.parametrize("fill", [0, 0.5, {tv_tensors.Image: 1, "others": 3}])
def test_padded_pixels_have_no_label(padding_mode, fill):
    parts = sample()
    padded = v2.Pad([1, 2, 3, 4], fill=fill, padding_mode=padding_mode)(*parts)
    for out, array, value in zip(arrays(padded)[1:], arrays(parts)[1:], (-1, 0, 0), strict=True):
        margins = [(0, 0)] * (array.ndim - 2) + [(2, 4), (1, 3)]
        values = {"constant_values": value} if padding_mode == "constant" else {}
        assert np.array_equal(out, np.pad(array, margins, padding_mode, **values))
    assert kinds(padded) == kinds(parts)


def test_crops_cut_the_same_window_out_of_all():
    parts = sample(12, 16)
    for _ in range(5):
        image, *targets = v2.RandomCrop([5, 7])(*parts)
        windows = [
            (top, left)
            for top in range(8)
            for left in range(10)
            if torch.equal(parts[0][..., top : top + 5, left : left + 7], image)
        ]
        ((top, left),) = windows
        for out, part in zip(targets, parts[1:], strict=True):
            assert torch.equal(out, part[..., top : top + 5, left : left + 7])


@pytest.mark.parametrize("transform", [v2.CenterCrop([10, 12]), v2.RandomCrop([10, 12], [2, 2])])
def test_what_lies_outside_the_image_has_no_label(transform):
    for out, part, value in zip(transform(*sample())[1:], sample()[1:], (-1, 0, 0), strict=True):
        assert out.shape[-2:] == (10, 12)
        assert torch.equal(out[..., 2:-2, 2:-2], part)
        outside = torch.ones(10, 12, dtype=torch.bool)
        outside[2:-2, 2:-2] = False
        assert (out[..., outside] == value).all()


@pytest.mark.parametrize("size", [(3, 4), (12, 16), (11, 5)])
def test_resizing_takes_the_nearest_pixel_and_leaves_values_alone(size):
    parts = sample()
    for out, array in zip(v2.Resize(size)(*parts)[1:], arrays(parts)[1:], strict=True):
        assert np.array_equal(out.numpy(), nearest(array, *size))


def test_a_resized_crop_has_nothing_that_was_not_there():
    parts = sample()
    for _ in range(5):
        out = v2.RandomResizedCrop([9, 9])(*parts)
        assert kinds(out) == kinds(parts)
        assert set(out[1].unique().tolist()) <= set(parts[1].unique().tolist())
        assert set(out[2].unique().tolist()) <= set(parts[2].unique().tolist())
        vectors = {tuple(vector) for vector in parts[3].flatten(1).T.tolist()}
        assert {tuple(vector) for vector in out[3].flatten(1).T.tolist()} <= vectors


TURNS = {
    "rotate": v2.RandomRotation([30, 30]),
    "affine": v2.RandomAffine(0, translate=(0.4, 0.4), shear=[20, 20]),
    "perspective": v2.RandomPerspective(0.6, p=1),
    "elastic": v2.ElasticTransform(alpha=90.0),
}


@pytest.mark.parametrize("name", TURNS)
def test_turned_segmentation_and_depth_keep_their_values_and_new_pixels_have_no_label(name):
    torch.manual_seed(2)
    image = tv_tensors.Image(torch.ones(3, 24, 32))
    labels, depth = Segmentation(torch.full([24, 32], 7)), Depth(torch.full([1, 24, 32], 2.5))
    image, labels, depth = TURNS[name](image, labels, depth)
    assert type(labels) is Segmentation
    assert type(depth) is Depth
    assert labels.dtype == torch.int64
    assert set(labels.unique().tolist()) == {-1, 7}
    assert set(depth.unique().tolist()) == {0.0, 2.5}
    assert torch.equal(labels == -1, depth[0] == 0)
    # Pixels move with those of the image, which the transform fills with black.
    assert (image[0][labels == 7] > 0.2).float().mean() > 0.99


@pytest.mark.parametrize("name", TURNS)
def test_normals_are_not_turned_wrongly_but_refused(name):
    with pytest.raises(TypeError, match=f"`Normals` cannot go through `{name}`"):
        TURNS[name](*sample(48, 64))


@pytest.mark.parametrize("mode", ["reflect", "symmetric"])
def test_normals_are_not_mirrored_wrongly_but_refused(mode):
    with pytest.raises(TypeError, match=f"padded by reflection, got padding_mode='{mode}'"):
        v2.Pad(2, padding_mode=mode)(*sample())


@pytest.mark.parametrize(
    "transform",
    [
        v2.ColorJitter(0.5, 0.5, 0.5, 0.2),
        v2.GaussianBlur(3),
        v2.RandomGrayscale(p=1),
        v2.Normalize([0.5, 0.5, 0.5], [0.2, 0.2, 0.2]),
        v2.ToDtype(torch.float64, scale=True),
        v2.GaussianNoise(),
    ],
)
def test_colours_are_the_images_alone(transform):
    parts = sample()
    image, *targets = transform(*parts)
    assert not torch.equal(image, parts[0]) or image.dtype == torch.float64
    for out, part in zip(targets, parts[1:], strict=True):
        assert out.dtype == part.dtype
        assert torch.equal(out, part)


def test_transforms_that_torchvision_refuses_to_masks_are_refused():
    with pytest.raises(TypeError, match="Mask"):
        v2.FiveCrop(4)(*sample())
    with pytest.raises(TypeError, match="Segmentation are not supported"):
        v2.TrivialAugmentWide()(*sample())


def test_the_published_augmentation_as_a_pipeline_that_is_pickled():
    pipeline = v2.Compose([RandomScaleCrop(), v2.RandomHorizontalFlip()])
    copied = pickle.loads(pickle.dumps(pipeline))
    outs = []
    for transform in (pipeline, copied):
        torch.manual_seed(4)
        outs.append(transform(*sample()))
    assert all(map(torch.equal, *outs))
    assert "scales=(1.0, 1.2, 1.5)" in repr(copied)
