"""The clothing reviews in the format of their file, a few rows."""

import csv
import random
from pathlib import Path

from lightning_flatmtl.data._reviews_files import COLUMNS, DEPARTMENTS

WORDS = ("dress", "top", "love", "too", "small", "fits", "i'm", "color", "soft", "5", "xs")
MARKS = ("", "", "", ",", ".", "!", " -", "?")


def rows(count: int = 120, products: int = 30, seed: int = 0) -> list[dict[str, str]]:
    """Rows by column: every tenth has no text, some no title; a text comes twice."""
    chance = random.Random(seed)
    found = []
    for number in range(count):
        product = chance.randrange(products)
        sentence = "".join(
            f"{chance.choice(WORDS)}{chance.choice(MARKS)} " for _ in range(chance.randrange(3, 20))
        )
        stars = chance.randrange(1, 6)
        department = DEPARTMENTS[product % len(DEPARTMENTS)] if product else ""
        values = (
            number, 1000 + product, chance.randrange(18, 90), f"So, {chance.choice(WORDS)}!",
            f"Begins {sentence}", stars, int(stars > 2), chance.randrange(9), "General", department,
            department,
        )  # fmt: skip
        found.append(dict(zip(COLUMNS, map(str, values), strict=True)))
        if number % 10 == 3:
            found[-1].update({"Title": "", "Review Text": ""})
        elif number % 4 == 0:
            found[-1]["Title"] = ""
    found[8]["Review Text"] = found[9]["Review Text"] + " "
    return found


def write(path: Path, found: list[dict[str, str]]) -> None:
    """Write rows as they are published."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)


def write_clothing_reviews(root: Path, count: int = 120) -> Path:
    """Write the file under ``root/reviews``, and return ``root``."""
    write(root / "reviews" / "reviews.csv", rows(count))
    return root
