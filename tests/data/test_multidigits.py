import math
import sys

import lightning.pytorch as pl
import pytest
import torch
from sklearn.datasets import load_digits

from lightning_flatmtl.data import DigitPairs, MultiDigits
from lightning_flatmtl.data.multidigits import _load_digits

SPLITS = ("train", "val", "test")


def prepared(**kwargs):
    sizes = {"train_pairs": 200, "val_pairs": 50, "test_pairs": 70, "batch_size": 16}
    data = MultiDigits(**{**sizes, **kwargs})
    data.setup()
    return data


def same(a, b):
    return (
        torch.equal(a.images, b.images)
        and torch.equal(a.sources, b.sources)
        and all(torch.equal(a.targets[t], b.targets[t]) for t in ("left", "right"))
    )


# --- what a batch looks like ---------------------------------------------------------------------


@pytest.mark.parametrize("canvas", [8, 9, 12, 16])
def test_shapes_types_and_bounds(canvas):
    data = prepared(canvas=canvas, label_noise=0.2)
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    for split, loader in zip(SPLITS, loaders, strict=True):
        images, targets = next(iter(loader))
        assert images.shape == (16, 1, canvas, canvas), split
        assert images.dtype == torch.float32
        assert images.min() >= 0
        assert images.max() <= 1
        assert list(targets) == ["left", "right"]
        for labels in targets.values():
            assert labels.shape == (16,)
            assert labels.dtype == torch.int64
            assert labels.min() >= 0
            assert labels.max() <= 9


def test_default_sizes():
    data = MultiDigits()
    data.setup()
    assert [len(data.dataset(s)) for s in SPLITS] == [3000, 1000, 2000]
    assert data.dataset("train").images.shape[1:] == (1, 12, 12)


def test_pixels_are_those_of_the_source_images():
    raw = torch.tensor(load_digits().images, dtype=torch.float32) / 16
    classes = torch.tensor(load_digits().target)
    pairs = prepared(canvas=11).dataset("val")
    for image, (first, second), left, right in zip(
        pairs.images, pairs.sources, *pairs.clean_targets.values(), strict=True
    ):
        expected = torch.zeros(11, 11)
        for row in range(8):
            for col in range(8):
                expected[row, col] = max(expected[row, col], raw[first, row, col])
        for row in range(8):
            for col in range(8):
                place = (row + 3, col + 3)
                expected[place] = max(expected[place], raw[second, row, col])
        assert torch.equal(image[0], expected)
        assert (left, right) == (classes[first], classes[second])


def test_without_overlap_the_digits_stand_untouched():
    digits, _ = _load_digits()
    pairs = prepared(canvas=16).dataset("train")
    assert torch.equal(pairs.images[:, 0, :8, :8], digits[pairs.sources[:, 0]])
    assert torch.equal(pairs.images[:, 0, 8:, 8:], digits[pairs.sources[:, 1]])
    assert pairs.images[:, 0, :8, 8:].abs().sum() == 0


# --- splits --------------------------------------------------------------------------------------


def test_no_source_image_is_in_two_splits():
    data = prepared(train_pairs=5000)
    together = torch.cat([data.source_indices[s] for s in SPLITS])
    assert torch.equal(together.sort().values, torch.arange(1797))
    for split in SPLITS:
        used = set(data.dataset(split).sources.flatten().tolist())
        assert used <= set(data.source_indices[split].tolist())


def test_splits_are_stratified():
    _, labels = _load_digits()
    data = prepared(val_fraction=0.1, test_fraction=0.4)
    for split, share in zip(SPLITS, (0.5, 0.1, 0.4), strict=True):
        counts = torch.bincount(labels[data.source_indices[split]], minlength=10)
        expected = torch.bincount(labels) * share
        assert (counts - expected).abs().max() <= 1


def test_fractions_too_small_for_a_class_are_refused():
    data = MultiDigits(val_fraction=1e-4)
    with pytest.raises(ValueError, match=r"leave every split an image of each class, got 0\.0001"):
        data.setup()


# --- label noise ---------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.333, 0.99])
def test_share_of_wrong_labels_is_exact_and_only_in_training(share):
    data = prepared(label_noise=share)
    for split in SPLITS:
        pairs = data.dataset(split)
        for task in ("left", "right"):
            wrong = (pairs.targets[task] != pairs.clean_targets[task]).sum()
            assert wrong == (round(share * len(pairs)) if split == "train" else 0)


def test_tasks_are_wrong_in_different_places_and_in_every_way():
    pairs = prepared(train_pairs=4000, label_noise=0.5).dataset("train")
    wrong = {t: pairs.targets[t] != pairs.clean_targets[t] for t in ("left", "right")}
    both = (wrong["left"] & wrong["right"]).float().mean()
    assert abs(both - 0.25) < 0.05
    shift = (pairs.targets["left"] - pairs.clean_targets["left"])[wrong["left"]] % 10
    counts = torch.bincount(shift, minlength=10)[1:].float()
    assert (counts - 2000 / 9).abs().max() < 6 * math.sqrt(2000 / 9)


def test_noise_changes_neither_images_nor_splits():
    clean, noisy = prepared().dataset("train"), prepared(label_noise=0.4).dataset("train")
    assert torch.equal(clean.images, noisy.images)
    assert all(torch.equal(clean.targets[t], noisy.clean_targets[t]) for t in ("left", "right"))


# --- determinism ---------------------------------------------------------------------------------


def test_the_seed_decides_everything():
    a, b, c = prepared(label_noise=0.3), prepared(label_noise=0.3), prepared(seed=1)
    assert all(same(a.dataset(s), b.dataset(s)) for s in SPLITS)
    assert not any(same(a.dataset(s), c.dataset(s)) for s in SPLITS)
    assert not torch.equal(a.source_indices["test"], c.source_indices["test"])


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(3)
    a = prepared(label_noise=0.3)
    state = torch.get_rng_state()
    torch.manual_seed(4)
    b = prepared(label_noise=0.3)
    assert all(same(a.dataset(s), b.dataset(s)) for s in SPLITS)
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), state)


def test_more_training_pairs_leave_the_other_splits_alone():
    a, b = prepared(), prepared(train_pairs=300)
    assert same(a.dataset("val"), b.dataset("val"))
    assert same(a.dataset("test"), b.dataset("test"))


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict", None])
def test_setup_is_idempotent_and_independent_of_the_stage(stage):
    data = MultiDigits(train_pairs=200, val_pairs=50, test_pairs=70, batch_size=16)
    data.setup(stage)
    first = data.dataset("train")
    data.setup("fit")
    assert data.dataset("train") is first
    assert all(same(data.dataset(s), prepared().dataset(s)) for s in SPLITS)


# --- loaders -------------------------------------------------------------------------------------


def test_training_leaves_the_incomplete_batch_out_and_evaluation_does_not():
    data = prepared(train_pairs=33, val_pairs=33, batch_size=16)
    assert [len(x) for x, _ in data.train_dataloader()] == [16, 16]
    assert [len(x) for x, _ in data.val_dataloader()] == [16, 16, 1]


def test_only_training_is_shuffled():
    data = prepared()
    test = torch.cat([images for images, _ in data.test_dataloader()])
    assert torch.equal(test, data.dataset("test").images)
    torch.manual_seed(0)
    first = next(iter(data.train_dataloader()))[0]
    assert not torch.equal(first, data.dataset("train").images[:16])


def test_images_out_of_domain_are_those_of_the_test_with_their_pixels_moved():
    data = prepared(seed=1)
    images, inside = torch.cat(list(data.ood_dataloader())), data.dataset("test").images
    assert images.shape == inside.shape
    torch.testing.assert_close(images.flatten(1).sort().values, inside.flatten(1).sort().values)
    assert not torch.equal(images, inside)
    moved = images.flatten(1)[:, None] == inside.flatten(1)[:, :, None]
    assert moved.all(0).any(0).all()  # one order for all of them
    assert torch.equal(torch.cat(list(prepared(seed=1).ood_dataloader())), images)


def test_prediction_yields_the_test_images():
    data = prepared()
    images = list(data.predict_dataloader())
    assert all(isinstance(x, torch.Tensor) for x in images)
    assert torch.equal(torch.cat(images), data.dataset("test").images)


def test_workers():
    data = prepared(num_workers=1)
    images, targets = next(iter(data.val_dataloader()))
    assert torch.equal(images, data.dataset("val").images[:16])
    assert torch.equal(targets["right"], data.dataset("val").targets["right"][:16])


class Linear(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer1 = torch.nn.Linear(144, 20)

    def forward(self, images):
        return self.layer1(images.flatten(1))

    def training_step(self, batch, _):
        images, targets = batch
        scores = self(images).chunk(2, dim=1)
        return sum(map(torch.nn.functional.cross_entropy, scores, targets.values()))

    def validation_step(self, batch, _):
        self.training_step(batch, _)

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_trainer_runs_every_stage(tmp_path):
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module, data = Linear(), MultiDigits(train_pairs=40, val_pairs=8, test_pairs=10, batch_size=8)
    trainer.fit(module, data)
    assert trainer.global_step == 5
    trainer.test(module, data, verbose=False)
    assert torch.cat(trainer.predict(module, data)).shape == (10, 20)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"train_pairs": 0}, "`train_pairs` must be at least 1, got 0"),
        ({"val_pairs": 0}, "`val_pairs` must be at least 1, got 0"),
        ({"test_pairs": -1}, "`test_pairs` must be at least 1, got -1"),
        ({"canvas": 7}, r"`canvas` must be in \[8, 16\], got 7"),
        ({"canvas": 17}, r"`canvas` must be in \[8, 16\], got 17"),
        ({"label_noise": 1.0}, r"`label_noise` must be in \[0, 1\), got 1.0"),
        ({"label_noise": -0.1}, r"`label_noise` must be in \[0, 1\), got -0.1"),
        ({"label_noise": math.nan}, r"`label_noise` must be in \[0, 1\), got nan"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"train_pairs": 10}, "`batch_size` must be at most `train_pairs` = 10, got 64"),
        ({"seed": -1}, "`seed` must be at least 0, got -1"),
        ({"val_fraction": 0.0}, r"`val_fraction` must be in \(0, 1\), got 0.0"),
        ({"test_fraction": 1.0}, r"`test_fraction` must be in \(0, 1\), got 1.0"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "must be below 1, got 1.0"),
        ({"num_workers": -1}, "`num_workers` must be at least 0, got -1"),
    ],
)
def test_arguments_out_of_bounds_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MultiDigits(**kwargs)


def test_batches_must_fit_every_process():
    data = prepared(train_pairs=30, batch_size=16)

    class TwoProcesses:
        world_size = 2

    data.trainer = TwoProcesses()
    with pytest.raises(ValueError, match=r"`batch_size` must be at most .* 30 / 2, got 16"):
        data.train_dataloader()


def test_missing_scikit_learn_names_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-flatmtl\[digits\]"'):
        MultiDigits()


def test_data_before_setup_is_refused():
    with pytest.raises(RuntimeError, match=r"call `setup\(\)` first"):
        MultiDigits().dataset("train")


def test_pairs_stand_alone():
    digits = torch.rand(4, 8, 8)
    pairs = DigitPairs(digits, torch.arange(4), torch.tensor([[2, 0], [1, 1]]), canvas=10)
    assert len(pairs) == 2
    image, target = pairs[0]
    assert torch.equal(image[0, :2, :8], digits[2, :2])
    assert {k: v.item() for k, v in target.items()} == {"left": 2, "right": 0}
