"""Small faults, put in one at a time: do the tests see them?

    python -m tests.mutation [--sample 100] [--seed 0] [--minutes 60] [FILE[:LINE] ...]

Every mutation swaps an operator or a comparison, moves a constant, negates a condition, or drops a
statement of a file of ``functional`` or ``engine``. All tests are loaded once and run once, to see
which test runs which line and how long it takes (``--reach`` keeps that). For each mutation a
forked process puts the changed functions in the place of those loaded; no file is written. It runs
the tests that run the line, the nearest and the shortest first, up to ``--budget`` seconds. A
mutation that no test notices has survived: the tests do not look there, or it changes nothing that
matters (a bound of a loop that has converged, a message, a faster path to the same numbers). A
fault that cannot be put in is left out and counts for nothing.

Before the sample all its tests are run in the same way without a fault. What fails there says
nothing about a fault and is not used; if the process itself ends, nothing is tried.

``--results`` takes one JSON line a mutation as they come; those that it has are not tried again.
Files that only several processes run are left out; their tests are those of ``tests/ddp``.
"""

import argparse
import gc
import json
import os
import random
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import FunctionType

import pytest

from tests.mutation.changes import PACKAGE, ROOT, Mutation, mutations
from tests.mutation.child import TIMEOUT, Failures, control, forked, run
from tests.mutation.reach import Reached, measure, read
from tests.mutation.swap import loaded, put_in

SEVERAL_PROCESSES = {"distributed", "failure", "sharded"}
SKIPPED = {"__init__", "errors"}
NEAR = {
    "functional": ["tests/functional", "tests/aggregators/test_contract.py"],
    "engine": ["tests/engine", "tests/test_weighted_heads.py", "tests/test_exact.py"],
}
LIBRARIES = {"torch", "lightning", "torchmetrics", "numpy", "scipy", "mpmath", PACKAGE}
LEFT_OUT = 3


class Loop:
    """Takes the place of pytest's loop over the tests."""

    def __init__(self, arguments: argparse.Namespace, failures: Failures) -> None:
        self.arguments, self.failures = arguments, failures

    def pytest_configure(self) -> None:
        from hypothesis import Phase, settings

        # Nothing is replayed, kept or made smaller: a failure is enough.
        phases = [Phase.explicit, Phase.generate]
        settings.register_profile("mutation", database=None, deadline=None, phases=phases)
        settings.load_profile("mutation")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items if "tests/ddp" not in item.nodeid}
        reached = reach(list(items.values()), self.failures, self.arguments.reach)
        reached = {test: found for test, found in reached.items() if test in items}
        print(f"{len(reached)} tests, {sum(r.seconds for r in reached.values()):.0f} s", flush=True)
        attempts(items, reached, self.failures, self.arguments)
        return True


def reach(
    items: Sequence[pytest.Item], failures: Failures, keep: Path | None
) -> dict[str, Reached]:
    """What each test runs: measured, if the file does not know it already."""
    with tempfile.TemporaryDirectory() as folder:
        file = keep or Path(folder) / "reach"
        known = read(file)[0]
        missing = [item for item in items if item.nodeid not in known]
        if missing:
            forked(lambda: measure(missing, failures.not_passed, file))
        found, modules = read(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in sorted(modules):  # once, for all processes
            if name.partition(".")[0] in LIBRARIES and name not in sys.modules:
                try:
                    import_module(name)
                except Exception:  # made by a test, or only half of it
                    continue
    return found


def choose(mutation: Mutation, reached: dict[str, Reached], budget: float) -> list[str]:
    """The tests that run the line, the nearest first, of each a few variants at a time."""
    path = str(mutation.path)
    own = f"test_{mutation.path.stem.lstrip('_')}.py"
    lines = set(mutation.place.lines)
    anywhere = mutation.place.remembered or not mutation.place.in_function

    def distance(test: str) -> int:
        if f"/{own}::" in test:
            return 0
        return 1 if test.startswith(tuple(NEAR[mutation.part])) else 2

    running = [
        test
        for test, found in reached.items()
        if path in found.lines and (anywhere or lines & found.lines[path])
    ]
    variants: Counter[str] = Counter()
    order: dict[str, tuple[int, float]] = {}
    for test in sorted(running, key=lambda t: reached[t].seconds):
        name = test.partition("[")[0]
        order[test] = (distance(test) + variants[name] // 3, reached[test].seconds)
        variants[name] += 1
    chosen: list[str] = []
    for test in sorted(order, key=order.__getitem__):
        if budget < reached[test].seconds:
            break
        budget -= reached[test].seconds
        chosen.append(test)
    return chosen


def attempt(
    mutation: Mutation,
    items: Sequence[pytest.Item],
    failures: Failures,
    functions: Sequence[FunctionType],
) -> str:
    """What comes of it; ``"not run"`` where no test does, ``"left out"`` if it cannot be put in."""
    if not items:
        return "not run"

    def work() -> int:
        try:
            put_in(mutation, functions)
        except Exception:  # nothing is known of a fault that was not there
            return LEFT_OUT
        return run(items, failures)

    return {0: "survived", LEFT_OUT: "left out", TIMEOUT: "timeout"}.get(forked(work), "killed")


def sound(
    wanted: set[str],
    items: dict[str, pytest.Item],
    reached: dict[str, Reached],
    failures: Failures,
) -> dict[str, Reached]:
    """What is reached by the tests that pass where no fault is put in.

    Raises:
        SystemExit: If the process that runs them does not come to its end.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "failed"
        tests = [item for test, item in items.items() if test in wanted]
        status = forked(lambda: control(tests, failures, file))
        if status or not file.exists():
            raise SystemExit(f"Without a fault the tests end with the status {status}.")
        failed = set(file.read_text("utf-8").splitlines())
    for test in sorted(failed):
        print(f"fails without a fault, not used: {test}", flush=True)
    print(f"{len(wanted) - len(failed)} tests pass without a fault", flush=True)
    return {test: found for test, found in reached.items() if test not in failed}


def attempts(
    items: dict[str, pytest.Item],
    reached: dict[str, Reached],
    failures: Failures,
    arguments: argparse.Namespace,
) -> None:
    """Try a sample, and print what survives."""
    every = [m for path in arguments.files or files() for m in mutations_of(path)]
    chosen = random.Random(arguments.seed).sample(every, min(arguments.sample, len(every)))
    results = arguments.results or Path(os.devnull)
    done = results.read_text("utf-8").splitlines() if results.exists() else []
    known = {(r["mutation"], r["number"]) for r in map(json.loads, done)}
    chosen = [m for m in chosen if (str(m), m.place.number) not in known]
    functions = loaded()
    wanted = {test for m in chosen for test in choose(m, reached, arguments.budget)}
    reached = sound(wanted, items, reached, failures)
    outcomes: defaultdict[str, Counter[str]] = defaultdict(Counter)
    start = time.monotonic()
    with results.open("a", encoding="utf-8") as file:
        for mutation in chosen:
            if time.monotonic() - start > 60 * arguments.minutes:
                break
            tests = choose(mutation, reached, arguments.budget)
            began = time.monotonic()
            outcome = attempt(mutation, [items[test] for test in tests], failures, functions)
            outcomes[mutation.folder][outcome] += 1
            record = {
                "mutation": str(mutation),
                "number": mutation.place.number,
                "folder": mutation.folder,
                "outcome": outcome,
                "tests": len(tests),
                "seconds": round(time.monotonic() - began, 1),
            }
            file.write(json.dumps(record) + "\n")
            file.flush()
            if outcome != "killed" or arguments.files:
                print(f"{outcome} ({len(tests)} tests): {mutation}", flush=True)
    gc.unfreeze()
    print(f"{len(every)} mutations, seed {arguments.seed}")
    for folder, counts in sorted(outcomes.items()):
        tried = counts.total() - counts["left out"]
        killed = counts["killed"] + counts["timeout"]
        print(
            f"{folder}: {killed} of {tried} killed = {100 * killed / max(tried, 1):.1f} %", end=""
        )
        print(f", {counts['not run']} not run, {counts['left out']} left out")


def mutations_of(file: str) -> list[Mutation]:
    """Those of a file, or of one of its lines."""
    path, _, line = file.partition(":")
    return [m for m in mutations(Path(path)) if not line or m.line == int(line)]


def files() -> list[str]:
    """The files of ``functional`` and ``engine`` that one process runs."""
    parts = (ROOT / PACKAGE / part for part in ("functional", "engine"))
    found = [path for part in parts for path in part.rglob("*.py")]
    left_out = SEVERAL_PROCESSES | SKIPPED
    return sorted(str(p.relative_to(ROOT)) for p in found if p.stem not in left_out)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation")
    parser.add_argument("files", nargs="*", metavar="FILE[:LINE]")
    parser.add_argument("--sample", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60, help="start none after so many")
    parser.add_argument("--budget", type=float, default=60, help="seconds of tests a mutation")
    parser.add_argument("--reach", type=Path, help="keeps which test runs which line")
    parser.add_argument("--results", type=Path, help="one JSON line a mutation")
    parser.add_argument("--tests", nargs="+", default=["tests"], help="what pytest collects")
    arguments = parser.parse_args()
    failures = Failures()
    with tempfile.TemporaryDirectory() as folder:
        options = ["-q", "-s", "--no-header", "--tb=native", "-p", "no:cacheprovider"]
        options += ["--hypothesis-seed=0"]
        options += [f"--basetemp={folder}/tests", "--ignore=tests/ddp", "--ignore=tests/benchmarks"]
        plugins = [failures, Loop(arguments, failures)]
        sys.exit(pytest.main([*options, *arguments.tests], plugins=plugins))


if __name__ == "__main__":
    main()
