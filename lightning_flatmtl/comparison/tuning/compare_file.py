"""The best settings as a file of ``flatmtl compare``."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from lightning_flatmtl import __version__
from lightning_flatmtl.comparison.files import write_whole
from lightning_flatmtl.comparison.tuning.display import shown
from lightning_flatmtl.comparison.tuning.plan import Searched
from lightning_flatmtl.comparison.tuning.results import Best
from lightning_flatmtl.comparison.tuning.settings import TuneSettings

__all__ = ["write_compare"]


def write_compare(
    path: Path,
    settings: TuneSettings,
    direction: str,
    best: Mapping[str, tuple[Searched, Best | None]],
) -> None:
    """Write each method with its best arguments, and say in comments where they come from.

    Args:
        path: The file.
        settings: The search.
        direction: ``"minimize"`` or ``"maximize"``.
        best: Each method and its best trial; a method without one is left out.
    """
    runs = settings.runs
    lines = [
        f"# The best of {settings.trials} trials a method by {settings.metric} ({direction}), as",
        f"# `flatmtl tune` of version {__version__} found them.",
        "#",
        f"#   flatmtl compare --config {os.path.relpath(path)} --workers 2",
        "#",
    ]
    methods: dict[str, Any] = {}
    for name, (method, found) in best.items():
        if found is None:
            lines.append(f"# {name}: left out, no trial is complete")
            continue
        values = f": {shown(found.arguments)}" if found.arguments else ", nothing to search"
        lines.append(f"# {name}: trial {found.trial}, {settings.metric} {found.value:.6g}{values}")
        methods[name] = _method(method, found, runs.method_arguments.get(name, ()))
    content = {
        "config": [os.path.relpath(file, path.parent) for file in runs.config],
        "methods": methods,
        **(settings.compare or {}),
    }
    if runs.arguments:
        content["arguments"] = _mapping(runs.arguments)
    if "resources" not in content and runs.resources.cpu is not None:
        content["resources"] = {"cpu": runs.resources.cpu}
    if runs.resources.gpu is not None:
        content.setdefault("resources", {})["gpu"] = runs.resources.gpu
    text = yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=100)
    write_whole(path, "\n".join(lines) + "\n" + text)


def _method(method: Searched, found: Best, words: Sequence[str]) -> Any:
    callbacks, arguments = method.placed(found.arguments)
    arguments = {**_mapping(words), **arguments}
    return {"callbacks": callbacks, "arguments": arguments} if arguments else callbacks


def _mapping(words: Sequence[str]) -> dict[str, Any]:
    """The arguments that words such as ``--trainer.max_epochs=2`` stand for."""
    pairs = [word.removeprefix("--").partition("=") for word in words]
    return {key: yaml.safe_load(value) for key, _, value in pairs}


class _Dumper(yaml.SafeDumper):
    """Every value in full, also where it comes twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
