"""One entry per public aggregator: how to make it and which contracts it keeps.

``tests/aggregators/test_contract.py`` is driven by this table; a test there fails when a public
aggregator has no entry.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from lightning_flatmtl import aggregators as a


@dataclass(frozen=True)
class Spec:
    """What one configuration of an aggregator promises.

    Traits: ``order_free`` (a permutation of the rows leaves the direction alone), ``homogeneous``
    (the direction scales with the matrix), ``descent`` (no task's loss rises to first order),
    ``random``, ``stateful``, ``losses`` (looks at losses).
    """

    make: Callable[[], a.Aggregator]
    traits: frozenset[str] = field(default_factory=frozenset)
    identical: Callable[[int], float] | None = None
    """Factor of g if all g_i = g, by the number of tasks."""
    golden: str | None = None
    """Name in ``tests/vectors/aggregators.json``."""


def traits(names: str) -> frozenset[str]:
    return frozenset(names.split())


def cagrad_factor(c: float) -> float:
    return (1 + c) / (1 + c * c)


SPECS = {
    "LinearScalarization": Spec(
        a.LinearScalarization, traits("order_free homogeneous"), lambda m: m
    ),
    "MGDA": Spec(a.MGDA, traits("order_free homogeneous descent"), lambda m: 1, "MGDA"),
    "MGDA-l2": Spec(lambda: a.MGDA("l2"), traits("order_free homogeneous"), lambda m: 1),
    "MGDA-loss": Spec(lambda: a.MGDA("loss"), traits("order_free homogeneous losses"), lambda m: 1),
    "MGDA-loss+": Spec(
        lambda: a.MGDA("loss+"), traits("order_free homogeneous losses"), lambda m: 1
    ),
    "PCGrad": Spec(a.PCGrad, traits("homogeneous random stateful"), lambda m: m),
    "PCGrad-mean": Spec(
        lambda: a.PCGrad("mean"), traits("homogeneous random stateful"), lambda m: 1
    ),
    "CAGrad": Spec(
        a.CAGrad,
        traits("order_free homogeneous"),
        lambda m: cagrad_factor(0.4),
        "CAGrad(c=0.4, rescale=True)",
    ),
    "CAGrad-raw": Spec(
        lambda: a.CAGrad(0.4, rescale=False),
        traits("order_free homogeneous"),
        lambda m: 1.4,
        "CAGrad(c=0.4, rescale=False)",
    ),
    "CAGrad-wide": Spec(
        lambda: a.CAGrad(1.5),
        traits("order_free homogeneous descent"),
        lambda m: cagrad_factor(1.5),
    ),
    "IMTLG": Spec(a.IMTLG, traits("order_free homogeneous"), lambda m: 1, "IMTLG"),
    "IMTLL": Spec(a.IMTLL, traits("order_free homogeneous stateful losses"), lambda m: m),
    "IMTL": Spec(a.IMTL, traits("order_free homogeneous stateful losses"), lambda m: 1),
    "ScaleInvariant": Spec(a.ScaleInvariant, traits("order_free losses homogeneous"), lambda m: m),
    "GLS": Spec(a.GLS, traits("order_free losses homogeneous"), lambda m: 1),
    "RandomLossWeighting": Spec(
        a.RandomLossWeighting, traits("homogeneous random stateful"), lambda m: m
    ),
    "DynamicWeightAverage": Spec(
        a.DynamicWeightAverage, traits("order_free homogeneous stateful"), lambda m: m
    ),
    "UncertaintyWeighting": Spec(
        a.UncertaintyWeighting, traits("order_free homogeneous stateful"), lambda m: m
    ),
    "GradNorm": Spec(a.GradNorm, traits("order_free homogeneous stateful losses"), lambda m: m),
    "GradDrop": Spec(a.GradDrop, traits("homogeneous random stateful"), lambda m: m),
    "GradDrop-leak": Spec(
        lambda: a.GradDrop(leak=1.0), traits("homogeneous stateful"), lambda m: m
    ),
    "GradVac": Spec(a.GradVac, traits("homogeneous random stateful"), lambda m: m),
    "NashMTL": Spec(
        a.NashMTL,
        traits("order_free descent"),
        None,
        "NashMTL (one exact solve, no norm clip)",
    ),
    "NashMTL-kept": Spec(
        lambda: a.NashMTL(max_norm=1.0, update_interval=3), traits("order_free descent stateful")
    ),
    "AlignedMTL": Spec(a.AlignedMTL, traits("order_free homogeneous"), None, "AlignedMTL (min)"),
    "AlignedMTL-median": Spec(lambda: a.AlignedMTL("median"), traits("order_free homogeneous")),
    "AlignedMTL-rmse": Spec(lambda: a.AlignedMTL("rmse"), traits("order_free homogeneous")),
    "NashMTL-normalized": Spec(
        lambda: a.NashMTL(normalize=True), traits("order_free homogeneous descent")
    ),
    "FairGrad-normalized": Spec(
        lambda: a.FairGrad(normalize=True), traits("order_free homogeneous descent")
    ),
    "FairGrad": Spec(a.FairGrad, traits("order_free descent"), None, "FairGrad(alpha=2)"),
    "UPGrad": Spec(a.UPGrad, traits("order_free homogeneous descent"), lambda m: 1, "UPGrad"),
    "STCH": Spec(
        lambda: a.STCH(warmup_epochs=0),
        traits("order_free homogeneous stateful losses"),
        lambda m: m,
    ),
    "DBMTL": Spec(a.DBMTL, traits("order_free homogeneous losses"), lambda m: m),
    "DBMTL-average": Spec(
        lambda: a.DBMTL(beta=0.9), traits("order_free homogeneous stateful losses"), lambda m: m
    ),
    "FAMO": Spec(a.FAMO, traits("order_free homogeneous stateful losses"), lambda m: 1),
    "ConFIG": Spec(a.ConFIG, traits("order_free homogeneous"), lambda m: m),
    "SDMGrad": Spec(a.SDMGrad, traits("order_free homogeneous"), lambda m: 1),
    "ConicGrad": Spec(a.ConicGrad, traits("order_free homogeneous"), lambda m: 1),
    "ConicGrad-half": Spec(
        lambda: a.ConicGrad(0.0), traits("order_free homogeneous descent"), lambda m: 1
    ),
    "ConicGrad-narrow": Spec(
        lambda: a.ConicGrad(0.99), traits("order_free homogeneous"), lambda m: 1
    ),
    "GO4Align": Spec(a.GO4Align, traits("order_free homogeneous stateful losses"), lambda m: m),
    "LDCMTL": Spec(a.LDCMTL, traits("homogeneous stateful losses"), lambda m: 1),
    "LDCMTL-plain": Spec(
        lambda: a.LDCMTL(compared="plain"), traits("homogeneous stateful losses"), lambda m: 1
    ),
    "NTKMTL": Spec(a.NTKMTL, traits("order_free homogeneous"), lambda m: m * math.sqrt(m)),
    "UWSO": Spec(a.UWSO, traits("order_free homogeneous losses"), lambda m: 1),
    "ExcessMTL": Spec(a.ExcessMTL, traits("order_free homogeneous stateful"), lambda m: m),
    "MoCo": Spec(a.MoCo, traits("order_free stateful"), lambda m: 1),
    "MoDo": Spec(a.MoDo, traits("order_free stateful"), lambda m: 1),
    "Composition": Spec(
        lambda: a.Composition(a.UncertaintyWeighting(), a.PCGrad()),
        traits("homogeneous random stateful"),
        lambda m: m,
    ),
    "Composition-columns": Spec(
        lambda: a.Composition(a.ScaleInvariant(), a.GradDrop()),
        traits("homogeneous random stateful losses"),
        lambda m: m,
    ),
    "MovingAverage": Spec(
        lambda: a.MovingAverage(a.CAGrad()),
        traits("order_free homogeneous stateful"),
        lambda m: cagrad_factor(0.4),
    ),
    "MovingAverage-losses": Spec(
        lambda: a.MovingAverage(a.FAMO()),
        traits("order_free homogeneous stateful losses"),
        lambda m: 1,
    ),
    "ByGroup": Spec(
        lambda: a.ByGroup(a.MGDA()), traits("order_free homogeneous descent"), lambda m: 1
    ),
    "ByGroup-stateful": Spec(
        lambda: a.ByGroup(a.MovingAverage(a.PCGrad()), groups="parameter"),
        traits("homogeneous random stateful"),
        lambda m: m,
    ),
}
