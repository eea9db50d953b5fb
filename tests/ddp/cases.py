"""What the processes of one launch do, one case after the other: starting them is the slow part."""

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.distributed as dist

from tests.ddp.launch import free_port
from tests.ddp.worker import Place

MODULES = "modules.txt"
"""The file, in the launch's folder, that names the test modules whose cases are to run."""


@dataclass(frozen=True)
class Case:
    """A function of one process, run in a group of each of these sizes."""

    run: Callable[[Place], Any]
    sizes: tuple[int, ...]


CASES: dict[str, Case] = {}


def case(name: str, run: Callable[[Place], Any], sizes: Iterable[int] = (1, 2, 3)) -> None:
    """Add a case."""
    assert name not in CASES, name
    CASES[name] = Case(run, tuple(sizes))


@dataclass(frozen=True)
class Failed:
    """A case that ended with an error."""

    words: str


class Caught(NamedTuple):
    """An error that a case has waited for."""

    kind: str
    words: str


def caught(function: Callable[[], Any]) -> Caught:
    """The error that ``function`` ends with."""
    try:
        function()
    except Exception as error:
        return Caught(type(error).__name__, str(error))
    raise AssertionError("Expected an error, got none.")


def everything(place: Place) -> dict[str, Any]:
    """All cases of the modules asked for; an error ends its own case only."""
    for module in (place.folder / MODULES).read_text().split():
        importlib.import_module(module)
    found: dict[str, Any] = {}
    for i, (name, of_name) in enumerate(CASES.items()):
        if place.size not in of_name.sizes:
            continue
        begin = time.monotonic()
        try:
            found[name] = of_name.run(place)
        except Exception:
            found[name] = Failed(traceback.format_exc())
        if any(_exchanged(place, f"broken_{i}", isinstance(found[name], Failed | Caught))):
            _meet_again(place, f"port_{i}")
        sys.stdout.write(f"{name}: {time.monotonic() - begin:.2f} s\n")
        sys.stdout.flush()
    return found


def _exchanged(place: Place, name: str, value: Any) -> list[Any]:
    """What all processes say, by files: their connections may be broken."""
    paths = [place.folder / f"{name}_{place.size}_{rank}" for rank in range(place.size)]
    part = paths[place.rank].with_suffix(".part")
    part.write_text(json.dumps(value))
    part.rename(paths[place.rank])
    while not all(path.exists() for path in paths):  # the launch has a limit of its own
        time.sleep(0.001)
    return [json.loads(path.read_text()) for path in paths]


def _meet_again(place: Place, name: str) -> None:
    """Connect anew after an error, which may have left some in the middle of something."""
    if dist.is_initialized():
        dist.destroy_process_group()
    ports = _exchanged(place, name, free_port())
    os.environ["MASTER_PORT"] = str(ports[0])
