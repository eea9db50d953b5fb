"""The direction from the Gram matrix alone is that of the rows, in less memory."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from lightning_flatmtl.aggregators import MGDA, CAGrad, GradDrop, LinearScalarization, UPGrad
from lightning_flatmtl.engine import (
    ComposedPasses,
    MultiTaskStep,
    NonFiniteError,
    Sharpness,
    StepResult,
)
from lightning_flatmtl.engine.gradients import without_matrix
from tests import naive
from tests.aggregators.specs import SPECS

TASKS = ("a", "b", "c")
N = 20


class Trunk(nn.Module):
    """Four layers of which ``kind`` says how they are used."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Linear(N, N, bias=False)  # normalised away
        self.second, self.third, self.fourth = (nn.Linear(N, N) for _ in range(3))
        self.norm = nn.BatchNorm1d(N)
        if kind == "frozen":
            self.second.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).tanh()
        if self.kind == "residual":
            x = x + self.third(self.second(x).relu_())
        elif self.kind == "tied":
            x = self.third(self.second(self.third(x).tanh())).tanh()
        elif self.kind == "checkpoint":
            x = checkpoint(lambda x: self.third(self.second(x).tanh()), x, use_reentrant=False)
        else:
            x = self.third(self.second(x).tanh())
        return self.fourth(x.tanh())


class Net(nn.Module):
    def __init__(self, kind: str = "chain") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = Trunk(kind)
        self.neck = nn.Linear(N, N)
        self.spare = nn.Linear(2, 2)
        self.heads = nn.ModuleDict({task: nn.Linear(N, 2) for task in TASKS})
        self.double()

    def forward(self, x: Tensor, task: str) -> Tensor:
        return self.loss(task, self.encoder(x))

    def loss(self, task: str, features: Tensor) -> Tensor:
        if self.encoder.kind == "some share" and task != "a":
            features = self.neck(features).tanh()  # shared by two of the three
        return nn.functional.mse_loss(self.heads[task](features), Y[TASKS.index(task)])


X = torch.randn(4, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.randn(3, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
KINDS = ("chain", "residual", "tied", "checkpoint", "frozen", "some share")


def passes(net: Net, loss: Callable | None = None, without: bool = True) -> ComposedPasses:
    x = X.to(next(net.parameters()).dtype)
    found = ComposedPasses(
        net.encoder,
        lambda task, features, _: (loss or net.loss)(task, features),
        dict.fromkeys(TASKS, x),
        net,
    )
    found.without_matrix = without
    return found


def step(net: Net, aggregator: object, without: bool = True, **settings) -> StepResult:
    net.zero_grad()
    loss = settings.pop("loss", None)
    penalty = settings.pop("penalty", None)
    made = passes(net, loss, without)
    made.penalty = penalty
    torch.manual_seed(7)
    result = MultiTaskStep()(net, made, aggregator, **settings)
    result.loss.backward()
    return result


def gradients(net: nn.Module) -> dict[str, Tensor | None]:
    return {n: None if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}


def assert_same(net: Net, expected: dict[str, Tensor | None], tolerance: float = 1e-10) -> None:
    for name, found in gradients(net).items():
        wanted = expected[name]
        if wanted is None:
            assert found is None, name
        else:
            assert (found - wanted).norm() <= tolerance * wanted.norm(), name


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of columns of all rows that the step had at a time."""
    seen: list[int] = []
    whole = without_matrix.gram_matrix

    def noted(rows: Tensor) -> Tensor:
        seen.append(rows.shape[1])
        return whole(rows)

    monkeypatch.setattr(without_matrix, "gram_matrix", noted)
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["MGDA", "MGDA-l2", "UPGrad"])
def test_equals_the_naive_direction(kind: str, name: str, widths: list[int]) -> None:
    net = Net(kind)
    shared = [n for n, p in net.named_parameters() if n.startswith("encoder.") and p.requires_grad]
    if kind == "some share":
        shared += ["neck.weight", "neck.bias"]
    heads = {t: [f"heads.{t}.weight", f"heads.{t}.bias"] for t in TASKS}

    def loss_of(task: str) -> Callable[[naive.Params], Tensor]:
        def loss(params: naive.Params) -> Tensor:
            state = {**params, **{n: b.clone() for n, b in net.named_buffers()}}
            return functional_call(net, state, (X, task))

        return loss

    at = {n: p.detach().clone() for n, p in net.named_parameters()}
    make, aggregate = {
        "MGDA": (MGDA, naive.mgda),
        "MGDA-l2": (lambda: MGDA("l2"), naive.mgda_l2),
        "UPGrad": (UPGrad, upgrad),
    }[name]
    expected = naive.f_mtl_gradients({t: loss_of(t) for t in TASKS}, at, shared, heads, aggregate)
    step(net, make())
    for n in [*shared, *(h for head in heads.values() for h in head)]:
        found, wanted = dict(net.named_parameters())[n].grad, expected[n]
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    d = sum(at[n].numel() for n in shared)
    assert sum(widths) == d
    assert max(widths) <= 0.6 * d


def upgrad(rows: Tensor, losses: Tensor) -> Tensor:
    """The mean of the projections of the rows onto the dual cone, by trying all active sets."""
    total = torch.zeros_like(rows[0])
    for row in rows:
        best = row
        if not bool((rows @ row >= -1e-13).all()):
            found = []
            for size in range(1, len(rows) + 1):
                for active in itertools.combinations(range(len(rows)), size):
                    sub = rows[list(active)]
                    v = torch.linalg.lstsq(sub @ sub.T, -(sub @ row)[:, None]).solution[:, 0]
                    point = row + v @ sub
                    if bool((v >= -1e-13).all()) and bool((rows @ point >= -1e-12).all()):
                        found.append(point)
            best = min(found, key=lambda p: float((p - row).norm()))
        total = total + best
    return total / len(rows)


@pytest.mark.parametrize("name", [n for n, s in SPECS.items() if s.make().requires == "gram"])
def test_every_method_gives_what_it_gives_with_the_rows(name: str) -> None:
    net = Net("residual")
    found = {}
    for without in (False, True):
        aggregator = SPECS[name].make()
        net.load_state_dict(Net("residual").state_dict())
        results = [step(net, aggregator, without) for _ in range(2)]  # a state has moved
        found[without] = gradients(net), results[1]
    (expected, rows), (_, gram) = found[False], found[True]
    assert_same(net, expected)
    if SPECS[name].make().needs_gradients:
        torch.testing.assert_close(gram.gram, rows.gram, rtol=1e-10, atol=1e-14)
    assert (gram.dead, gram.zero, gram.losses) == (rows.dead, rows.zero, rows.losses)


@pytest.mark.parametrize("kind", KINDS)
def test_a_penalty_and_a_loss_scale_are_as_with_the_rows(kind: str) -> None:
    net = Net(kind)
    settings = {
        "penalty": lambda: 0.1 * sum(p.square().sum() for p in net.parameters()),
        "scale": torch.tensor(1024.0, dtype=torch.float64),
    }
    for extra in ({"penalty": settings["penalty"]}, {"scale": settings["scale"]}, settings):
        step(net, CAGrad(), without=False, **extra)
        expected = gradients(net)
        step(net, CAGrad(), **extra)
        # A scaled loss has passed through 32 bits.
        assert_same(net, expected, 1e-6 if "scale" in extra else 1e-10)


def test_single_precision_is_as_exact_as_the_rows() -> None:
    exact, net = Net("residual"), Net("residual")
    step(exact, CAGrad(), without=False)
    net.float()
    Y32 = Y.float()

    def loss(task: str, features: Tensor) -> Tensor:
        return nn.functional.mse_loss(net.heads[task](features), Y32[TASKS.index(task)])

    step(net, CAGrad(), loss=loss)
    for p, q in zip(net.parameters(), exact.parameters(), strict=True):
        if q.grad is not None:
            assert (p.grad - q.grad).norm() <= 1e-5 * q.grad.norm() + 1e-7


def test_weights_that_differ_by_the_range_of_the_type() -> None:
    net = Net().float()

    def loss(task: str, features: Tensor) -> Tensor:
        value = net.heads[task](features).square().mean()
        return value * 1e-15 if task == "a" else value

    class Opposite(LinearScalarization):
        needs_gradients = True

        def loss_weights(self, tasks, losses):
            return torch.tensor([1e25, 1.0, -1.0], dtype=torch.float64)

    for without in (False, True):
        step(net, Opposite(), without, loss=loss)
        if not without:
            expected = gradients(net)
    assert_same(net, expected, 1e-5)
    assert all(g.isfinite().all() for g in gradients(net).values() if g is not None)


@pytest.mark.parametrize("where", ["shared", "head"])
def test_what_is_not_finite_names_its_task(where: str) -> None:
    net = Net()

    def loss(task: str, features: Tensor) -> Tensor:
        value = net.loss(task, features)
        if task != "b":
            return value
        zero = features.square().sum() * 0 if where == "shared" else net.heads["b"].bias.sum() * 0
        return value + zero.sqrt()  # zero, with an infinite slope

    with pytest.raises(NonFiniteError, match="task 'b'"):
        step(net, CAGrad(), loss=loss)
    result = step(net, CAGrad(), loss=loss, scale=torch.tensor(2.0))
    assert result.overflow is not None
    assert not net.encoder.first.weight.grad.isfinite().any()


def test_losses_of_zero() -> None:
    net = Net()

    def loss(task: str, features: Tensor) -> Tensor:
        return net.loss(task, features) * (task == "c")

    for without in (False, True):
        result = step(net, CAGrad(), without, loss=loss)
        assert result.zero == ("a", "b")
        assert not result.dead
        if not without:
            expected = gradients(net)
    assert_same(net, expected)
    result = step(net, CAGrad(), loss=lambda task, features: net.loss(task, features) * 0)
    assert result.dead
    assert not net.encoder.first.weight.grad.any()


def test_a_task_that_misses_the_trunk() -> None:
    net = Net()

    def loss(task: str, features: Tensor) -> Tensor:
        return net.loss(task, X if task == "a" else features)

    for without in (False, True):
        step(net, UPGrad(), without, loss=loss)
        if not without:
            expected = gradients(net)
    assert_same(net, expected)


def test_where_nothing_is_saved_the_rows_are_kept(widths: list[int]) -> None:
    net = Net()
    big = torch.randn(500, N, dtype=torch.float64)

    def run(without: bool) -> None:
        net.zero_grad()
        made = ComposedPasses(
            lambda x: net.encoder.first(x).tanh(),
            lambda task, features, _: net.heads[task](features).square().mean(),
            dict.fromkeys(TASKS, big),
            net,
        )
        made.without_matrix = without
        MultiTaskStep()(net, made, CAGrad()).loss.backward()

    run(False)
    expected = gradients(net)
    run(True)
    assert_same(net, expected, 0.0)
    assert widths == []


def test_who_watches_a_step_gets_the_gram_without_the_matrix(widths: list[int]) -> None:
    net, grams = Net(), []
    for without in (False, True):
        engine = MultiTaskStep()
        engine.watched = True
        result = engine(net, passes(net, without=without), LinearScalarization())
        grams.append(result.gram)
        result.loss.backward()
    torch.testing.assert_close(*grams, rtol=1e-10, atol=1e-14)
    assert len(widths) > 1


@pytest.mark.parametrize(
    ("aggregator", "sharpness", "said"),
    [
        (GradDrop(), None, "must look at the Gram matrix only"),
        (CAGrad(), Sharpness(0.1, 0.1), "TaskSAM needs the rows"),
    ],
)
def test_what_needs_the_rows_is_refused(aggregator, sharpness, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        step(Net(), aggregator, sharpness=sharpness)


def test_a_graph_that_hides_parameters_is_refused() -> None:
    net = Net()

    def loss(task: str, features: Tensor) -> Tensor:
        return net.loss(task, checkpoint(net.neck, features, use_reentrant=True))

    with pytest.raises(ValueError, match="use_reentrant=False"):
        step(net, CAGrad(), loss=loss)
