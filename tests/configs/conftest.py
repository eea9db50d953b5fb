"""Commands of the tests run in a folder of their own."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning looks at the process's arguments, and calls jsonargparse by its older names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["flatmtl"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
