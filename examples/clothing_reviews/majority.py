"""What the clothing reviews hold, which texts come twice, and what always saying the same gives.

python examples/clothing_reviews/majority.py --root data
"""

import argparse
from collections import Counter

import torch

from lightning_flatmtl.data import ClothingReviews
from lightning_flatmtl.data._reviews_files import find_reviews, read_reviews, words_of
from lightning_flatmtl.metrics import BalancedAccuracy, MacroF1


def twins(root: str) -> list[list[int]]:
    """Lines of the file with the same words in their texts."""
    lines: dict[tuple[str, ...], list[int]] = {}
    for review in read_reviews(find_reviews(root)):
        words = words_of(review.text) or words_of(review.title)
        key = tuple(word for word in words if word[0].isalnum())
        if key:
            lines.setdefault(key, []).append(review.row)
    return [rows for rows in lines.values() if len(rows) > 1]


def main() -> None:
    """Print the counts, the twins and a row for each task."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", default="data")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    data = ClothingReviews(arguments.root, seed=arguments.seed, tags=True)
    data.setup()
    print(", ".join(f"{count} {name}" for name, count in data.counts.items()))
    print("rows with the same words:", *twins(arguments.root))
    splits = {split: data.dataset(split) for split in ("train", "val", "test")}
    print(", ".join(f"{len(dataset)} {split}" for split, dataset in splits.items()))
    print(f"\n{'most frequent':<15}{'class':>7}{'accuracy':>11}{'balanced':>11}{'macro F1':>11}")
    for task in ("rating", "recommended", "department", "punctuation"):
        train, test = (
            splits[split].tags if task == "punctuation" else splits[split].targets[task].long()
            for split in ("train", "test")
        )
        train, test = train[train >= 0], test[test >= 0]
        chosen = Counter(train.tolist()).most_common(1)[0][0]
        classes = int(train.max()) + 1
        logits = torch.nn.functional.one_hot(torch.full_like(test, chosen), classes).float()
        figures = [
            (test == chosen).double().mean(),
            BalancedAccuracy(classes)(logits, test),
            MacroF1(classes)(logits, test),
        ]
        print(f"{task:<15}{chosen:>7}" + "".join(f"{100 * float(x):>9.2f} %" for x in figures))


if __name__ == "__main__":
    main()
