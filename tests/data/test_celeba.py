import pickle
import shutil
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torchvision import datasets

from lightning_flatmtl import Task
from lightning_flatmtl.data import CelebA, _image_cache
from lightning_flatmtl.data._image_cache import ImageCache
from tests.data.writers.celeba import SPLITS, face, labels, write_celeba, write_picture


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_celeba(tmp_path_factory.mktemp("celeba"))


@pytest.fixture
def own(written, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(written, tmp_path / "own"))


def prepared(root, **kwargs):
    data = CelebA(str(root), **{"batch_size": 2, **kwargs})
    data.prepare_data()
    data.setup()
    return data


def everything(loader):
    batches = list(loader)
    images = torch.cat([x for x, _ in batches])
    return images, {t: torch.cat([y[t] for _, y in batches]) for t in batches[0][1]}


# --- what a batch holds --------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
def test_images_and_labels_are_those_of_the_files(written, tmp_path, cached):
    data = prepared(written, cache=str(tmp_path) if cached else None)
    first = 0
    expected = labels(sum(SPLITS)) == 1
    for split, count in zip(("train", "val", "test"), SPLITS, strict=True):
        faces = data.dataset(split)
        assert len(faces) == count
        images, targets = faces.batch(torch.arange(count))
        assert images.shape == (count, 3, 64, 64)
        assert images.dtype == torch.float32
        for k, name in enumerate(CelebA.ATTRIBUTES):
            assert targets[name].dtype == torch.int64
            assert targets[name].tolist() == expected[first : first + count, k].tolist()
        for row, image in enumerate(images):
            # The antialiased picture shrunk otherwise: means over areas.
            wanted = torch.nn.functional.adaptive_avg_pool2d(face(first + row).float(), 64) / 255
            assert (image - wanted).abs().mean() < 0.02
        first += count


def test_colours_and_sides_are_where_they_were(own):
    """Red above, blue below, white on the left: no flip, no transposition, RGB."""
    picture = torch.zeros(3, 218, 178, dtype=torch.uint8)
    picture[0, :109] = 255
    picture[2, 109:] = 255
    picture[:, :, :60] = 255
    path = own / "celeba/img_align_celeba/000001.jpg"
    write_picture(path, picture)
    image, _ = prepared(own).dataset("train")[0]
    assert image[:, 10, 50].tolist() == pytest.approx([1, 0, 0], abs=0.05)
    assert image[:, 54, 50].tolist() == pytest.approx([0, 0, 1], abs=0.05)
    assert image[:, 32, 5].tolist() == pytest.approx([1, 1, 1], abs=0.05)


def test_loaders(written):
    data = prepared(written, batch_size=4)
    assert [len(x) for x, _ in data.train_dataloader()] == [4]  # of six
    images, targets = everything(data.test_dataloader())
    assert len(images) == 4
    assert torch.equal(torch.cat(list(data.predict_dataloader())), images)
    assert list(targets) == list(CelebA.ATTRIBUTES)
    torch.manual_seed(0)
    orders = {tuple(next(iter(data.train_dataloader()))[0].flatten(1).sum(1)) for _ in range(6)}
    assert len(orders) > 1


def test_some_attributes_in_an_order_of_their_own(written):
    whole, some = prepared(written), prepared(written, attributes=["Young", "Bald"])
    _, targets = some.dataset("val").batch(torch.arange(4))
    assert list(targets) == ["Young", "Bald"]
    _, expected = whole.dataset("val").batch(torch.arange(4))
    assert all(torch.equal(targets[name], expected[name]) for name in targets)


def test_the_split_and_labels_are_torchvisions(written, monkeypatch):
    monkeypatch.setattr(datasets.CelebA, "_check_integrity", lambda _: True)  # true checksums
    data = prepared(written)
    for split, theirs in (("train", "train"), ("val", "valid"), ("test", "test")):
        reference = datasets.CelebA(str(written), split=theirs)
        assert torch.equal(data.dataset(split).labels.T.long(), reference.attr)
        assert reference.attr_names[:40] == list(CelebA.ATTRIBUTES)


def test_every_attribute_can_name_a_task():
    assert len({Task(name).name for name in CelebA.ATTRIBUTES}) == 40


def test_a_download_is_torchvisions(written, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "CelebA", lambda root, download: asked.append((root, download)))
    CelebA(str(written)).prepare_data()
    assert asked == []
    CelebA(str(written), download=True).prepare_data()
    assert asked == [(str(written), True)]


# --- the cache -----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_the_cache_gives_the_same_images(written, tmp_path, workers):
    plain, cached = prepared(written), prepared(written, cache=str(tmp_path), num_workers=workers)
    for split in ("train", "val", "test"):
        rows = torch.arange(len(plain.dataset(split))).flip(0)
        decoded, mapped = (data.dataset(split).batch(rows)[0] for data in (plain, cached))
        assert torch.equal(mapped, decoded)
    images, _ = everything(cached.val_dataloader())
    assert torch.equal(images, plain.dataset("val").batch(torch.arange(4))[0])
    assert (tmp_path / "celeba_64x64_14.npy").stat().st_size == 14 * 3 * 64 * 64 + 128


def test_a_dataset_with_a_cache_is_pickled_without_its_pixels(written, tmp_path):
    faces = prepared(written, cache=str(tmp_path)).dataset("train")
    image, _ = faces[0]
    sent = pickle.dumps(faces)
    assert len(sent) < 10_000
    assert torch.equal(pickle.loads(sent)[0][0], image)


def test_a_cache_is_not_filled_twice(written, tmp_path, monkeypatch):
    prepared(written, cache=str(tmp_path))
    monkeypatch.setattr(ImageCache, "_decode_all", None)
    prepared(written, cache=str(tmp_path))


def test_a_broken_off_cache_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(_image_cache, "_CHUNK", 4)
    pictures = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 3, 2, 2)
    asked: list[int] = []
    limit = 6

    def decode(row):
        if row >= limit:
            raise KeyboardInterrupt
        asked.append(row)
        return pictures[row]

    cache = ImageCache(tmp_path / "x.npy", 10, 2, decode)
    with pytest.raises(KeyboardInterrupt):
        cache.fill()
    assert asked == [0, 1, 2, 3, 4, 5]
    assert not cache.path.exists()
    asked.clear()
    limit = 10
    cache.fill()
    assert asked == [4, 5, 6, 7, 8, 9, 0, 5, 9]  # then three are compared
    assert np.array_equal(cache.open(), pictures.numpy())
    assert {path.name for path in tmp_path.iterdir()} <= {"x.npy", "x.npy.lock"}


def test_caches_that_do_not_fit_are_refused(written, tmp_path):
    prepared(written, cache=str(tmp_path / "cache"))
    file = tmp_path / "cache" / "celeba_64x64_14.npy"
    other = write_celeba(tmp_path / "other", seed=1)  # as many other images
    with pytest.raises(ValueError, match="holds another image than the folder in row 0. Delete"):
        prepared(other, cache=str(tmp_path / "cache"))
    whole = file.read_bytes()
    for content in (whole[:-5], whole[:40], b""):
        file.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"must hold uint8 \[14, 3, 64, 64\] .* cannot be read"
        ):
            prepared(written, cache=str(tmp_path / "cache"))
    np.save(file, np.zeros((14, 3, 64, 64)))
    with pytest.raises(ValueError, match=r"holds float64 \[14, 3, 64, 64\]"):
        prepared(written, cache=str(tmp_path / "cache"))


# --- missing and broken files --------------------------------------------------------------------


@pytest.mark.parametrize(
    "gone", ["list_attr_celeba.txt", "list_eval_partition.txt", "img_align_celeba"]
)
def test_what_is_missing_is_named(own, gone):
    path = own / "celeba" / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FileNotFoundError, match=f"`celeba/{gone}` is missing"):
        CelebA(str(own)).setup()


def test_a_missing_folder_says_how_it_must_look_and_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        CelebA(str(tmp_path)).setup()
    for told in ("`celeba` is missing", "img_align_celeba/000001.jpg", "download=True", "mmlab"):
        assert told in str(caught.value)


def test_missing_images_are_counted(own):
    for name in ("000003.jpg", "000009.jpg"):
        (own / "celeba/img_align_celeba" / name).unlink()
    with pytest.raises(FileNotFoundError, match="2 of 14 images are missing, .* `000003.jpg`"):
        CelebA(str(own)).setup()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("list_attr_celeba.txt", lambda t: "", "does not begin with the number of images"),
        ("list_attr_celeba.txt", lambda t: t.replace("Bald ", ""), "is not the 40 attributes"),
        ("list_attr_celeba.txt", lambda t: t.replace("14\n", "15\n", 1), "tells of 15 .* has 14"),
        ("list_attr_celeba.txt", lambda t: t.rstrip()[:-2] + "\n", "line 16 of .* and 40 of -1, 1"),
        ("list_attr_celeba.txt", lambda t: t[:-3] + " 0\n", "line 16 .* must be an image and 40"),
        ("list_eval_partition.txt", lambda t: t.replace("14.jpg 2", "14.jpg 3"), "line 14 of"),
        ("list_eval_partition.txt", lambda t: t.replace("13.jpg", "14.jpg"), "more than once"),
        ("list_eval_partition.txt", lambda t: t[:-13], "does not list the images of"),
        ("list_eval_partition.txt", lambda t: t.replace(" 1\n", " 0\n"), r"no image of val \(1\)"),
    ],
)
def test_broken_lists_are_told(own, name, change, message):
    path = own / "celeba" / name
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message):
        CelebA(str(own)).setup()


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_broken_image_is_named(own, share):
    path = own / "celeba/img_align_celeba/000007.jpg"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    faces = prepared(own).dataset("val")
    with pytest.raises(ValueError, match="`000007.jpg` cannot be decoded"):
        faces.batch(torch.tensor([0]))
    with pytest.raises(ValueError, match="`000007.jpg` cannot be decoded"):
        prepared(own, cache=str(own / "cache"))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"size": 0}, "`size` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"num_workers": -1}, "`num_workers` must be at least 0, got -1"),
        ({"attributes": ["Smilling"]}, "got 'Smilling'. Did you mean 'Smiling'?"),
        ({"attributes": []}, "`attributes` must be different names, at least one, got none"),
        ({"attributes": ["Bald", "Bald"]}, "got some more than once"),
    ],
)
def test_arguments_out_of_bounds_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        CelebA(**kwargs)


def test_batches_must_fit_every_process(written):
    data = prepared(written, batch_size=4)

    class TwoProcesses:
        world_size = 2

    data.trainer = TwoProcesses()
    with pytest.raises(ValueError, match=r"`batch_size` must be at most .* 6 / 2, got 4"):
        data.train_dataloader()


def test_data_before_setup_is_refused():
    with pytest.raises(RuntimeError, match=r"call `setup\(\)` first"):
        CelebA().dataset("train")


class Linear(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(3 * 16 * 16, 2)

    def forward(self, images):
        return self.head(images.flatten(1))

    def training_step(self, batch, _):
        images, targets = batch
        assert list(targets) == ["Smiling", "Male"]
        loss = torch.nn.functional.binary_cross_entropy_with_logits
        return loss(self(images), torch.stack(list(targets.values()), 1).float())

    validation_step = test_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_trainer_prepares_and_runs_it(written, tmp_path):
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = CelebA(str(written), ["Smiling", "Male"], 16, str(tmp_path / "cache"), batch_size=2)
    module = Linear()
    trainer.fit(module, data)
    assert trainer.global_step == 3
    trainer.test(module, data, verbose=False)
    assert torch.cat(trainer.predict(module, data)).shape == (4, 2)
