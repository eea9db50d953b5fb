"""Comparisons whose runs are done in the process of the test."""

from pathlib import Path

import pytest

from tests.comparison.project import InProcess


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> InProcess:
    """What `flatmtl compare` starts runs with; commands run in a folder of their own."""
    found = InProcess()
    monkeypatch.setattr("lightning_flatmtl.comparison.comparison.make_launcher", lambda *_: found)
    monkeypatch.setattr(
        "lightning_flatmtl.comparison.tuning.tuning.make_launcher", lambda *_: found
    )
    # Seconds for each comparison; they have tests of their own.
    monkeypatch.setattr("lightning_flatmtl.comparison.comparison.write_figures", lambda *_: ())
    monkeypatch.setattr("lightning_flatmtl.comparison.tuning.tuning.write_figures", lambda *_: ())
    monkeypatch.setattr("sys.argv", ["flatmtl"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.chdir(tmp_path)
    return found
