"""MultiMNIST from idx files: composition, splits, streams, and folders that are not right."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST

from lightning_flatmtl.data import MultiMNIST
from tests.data.writers.multimnist import write

SMALL = {
    "train_pairs": 40, "val_pairs": 20, "test_pairs": 30, "val_images": 20, "batch_size": 8,
}  # fmt: skip
VARIANTS = ["mnist", "fashion", "mixed"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data"))


def made(root: Path, **arguments: Any) -> MultiMNIST:
    data = MultiMNIST(str(root), **{**SMALL, **arguments})
    data.setup("fit")
    return data


def of(root: Path, name: str, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Read as the format says, without torchvision."""
    prefix = root / name / "raw" / ("train" if train else "t10k")
    images = np.frombuffer(Path(f"{prefix}-images-idx3-ubyte").read_bytes()[16:], np.uint8)
    labels = np.frombuffer(Path(f"{prefix}-labels-idx1-ubyte").read_bytes()[8:], np.uint8)
    return images.reshape(-1, 28, 28), labels


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("max_shift", [0, 3, 8])
def test_composition_pixel_by_pixel(root: Path, variant: Any, split: Any, max_shift: int) -> None:
    names = {
        "mnist": ("MNIST", "MNIST"),
        "fashion": ("FashionMNIST", "FashionMNIST"),
        "mixed": ("MNIST", "FashionMNIST"),
    }[variant]
    singles = [of(root, name, split != "test") for name in names]
    data = made(root, variant=variant, max_shift=max_shift)
    pairs = data.dataset(split)
    assert len(pairs) == data.pairs[split]
    for row in range(len(pairs)):
        canvas = np.zeros((36, 36))
        for k, (images, labels) in enumerate(singles):
            source = int(pairs.sources[row, k])
            down, right = (int(s) if k == 0 else 8 - int(s) for s in pairs.shifts[row, k])
            part = canvas[down : down + 28, right : right + 28]
            np.maximum(part, images[source], out=part)
            assert pairs.targets[("left", "right")[k]][row] == labels[source]
        image, targets = pairs[row]
        assert image.dtype == torch.float32
        torch.testing.assert_close(image[0].double(), torch.tensor(canvas) / 255, rtol=0, atol=1e-7)
        assert targets["left"].item() == pairs.targets["left"][row]
    assert int(pairs.shifts.min()) >= 0
    assert int(pairs.shifts.max()) == max_shift  # of 40 draws and more


def test_no_source_image_is_in_two_splits(root: Path) -> None:
    data = made(root, train_pairs=500, val_pairs=500, test_pairs=500)
    used = {
        split: set(data.dataset(split).sources.flatten().tolist()) for split in ("train", "val")
    }
    assert len(used["val"]) == 20  # all that are set aside, with 1,000 draws
    assert len(used["train"]) == 40
    assert not used["train"] & used["val"]
    # Test pairs are of the test file, whose images say so.
    marks = {
        split: {int(image) for image in pairs.images[pairs.shifts[:, 0].sum(1) == 0][:, 0, 0, 2]}
        for split, pairs in ((s, data.dataset(s)) for s in ("train", "val", "test"))
    }
    assert marks == {"train": {100}, "val": {100}, "test": {101}}


def test_the_same_with_the_same_seed_and_the_global_generator_untouched(root: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = made(root, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = made(root, seed=3), made(root, seed=4)
    for split in ("train", "val", "test"):
        assert torch.equal(first.dataset(split).images, again.dataset(split).images)
        assert not torch.equal(first.dataset(split).images, other.dataset(split).images)
        shifts = first.dataset(split).shifts
        assert not torch.equal(shifts[:20], first.dataset("test").shifts[:20]) or split == "test"


def test_more_pairs_begin_with_the_same_ones(root: Path) -> None:
    few, many = made(root), made(root, train_pairs=80)
    assert torch.equal(few.dataset("val").images, many.dataset("val").images)
    assert torch.equal(few.dataset("train").sources[:, 0], many.dataset("train").sources[:40, 0])


def test_batches_are_those_of_an_ordinary_loader(root: Path) -> None:
    data = made(root)
    seed_everything(5)
    own = list(data.train_dataloader())
    seed_everything(5)
    plain = list(DataLoader(data.dataset("train"), batch_size=8, shuffle=True, drop_last=True))
    assert len(own) == len(plain) == 5
    for (images, targets), (expected, labels) in zip(own, plain, strict=True):
        assert torch.equal(images, expected)
        assert {task: y.tolist() for task, y in targets.items()} == {
            task: y.tolist() for task, y in labels.items()
        }
    assert [len(images) for images, _ in data.test_dataloader()] == [8, 8, 8, 6]
    assert [tuple(x.shape) for x in data.predict_dataloader()][-1] == (6, 1, 36, 36)


def test_workers_yield_the_same(root: Path) -> None:
    alone, helped = made(root), made(root, num_workers=1)
    for (x, a), (y, b) in zip(alone.val_dataloader(), helped.val_dataloader(), strict=True):
        assert torch.equal(x, y)
        assert torch.equal(a["left"], b["left"])


def test_out_of_domain_has_the_pixels_in_another_order(root: Path) -> None:
    data = made(root)
    images = torch.cat(list(data.predict_dataloader())).flatten(1)
    other = torch.cat(list(data.ood_dataloader())).flatten(1)
    assert not torch.equal(images, other)
    assert torch.equal(images.sort().values, other.sort().values)


def test_every_epoch_is_shuffled_anew(root: Path) -> None:
    loader = made(root).train_dataloader()
    first, second = (torch.cat([x for x, _ in loader]).sum((1, 2, 3)) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, second.sort().values)


def test_downloading_is_torchvisions(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(MNIST, "download", lambda self: asked.append(type(self).__name__))
    MultiMNIST(str(root), "mixed", **SMALL).prepare_data()
    assert asked == []
    MultiMNIST(str(root), "mixed", download=True, **SMALL).prepare_data()
    assert asked == ["MNIST", "FashionMNIST"]


def test_a_missing_file_says_what_goes_where(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"MultiMNIST \(`root`\) needs MNIST") as caught:
        made(tmp_path / "nowhere")
    told = str(caught.value)
    for part in ("train-images-idx3-ubyte is not there", "MNIST/raw/t10k-labels", "download=True"):
        assert part in told
    write(tmp_path)
    path = tmp_path / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte"
    packed = gzip.compress(path.read_bytes())
    path.unlink()
    path.with_name(path.name + ".gz").write_bytes(packed)
    made(tmp_path, variant="mnist")  # does not need it
    with pytest.raises(FileNotFoundError, match="ubyte.gz is: unpack it with gunzip"):
        made(tmp_path, variant="mixed")


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html>not found</html>", None])
@pytest.mark.parametrize("kind", ["images-idx3", "labels-idx1"])
def test_a_broken_file_is_told(tmp_path: Path, kind: str, content: bytes | None) -> None:
    path = write(tmp_path) / "MNIST" / "raw" / f"train-{kind}-ubyte"
    path.write_bytes(path.read_bytes()[:-7] if content is None else content)  # cut short
    with pytest.raises(ValueError, match=r"a file in .*MNIST/raw is broken"):
        made(tmp_path)


def test_images_and_labels_that_do_not_fit(tmp_path: Path) -> None:
    raw = write(tmp_path) / "MNIST" / "raw"
    (raw / "train-labels-idx1-ubyte").write_bytes((raw / "t10k-labels-idx1-ubyte").read_bytes())
    with pytest.raises(ValueError, match=r"got \[60, 28, 28\] images and 30 labels"):
        made(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "digits"}, "`variant` must be 'mnist', 'fashion' or 'mixed', got 'digits'"),
        ({"train_pairs": 0}, "`train_pairs` must be at least 1, got 0"),
        ({"batch_size": 41}, "`batch_size` must be at most `train_pairs` = 40, got 41"),
        ({"max_shift": 9}, r"`max_shift` must be in \[0, 8\], got 9"),
        ({"val_images": 0}, "`val_images` must be at least 1, got 0"),
        ({"val_images": 60}, "`val_images` must be below the number of training images, 60, got"),
        ({"seed": -1}, "`seed` must be at least 0, got -1"),
    ],
)
def test_bad_arguments(root: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(root, **arguments)


def test_it_is_set_up_before_it_is_asked(root: Path) -> None:
    with pytest.raises(RuntimeError, match=r"call `setup\(\)` first"):
        MultiMNIST(str(root), **SMALL).dataset("train")
