"""Which test runs which line."""

import os
import pickle
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

from tests.mutation.changes import PACKAGE, ROOT

WATCHED = tuple(str(ROOT / PACKAGE / part) + os.sep for part in ("functional", "engine"))
CALLS = 30  # of a function are looked at: the next ones of the same test run the same lines
KEPT_EVERY = 60.0  # seconds


@dataclass
class Reached:
    """What one test runs, and for how long; no lines if it does not pass."""

    seconds: float
    lines: dict[str, set[int]]  # by file relative to the root


Kept = tuple[dict[str, Reached], set[str]]  # by test; and the modules that they load


def read(file: Path) -> Kept:
    """What is known already."""
    return pickle.loads(file.read_bytes()) if file.exists() else ({}, set())


def measure(items: Sequence[pytest.Item], failed: set[str], file: Path) -> int:
    """Run the tests and add to the file what each of them runs."""
    found, modules = read(file)
    last = time.monotonic()
    for item, following in zip(items, [*items[1:], None], strict=True):
        lines: defaultdict[str, set[int]] = defaultdict(set)
        start = time.monotonic()
        sys.settrace(_tracer(lines))
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        sys.settrace(None)
        passed = {} if item.nodeid in failed else lines
        relative = {os.path.relpath(name, ROOT): seen for name, seen in passed.items()}
        found[item.nodeid] = Reached(time.monotonic() - start, relative)
        if time.monotonic() - last > KEPT_EVERY or following is None:
            kept: Kept = found, modules | set(sys.modules)
            file.write_bytes(pickle.dumps(kept))
            last = time.monotonic()
    return 0


def _tracer(lines: dict[str, set[int]]) -> Callable[[FrameType, str, Any], Any]:
    calls: Counter[CodeType] = Counter()

    def line(frame: FrameType, event: str, _: Any) -> Any:
        lines[frame.f_code.co_filename].add(frame.f_lineno)
        return line

    def call(frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(WATCHED):
            return None
        calls[code] += 1
        return line(frame, event, _) if calls[code] <= CALLS else None

    return call
