"""The small faults: what may be changed in a file, and the code that comes of it."""

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType

ROOT = Path(__file__).parent.parent.parent
PACKAGE = "lightning_flatmtl"

OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}

FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Place:
    """A node that may be changed."""

    number: int  # in the order of ast.walk
    lines: range  # from the statement's first line to the node's last one
    in_function: bool
    remembered: bool  # the function is a cached one: only its first caller runs it


@dataclass(frozen=True)
class Mutation:
    """One change of one file."""

    path: Path  # relative to the root
    place: Place
    line: int
    kind: str
    change: str
    apply: Callable[[ast.AST], ast.AST] = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.kind}: {self.change}"

    @property
    def part(self) -> str:
        """``"functional"`` or ``"engine"``."""
        return self.path.parts[1]

    @property
    def folder(self) -> str:
        """The folder within the package."""
        return "/".join(self.path.parts[1:-1])

    def code(self) -> CodeType:
        """The changed module, compiled."""
        tree = ast.parse((ROOT / self.path).read_text("utf-8"))
        _replace(tree, self.place.number, self.apply)
        return module_code(tree, self.path)


Change = tuple[str, Callable[[ast.AST], ast.AST]]


def changes(node: ast.AST) -> Iterator[Change]:
    """What may be done to a node, each a function of a copy of it."""
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in OPERATORS:
        yield "operator", lambda n: _with(n, op=OPERATORS[type(n.op)]())
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        yield "comparison", lambda n: _with(n, ops=[OPERATORS[type(n.ops[0])](), *n.ops[1:]])
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        yield "condition", lambda n: _with(n, test=ast.UnaryOp(ast.Not(), n.test))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield "sign", lambda n: n.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant", lambda n: ast.Constant(not n.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield "constant", lambda n: ast.Constant(n.value + 1)
    call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    if call or isinstance(node, ast.AugAssign | ast.Raise):
        # Never run rather than removed: a function keeps the variables it closes over.
        yield "dropped", lambda n: ast.If(ast.Constant(False), [n], [])


def _with(node: ast.AST, **fields: object) -> ast.AST:
    for name, value in fields.items():
        setattr(node, name, value)
    return node


def mutations(path: Path) -> Iterator[Mutation]:
    """All mutations of a file, given relative to the root."""
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    nodes = list(ast.walk(tree))
    numbers = {id(node): number for number, node in enumerate(nodes)}
    for place in _places(tree, numbers):
        node = nodes[place.number]
        for kind, apply in changes(node):
            before = ast.unparse(node).splitlines()[0]
            after = ast.unparse(ast.fix_missing_locations(apply(copy.deepcopy(node))))
            after = "(dropped)" if kind == "dropped" else after.splitlines()[0]
            line = getattr(node, "lineno", place.lines[0])
            yield Mutation(path, place, line, kind, f"{before}  ->  {after}", apply)


def module_code(tree: ast.Module, path: Path) -> CodeType:
    """The compiled module."""
    return compile(ast.fix_missing_locations(tree), str(ROOT / path), "exec", dont_inherit=True)


def _replace(tree: ast.Module, number: int, apply: Callable[[ast.AST], ast.AST]) -> None:
    target = list(ast.walk(tree))[number]
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            if value is target:
                setattr(parent, name, ast.copy_location(apply(target), target))
                return
            if isinstance(value, list) and any(child is target for child in value):
                index = next(i for i, child in enumerate(value) if child is target)
                value[index] = ast.copy_location(apply(target), target)
                return


def _places(tree: ast.Module, numbers: dict[int, int]) -> Iterator[Place]:
    """The nodes that may be changed: in functions, and in values that a module sets.

    Types, defaults of arguments and messages of errors are no behaviour that a test should pin
    down; what runs when a class or a decorated function is made cannot be changed afterwards.
    """

    def visit(node: ast.AST, first: int, in_function: bool, remembered: bool) -> Iterator[Place]:
        if isinstance(node, ast.stmt):
            first = node.lineno
        if isinstance(node, ast.expr | ast.stmt):
            last = node.end_lineno if isinstance(node, ast.expr) else first
            lines = range(first, (last or first) + 1)
            yield Place(numbers[id(node)], lines, in_function, remembered)
        if isinstance(node, FUNCTIONS):
            cached = any("cache" in ast.unparse(d) for d in node.decorator_list)
            in_function, remembered = True, remembered or cached
        for child in _inside(node):
            yield from visit(child, first, in_function, remembered)

    for statement in tree.body:
        if isinstance(statement, FUNCTIONS | ast.ClassDef | ast.Assign | ast.AnnAssign):
            yield from visit(statement, 1, False, False)


def _inside(node: ast.AST) -> list[ast.AST]:
    """The parts of a node that may be changed."""
    if isinstance(node, ast.Raise | ast.JoinedStr):
        return []
    if isinstance(node, FUNCTIONS):
        return list(node.body)
    if isinstance(node, ast.ClassDef):
        return [statement for statement in node.body if isinstance(statement, FUNCTIONS)]
    if isinstance(node, ast.AnnAssign):
        return [node.value] if node.value else []
    return [c for c in ast.iter_child_nodes(node) if not isinstance(c, ast.arguments)]
