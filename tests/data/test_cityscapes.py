"""Cityscapes in the format of the MTAN pack."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_flatmtl.data import Cityscapes
from tests.data.dense import SPOILT
from tests.data.writers import cityscapes


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return cityscapes.write(tmp_path_factory.mktemp("cityscapes"), train=12)


@pytest.fixture
def copy(pack, tmp_path):
    return Path(shutil.copytree(pack, tmp_path / "copy"))


def module(root, **kwargs):
    data = Cityscapes(str(root), **{"num_workers": 0, "batch_size": 2, **kwargs})
    data.setup()
    return data


@pytest.mark.parametrize("augment", [True, False])
def test_shapes_types_and_bounds(pack, augment):
    data = module(pack, augment=augment, val_fraction=0.2)
    for split in ("train", "val", "test"):
        images, targets = next(iter(getattr(data, f"{split}_dataloader")()))
        assert images.shape == (2, 3, 32, 64)
        assert images.dtype == torch.float32
        assert list(targets) == ["segmentation", "depth"]
        assert targets["segmentation"].shape == (2, 32, 64)
        assert targets["segmentation"].dtype == torch.int64
        assert set(targets["segmentation"].unique().tolist()) <= set(range(-1, 7))
        assert targets["depth"].shape == (2, 1, 32, 64)
        assert targets["depth"].dtype == torch.float32
    assert Cityscapes().batch_size == 8


def test_what_is_not_augmented_is_what_lies_on_disk(pack):
    data = module(pack, augment=False)
    for (image, targets), index in zip(data.dataset("train"), data.indices["train"], strict=True):
        at = {name: np.load(pack / f"train/{name}/{index}.npy") for name in ("image", "label")}
        depth = np.load(pack / f"train/depth/{index}.npy")
        assert np.array_equal(np.moveaxis(image.numpy(), 0, -1), at["image"].astype("f4"))
        assert np.array_equal(targets["segmentation"].numpy(), at["label"])
        assert np.array_equal(targets["depth"][0].numpy(), depth[..., 0].astype("f4"))


def test_either_name_of_the_labels_folder(pack, copy):
    for split in ("train", "val"):
        (copy / split / "label").rename(copy / split / "label_7")
    for (_, targets), (_, same) in zip(
        module(pack).dataset("test"), module(copy).dataset("test"), strict=True
    ):
        assert torch.equal(targets["segmentation"], same["segmentation"])


def test_the_seven_classes_are_read_where_a_pack_has_other_labels_too(pack, copy):
    # The pack with all its folders: label may be of 19 classes.
    for split in ("train", "val"):
        shutil.copytree(copy / split / "label", copy / split / "label_7")
        for path in (copy / split / "label").iterdir():
            np.save(path, np.full_like(np.load(path), 18))
    _, targets = module(copy).dataset("test")[0]
    assert torch.equal(targets["segmentation"], module(pack).dataset("test")[0][1]["segmentation"])


def test_labels_of_more_classes_are_refused(copy):
    path = copy / "val/label/0.npy"
    np.save(path, np.full_like(np.load(path), 7))
    with pytest.raises(
        ValueError, match=r"`val/label/0.npy` must hold classes from -1 to 6, got 7"
    ):
        module(copy).dataset("test")[0]


def told(error):
    message = str(error.value)
    return "label_7/" in message and "github.com/lorenmt/mtan" in message


def test_a_missing_root(tmp_path):
    with pytest.raises(FileNotFoundError, match="the folder does not exist") as error:
        module(tmp_path / "nowhere")
    assert told(error)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("name", "shown"),
    [("image", "image"), ("label", "label_7` or `{split}/label"), ("depth", "depth")],
)
def test_a_missing_folder(copy, split, name, shown):
    shutil.rmtree(copy / split / name)
    with pytest.raises(
        FileNotFoundError, match=f"`{split}/{shown.format(split=split)}` is missing"
    ) as error:
        module(copy)
    assert told(error)


@pytest.mark.parametrize("case", SPOILT)
def test_spoilt_files(copy, case):
    file, spoil, message = SPOILT[case]
    spoil(copy / file)
    with pytest.raises((FileNotFoundError, ValueError), match=message) as error:
        module(copy)
    assert told(error)
