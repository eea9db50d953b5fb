"""A run ends with the comparison that has started it, even where that is killed."""

import os
import signal
import threading
import time

__all__ = ["PARENT", "end_with_parent"]

PARENT = "FLATMTL_PARENT"
"""In the environment: the process that a run belongs to."""

_EVERY_SECONDS = 0.5


def end_with_parent() -> None:
    """Watch the process that has started this one, if it asks for that, and end with it.

    A comparison that is killed cannot end its runs itself, and they would hold memory and GPUs.
    """
    parent = os.environ.get(PARENT)
    if (
        parent is None or "LOCAL_RANK" in os.environ
    ):  # further processes of a run end with the first
        return
    threading.Thread(target=_watch, args=(int(parent),), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_EVERY_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
