"""One launch for each number of processes, whose findings all tests share."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from tests.ddp.cases import MODULES, Failed
from tests.ddp.launch import results

Runs = Callable[[int, str], list[Any]]
FOUND = "found.pt"
LIMIT = 800.0  # seconds for all cases of a launch; on two quiet cores it takes about 90


def _launched(folder: Path, modules: list[str]) -> dict[int, list[dict[str, Any]]]:
    """By number of processes: what each of them has found."""
    (folder / MODULES).write_text("\n".join(modules))
    found: dict[int, list[dict[str, Any]]] = {}

    def start(size: int) -> None:
        found[size] = results("tests.ddp.cases:everything", size, folder, LIMIT)

    start(2)  # it writes checkpoints that the others go on from
    with ThreadPoolExecutor() as pool:
        list(pool.map(start, (1, 3)))
    return found


@pytest.fixture(scope="session")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What a case has found in each process of a group of that size."""
    asked = {item.module.__name__ for item in request.session.items}
    named = sorted(name for name in asked if name.startswith("tests.ddp."))
    if "PYTEST_XDIST_WORKER" not in os.environ:
        found = _launched(tmp_path_factory.mktemp("ddp"), named)
    else:  # all workers share one launch; who comes later waits for it
        folder = tmp_path_factory.getbasetemp().parent / "ddp"
        folder.mkdir(exist_ok=True)
        with FileLock(folder / "lock"):
            if not (folder / FOUND).exists():
                torch.save(_launched(folder, named), folder / FOUND)
        found = torch.load(folder / FOUND, weights_only=False)

    def of_case(size: int, name: str) -> list[Any]:
        of_ranks = [of_rank[name] for of_rank in found[size]]
        for rank, value in enumerate(of_ranks):
            assert not isinstance(value, Failed), f"process {rank} of {size}: {value.words}"
        return of_ranks

    return of_case


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test waits for all launches."""
    for item in items:
        if item.get_closest_marker("ddp"):
            item.add_marker(pytest.mark.timeout(1800))
