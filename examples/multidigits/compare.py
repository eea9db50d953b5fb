"""Train several methods on MultiDigits over several seeds and print the test table.

    python examples/multidigits/compare.py                      # CAGrad and F-CAGrad, one seed
    python examples/multidigits/compare.py --seeds 5 --methods ls f_ls cagrad f_cagrad

Every run is one of the YAML files beside this script. The two single-task runs of the same seed are
the baselines of Delta_m. A seed governs the split of the source images, the pairs, the wrong
labels, the initial weights and the order of the batches; no run is chosen by its result. The
numbers are those after the last epoch, and, in a column of their own, those of the epoch with the
smallest validation loss, since stopping early is the usual remedy for memorised labels.
"""

import argparse
import logging
import statistics
import time
import warnings
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_flatmtl.cli import FlatMTLCLI
from lightning_flatmtl.metrics import delta_m

HERE = Path(__file__).parent
NAMES = {"ls": "LS", "f_ls": "F-LS", "cagrad": "CAGrad", "f_cagrad": "F-CAGrad"}
PAIRS = [("ls", "f_ls"), ("cagrad", "f_cagrad")]

Row = dict[str, float]


def train(method: str, seed: int, extra: list[str], console: Console) -> tuple[Row, Row]:
    """Fit one YAML file; returns the test accuracies of the last epoch and of the best one."""
    start = time.monotonic()
    arguments = [
        f"--config={HERE / method}.yaml",
        f"--seed_everything={seed}",
        f"--data.seed={seed}",
    ]
    cli = FlatMTLCLI([*arguments, "--trainer.enable_progress_bar=false", *extra], run=False)
    cli.trainer.fit(cli.model, cli.datamodule)
    last, best = test(cli), test(cli, ckpt_path="best")
    shown = ", ".join(f"{name} {100 * value:.2f} %" for name, value in last.items())
    console.print(f"seed {seed}  {method:<12}  {shown}  ({time.monotonic() - start:.0f} s)")
    return last, best


def test(cli: FlatMTLCLI, **kwargs: str) -> Row:
    """The test accuracies by ``task/metric``."""
    (metrics,) = cli.trainer.test(cli.model, cli.datamodule, verbose=False, **kwargs)
    return {k.removeprefix("test/"): v for k, v in metrics.items() if k.endswith("/accuracy")}


def average(row: Row) -> float:
    """Mean accuracy of the tasks, in percent."""
    return 100 * statistics.mean(row.values())


def mean_and_error(values: list[float]) -> str:
    """Mean and, for several seeds, its standard error."""
    text = f"{statistics.mean(values):.2f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values) / len(values) ** 0.5:.2f}"
    return text


def table(results: dict[str, list[Row]], best: dict[str, list[Row]]) -> Table:
    """One line a method; Delta_m against the single-task runs of the same seed."""
    singles = results["single-task"]
    directions = dict.fromkeys(singles[0], True)
    shown = Table(title=f"MultiDigits, test, {len(singles)} seed(s)")
    shown.add_column("method")
    for column in (
        "left acc. %",
        "right acc. %",
        "average %",
        "Delta_m %",
        "average %, best epoch",
    ):
        shown.add_column(column, justify="right")
    for method, rows in results.items():
        gains = [delta_m(row, s, directions) for row, s in zip(rows, singles, strict=True)]
        shown.add_row(
            method,
            *(
                mean_and_error([100 * row[f"{t}/accuracy"] for row in rows])
                for t in ("left", "right")
            ),
            mean_and_error([average(row) for row in rows]),
            "0" if method == "single-task" else mean_and_error(gains),
            mean_and_error([average(row) for row in best[method]]),
        )
    return shown


def print_gains(results: dict[str, list[Row]], console: Console) -> None:
    """What flatness adds to each method: difference of means in standard errors."""
    for plain, flat in PAIRS:
        if NAMES[plain] not in results or NAMES[flat] not in results:
            continue
        a, b = ([average(row) for row in results[NAMES[m]]] for m in (plain, flat))
        gain = statistics.mean(b) - statistics.mean(a)
        line = f"{NAMES[flat]} over {NAMES[plain]}: {gain:+.2f} points of average accuracy"
        if len(a) > 1:
            error = ((statistics.variance(a) + statistics.variance(b)) / len(a)) ** 0.5
            line += f", {gain / error:.1f} standard errors of the difference (unpaired)"
        console.print(line)


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=["cagrad", "f_cagrad"])
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, from 0 on")
    parser.add_argument(
        "extra",
        nargs="*",
        help="after --: further arguments of flatmtl, e.g. --trainer.max_epochs=2",
    )
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    console = Console(highlight=False, width=100)
    last: dict[str, list[Row]] = {"single-task": [], **{NAMES[m]: [] for m in arguments.methods}}
    best: dict[str, list[Row]] = {name: [] for name in last}
    for seed in range(arguments.seeds):
        left, right = (
            train(side, seed, arguments.extra, console) for side in ("single_left", "single_right")
        )
        last["single-task"].append(left[0] | right[0])
        best["single-task"].append(left[1] | right[1])
        for method in arguments.methods:
            rows = train(method, seed, arguments.extra, console)
            last[NAMES[method]].append(rows[0])
            best[NAMES[method]].append(rows[1])
    console.print(table(last, best))
    print_gains(last, console)


if __name__ == "__main__":
    main()
