"""What the names of test metrics say: of which task they are, and which of them belong together."""

import re
from collections.abc import Iterable, Sequence

from lightning_flatmtl.hosting.names import nearest

__all__ = ["is_loss", "is_share", "label", "named", "task_of", "validation_loss", "without_task"]

_SHARE = re.compile(
    r"(?<![a-z])(acc(uracy)?|balanced|f1(_?score)?|auroc|auc|m?iou|precision|recall|dice|rate|ece)"
    r"(?![a-z])"
)


def named(wanted: Iterable[str], logged: Iterable[str], setting: str = "metrics") -> list[str]:
    """The logged names that are meant: ``left/accuracy`` is ``test/left/accuracy``.

    Raises:
        ValueError: If there is none.
    """
    known = list(dict.fromkeys(logged))
    found = []
    for name in wanted:
        for full in (name, f"test/{name}"):
            if full in known:
                found.append(full)
                break
        else:
            raise ValueError(
                f"`{setting}` must be what the runs log, got '{name}'. "
                f"{nearest(name, [k.removeprefix('test/') for k in known])}They log: "
                f"{', '.join(known)}."
            )
    return found


def task_of(name: str, tasks: Sequence[str]) -> str | None:
    """The task that a metric's name has in it; the longest, if there are several."""
    parts = name.split("/")
    whole = [task for task in tasks if task in parts]
    within = whole or [task for task in tasks if _within(task).search(name)]
    return max(within, key=len, default=None)


def without_task(name: str, task: str) -> str:
    """The name of the same metric of any task."""
    parts = name.removeprefix("test/").split("/")
    if task in parts:
        parts.remove(task)
        return "/".join(parts) or name
    return _within(task).sub("", name).strip("_/-. ")


def is_loss(name: str) -> bool:
    """Whether it is a loss."""
    return name.rpartition("/")[2].endswith("loss")


def is_share(name: str) -> bool:
    """Whether it is a share of one, which people read in percent."""
    return _SHARE.search(name.lower()) is not None


def validation_loss(logged: Iterable[str]) -> str | None:
    """The name of the validation loss, which may be written in many ways."""
    names = [n for n in logged if n.startswith("val") and n.removesuffix("_epoch").endswith("loss")]
    return min(names, key=len, default=None)


def label(name: str) -> str:
    """A name for people."""
    return name.removeprefix("test/").replace("/", " ").replace("_", " ")


def _within(task: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![A-Za-z0-9]){re.escape(task)}(?![A-Za-z0-9])")
