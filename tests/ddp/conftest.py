"""One launch for each number of processes, whose findings all tests share."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.ddp.cases import MODULES, Failed
from tests.ddp.launch import results

Runs = Callable[[int, str], list[Any]]
LIMIT = 800.0  # seconds for all cases of a launch; on two quiet cores it takes about 90


@pytest.fixture(scope="session")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What a case has found in each process of a group of that size."""
    folder: Path = tmp_path_factory.mktemp("ddp")
    asked = {item.module.__name__ for item in request.session.items}
    named = sorted(name for name in asked if name.startswith("tests.ddp."))
    (folder / MODULES).write_text("\n".join(named))
    found: dict[int, list[dict[str, Any]]] = {}

    def start(size: int) -> None:
        found[size] = results("tests.ddp.cases:everything", size, folder, LIMIT)

    start(2)  # it writes checkpoints that the others go on from
    with ThreadPoolExecutor() as pool:
        list(pool.map(start, (1, 3)))

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
