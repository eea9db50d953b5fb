"""The methods that a configuration may name, as a table."""

import inspect
import re
import textwrap

__all__ = ["methods_table"]

_WIDTH = 100


def methods_table() -> str:
    """Names and what they are, in a text for the terminal."""
    from lightning_flatmtl import TaskSAM, aggregators  # noqa: PLC0415 # heavy
    from lightning_flatmtl.aggregators._base import LossWeighting  # noqa: PLC0415

    classes = [getattr(aggregators, name) for name in aggregators.__all__]
    leaves = [c for c in classes if inspect.isclass(c) and not inspect.isabstract(c)]
    leaves.sort(key=lambda c: c.__name__.lower())
    losses = [c for c in leaves if issubclass(c, LossWeighting)]
    gradients = [c for c in leaves if c not in losses]
    groups: dict[str, list[type]] = {
        "Flatness, beside any of the others or alone": [TaskSAM],
        "Aggregators of task gradients": gradients,
        "Weightings of the losses": losses,
    }
    width = max(len(c.__name__) for c in leaves) + 2
    text = "".join(f"{title}:\n{_lines(group, width)}\n" for title, group in groups.items())
    return text + (
        "A Trainer takes at most one aggregator and one TaskSAM. All arguments of one:\n"
        "  flatmtl fit --trainer.callbacks.help=CAGrad\n"
    )


def _lines(classes: list[type], width: int) -> str:
    found = []
    for each in classes:
        said = _first_sentence(each)
        shown = textwrap.wrap(said, _WIDTH - width - 2) or [""]
        found.append(f"  {each.__name__:<{width}}{shown[0]}\n")
        found += [f"  {'':<{width}}{line}\n" for line in shown[1:]]
    return "".join(found)


def _first_sentence(each: type) -> str:
    said = (inspect.getdoc(each) or "").partition("\n\n")[0]
    plain = re.sub(r":\w+:|\s*<[^>]*>`?_|`", "", said)  # roles, links, quotes
    return " ".join(plain.split())
