"""How good is the radius that RhoFinder suggests? The accuracy there against that of a grid.

    python -m tests.benchmarks.rho_finder grid --out runs/rho [--cases text] [--seeds 0]
    python -m tests.benchmarks.rho_finder find --out runs/rho
    python -m tests.benchmarks.rho_finder suggested --out runs/rho
    python -m tests.benchmarks.rho_finder table --out runs/rho
    python -m tests.benchmarks.rho_finder rules --out runs/rho

F-LS, the sum of the losses beside TaskSAM, is trained on five benchmarks in small; one run takes
about a minute on one core. `grid` trains with every radius of a grid, `find` looks for a radius,
`suggested` trains with those that were found; they add to CSV files in the folder and leave out
what these have already. `table` prints what came out, `rules` what other rules would have
suggested.

The Multi-MNIST cases need the files of MNIST below `--root`.
"""

import argparse
import csv
import importlib.util
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from lightning_flatmtl import ClassificationTask, MultiTaskModule, TaskSAM
from lightning_flatmtl.callbacks import find_rho
from lightning_flatmtl.data import MultiDigits, MultiMNIST
from lightning_flatmtl.models import ConvEncoder, LeNetEncoder, ResNetEncoder

PLAIN = (0.0125, 0.025, 0.05, 0.1, 0.2)
ADAPTIVE = (0.25, 0.5, 1.0, 2.0)
COLUMNS = (
    "case",
    "seed",
    "adaptive",
    "rho",
    "val_accuracy",
    "val_loss",
    "test_accuracy",
    "seconds",
)
TEXT = Path(__file__).parents[2] / "examples" / "transformer_text.py"
FOUND = ("case", "seed", "adaptive", "suggestion", "killed", "step", "seconds")


@dataclass(frozen=True)
class Parts:
    """What a run trains on, and for how long."""

    module: pl.LightningModule
    data: dict[str, Any]
    """Arguments of ``Trainer.fit``."""
    test: Any
    epochs: int


def digits(noise: float) -> Callable[[int, Path], Parts]:
    """MultiDigits as in examples/multidigits."""

    def make(seed: int, root: Path) -> Parts:
        data = MultiDigits(train_pairs=3000, label_noise=noise, batch_size=64, seed=seed)
        return Parts(two_tasks(ConvEncoder(features=64), 64), {"datamodule": data}, data, 15)

    return make


def lenet(seed: int, root: Path) -> Parts:
    """LeNet as in examples/multimnist/lenet.yaml, fewer epochs."""
    data = MultiMNIST(
        str(root), train_pairs=5000, val_pairs=2000, test_pairs=4000, max_shift=0, seed=seed,
        batch_size=128,
    )  # fmt: skip
    return Parts(two_tasks(LeNetEncoder(features=50), 50), {"datamodule": data}, data, 10)


def resnet(seed: int, root: Path) -> Parts:
    """A ResNet-18 of an eighth of the width, as in examples/multimnist/small.yaml, but shorter."""
    data = MultiMNIST(
        str(root), train_pairs=2000, val_pairs=2000, test_pairs=4000, max_shift=0, seed=seed,
        batch_size=128,
    )  # fmt: skip
    encoder = ResNetEncoder(in_channels=1, features=100, width=8, channels_last=True)
    return Parts(two_tasks(encoder, 100), {"datamodule": data}, data, 12)


def text(seed: int, root: Path) -> Parts:
    """The transformer of examples/transformer_text.py; a quarter of the sentences validates."""
    spec = importlib.util.spec_from_file_location("transformer_text", TEXT)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = example
    spec.loader.exec_module(example)
    train, val = example.split(example.read_sentences(), seed)
    collate = example.Collate(train)
    module = example.Sentences(
        encoder=example.Encoder(len(collate)),
        tasks=example.make_tasks(),
        optimizer=lambda params: torch.optim.AdamW(params, lr=3e-3),
        gradient_clip_val=1.0,
    )
    held_out = DataLoader(val, 64, collate_fn=collate)
    loaders = {
        "train_dataloaders": DataLoader(train, 16, shuffle=True, collate_fn=collate),
        "val_dataloaders": held_out,
    }
    return Parts(module, loaders, None, 30)


CASES: dict[str, Callable[[int, Path], Parts]] = {
    "digits_noisy": digits(0.3),
    "digits_clean": digits(0.0),
    "text": text,
    "lenet": lenet,
    "resnet": resnet,
}


def two_tasks(encoder: torch.nn.Module, features: int) -> MultiTaskModule:
    """Two linear heads, ten classes each, Adam at 1e-3."""
    tasks = [ClassificationTask(name, features, 10) for name in ("left", "right")]
    return MultiTaskModule(encoder, tasks, optimizer=lambda p: torch.optim.Adam(p, lr=1e-3))


def trainer_of(epochs: int, callbacks: Sequence[pl.Callback]) -> pl.Trainer:
    """On one CPU, quietly; validation after the last epoch alone."""
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        check_val_every_n_epoch=epochs,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def accuracy(metrics: dict[str, Any], stage: str) -> float:
    """The mean over the tasks, in percent."""
    found = [float(v) for k, v in metrics.items() if k.endswith("/accuracy") and stage in k]
    return 100 * sum(found) / len(found)


def train(case: str, seed: int, adaptive: bool, rho: float, root: Path) -> list[object]:
    """One run: a row of the CSV file."""
    pl.seed_everything(seed, verbose=False)
    parts = CASES[case](seed, root)
    trainer = trainer_of(parts.epochs, [TaskSAM(rho=rho, adaptive=adaptive)] if rho else [])
    begun = time.perf_counter()
    try:
        trainer.fit(parts.module, **parts.data)
    except Exception as error:  # a radius that breaks the fit is a finding
        print(f"{case} {seed} {adaptive} {rho}: {type(error).__name__}: {error}", flush=True)
        return [case, seed, adaptive, rho, "nan", "nan", "nan", "nan"]
    seconds = time.perf_counter() - begun
    found = dict(trainer.callback_metrics)
    val, loss, test = accuracy(found, "val"), float(found["val/loss"]), float("nan")
    if parts.test is not None:
        (tested,) = trainer.test(parts.module, datamodule=parts.test, verbose=False)
        test = accuracy(tested, "test")
    return [case, seed, adaptive, rho, *(f"{x:.4f}" for x in (val, loss, test, seconds))]


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, none if it is not there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def add(path: Path, columns: Sequence[str], row: Sequence[object]) -> None:
    """Append a row."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(columns)
        writer.writerow(row)


def grid(cases: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[str, int, bool, float]]:
    """All runs, seed by seed."""
    for seed in seeds:
        for case in cases:
            yield case, seed, False, 0.0
            for adaptive, radii in ((False, PLAIN), (True, ADAPTIVE)):
                for rho in radii:
                    yield case, seed, adaptive, rho


def run_grid(arguments: argparse.Namespace) -> None:
    """Train with every radius of the grid."""
    path = arguments.out / "grid.csv"
    for case, seed, adaptive, rho in grid(arguments.cases, arguments.seeds):
        key = (case, str(seed), str(adaptive), str(rho))
        if key not in {(r["case"], r["seed"], r["adaptive"], r["rho"]) for r in rows_of(path)}:
            row = train(case, seed, adaptive, rho, arguments.root)
            add(path, COLUMNS, row)
            print(*row, flush=True)


def run_find(arguments: argparse.Namespace) -> None:
    """Look for a radius before training, in every case and for every seed."""
    path = arguments.out / "found.csv"
    for seed in arguments.seeds:
        for case in arguments.cases:
            if (case, str(seed)) in {(r["case"], r["seed"]) for r in rows_of(path)}:
                continue
            pl.seed_everything(seed, verbose=False)
            parts = CASES[case](seed, arguments.root)
            trainer, data = trainer_of(parts.epochs, []), [*parts.data.values()]
            curves = arguments.out / f"curves_{case}_{seed}.csv"
            begun = time.perf_counter()
            found = find_rho(trainer, parts.module, *data, verbose=False, csv=curves)
            seconds = f"{time.perf_counter() - begun:.1f}"
            for adaptive in (False, True):
                killed, step = found.killed(adaptive), found.rows[0].step
                row = [case, seed, adaptive, found.suggestion(adaptive), killed, step, seconds]
                add(path, FOUND, row)
                print(*row, flush=True)


def run_suggested(arguments: argparse.Namespace) -> None:
    """Train with the radii that were found."""
    done = arguments.out / "suggested.csv"
    for found in rows_of(arguments.out / "found.csv"):
        case, seed = found["case"], int(found["seed"])
        known = {(r["case"], r["seed"], r["adaptive"]) for r in rows_of(done)}
        key = (case, found["seed"], found["adaptive"])
        if case in arguments.cases and seed in arguments.seeds and key not in known:
            adaptive = found["adaptive"] == "True"
            row = train(case, seed, adaptive, float(found["suggestion"]), arguments.root)
            add(done, COLUMNS, row)
            print(*row, flush=True)


def run_table(arguments: argparse.Namespace) -> None:
    """Print the accuracies at the suggested radii, and those of the whole grid."""
    runs = rows_of(arguments.out / "grid.csv")
    line("benchmark", "seed", "kind", "LS", "best of the grid", "suggested", "gap", "gap on test")
    line("---", "---:", "---", *["---:"] * 5)
    for row in rows_of(arguments.out / "suggested.csv"):
        found = best_of(runs, row)
        if found is not None:
            plain, best = found
            gaps = [f"{figure(row, on) - figure(best, on):+.2f}" for on in ("val", "test")]
            seen = [f"{figure(r):.2f} ({float(r['rho']):g})" for r in (best, row)]
            name = (row["case"], row["seed"], KINDS[row["adaptive"]], f"{figure(plain):.2f}")
            line(*name, *seen, *(gap if gap != "+nan" else "" for gap in gaps))
        else:  # the grid of this seed is not done
            plain = best_of(runs, row, whole=False)
            accuracies = (f"{figure(plain[0]):.2f}" if plain else "", "")
            shown = f"{figure(row):.2f} ({float(row['rho']):g})"
            line(row["case"], row["seed"], KINDS[row["adaptive"]], *accuracies, shown, "", "")
    print()
    columns = [("False", 0.0), *(("False", r) for r in PLAIN), *(("True", r) for r in ADAPTIVE)]
    line(
        "benchmark", "seeds", *(f"{KINDS[kind]} {rho:g}" if rho else "LS" for kind, rho in columns)
    )
    line("---", "---", *["---:"] * len(columns))
    for case in CASES:
        of_case = [r for r in runs if r["case"] == case]
        seeds = sorted({r["seed"] for r in of_case})
        whole = [s for s in seeds if sum(r["seed"] == s for r in of_case) == len(columns)]
        cells = []
        for kind, rho in columns:
            here = [r for r in of_case if (r["adaptive"], float(r["rho"])) == (kind, rho)]
            figures = [figure(r) for r in here if r["seed"] in whole]
            cells.append(f"{sum(figures) / len(figures):.2f}" if figures else "")
        line(case, ", ".join(whole), *cells)


Row = dict[str, str]


def best_of(runs: Sequence[Row], row: Row, whole: bool = True) -> tuple[Row, Row] | None:
    """The run without flatness and the best of the grid; ``None`` if the ``whole`` is not done."""
    same = [r for r in runs if (r["case"], r["seed"]) == (row["case"], row["seed"])]
    flat = [r for r in same if r["adaptive"] == row["adaptive"] and float(r["rho"]) > 0]
    plain = [r for r in same if float(r["rho"]) == 0]
    missing = len(flat) < len(ADAPTIVE if row["adaptive"] == "True" else PLAIN)
    if not plain or (whole and missing):
        return None
    return plain[0], max(flat or plain, key=figure)


def run_rules(arguments: argparse.Namespace) -> None:
    """Print which radii other rules would have suggested, from the same curves."""
    runs = rows_of(arguments.out / "grid.csv")
    line("benchmark", "seed", "kind", "within 1 point of the best", *RULES)
    line("---", "---:", "---", "---", *["---:"] * len(RULES))
    for row in rows_of(arguments.out / "found.csv"):
        found = best_of(runs, row)
        if found is None:
            continue
        good = [
            float(r["rho"])
            for r in runs
            if all(r[name] == row[name] for name in ("case", "seed", "adaptive"))
            and float(r["rho"]) > 0
            and figure(r) >= figure(found[1]) - 1
        ]
        curves = rows_of(arguments.out / f"curves_{row['case']}_{row['seed']}.csv")
        of_kind = [r for r in curves if r["adaptive"] == row["adaptive"]]
        radii = [crossing(rule(of_kind), limit) for rule, limit in RULES.values()]
        name = (row["case"], row["seed"], KINDS[row["adaptive"]])
        line(*name, ", ".join(f"{rho:g}" for rho in sorted(good)), *(f"{rho:.2g}" for rho in radii))


Curve = dict[float, float]
"""A figure by radius, in increasing order."""
GUESSING = {"left": math.log(10), "right": math.log(10), "tags": math.log(5), "kind": math.log(3)}


def mean(curves: Sequence[Row], column: str, parts: Sequence[str]) -> Curve:
    """The mean over the tasks, that of both parts added up."""
    tasks = len({r["task"] for r in curves})
    found: Curve = {}
    for r in curves:
        if r["part"] in parts:
            rho = float(r["rho"])
            found[rho] = found.get(rho, 0.0) + float(r[column]) / tasks
    return dict(sorted(found.items()))


def share(parts: Sequence[str], of_clean: bool = False) -> Callable[[Sequence[Row]], Curve]:
    """The rise as a share of the loss of guessing, or of the clean loss."""

    def rule(curves: Sequence[Row]) -> Curve:
        clean = {r["task"]: float(r["loss"]) - float(r["rise"]) for r in curves}
        base = sum(clean[t] if of_clean else GUESSING[t] for t in clean) / len(clean)
        return {rho: rise / base for rho, rise in mean(curves, "rise", parts).items()}

    return rule


def misalignment(curves: Sequence[Row]) -> Curve:
    """One less the cosine of the gradients of the shared parameters, there and here."""
    return {rho: 1 - cosine for rho, cosine in mean(curves, "cosine", ["shared"]).items()}


def departure(curves: Sequence[Row]) -> Curve:
    """How much the rise of both parts is above a linear one."""
    rises = mean(curves, "rise", ["shared", "head"])
    first, slope = next((rho, rise / rho) for rho, rise in rises.items())
    return {rho: rise / (slope * rho) - 1 if rho > first else 0.0 for rho, rise in rises.items()}


BOTH = ("shared", "head")
RULES: dict[str, tuple[Callable[[Sequence[Row]], Curve], float]] = {
    "rise 15 %": (share(BOTH), 0.15),
    "rise 25 %": (share(BOTH), 0.25),
    "shared alone 10 %": (share(["shared"]), 0.1),
    "of the clean loss 50 %": (share(BOTH, of_clean=True), 0.5),
    "cosine 0.95": (misalignment, 0.05),
    "20 % above linear": (departure, 0.2),
}


def crossing(curve: Curve, limit: float) -> float:
    """The radius at which a curve passes a limit, log-linear between two; the last if it never."""
    before: tuple[float, float] | None = None
    for rho, value in curve.items():
        if value > limit:
            if before is None:
                return rho / 2
            part = (limit - before[1]) / (value - before[1])
            return float(before[0] * (rho / before[0]) ** part)
        before = rho, value
    return max(curve)


KINDS = {"False": "plain", "True": "adaptive"}


def line(*cells: str) -> None:
    """Print a line of a table."""
    print("| " + " | ".join(cells) + " |")


def figure(row: Row, data: str = "val") -> float:
    """The accuracy, 0 of a fit that broke."""
    value = float(row[f"{data}_accuracy"])
    return 0.0 if math.isnan(value) and data == "val" else value


COMMANDS = {"grid": run_grid, "find": run_find, "suggested": run_suggested}
COMMANDS |= {"table": run_table, "rules": run_rules}


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=list(COMMANDS))
    parser.add_argument("--out", type=Path, required=True, help="folder of the CSV files")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder above MNIST/raw")
    arguments = parser.parse_args()
    COMMANDS[arguments.command](arguments)


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    main()
