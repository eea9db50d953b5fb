"""Census-Income: shares of the labels, and attributes by label; how many persons have a twin.

python examples/sample_sheets/census_income.py --root data
"""

import argparse
from collections import Counter
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch

from lightning_flatmtl.data import CensusIncome

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

TASKS = {"income": "over 50,000 dollars", "never_married": "never married"}
NUMBERS = ("age", "weeks worked")
CATEGORIES = ("education", "tax filer status", "household summary")
COLORS = ("#8da0cb", "#d95f02")


def twins(data: CensusIncome) -> str:
    """How many persons are equal to another in all features and both labels."""
    rows = {}
    for split in ("train", "val", "test"):
        part = data.dataset(split)
        labels = torch.stack(list(part.targets.values()), dim=1)
        table = torch.cat([part.numeric, part.categorical, labels], dim=1)
        rows[split] = [row.tobytes() for row in table.numpy()]
    known = Counter(rows["train"] + rows["val"])
    several = sum(count for count in known.values() if count > 1)
    found = sum(row in known for row in rows["test"])
    return (
        f"twins: {several:,} of {known.total():,} rows; {found:,} of {len(rows['test']):,} in test"
    )


def shares(axis: Axes, data: CensusIncome) -> None:
    """How many persons have each combination of labels."""
    labels = data.dataset("train").targets
    table = np.array(
        [
            [((labels["income"] == i) & (labels["never_married"] == n)).sum() for n in (0, 1)]
            for i in (0, 1)
        ]
    )
    axis.imshow(table, cmap="Blues", norm="log")
    for i, n in np.ndindex(2, 2):
        share = table[i, n] / table.sum()
        color = "white" if share > 0.1 else "black"
        axis.text(n, i, f"{table[i, n]:,}\n{share:.1%}", ha="center", va="center", color=color)
    axis.set_xticks([0, 1], ["was married", "never married"])
    axis.set_yticks([0, 1], ["to 50,000", "over 50,000"])
    axis.set_title("training rows by label", fontsize=9)


def histogram(axis: Axes, data: CensusIncome, column: str, task: str) -> None:
    """A number's distribution, of either label."""
    rows = data.dataset("train")
    k = data.NUMERIC.index(column)
    values = (rows.numeric[:, k].double() * data.std[k] + data.mean[k]).round().numpy()
    edges = np.arange(values.min(), values.max() + 4, 2) - 0.5
    for label, color in enumerate(COLORS):
        chosen = values[rows.targets[task].numpy() == label]
        axis.hist(chosen, edges, density=True, color=color, alpha=0.6)
    axis.set_yticks([])
    axis.set_title(f"{column}, by {TASKS[task]}", fontsize=9)


def bars(axis: Axes, data: CensusIncome, column: str) -> None:
    """How many of each category have each label."""
    rows = data.dataset("train")
    codes = rows.categorical[:, data.CATEGORICAL.index(column)].numpy()
    names = data.categories[column]
    places = np.arange(len(names))
    for side, (task, color) in enumerate(zip(TASKS, ("#1b9e77", "#7570b3"), strict=True)):
        labels = rows.targets[task].numpy()
        share = [labels[codes == k].mean() if (codes == k).any() else 0 for k in places + 1]
        axis.barh(places + 0.4 * side, share, height=0.4, color=color, label=TASKS[task])
    axis.set_yticks(places + 0.2, [name[:30] for name in names], fontsize=6)
    axis.set_xlim(0, 1)
    axis.invert_yaxis()
    axis.set_title(f"labels by {column}", fontsize=9)


def main() -> None:
    """Draw the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="data")
    parser.add_argument("--out", type=Path, default=Path("docs/images/census_income_samples.png"))
    arguments = parser.parse_args()
    data = CensusIncome(arguments.root)
    data.setup()
    print(twins(data))
    figure, axes = plt.subplots(2, 4, figsize=(15, 7), layout="constrained")
    figure.suptitle(
        f"Census-Income (KDD), {len(data.dataset('train')):,} training rows; blue: no, orange: yes",
        fontsize=11,
    )
    shares(axes[0, 0], data)
    for axis, (column, task) in zip(
        (axes[0, 1], axes[0, 2], axes[0, 3], axes[1, 0]),
        [(column, task) for column in NUMBERS for task in TASKS],
        strict=True,
    ):
        histogram(axis, data, column, task)
    for axis, column in zip(axes[1, 1:], CATEGORIES, strict=True):
        bars(axis, data, column)
    axes[1, 1].legend(fontsize=7)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=90)


if __name__ == "__main__":
    main()
