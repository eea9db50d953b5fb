"""The package face is lazy, and the mathematics needs no Lightning."""

import ast
import pickle
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import lightning_flatmtl
from tests.test_docs import public_modules

PACKAGE = Path(lightning_flatmtl.__file__).parent

PURE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {
            "lightning", "lightning_fabric", "pytorch_lightning", "torchmetrics", "torchvision"
        }:
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Blocked())

import lightning_flatmtl
assert {"MultiTaskModule", "engine", "__version__"} <= set(dir(lightning_flatmtl))
assert "torch" not in sys.modules

import torch
from lightning_flatmtl.functional import *
K = torch.tensor([[4.0, -1.0], [-1.0, 1.0]])
for solve in (min_norm_weights, nash_weights, upgrad_weights, imtl_g_weights):
    assert solve(K).isfinite().all()
assert conflict_rate(K) == 1
assert delta_m({"loss": 3.0}, {"loss": 2.0}, {"loss": False}) == -50
L = torch.tensor([1.0, 3.0])
assert famo_weights(softmax_weights([0.0, 0.0]), L).tolist() == [0.75, 0.25]
assert graddrop_direction(K, torch.rand(2)).shape == (2,)

from torch import nn
from lightning_flatmtl.engine import MultiTaskStep, Sharpness, WholePasses, gram_matrix
net = nn.Linear(2, 2)
def losses():
    out = net(torch.ones(1, 2))
    return {"a": out[:, 0].square().sum(), "b": out[:, 1].square().sum()}
result = MultiTaskStep()(net, WholePasses(losses, net), sharpness=Sharpness(rho_shared=0.1))
result.loss.backward()
assert net.weight.grad.abs().sum() > 0
assert torch.equal(gram_matrix(torch.eye(2)), torch.eye(2, dtype=torch.float64))
"""


def test_the_mathematics_runs_where_lightning_is_absent() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PURE],
        cwd=PACKAGE.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", sorted(public_modules()))
def test_every_public_module_is_reached_through_the_face(module: str) -> None:
    _, _, name = module.partition(".")
    if name:
        assert lightning_flatmtl.__getattr__(name) is import_module(module)
        assert name in dir(lightning_flatmtl)


def test_the_face_shows_type_checkers_what_it_gives() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    shown = {
        alias.name: getattr(import_module(str(node.module)), alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(shown) | {"__version__"} == set(lightning_flatmtl.__all__)
    assert all(getattr(lightning_flatmtl, name) is value for name, value in shown.items())


def test_a_misspelt_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="'lightning_flatmtl' has no attribute 'TaskSAN'"):
        lightning_flatmtl.TaskSAN  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'aggregator'"):
        from lightning_flatmtl import aggregator  # noqa: F401


def test_what_comes_from_the_face_is_pickled() -> None:
    for name in ("MultiTaskModule", "Task", "TaskSAM"):
        kind = getattr(lightning_flatmtl, name)
        assert pickle.loads(pickle.dumps(kind)) is kind
    copy = pickle.loads(pickle.dumps(lightning_flatmtl.TaskSAM(rho_shared=0.2)))
    assert repr(copy) == repr(lightning_flatmtl.TaskSAM(rho_shared=0.2))


def imported(file: Path) -> Iterator[str]:
    """The modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            yield str(node.module)


def test_every_aggregator_takes_its_mathematics_from_functional() -> None:
    files = [file for file in (PACKAGE / "aggregators").glob("*.py") if file.stem[0] != "_"]
    without = {
        file.stem for file in files if "lightning_flatmtl.functional" not in {*imported(file)}
    }
    # The weights are given, and the library's own; the others are made of other aggregators.
    made_of_others = {"by_group", "composition", "moving_average"}
    assert without == {"linear_scalarization", "torchjd", *made_of_others}


@pytest.mark.parametrize("room", ["functional", "engine"])
def test_the_pure_rooms_import_nothing_of_the_others(room: str) -> None:
    own = f"lightning_flatmtl.{room}"
    outside = {"torch", "numpy", "typing_extensions"} | sys.stdlib_module_names
    for file in (PACKAGE / room).rglob("*.py"):
        for module in imported(file):
            inside = module == own or module.startswith(f"{own}.")
            assert inside or module.partition(".")[0] in outside, f"{file} imports {module}"
