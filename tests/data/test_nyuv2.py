"""NYUv2 in the format of the MTAN pack."""

import pickle
import shutil
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from lightning_flatmtl import MultiTaskModule
from lightning_flatmtl.data import Depth, Normals, NYUv2, Segmentation
from tests.data.dense import SPOILT, saved
from tests.data.writers import nyuv2

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return nyuv2.write(tmp_path_factory.mktemp("nyuv2"))


@pytest.fixture
def copy(pack, tmp_path):
    return Path(shutil.copytree(pack, tmp_path / "copy"))


def module(root, **kwargs):
    data = NYUv2(str(root), **{"num_workers": 0, **kwargs})
    data.setup()
    return data


def on_disk(pack, split, index):
    return {
        name: np.load(pack / split / name / f"{index}.npy")
        for name in ("image", "label", "depth", "normal")
    }


# --- what a batch looks like ---------------------------------------------------------------------


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_shapes_types_and_bounds(pack, augment, num_workers):
    data = module(pack, augment=augment, num_workers=num_workers, val_fraction=0.2)
    for split in SPLITS:
        images, targets = next(iter(getattr(data, f"{split}_dataloader")()))
        assert type(images) is torch.Tensor
        assert images.shape == (2, 3, 32, 64)
        assert images.dtype == torch.float32
        assert 0 <= images.min() < images.max() <= 1
        assert list(targets) == ["segmentation", "depth", "normals"]
        assert all(type(target) is torch.Tensor for target in targets.values())
        assert targets["segmentation"].shape == (2, 32, 64)
        assert targets["segmentation"].dtype == torch.int64
        assert targets["depth"].shape == (2, 1, 32, 64)
        assert targets["depth"].dtype == torch.float32
        assert targets["normals"].shape == (2, 3, 32, 64)
        assert targets["normals"].dtype == torch.float32


def test_what_is_not_augmented_is_what_lies_on_disk(pack):
    data = module(pack, augment=False)
    for split in SPLITS:
        for item, index in zip(data.dataset(split), data.indices[split].tolist(), strict=True):
            expected = on_disk(pack, "val" if split == "test" else "train", index)
            image, targets = item
            for row, column in ((0, 0), (31, 63), (7, 40)):
                at = (..., row, column)
                assert image[at].tolist() == expected["image"][row, column].astype("f4").tolist()
                assert targets["segmentation"][at] == expected["label"][row, column]
                assert targets["depth"][at] == expected["depth"][row, column].astype("f4")
                normal = expected["normal"][row, column].astype("f4")
                assert targets["normals"][at].tolist() == normal.tolist()
            assert np.array_equal(targets["segmentation"].numpy(), expected["label"])


def test_files_are_read_in_the_order_of_their_numbers(pack):
    # Sorted as words, 10.npy and 11.npy come before 2.npy.
    data = module(pack, augment=False, val_fraction=0)
    assert data.indices["train"].tolist() == list(range(12))
    depth = data.dataset("train")[2][1]["depth"][0].numpy()
    assert np.array_equal(depth, on_disk(pack, "train", 2)["depth"][..., 0].astype("f4"))


@pytest.mark.parametrize("name", ["image", "label", "depth", "normal"])
@pytest.mark.parametrize("kind", ["<f4", ">f4", "<f8", "fortran"])
def test_every_kind_of_number_and_order_reads_alike(pack, copy, name, kind):
    def change(array):
        return np.asfortranarray(array) if kind == "fortran" else array.astype(kind)

    for path in (copy / "val" / name).iterdir():
        saved(change)(path)
    pairs = zip(module(pack).dataset("test"), module(copy).dataset("test"), strict=True)
    for (image, targets), (same, same_targets) in pairs:
        assert torch.equal(image, same)
        assert all(torch.equal(targets[task], same_targets[task]) for task in targets)


def test_images_of_bytes_are_brought_to_one(pack, copy):
    for path in (copy / "val/image").iterdir():
        saved(lambda array: np.round(array * 255).astype(np.uint8))(path)
    image, exact = module(copy).dataset("test")[0][0], module(pack).dataset("test")[0][0]
    assert (image - exact).abs().max() <= 0.5 / 255 + 1e-6


def test_whole_labels_of_any_type(pack, copy):
    for path in (copy / "val/label").iterdir():
        saved(lambda array: array.astype(np.int8))(path)
    same = module(copy).dataset("test")[1][1]["segmentation"]
    assert torch.equal(same, module(pack).dataset("test")[1][1]["segmentation"])


# --- splits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_validation_images_are_of_the_training_folder_and_not_trained_on(pack, share):
    data = module(pack, val_fraction=share)
    assert len(data.indices["val"]) == round(share * 12)
    together = torch.cat([data.indices["train"], data.indices["val"]])
    assert torch.equal(together.sort().values, torch.arange(12))
    assert torch.equal(data.indices["test"], torch.arange(4))


def test_validation_images_are_held_out_in_runs(tmp_path):
    root = nyuv2.write(tmp_path, train=160, val=1, size=(8, 8))
    val = module(root, val_fraction=0.2, batch_size=1).indices["val"].tolist()
    assert val != list(range(128, 160))
    # 32 images are four runs of eight; each begins at a multiple of eight.
    assert [index for index in val if index - 1 not in val or index % 8 == 0] == val[::8]
    assert all(start % 8 == 0 for start in val[::8])


def test_the_seed_decides_what_is_held_out_and_nothing_else_does(pack):
    state = torch.get_rng_state()
    drawn = [module(pack, seed=seed, val_fraction=0.5).indices["val"].tolist() for seed in range(9)]
    again = [module(pack, seed=seed, val_fraction=0.5).indices["val"].tolist() for seed in range(9)]
    assert drawn == again
    assert [0, 1, 2, 3, 4, 5] in drawn
    assert [0, 1, 8, 9, 10, 11] in drawn
    assert torch.equal(torch.get_rng_state(), state)


def test_without_validation_images_there_is_no_validation(pack):
    data = module(pack, val_fraction=0)
    assert len(data.indices["train"]) == 12
    assert data.val_dataloader() == []


@pytest.mark.parametrize("share", [0.04, 0.96])
def test_a_split_without_images_is_refused(pack, share):
    with pytest.raises(ValueError, match=f"or be 0, got {share} of 12 images"):
        module(pack, val_fraction=share)


def test_the_loaders_of_each_split(pack):
    data = module(pack, val_fraction=0.25, batch_size=2)
    assert [len(images) for images, _ in data.train_dataloader()] == [2] * 4  # of 9
    assert [len(images) for images, _ in data.val_dataloader()] == [2, 1]
    assert [len(images) for images, _ in data.test_dataloader()] == [2, 2]
    (first, second) = data.predict_dataloader()
    test = torch.cat([images for images, _ in data.test_dataloader()])
    assert torch.equal(torch.cat([first, second]), test)


def test_setup_looks_the_files_over_once(pack):
    data = module(pack)
    indices = data.indices
    data.setup("test")
    assert data.indices is indices


def test_a_module_without_setup_says_so(pack):
    with pytest.raises(RuntimeError, match=r"call `setup\(\)` first"):
        NYUv2(str(pack)).dataset("train")


# --- augmentation --------------------------------------------------------------------------------


def test_only_training_images_are_augmented(pack):
    plain, augmented = module(pack, augment=False), module(pack, augment=True)
    for split in ("val", "test"):
        for (a, _), (b, _) in zip(plain.dataset(split), augmented.dataset(split), strict=True):
            assert torch.equal(a, b)
    torch.manual_seed(0)
    pairs = zip(plain.dataset("train"), augmented.dataset("train"), strict=True)
    assert sum(torch.equal(a, b) for (a, _), (b, _) in pairs) < 6


def test_the_global_seed_decides_the_augmentation(pack):
    data = module(pack).dataset("train")
    draws = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        draws.append([data[i][0] for i in range(4)])
    assert all(map(torch.equal, draws[0], draws[1]))
    assert not all(map(torch.equal, draws[0], draws[2]))


def test_a_transform_of_ones_own_comes_after_and_sees_what_is_what(pack):
    seen = []

    def note(sample):
        image, targets = sample
        seen.extend(type(part) for part in (image, *targets.values()))
        return image * 0 + 0.5, targets

    data = module(pack, transform=note)
    image, _ = data.dataset("train")[0]
    assert seen == [tv_tensors.Image, Segmentation, Depth, Normals]
    assert (image == 0.5).all()
    data.dataset("test")[0]
    assert len(seen) == 4  # training samples alone


def test_a_flip_as_ones_own_transform(pack):
    plain, flipped = (
        module(pack, augment=False, transform=transform).dataset("train")[0]
        for transform in (None, v2.RandomHorizontalFlip(p=1))
    )
    assert torch.equal(flipped[0], plain[0].flip(-1))
    assert torch.equal(flipped[1]["segmentation"], plain[1]["segmentation"].flip(-1))
    mirrored = plain[1]["normals"].flip(-1) * torch.tensor([-1.0, 1.0, 1.0]).view(3, 1, 1)
    assert torch.equal(flipped[1]["normals"], mirrored)


def test_a_data_set_with_transforms_goes_to_other_processes(pack):
    data = module(pack, transform=v2.ColorJitter(brightness=0.1))
    copied = pickle.loads(pickle.dumps(data.dataset("train")))
    torch.manual_seed(1)
    image, _ = copied[0]
    torch.manual_seed(1)
    assert torch.equal(image, data.dataset("train")[0][0])


# --- bad input -----------------------------------------------------------------------------------


def told(error):
    """Every error of the folder shows how it must look and where to get it."""
    message = str(error.value)
    return all(part in message for part in ("train/normal/0.npy", "github.com/lorenmt/mtan"))


def test_a_missing_root(tmp_path):
    with pytest.raises(FileNotFoundError, match="the folder does not exist") as error:
        module(tmp_path / "nowhere")
    assert told(error)
    assert str(tmp_path / "nowhere") in str(error.value)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", ["image", "label", "depth", "normal", ""])
def test_a_missing_folder(copy, split, name):
    shutil.rmtree(copy / split / name)
    with pytest.raises(FileNotFoundError, match=f"`{split}/{name or 'image'}` is missing") as error:
        module(copy)
    assert told(error)


NORMALS = {
    "normals of two channels": (
        "train/normal/2.npy", saved(lambda a: a[..., :2]),
        r"`train/normal/2\.npy` must have shape \[32, 64, 3\].*got \[32, 64, 2\]"),
    "whole normals": (
        "val/normal/0.npy", saved(lambda a: a.astype(np.int8)),
        r"`val/normal/0\.npy` must be of floating type, got int8"),
    "normals without end": (
        "val/normal/3.npy", Path.unlink, r"`val/normal` lacks 3\.npy\."),
}  # fmt: skip


@pytest.mark.parametrize("case", [*SPOILT, *NORMALS])
def test_spoilt_files(copy, case):
    file, spoil, message = {**SPOILT, **NORMALS}[case]
    spoil(copy / file)
    with pytest.raises((FileNotFoundError, ValueError), match=message) as error:
        module(copy)
    assert told(error)


def test_many_missing_files_are_counted(copy):
    for index in range(1, 10):
        (copy / f"train/depth/{index}.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1.npy, .*, 5.npy and 4 more"):
        module(copy)


def test_an_empty_folder(copy):
    for path in copy.glob("val/*/*.npy"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"`val/image` lacks 0\.npy"):
        module(copy)


def test_hidden_files_of_archives_are_passed_over(copy):
    (copy / "train/image/._0.npy").write_bytes(b"\0")
    assert len(module(copy, val_fraction=0).indices["train"]) == 12


def test_test_images_of_another_size(tmp_path):
    nyuv2.write(tmp_path / "a")
    nyuv2.write(tmp_path / "b", size=(16, 32))
    shutil.rmtree(tmp_path / "a/val")
    (tmp_path / "b/val").rename(tmp_path / "a/val")
    with pytest.raises(ValueError, match="must be of one size, got .*32, 64.*16, 32"):
        module(tmp_path / "a")


@pytest.mark.parametrize("label", [13, -2, 0.5, np.nan])
def test_labels_that_are_no_classes(copy, label):
    def spoil(array):
        array[3, 4] = label
        return array

    saved(spoil)(copy / "val/label/2.npy")
    data = module(copy)
    data.dataset("test")[1]
    with pytest.raises(ValueError, match="`val/label/2.npy` must hold classes from -1 to 12, got"):
        data.dataset("test")[2]


@pytest.mark.parametrize(
    ("argument", "value", "bound"),
    [
        ("batch_size", 0, "at least 1"),
        ("val_fraction", 1.0, r"in \[0, 1\)"),
        ("val_fraction", -0.1, r"in \[0, 1\)"),
        ("val_fraction", float("nan"), r"in \[0, 1\)"),
        ("seed", -1, "at least 0"),
        ("num_workers", -1, "at least 0"),
    ],
)
def test_arguments_out_of_bounds(argument, value, bound):
    with pytest.raises(ValueError, match=f"`{argument}` must be {bound}, got {value}"):
        NYUv2("root", **{argument: value})


def test_a_batch_larger_than_the_training_images(pack):
    with pytest.raises(ValueError, match=r"at most training samples / processes = 11 / 1, got 12"):
        module(pack, batch_size=12).train_dataloader()


# --- with a trainer ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Total length of `list`")  # none to validate on, as wanted
@pytest.mark.parametrize("share", [0.0, 0.2])
def test_a_fit_with_and_without_validation(pack, share):
    class Pixels(MultiTaskModule):
        def losses(self, batch, batch_idx):
            images, targets = batch
            out = self.net(images)
            return {
                "segmentation": nn.functional.cross_entropy(
                    out[:, :13], targets["segmentation"], ignore_index=-1
                ),
                "depth": (out[:, 13:14] - targets["depth"]).abs().mean(),
                "normals": (out[:, 14:] - targets["normals"]).square().mean(),
            }

    network = Pixels()
    network.net = nn.Conv2d(3, 17, 1)
    trainer = pl.Trainer(
        max_epochs=1, limit_train_batches=2, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(network, NYUv2(str(pack), val_fraction=share, num_workers=0))
    assert trainer.global_step == 2
    validated = any(name.startswith("val/") for name in trainer.callback_metrics)
    assert validated == (share > 0)


# --- from a file ---------------------------------------------------------------------------------


def test_a_transform_from_a_configuration(pack):
    parser = ArgumentParser()
    parser.add_class_arguments(NYUv2, "data")
    jitter = {
        "class_path": "torchvision.transforms.v2.ColorJitter",
        "init_args": {"brightness": [0.5, 0.5]},
    }
    given = {"root": str(pack), "augment": False, "num_workers": 0, "transform": jitter}
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    data = instantiate(parser.parse_object({"data": given})).data
    data.setup()
    plain = module(pack, augment=False)
    darker, targets = data.dataset("train")[0]
    image, same = plain.dataset("train")[0]
    assert torch.allclose(darker, image * 0.5)
    assert all(torch.equal(targets[task], same[task]) for task in same)
