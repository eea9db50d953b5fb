"""``flatmtl compare``, ``flatmtl tune``, ``flatmtl baselines`` and ``flatmtl methods``."""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from typing_extensions import override

from lightning_flatmtl.comparison.comparison import Comparison
from lightning_flatmtl.comparison.jobs import State
from lightning_flatmtl.comparison.launchers.base import line
from lightning_flatmtl.comparison.methods import methods_table
from lightning_flatmtl.comparison.settings import Settings
from lightning_flatmtl.comparison.terminal import print_table
from lightning_flatmtl.hosting.cli_errors import in_full, refuse_briefly

if TYPE_CHECKING:
    from lightning_flatmtl.comparison.tuning.tuning import Tuning

__all__ = ["COMMANDS"]

_REFUSED = (ValueError, OSError, ModuleNotFoundError)

_COMPARE = """\
Train methods over seeds from one file, and print the table of their test metrics.

Runs that are done are kept: the same command goes on where it was broken off. Further arguments,
such as --trainer.max_epochs=2, are those of `flatmtl fit` and go to every run."""

_BASELINES = """\
Train every task by itself and write the values that Delta_m is relative to, as baselines.yaml,
which MultiTaskModule(baselines=...) reads.

The file is that of a comparison, methods are optional."""


_TUNE = """\
Search the best learning rate, radius and any other argument of each method on validation data, with
Optuna, and write them into a file that `flatmtl compare` runs.

Trials that are done are kept: the same command goes on where it was broken off. Further arguments,
such as --trainer.max_epochs=2, are those of `flatmtl fit` and go to every trial."""


class _Parser(argparse.ArgumentParser):
    @override
    def error(self, message: str) -> NoReturn:
        refuse_briefly(message, self.prog)


def compare_command(arguments: Sequence[str]) -> int:
    """Run ``flatmtl compare``; returns the exit status."""
    parser = _parser("flatmtl compare", _COMPARE)
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="run these methods alone")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print one `flatmtl fit` line for each run that is not done, for a SLURM array",
    )
    given, further = _parse(parser, arguments)

    def work() -> int:
        settings = Settings.load(given.config, further, given.output)
        comparison = Comparison(settings, given.only)
        if given.dry_run:
            comparison.prepare()
            _print_lines(comparison)
            return 0
        return _run(comparison, given.workers, given.launcher)

    return _briefly(work, parser.prog)


def tune_command(arguments: Sequence[str]) -> int:
    """Run ``flatmtl tune``; returns the exit status."""
    from lightning_flatmtl.comparison.tuning.settings import TuneSettings  # noqa: PLC0415
    from lightning_flatmtl.comparison.tuning.tuning import Tuning  # noqa: PLC0415

    parser = _parser("flatmtl tune", _TUNE, "search")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="search for these alone")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print what would be searched, and a line for each method, for a SLURM array",
    )
    given, further = _parse(parser, arguments)

    def work() -> int:
        tuning = Tuning(TuneSettings.load(given.config, further, given.output), given.only)
        if given.dry_run:
            _print_search(tuning, given, further)
            return 0
        try:
            trials = tuning.run(given.workers, given.launcher)
        except KeyboardInterrupt:
            _say_interrupted(tuning.output)
            return 130
        print_table(trials.markdown)
        if trials.compare is not None:
            sys.stdout.write(f"The best settings: flatmtl compare --config {trials.compare}\n")
        sys.stdout.write(f"Written to {tuning.output}/\n")
        sys.stdout.writelines(f"{remark}\n" for remark in trials.remarks)
        return 0 if set(tuning.only) <= set(trials.best) else 1

    return _briefly(work, parser.prog)


def baselines_command(arguments: Sequence[str]) -> int:
    """Run ``flatmtl baselines``; returns the exit status."""
    from lightning_flatmtl.comparison.single_tasks import baselines  # noqa: PLC0415 # imports this

    parser = _parser("flatmtl baselines", _BASELINES)
    given, further = _parse(parser, arguments)

    def work() -> int:
        try:
            found = baselines(
                given.config,
                *further,
                workers=given.workers,
                launcher=given.launcher,
                output=given.output,
            )
        except RuntimeError as error:
            sys.stderr.write(f"error: {error}\n")
            return 1
        for name, value in found.items():
            sys.stdout.write(f"{name}: {value:.6g}\n")
        return 0

    return _briefly(work, parser.prog)


def methods_command(arguments: Sequence[str]) -> int:
    """Run ``flatmtl methods``; returns the exit status."""
    parser = _Parser("flatmtl methods", description="List the methods that `callbacks` may name.")
    parser.parse_args(arguments)
    sys.stdout.write(methods_table())
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "compare": compare_command,
    "tune": tune_command,
    "baselines": baselines_command,
    "methods": methods_command,
}
"""What the ``flatmtl`` command does beside running a Trainer."""


def _parser(name: str, description: str, what: str = "comparison") -> _Parser:
    parser = _Parser(
        name,
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help=f"the file of the {what}")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="runs side by side (default: 1); Ray decides it",
    )
    parser.add_argument(
        "--launcher",
        choices=["local", "ray"],
        default="local",
        help="where runs are executed: on this machine, or on a Ray cluster",
    )
    parser.add_argument("--output", metavar="FOLDER", help="another folder than the file's")
    return parser


def _parse(parser: _Parser, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    given, further = parser.parse_known_args(arguments)
    for word in further:
        if not word.startswith("--") or word in {"--help", "-h"}:
            parser.error(
                f"unrecognized argument: {word}. Write arguments of `flatmtl fit` with an equals "
                "sign, such as --trainer.max_epochs=2."
            )
    if given.workers < 1:
        parser.error(f"argument --workers: must be at least 1, got {given.workers}")
    return given, further


def _run(comparison: Comparison, workers: int, launcher: str) -> int:
    try:
        results = comparison.run(workers, launcher)  # type: ignore[arg-type] # argparse's choices
    except KeyboardInterrupt:
        _say_interrupted(comparison.output)
        return 130
    print_table(results.markdown)
    sys.stdout.write(f"Written to {comparison.output}/\n")
    sys.stdout.writelines(f"{remark}\n" for remark in results.remarks)
    return 1 if any(job.state is State.FAILED for job in comparison.chosen) else 0


def _say_interrupted(output: Path) -> None:
    sys.stderr.write(f"\nInterrupted. What is done is in {output}; the same command goes on.\n")


def _print_search(tuning: "Tuning", given: argparse.Namespace, further: Sequence[str]) -> None:
    """Budgets and spaces as comments; the commands that share the work as lines."""
    begun = tuning.begun()
    output = [] if given.output is None else ["--output", given.output]
    for method in tuning.methods:
        if method.name not in tuning.only:
            continue
        done, budget = begun[method.name], tuning.budget(method.name)
        sys.stderr.write(f"# {method.name}: {min(done, budget)} of {budget} trials begun\n")
        for name, space in method.spaces.items():
            sys.stderr.write(f"#   {name}: {space.setting}\n")
        words = ["flatmtl", "tune", "--config", given.config, "--only", method.name]
        sys.stdout.write(f"{shlex.join([*words, *output, *further])}\n")


def _print_lines(comparison: Comparison) -> None:
    for job in comparison.chosen:
        if job.state is not State.DONE:
            sys.stdout.write(f"{line(job.folder)}\n")
    sys.stderr.write(
        "# When these are done, the same command without --dry_run writes the table.\n"
    )


def _briefly(work: Callable[[], int], name: str) -> int:
    """Do it; what is wrong with the settings is said in one line."""
    try:
        return work()
    except _REFUSED as error:
        if in_full():
            raise
        refuse_briefly(str(error), name)
