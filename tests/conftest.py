"""Settings of all tests."""

import pytest
import torch

# Nets of a few hundred parameters gain nothing from threads and lose much to busy neighbours.
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several workers (`-n 2 --dist loadgroup`) a file stays in one of them.

    What a file's tests share is then made once; so is what all of `tests/ddp` share.
    """
    for item in items:
        ddp = item.nodeid.startswith("tests/ddp/")
        item.add_marker(pytest.mark.xdist_group("ddp" if ddp else item.path.stem))
