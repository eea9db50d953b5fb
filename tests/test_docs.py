"""Everything public has its place in the documentation."""

import importlib
import pkgutil
import re
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

import lightning_flatmtl
from lightning_flatmtl import aggregators

ROOT = "lightning_flatmtl"
DOCS = Path(__file__).parent.parent / "docs"

# `.. autoclass:: lightning_flatmtl.Task`, and what has no docstring to read: `.. py:data:: ...`.
DIRECTIVE = re.compile(r"^\s*\.\. (?:auto\w+|py:\w+):: ([\w.]+)$", re.MULTILINE)

BASES = {"Aggregator", "GramAggregator", "LossWeighting"}

METHODS = sorted(page for page in (DOCS / "methods").glob("*.md") if page.stem != "index")

# `**{py:class}`~lightning_flatmtl.aggregators.MGDA`** takes ...` opens a method's part of its page.
INTRODUCED = re.compile(
    r"^\*\*{py:class}`~lightning_flatmtl\.aggregators\.(\w+)`\*\*", re.MULTILINE
)


def documented() -> set[str]:
    """Full names that a directive of an API page documents."""
    pages = sorted((DOCS / "api").glob("*.md"))
    return {name for page in pages for name in DIRECTIVE.findall(page.read_text("utf-8"))}


def public_modules() -> Iterator[str]:
    """The package and everything directly in it that does not begin with an underscore."""
    yield ROOT
    for module in pkgutil.iter_modules(lightning_flatmtl.__path__):
        if not module.name.startswith("_"):
            yield f"{ROOT}.{module.name}"


@pytest.mark.parametrize("module", list(public_modules()))
def test_every_public_name_is_documented(module: str) -> None:
    names = importlib.import_module(module).__all__
    root = set(lightning_flatmtl.__all__)
    known = documented()
    # What the package itself offers is documented there, wherever it is defined.
    missing = [
        name
        for name in names
        if f"{module}.{name}" not in known and not (name in root and f"{ROOT}.{name}" in known)
    ]
    assert not missing, f"add a directive for {missing} of {module} to a page of docs/api"


def test_every_documented_name_exists() -> None:
    for full in documented():
        module, _, name = full.rpartition(".")
        assert hasattr(importlib.import_module(module), name), full


def listed_below(page: Path) -> set[Path]:
    """The pages of a page's toctree, and of theirs."""
    found: set[Path] = set()
    for toctree in re.findall(r"```{toctree}\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
        for line in toctree.split("\n"):
            if line and not line.startswith(":"):
                other = (page.parent / f"{line}.md").resolve()
                found |= {other} | listed_below(other)
    return found


def test_every_page_is_reachable() -> None:
    included = re.compile(r"```{include} (\S+)")
    parts = {
        (page.parent / name).resolve()
        for page in DOCS.rglob("*.md")
        for name in included.findall(page.read_text("utf-8"))
    }
    index = (DOCS / "index.md").resolve()
    pages = {page.resolve() for page in DOCS.rglob("*.md")} - {index} - parts
    assert pages == listed_below(index)


def introduced(page: Path) -> list[str]:
    return INTRODUCED.findall(page.read_text("utf-8"))


def test_every_aggregator_has_one_page() -> None:
    count = Counter(name for page in METHODS for name in introduced(page))
    assert count == Counter(set(aggregators.__all__) - BASES)


def test_every_aggregator_has_a_row_that_links_to_its_page() -> None:
    page = (DOCS / "methods" / "index.md").read_text("utf-8")
    rows = set(re.findall(r"^\| \[(\w+)\]\((\w+)\.md\) \|", page, re.MULTILINE))
    assert rows == {(name, page.stem) for page in METHODS for name in introduced(page)}


@pytest.mark.parametrize("page", METHODS, ids=lambda page: page.stem)
def test_every_method_shows_a_matrix_and_a_line_of_yaml(page: Path) -> None:
    text, names = page.read_text("utf-8"), introduced(page)
    assert "```{doctest}\n" in text
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (callback,) = yaml.safe_load(block)
    assert callback["class_path"] in names
    if "TorchJD" in names and find_spec("torchjd") is None:
        pytest.skip("TorchJD is not installed")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=aggregators.Aggregator)
    # Older versions of jsonargparse have the longer name only.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    built = instantiate(parser.parse_object({"callback": callback})).callback
    assert type(built).__name__ == callback["class_path"]
