"""Several processes with equal shares of a batch train as one process with all of it does."""

from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from typing_extensions import override

from lightning_flatmtl import TaskSAM
from lightning_flatmtl.aggregators import (
    DBMTL,
    FAMO,
    GLS,
    IMTL,
    IMTLG,
    IMTLL,
    LDCMTL,
    MGDA,
    NTKMTL,
    STCH,
    UWSO,
    Aggregator,
    AlignedMTL,
    ByGroup,
    CAGrad,
    Composition,
    ConFIG,
    ConicGrad,
    DynamicWeightAverage,
    ExcessMTL,
    FairGrad,
    GO4Align,
    GradDrop,
    GradNorm,
    GradVac,
    LinearScalarization,
    MoCo,
    MoDo,
    MovingAverage,
    NashMTL,
    PCGrad,
    RandomLossWeighting,
    ScaleInvariant,
    SDMGrad,
    TorchJD,
    UncertaintyWeighting,
    UPGrad,
)
from lightning_flatmtl.engine import TaskGradients
from tests import naive
from tests.ddp.cases import case
from tests.ddp.net import LOSSES, batches, module, share, trunk
from tests.ddp.training import HOSTS, deviation, train
from tests.ddp.worker import Place

pytestmark = pytest.mark.ddp

TOLERANCE = 1e-10


class Whitened(Aggregator):
    """Each entry weighs by its size in its column and by that of the whole matrix."""

    @override
    def aggregate(self, gradients: TaskGradients) -> Tensor:
        rows = gradients.jacobian
        columns = rows.square().sum(0, keepdim=True) + rows.square().mean()
        return (rows / (1 + columns.sqrt())).sum(0)


def from_torchjd() -> Aggregator:
    from torchjd.aggregation import AlignedMTL as Theirs

    return TorchJD(Theirs())


def weighting_from_torchjd() -> Aggregator:
    from torchjd.aggregation import AlignedMTLWeighting

    return TorchJD(AlignedMTLWeighting())


def scalarizer_from_torchjd() -> Aggregator:
    from torchjd.scalarization import GeometricMean

    return TorchJD(GeometricMean())


METHODS: dict[str, Any] = {
    "plain": None,
    "LS": LinearScalarization,
    "MGDA": MGDA,
    "PCGrad": PCGrad,
    "CAGrad": CAGrad,
    "IMTL-G": IMTLG,
    "NashMTL": lambda: NashMTL(normalize=True),
    "UPGrad": UPGrad,
    "GradVac": lambda: GradVac(beta=0.5),
    "GradDrop": GradDrop,
    "GradNorm": lambda: GradNorm(lr=0.1),
    "UW": lambda: UncertaintyWeighting(lr=0.1),
    "FAMO": lambda: FAMO(lr=0.1),
    "DWA": DynamicWeightAverage,
    "DBMTL": lambda: DBMTL(beta=0.5),
    "ExcessMTL": ExcessMTL,
    "RLW": RandomLossWeighting,
    "AlignedMTL": AlignedMTL,
    "ConFIG": ConFIG,
    "FairGrad": FairGrad,
    "GLS": GLS,
    "IMTL": IMTL,
    "IMTL-L": IMTLL,
    "STCH": STCH,
    "ScaleInvariant": ScaleInvariant,
    "SDMGrad": SDMGrad,
    "NTKMTL": NTKMTL,
    "UWSO": UWSO,
    "MoCo": lambda: MoCo(beta=0.5),
    "MoDo": MoDo,
    "composition": lambda: Composition(UncertaintyWeighting(lr=0.1), CAGrad()),
    "composition of columns": lambda: Composition(FAMO(lr=0.1), GradDrop()),
    "moving average": lambda: MovingAverage(GradNorm(lr=0.1), beta=0.5),
    "by group": lambda: ByGroup(MovingAverage(PCGrad(), beta=0.5)),
    "ConicGrad": ConicGrad,
    "GO4Align": lambda: GO4Align(step_size=0.1),
    "LDCMTL": lambda: LDCMTL(lr=0.1),
    "whole matrix": Whitened,
    **({"TorchJD": from_torchjd} if find_spec("torchjd") else {}),
    **(
        {
            "TorchJD, weighting": weighting_from_torchjd,
            "TorchJD, scalarizer": scalarizer_from_torchjd,
        }
        if find_spec("torchjd") and find_spec("torchjd.scalarization")
        else {}
    ),
}
SAMS: dict[str, dict[str, Any] | None] = {
    "": None,
    **{
        f"{point} {'adaptive' if adaptive else 'even'} {arm}": {
            "rho": 0.5 if adaptive else 0.05,
            "adaptive": adaptive,
            "point": point,
            "aggregate": arm,
        }
        for point in ("separate", "joint")
        for adaptive in (False, True)
        for arm in ("split", "direct")
    },
    "second": {"rho": 0.05, "aggregate": "second"},
    "each": {"rho": 0.5, "adaptive": True, "point": "joint", "aggregate": "each"},
}
NESTED = ("second", "each")
FIRST = "separate even split"


def method(name: str, sam: str = "", **more: Any) -> list[Any]:
    settings = SAMS[sam]
    callbacks = [] if settings is None else [TaskSAM(**settings, **more)]
    make = METHODS[name]
    return callbacks if make is None else [make(), *callbacks]


BOTH = ("plain", "PCGrad", "CAGrad", "GradDrop", "DBMTL", "FAMO", "whole matrix")
"""Methods of each kind, with and without TaskSAM in both hosts and also with three processes; the
others alternate, with two."""
COMBINATIONS = [
    *(("taken over", name, "") for name in METHODS),
    *(("module", name, FIRST) for name in METHODS),
    *(("module", name, "") for name in BOTH),
    *(("taken over", name, FIRST) for name in BOTH),
    *((host, "CAGrad", sam) for host in HOSTS for sam in SAMS if sam not in ("", FIRST)),
    *(("module", "GradDrop", sam) for sam in SAMS if sam not in ("", FIRST, *NESTED)),
    *((host, "MGDA", sam) for host in HOSTS for sam in NESTED),
]
OTHERS: dict[str, dict[str, Any]] = {
    "accumulated": {"accumulate_grad_batches": 2},
    "clipped": {"gradient_clip_val": 0.3},
    "both": {"accumulate_grad_batches": 3, "gradient_clip_val": 0.3},
}


def _name(*words: str) -> str:
    return "exactness/" + "/".join(words)


for _host, _method, _sam in COMBINATIONS:
    case(
        _name(_host, _method, _sam),
        partial(train, host=_host, method=partial(method, _method, _sam), whole=batches(2)),
        (1, 2, 3) if _method in BOTH else (1, 2),
    )
for _host in HOSTS:
    for _other, _settings in OTHERS.items():
        case(
            _name(_host, _other),
            partial(
                train,
                host=_host,
                method=partial(method, "GradNorm", FIRST),
                whole=batches(5),
                max_epochs=1,
                **_settings,
            ),
        )
case(
    _name("features"),
    partial(
        train,
        host="module",
        method=partial(method, "CAGrad"),
        whole=batches(3),
        max_epochs=1,
        net={"gradients": "features"},
    ),
)


def check(runs: Any, size: int, name: str, steps: int | None = None) -> None:
    (one,) = runs(1, name)
    several = runs(size, name)
    assert deviation(one["params"], one["start"]) > 1e-3
    if steps is not None:
        assert one["steps"] == steps
    for run in several:
        assert run["steps"] == one["steps"]
        assert deviation(run["params"], one["params"]) < TOLERANCE
        assert run["diary"]["hashes"] == several[0]["diary"]["hashes"]


@pytest.mark.parametrize(
    ("host", "name", "sam", "size"),
    [(*c, size) for c in COMBINATIONS for size in (2, 3) if size == 2 or c[1] in BOTH],
)
def test_methods(runs: Any, host: str, name: str, sam: str, size: int) -> None:
    check(runs, size, _name(host, name, sam), steps=4)


def test_torchjd_is_among_them() -> None:
    pytest.importorskip("torchjd")
    assert "TorchJD" in METHODS


def test_the_trunk_cannot_be_shared_out_evenly() -> None:
    width = sum(p.numel() for p in trunk().parameters())
    assert width % 2
    assert width % 3


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("other", OTHERS)
def test_accumulation_and_clipping(runs: Any, host: str, other: str, size: int) -> None:
    check(runs, size, _name(host, other), {"accumulated": 3, "clipped": 5, "both": 2}[other])


@pytest.mark.parametrize("size", [2, 3])
def test_gradients_at_the_features(runs: Any, size: int) -> None:
    check(runs, size, _name("features"))


# A local perturbation: every process along the gradient of its own share.

LOCAL = {
    "even": {"rho": 0.05, "adaptive": False},
    "adaptive": {"rho": 0.5, "adaptive": True},
}
NAIVE = {
    "plain": (None, naive.ls),
    "MGDA": (MGDA, naive.mgda),
    "CAGrad": (lambda: CAGrad(0.4), naive.cagrad(0.4)),
}
TWO = ("a", "b")
LOCAL_BATCHES = {"equal": batches(2), "uneven": batches(2, 8)}


def _local(name: str, sam: str, point: str, perturbation: str) -> list[Any]:
    make = NAIVE[name][0]
    sam_callback = TaskSAM(**LOCAL[sam], point=point, perturbation=perturbation)
    return [sam_callback] if make is None else [make(), sam_callback]


LOCALS = [
    *((name, sam, "separate", "equal") for name in NAIVE for sam in LOCAL),
    *(("CAGrad", sam, "joint", "uneven") for sam in LOCAL),
]

for _host in HOSTS:
    for _name_, _sam, _point, _shares in LOCALS:
        for _kind in ("local", "global"):
            case(
                _name("perturbation", _host, _name_, _sam, _point, _shares, _kind),
                partial(
                    train,
                    host=_host,
                    method=partial(_local, _name_, _sam, _point, _kind),
                    whole=LOCAL_BATCHES[_shares],
                    net={"tasks": TWO, "counts": _shares == "uneven"},
                    max_epochs=1,
                ),
                sizes=(1,) if _kind == "global" else (1, 2),
            )


def reference(name: str, sam: str, point: str, shares: str) -> dict[str, Tensor]:
    """Two shares, each perturbed by itself; their gradients are averaged and then aggregated."""
    model = module(tasks=TWO)
    named = dict(model.named_parameters())
    shared = [n for n in named if n.startswith("encoder.")]
    optimizer = model.configure_optimizers()
    for batch in LOCAL_BATCHES[shares]:
        at = {n: p.detach().clone() for n, p in named.items()}
        pieces = [share(batch, Place(rank, 2, None)) for rank in range(2)]
        weights = [len(x) / len(batch[0]) for x, _ in pieces]
        clean, flat = {}, {}
        for task in TWO:
            head = [n for n in named if n.startswith(f"heads.{task}.")]
            rows: list[Any] = []
            for (x, targets), weight in zip(pieces, weights, strict=True):

                def loss(params: Any, x=x, y=targets[task], task=task, weight=weight) -> Tensor:
                    return weight * LOSSES[task](functional_call(model, params, (x,))[task], y)

                g_shared = naive.gradient(loss, at, shared)
                at_shared = naive.perturb(at, g_shared, **LOCAL[sam])
                at_head = naive.perturb(at, naive.gradient(loss, at, head), **LOCAL[sam])
                if point == "joint":
                    both = {n: at_shared[n] if n in shared else at_head[n] for n in at}
                    at_shared = at_head = both
                rows.append(
                    (
                        naive.vector(g_shared),
                        naive.vector(naive.gradient(loss, at_shared, shared)),
                        naive.gradient(loss, at_head, head),
                    )
                )
            clean[task] = rows[0][0] + rows[1][0]
            flat[task] = rows[0][1] + rows[1][1] - clean[task]
            for n in head:
                named[n].grad = rows[0][2][n] + rows[1][2][n]
        aggregate = NAIVE[name][1]
        nothing = torch.zeros(2)
        direction = aggregate(torch.stack(list(clean.values())), nothing)
        direction = direction + aggregate(torch.stack(list(flat.values())), nothing)
        lengths = [named[n].numel() for n in shared]
        for n, piece in zip(shared, direction.split(lengths), strict=True):
            named[n].grad = piece.view_as(named[n])
        optimizer.step()
    return {n: p.detach() for n, p in named.items()}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("name", "sam", "point", "shares"), LOCALS)
def test_a_local_perturbation(
    runs: Any, host: str, name: str, sam: str, point: str, shares: str
) -> None:
    words = ("perturbation", host, name, sam, point, shares)
    expected = reference(name, sam, point, shares)
    for run in runs(2, _name(*words, "local")):
        assert deviation(run["params"], expected) < TOLERANCE
    (alone,), (everywhere,) = runs(1, _name(*words, "local")), runs(1, _name(*words, "global"))
    assert alone["diary"]["hashes"] == everywhere["diary"]["hashes"]
    assert deviation(alone["params"], expected) > 1e-6  # another perturbation, and it shows
