"""A changed function in the place of the one that is loaded: no file is written."""

import ast
import gc
import sys
from pathlib import Path
from types import CodeType, FunctionType

from tests.mutation.changes import PACKAGE, ROOT, Mutation, module_code


class NotLoadedError(Exception):
    """What is changed is not there in a form that can be changed."""


def put_in(mutation: Mutation) -> None:
    """Let this process run the changed code.

    Raises:
        NotLoadedError: If no loaded function or value is concerned.
    """
    module = sys.modules[".".join(mutation.path.with_suffix("").parts)]
    original = module_code(ast.parse((ROOT / mutation.path).read_text("utf-8")), mutation.path)
    changed = mutation.code()
    if mutation.place.in_function:
        put = _swap_functions(mutation.path, dict(_pairs(original, changed)))
    else:
        put = _set_values(vars(module), changed)
    if not put:
        raise NotLoadedError(f"Nothing loaded runs {mutation}.")


def _pairs(old: CodeType, new: CodeType) -> list[tuple[CodeType, CodeType]]:
    """The code of every function that differs, with that in its place."""
    if old == new:
        return []
    inner_old = [c for c in old.co_consts if isinstance(c, CodeType)]
    inner_new = [c for c in new.co_consts if isinstance(c, CodeType)]
    pairs = [(old, new)]
    for a, b in zip(inner_old, inner_new, strict=False):
        if a.co_qualname == b.co_qualname:
            pairs += _pairs(a, b)
    return pairs


def _swap_functions(path: Path, pairs: dict[CodeType, CodeType]) -> bool:
    name, put = str(ROOT / path), False
    for function in gc.get_objects():
        if isinstance(function, FunctionType) and function.__code__.co_filename == name:
            new = pairs.get(function.__code__)
            if new is not None and new.co_freevars == function.__code__.co_freevars:
                function.__code__, put = new, True
    return put


def _set_values(namespace: dict[str, object], changed: CodeType) -> bool:
    """A module's plain values, in every module of the package that has them too."""
    fresh = {k: v for k, v in namespace.items() if k.startswith("__")}
    exec(changed, fresh)
    put = False
    for name, new in fresh.items():
        old = namespace.get(name)
        if name.startswith("__") or not _plain(old) or new == old:
            continue
        for other in [m for n, m in sys.modules.items() if n.partition(".")[0] == PACKAGE]:
            if name in vars(other) and vars(other)[name] is old:
                setattr(other, name, new)
                put = True
    return put


def _plain(value: object) -> bool:
    return isinstance(value, int | float | str | tuple | frozenset | set | dict)
