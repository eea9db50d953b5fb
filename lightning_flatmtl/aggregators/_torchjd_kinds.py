"""The kinds of methods that TorchJD has, and how each is asked."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar, final, get_args, get_origin

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_flatmtl.engine import TaskGradients
from lightning_flatmtl.engine.aggregation import Requires

__all__ = ["Kind", "kind_of"]


class Kind:
    """How one kind of TorchJD's methods is asked; it has no state."""

    requires: Requires = "matrix"
    needs_gradients = True
    weighs_losses = False

    def loss_weights(self, theirs: nn.Module, losses: Tensor) -> Tensor | None:
        """Weights ``[m]`` of the losses; ``None`` if the method looks at none."""
        return None

    def row_weights(self, theirs: nn.Module, gradients: TaskGradients) -> Tensor | None:
        """Weights ``[m]`` of the rows; ``None`` if the method gives a direction at once."""
        return None

    def direction(self, theirs: nn.Module, gradients: TaskGradients) -> Tensor:
        """The direction ``[d]`` where there are no weights of the rows."""
        raise NotImplementedError


@final
class OfMatrix(Kind):
    """An aggregator: the matrix of the gradients to a direction."""

    @override
    def direction(self, theirs: nn.Module, gradients: TaskGradients) -> Tensor:
        return _asked(theirs, gradients.jacobian)


@final
class WeightsOfMatrix(Kind):
    """A weighting of the rows that sees the matrix."""

    @override
    def row_weights(self, theirs: nn.Module, gradients: TaskGradients) -> Tensor:
        return _asked(theirs, gradients.jacobian).to("cpu", torch.float64)


@final
class WeightsOfGram(Kind):
    """A weighting of the rows that sees their inner products only."""

    requires: Requires = "gram"

    @override
    def row_weights(self, theirs: nn.Module, gradients: TaskGradients) -> Tensor:
        return _asked(theirs, gradients.gram).to("cpu", torch.float64)


@final
class OfLosses(Kind):
    """A scalarizer: all losses to one, whose derivatives are the weights."""

    requires: Requires = "gram"
    needs_gradients = False
    weighs_losses = True

    @override
    def loss_weights(self, theirs: nn.Module, losses: Tensor) -> Tensor:
        values = losses.detach().clone().requires_grad_()
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            (weights,) = torch.autograd.grad(theirs(values), values)
        return weights

    @override
    def row_weights(self, theirs: nn.Module, gradients: TaskGradients) -> Tensor:
        assert gradients.loss_weights is not None
        return gradients.loss_weights


def _asked(theirs: nn.Module, shown: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast(shown.device.type, enabled=False):
        found: Tensor = theirs(shown)
    return found.detach()


_OWN = {
    "MoDoWeighting": "MoDo",
    "SDMGradWeighting": "SDMGrad",
    "UW": "UncertaintyWeighting",
    "IMTLL": "IMTLL",
    "FAMO": "FAMO",
}
"""What this library has in place of methods that need more than the gradients of a batch."""


def kind_of(theirs: object) -> Kind:
    """The kind of a method of TorchJD.

    Raises:
        TypeError: If it is none of them.
        ValueError: If it needs more than gradients or losses of a batch.
    """
    aggregation: Any = import_module("torchjd.aggregation")
    # Before 0.18 there were no scalarizers, and long before that no public weightings.
    weighting = getattr(aggregation, "Weighting", ())
    if isinstance(theirs, aggregation.Aggregator):
        return OfMatrix()
    if isinstance(theirs, weighting):
        return _of_weighting(theirs)
    if find_spec("torchjd.scalarization") is not None:
        scalarization: Any = import_module("torchjd.scalarization")
        if isinstance(theirs, scalarization.Scalarizer):
            return _of_scalarizer(theirs)
    raise TypeError(
        "`aggregator` must be an aggregator or a weighting of torchjd.aggregation or a scalarizer "
        f"of torchjd.scalarization, got {type(theirs).__name__}."
    )


def _of_scalarizer(theirs: nn.Module) -> Kind:
    if any(p.requires_grad for p in theirs.parameters()) or hasattr(theirs, "update"):
        raise ValueError(
            f"`aggregator` must be a scalarizer that learns nothing by itself, got {theirs!r}, "
            f"whose parameters nothing here would train. {_in_place_of(theirs)}"
        )
    return OfLosses()


def _of_weighting(theirs: nn.Module) -> Kind:
    for part in theirs.modules():
        if type(part).__name__ in ("MoDoWeighting", "SDMGradWeighting"):
            raise ValueError(
                f"`aggregator` must look at the gradients of one batch, got {theirs!r}, which is "
                f"made for the product of two batches' gradients. {_in_place_of(part)}"
            )
    shown = _shown(theirs)
    if shown == "PSDMatrix":
        return WeightsOfGram()
    if shown == "Matrix":
        return WeightsOfMatrix()
    raise TypeError(
        "`aggregator` must say what it looks at, as a subclass of Weighting[PSDMatrix] (the "
        f"Gramian) or Weighting[Matrix] does, got {theirs!r}."
    )


def _shown(theirs: nn.Module) -> str | None:
    """The name of what a weighting is shown: the argument of its base ``Weighting[...]``."""
    for each in type(theirs).__mro__:
        for base in each.__dict__.get("__orig_bases__", ()):
            arguments = get_args(base)
            origin = get_origin(base)
            if not arguments or getattr(origin, "__name__", None) != "Weighting":
                continue
            if not isinstance(arguments[0], TypeVar):
                return str(getattr(arguments[0], "__name__", arguments[0]))
            # One around another, of what that is shown, unless it shows it something else.
            inner = getattr(theirs, "weighting", None)
            composed = hasattr(theirs, "fn")
            return "Matrix" if composed else None if inner is None else _shown(inner)
    return None


def _in_place_of(theirs: nn.Module) -> str:
    own = _OWN.get(type(theirs).__name__)
    if own is None:
        return "Write it as an aggregator: see the page on extending."
    return f"Use {own} of lightning_flatmtl.aggregators."
