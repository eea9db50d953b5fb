"""Multi-MNIST: every file, plain and flat."""

from pathlib import Path

import pytest

from tests.configs.two_steps import EXAMPLES, rows, two_steps
from tests.data.writers.multimnist import write

FOLDER = EXAMPLES / "multimnist"
COMPARISONS = sorted([*FOLDER.glob("compare*.yaml"), *FOLDER.glob("tune*.yaml")])
SMALL = [
    "--trainer.accelerator=cpu",
    "--model.encoder.width=4",
    "--data.train_pairs=16",
    "--data.val_pairs=4",
    "--data.test_pairs=4",
    "--data.val_images=20",
    "--data.batch_size=4",
]


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_rows(path: Path, tmp_path: Path) -> None:
    root = write(tmp_path / "data")
    runs = rows(path, *SMALL, f"--data.root={root}")
    assert sum(name.startswith("F-") for name in runs) >= 3
    # Each flat row is the plain row and the same radius; two of them say that the file runs.
    chosen = [name for name in runs if name.endswith("LS")] + [
        name for name in runs if name.startswith("F-")
    ][-1:]
    assert len(chosen) >= 2
    two_steps([runs[name] for name in chosen], tmp_path)
