"""Small faults, put in one at a time: do the tests see them?

    python -m tests.mutation [--sample 100] [--seed 0] [--minutes 20] [FILE ...]

Every mutation swaps an operator or a comparison, moves a constant, negates a condition, or drops a
statement of a file of ``functional`` or ``engine``, in a copy of the repository. The nearest tests
are run first, those around them if the nearest notice nothing. A mutation that no test notices has
survived: the tests do not look there, or it changes nothing that matters (a bound of a loop that
has converged, a message, a faster path to the same numbers).

Files that only several processes run are left out; their tests are those of ``tests/ddp``.
"""

import argparse
import ast
import copy
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "lightning_flatmtl"
SEVERAL_PROCESSES = {"processes", "together", "sharded"}
SKIPPED = {"__init__", "errors"}

AROUND = {
    "functional": ["tests/functional", "tests/aggregators/test_contract.py"],
    "engine": [
        "tests/engine",
        "tests/test_weighted_heads.py",
        "tests/test_exact.py",
        "tests/test_partition.py",
        "tests/test_bad_input.py",
        "tests/test_no_leak.py",
    ],
}
NEAREST = {"engine": ["tests/engine", "tests/test_weighted_heads.py"]}

OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


@dataclass(frozen=True)
class Mutation:
    """One change of one file."""

    path: Path
    line: int
    kind: str
    change: str
    source: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.kind}: {self.change}"


Change = tuple[str, Callable[[ast.AST], ast.AST]]


def changes(node: ast.AST) -> Iterator[Change]:
    """What may be done to a node, each a function of a copy of it."""
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in OPERATORS:
        yield "operator", lambda n: _with(n, op=OPERATORS[type(n.op)]())
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        yield "comparison", lambda n: _with(n, ops=[OPERATORS[type(n.ops[0])](), *n.ops[1:]])
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        yield "condition", lambda n: _with(n, test=ast.UnaryOp(ast.Not(), n.test))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield "sign", lambda n: n.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant", lambda n: ast.Constant(not n.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield "constant", lambda n: ast.Constant(n.value + 1)
    call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    if call or isinstance(node, ast.AugAssign | ast.Raise):
        yield "dropped", lambda _: ast.Pass()


def _with(node: ast.AST, **fields: object) -> ast.AST:
    for name, value in fields.items():
        setattr(node, name, value)
    return node


class _Replace(ast.NodeTransformer):
    """Changes the node with a number, in the order in which the nodes are visited."""

    def __init__(self, number: int, change: Callable[[ast.AST], ast.AST]) -> None:
        self.number, self.change, self.seen = number, change, -1

    def visit(self, node: ast.AST) -> ast.AST:
        self.seen += 1
        if self.seen == self.number:
            return self.change(node)
        return self.generic_visit(node)


class _Numbered(ast.NodeVisitor):
    """The nodes by their numbers, without annotations and the arguments' declarations."""

    def __init__(self) -> None:
        self.seen = -1
        self.nodes: list[tuple[int, ast.AST]] = []
        self.quiet = 0

    def visit(self, node: ast.AST) -> None:
        self.seen += 1
        if not self.quiet:
            self.nodes.append((self.seen, node))
        # Types, and messages of errors, are no behaviour that a test should pin down.
        quiet = isinstance(
            node, ast.arguments | ast.arg | ast.AnnAssign | ast.Raise | ast.JoinedStr
        )
        self.quiet += quiet
        self.generic_visit(node)
        self.quiet -= quiet


def mutations(path: Path) -> Iterator[Mutation]:
    """All mutations of a file, given relative to the root."""
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    numbered = _Numbered()
    numbered.visit(tree)
    for number, node in numbered.nodes:
        for kind, change in changes(node):
            mutant = _Replace(number, change).visit(copy.deepcopy(tree))
            source = ast.unparse(ast.fix_missing_locations(mutant))
            before = ast.unparse(node).splitlines()[0]
            after = ast.unparse(ast.fix_missing_locations(change(copy.deepcopy(node))))
            line = getattr(node, "lineno", 0)
            yield Mutation(path, line, kind, f"{before}  ->  {after.splitlines()[0]}", source)


def stages(path: Path) -> list[list[str]]:
    """The tests of a file, the nearest first."""
    package = path.parent.name
    own = Path("tests") / package / f"test_{path.stem.lstrip('_')}.py"
    first = [str(own)] if (ROOT / own).exists() else NEAREST.get(package, [])
    return [stage for stage in (first, AROUND[package]) if stage]


def run(folder: Path, tests: list[str], seconds: float) -> str:
    """``"passed"``, ``"failed"`` or ``"timeout"``; runs in a process that has torch already."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os.chdir(folder)
        sys.path[:] = [str(folder), *(p for p in sys.path if p not in ("", str(ROOT)))]
        for module in [m for m in sys.modules if m.partition(".")[0] in ("tests", PACKAGE)]:
            del sys.modules[module]  # this script is a module of the original's tests
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        import pytest

        arguments = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", *tests]
        os._exit(int(pytest.main(arguments)))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "passed" if status == 0 else "failed"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def survives(mutation: Mutation, folder: Path, seconds: float) -> bool:
    """Whether no test notices."""
    target = folder / mutation.path
    original = target.read_text("utf-8")
    target.write_text(mutation.source, "utf-8")
    try:
        return all(run(folder, tests, seconds) == "passed" for tests in stages(mutation.path))
    finally:
        target.write_text(original, "utf-8")


def files() -> list[Path]:
    """The files of ``functional`` and ``engine`` that one process runs."""
    found = [p for part in ("functional", "engine") for p in (ROOT / PACKAGE / part).glob("*.py")]
    left_out = SEVERAL_PROCESSES | SKIPPED
    return sorted(p.relative_to(ROOT) for p in found if p.stem not in left_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--sample", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60, help="start none after so many")
    parser.add_argument("--seconds", type=float, default=240, help="a run of tests may take")
    arguments = parser.parse_args()
    sys.dont_write_bytecode = True  # a mutant is as old and as long as the original
    every = [m for path in arguments.files or files() for m in mutations(path)]
    chosen = random.Random(arguments.seed).sample(every, min(arguments.sample, len(every)))
    import lightning.pytorch  # noqa: F401 - loaded once, for all processes
    import torchmetrics  # noqa: F401

    tried: Counter[str] = Counter()
    lived: list[Mutation] = []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in (PACKAGE, "tests", "examples", "docs"):
            shutil.copytree(
                ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__")
            )
        shutil.copy(ROOT / "pyproject.toml", folder)
        for tests in AROUND.values():
            if run(folder, tests, 10 * arguments.seconds) != "passed":
                raise SystemExit(f"The tests {tests} do not pass as they are.")
        for mutation in chosen:
            if time.monotonic() - start > 60 * arguments.minutes:
                break
            tried[mutation.path.parent.name] += 1
            if survives(mutation, folder, arguments.seconds):
                lived.append(mutation)
                print(f"survived: {mutation}", flush=True)
            elif sum(tried.values()) % 10 == 0:
                print(f"{sum(tried.values())} tried, {len(lived)} survived", flush=True)
    count = sum(tried.values())
    print(f"{len(every)} mutations, seed {arguments.seed}, tried {count}: {dict(tried)}")
    print(f"killed {count - len(lived)} = {100 * (1 - len(lived) / max(count, 1)):.1f} %")
    for mutation in sorted(lived, key=str):
        print(f"  {mutation}")


if __name__ == "__main__":
    main()
