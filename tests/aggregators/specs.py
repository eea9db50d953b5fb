"""One entry per public aggregator: how to make it and which contracts it keeps.

``tests/aggregators/test_contract.py`` is driven by this table; a test there fails when a public
aggregator has no entry.
"""

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
}
