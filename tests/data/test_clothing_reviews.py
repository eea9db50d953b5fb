"""The clothing reviews: what is read, how it is split and encoded, and what is refused."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from lightning_flatmtl.data import ClothingReviews
from lightning_flatmtl.data._review_groups import deal_out, grouped
from lightning_flatmtl.data._reviews_files import COLUMNS, words_of
from tests.data.writers.clothing_reviews import rows, write, write_clothing_reviews

SPLITS = ("train", "val", "test")


def made(root: Path, **arguments) -> ClothingReviews:
    data = ClothingReviews(str(root), **{"batch_size": 4, "min_count": 1, **arguments})
    data.setup("fit")
    return data


def text_of(row: dict[str, str]) -> str:
    return row["Title"] + row["Review Text"]


def decoded(data: ClothingReviews, tokens: torch.Tensor) -> list[str]:
    known = {0: "PAD", 1: "UNKNOWN", 2: "END", **dict(enumerate(data.words, 3))}
    return [known[token] for token in tokens.tolist()]


def test_every_review_is_where_the_file_has_it(tmp_path) -> None:
    data, found = made(write_clothing_reviews(tmp_path)), rows()
    for split in SPLITS:
        dataset = data.dataset(split)
        sources = data.source_rows[split].tolist()
        assert len(dataset) == len(sources) > 0
        for item, source in enumerate(sources):
            row, (inputs, targets) = found[source], dataset[item]
            assert targets["rating"].item() == int(row["Rating"]) - 1
            assert targets["recommended"].item() == float(row["Recommended IND"])
            name = row["Department Name"]
            expected = data.DEPARTMENTS.index(name) if name else -1
            assert targets["department"].item() == expected
            title = [*words_of(row["Title"]), "END"] if row["Title"] else []
            expected = [*title, *words_of(row["Review Text"])]
            assert inputs["lengths"].item() == len(inputs["tokens"]) == len(expected)
            for word, wanted in zip(decoded(data, inputs["tokens"]), expected, strict=True):
                assert word == (wanted if wanted in data.words or wanted == "END" else "UNKNOWN")
    used = torch.cat(list(data.source_rows.values())).sort().values.tolist()
    assert used == [k for k, row in enumerate(found) if text_of(row)]
    assert data.counts == {
        "reviews": 120,
        "without_text": 12,
        "without_department": sum(not r["Department Name"] and bool(text_of(r)) for r in found),
        "twins": 2,
    }
    assert data.counts["without_department"] > 0


def test_no_product_and_no_text_is_in_two_splits(tmp_path) -> None:
    found = rows()
    root = write_clothing_reviews(tmp_path)
    assert found[8]["Clothing ID"] != found[9]["Clothing ID"]
    for seed in range(4):
        data = made(root, seed=seed)
        of_row = {k: split for split in SPLITS for k in data.source_rows[split].tolist()}
        products = {(found[k]["Clothing ID"], split) for k, split in of_row.items()}
        assert len(products) == len({product for product, _ in products})
        assert of_row[8] == of_row[9]


def test_the_words_are_those_of_the_training_reviews_by_frequency(tmp_path) -> None:
    data, found = made(write_clothing_reviews(tmp_path), min_count=3), rows()
    count = Counter(
        word
        for k in data.source_rows["train"].tolist()
        for word in words_of(found[k]["Title"]) + words_of(found[k]["Review Text"])
    )
    kept = [word for word, times in count.items() if times >= 3]
    assert list(data.words) == sorted(kept, key=lambda word: (-count[word], word))
    few = made(write_clothing_reviews(tmp_path), min_count=3, vocabulary=7)
    assert few.words == data.words[:4]
    assert max(int(few.dataset(split).tokens.max()) for split in SPLITS) == 6
    changed = rows()
    for k in (*data.source_rows["val"].tolist(), *data.source_rows["test"].tolist()):
        changed[k]["Review Text"] += " another word"
    write(tmp_path / "other/reviews.csv", changed)
    assert made(tmp_path / "other", min_count=3).words == data.words


def test_punctuation_becomes_tags(tmp_path) -> None:
    found = rows()
    text = "I'm 5'4, and... it FITS (really)!! ok?"
    found[1].update({"Title": "Wow, so good.", "Review Text": text})
    write(tmp_path / "reviews.csv", found)
    data = made(tmp_path, tags=True)
    (split,) = (s for s in SPLITS if 1 in data.source_rows[s].tolist())
    item = data.source_rows[split].tolist().index(1)
    inputs, targets = data.dataset(split)[item]
    tags = ["-" if tag == -100 else data.TAGS[tag] for tag in targets["punctuation"].tolist()]
    words = [w for w in words_of(f"wow so good | {text}") if w[0].isalnum() or w == "|"]
    expected = dict.fromkeys(range(len(words)), "nothing")
    expected.update({0: "comma", 2: "stop", 3: "-", 6: "comma", 7: "stop"})
    expected.update({10: "exclamation mark", 11: "stop"})
    assert tags == list(expected.values())
    assert words[:8] == ["wow", "so", "good", "|", "i'm", "5", "4", "and"]
    assert len(inputs["tokens"]) == len(words)
    assert inputs["tokens"][3] == 2
    assert all(word[0].isalnum() for word in data.words)
    assert set(made(tmp_path).dataset("train")[0][1]) == {"rating", "recommended", "department"}


def test_batches_are_padded_to_their_longest_review(tmp_path) -> None:
    data = made(write_clothing_reviews(tmp_path), tags=True, longest=9)
    dataset = data.dataset("train")
    inputs, targets = dataset.batch(torch.tensor([3, 0, 5]))
    items = [dataset[i] for i in (3, 0, 5)]
    longest = max(int(x["lengths"]) for x, _ in items)
    assert longest <= 9
    assert inputs["tokens"].shape == targets["punctuation"].shape == (3, longest)
    for row, (x, y) in enumerate(items):
        n = int(x["lengths"])
        assert inputs["lengths"][row] == n
        assert torch.equal(inputs["tokens"][row, :n], x["tokens"])
        assert torch.equal(targets["punctuation"][row, :n], y["punctuation"])
        assert (inputs["tokens"][row, n:] == 0).all()
        assert (targets["punctuation"][row, n:] == -100).all()
    x, y = next(iter(data.train_dataloader()))
    assert len(x["tokens"]) == len(y["rating"]) == 4
    assert next(iter(data.predict_dataloader())).keys() == {"tokens", "lengths"}
    assert data.dataset("test")[0][0].keys() == {"tokens", "lengths"}


def test_the_split_is_of_the_seed_alone(tmp_path) -> None:
    root = write_clothing_reviews(tmp_path)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, other = made(root), made(root)
    assert torch.equal(state, torch.get_rng_state())
    for split in SPLITS:
        assert torch.equal(one.source_rows[split], other.source_rows[split])
        assert torch.equal(one.dataset(split).tokens, other.dataset(split).tokens)
    assert not torch.equal(made(root, seed=1).source_rows["val"], one.source_rows["val"])


def test_groups_are_connected_by_any_key() -> None:
    assert grouped(["a", "b", "a", "c", "d"], [1, 2, None, 1, None]) == [[0, 2, 3], [1], [4]]
    chain = [[k // 2 for k in range(6)], [(k + 1) // 2 for k in range(6)]]
    assert grouped(*chain) == [list(range(6))]


def test_shares_hold_in_every_kind() -> None:
    groups, start = [], 0
    for size in [7, 1, 1, 2, 1, 4, 1, 1, 1, 1] * 8:
        groups.append(list(range(start, start + size)))
        start += size
    kinds = ["a" if k % 2 else "b" for k in range(len(groups))]
    for seed in range(3):
        parts = deal_out(groups, kinds, (0.7, 0.15, 0.15), seed)
        assert sorted(row for part in parts for row in part) == list(range(start))
        for kind in "ab":
            rows_of = {r for g, k in zip(groups, kinds, strict=True) if k == kind for r in g}
            for part, share in zip(parts, (0.7, 0.15, 0.15), strict=True):
                assert abs(len(rows_of & set(part)) - share * len(rows_of)) <= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Rating": "6"}, "row 3: 'Rating' must be 1 to 5, got '6'"),
        ({"Recommended IND": "yes"}, "row 3: 'Recommended IND' must be 0 or 1, got 'yes'"),
        ({"Department Name": "Shoes"}, "row 3: 'Department Name' must be empty or one of"),
    ],
)
def test_a_file_with_other_values_is_refused(tmp_path, change, message) -> None:
    found = rows()
    found[2].update(change)
    write(tmp_path / "reviews.csv", found)
    with pytest.raises(ValueError, match=message):
        made(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>", "must begin with the header of the columns, not '<html>'"),
        (b"", "must begin with the header"),
        (",".join(COLUMNS).encode() + b"\n", "has no rows"),
        (",".join(COLUMNS).encode() + b"\n1,2\n", "row 1 must have 11 columns, got 2"),
        (b"\xff\xfe\x00", "is no text of rows"),
    ],
)
def test_a_file_that_is_something_else_is_refused(tmp_path, content, message) -> None:
    (tmp_path / "reviews.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        made(tmp_path)


def test_a_missing_file_says_where_to_get_it(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="(?s)`reviews.csv` is missing.*kaggle.com"):
        made(tmp_path)
    with pytest.raises(FileNotFoundError, match="the folder does not exist"):
        made(tmp_path / "nowhere")
    found = write_clothing_reviews(tmp_path) / "reviews" / "reviews.csv"
    found.rename(found.with_name("Womens Clothing E-Commerce Reviews.csv"))
    made(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocabulary": 3}, "`vocabulary` must be at least 4, got 3"),
        ({"longest": 0}, "`longest` must be at least 1, got 0"),
        ({"min_count": 0}, "`min_count` must be at least 1, got 0"),
        ({"val_fraction": 1.0}, "`val_fraction` must be in \\(0, 1\\), got 1.0"),
        ({"test_fraction": 0.9}, "`test_fraction` must be in \\(0, 0.85\\).*got 0.9"),
        ({"seed": -1}, "`seed` must be at least 0, got -1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        ClothingReviews(**arguments)


def test_a_split_without_a_review_is_refused(tmp_path) -> None:
    write(tmp_path / "reviews.csv", rows(12, products=1))
    with pytest.raises(ValueError, match="must leave every split a review, got none for"):
        made(tmp_path)
