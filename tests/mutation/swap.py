"""A changed function in the place of the one that is loaded: no file is written."""

import ast
import gc
import sys
from collections.abc import Sequence
from types import CodeType, FunctionType

from tests.mutation.changes import PACKAGE, ROOT, Mutation, module_code


class NotLoadedError(Exception):
    """What is changed is not there in a form that can be changed."""


def loaded() -> list[FunctionType]:
    """The functions of the package, and all objects out of the collector's sight.

    A forked process shares what it does not touch: looking for functions there would copy it all.
    """
    gc.collect()
    found = [f for f in gc.get_objects() if type(f) is FunctionType]
    gc.freeze()
    folder = str(ROOT / PACKAGE)
    return [f for f in found if f.__code__.co_filename.startswith(folder)]


def put_in(mutation: Mutation, functions: Sequence[FunctionType]) -> None:
    """Let this process run the changed code.

    Args:
        mutation: What to change.
        functions: Those that are :func:`loaded`.

    Raises:
        NotLoadedError: If no loaded function or value is concerned.
    """
    module = sys.modules[".".join(mutation.path.with_suffix("").parts)]
    original = module_code(ast.parse((ROOT / mutation.path).read_text("utf-8")), mutation.path)
    changed = mutation.code()
    if mutation.place.in_function:
        put = _swap_functions(functions, dict(_pairs(original, changed)))
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


def _swap_functions(functions: Sequence[FunctionType], pairs: dict[CodeType, CodeType]) -> bool:
    put = False
    name = next(iter(pairs)).co_filename if pairs else ""
    for function in functions:
        old = function.__code__
        new = pairs.get(old) if old.co_filename == name else None
        if new is not None and new.co_freevars == old.co_freevars:
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
