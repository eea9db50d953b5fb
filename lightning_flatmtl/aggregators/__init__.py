"""Aggregators: callbacks that combine the gradients of several tasks, one file a method."""

from lightning_flatmtl.aggregators._base import Aggregator, GramAggregator, LossWeighting
from lightning_flatmtl.aggregators.cagrad import CAGrad
from lightning_flatmtl.aggregators.imtl import IMTL, IMTLG, IMTLL
from lightning_flatmtl.aggregators.linear_scalarization import LinearScalarization
from lightning_flatmtl.aggregators.mgda import MGDA
from lightning_flatmtl.aggregators.pcgrad import PCGrad

__all__ = [
    "IMTL",
    "IMTLG",
    "IMTLL",
    "MGDA",
    "Aggregator",
    "CAGrad",
    "GramAggregator",
    "LinearScalarization",
    "LossWeighting",
    "PCGrad",
]
