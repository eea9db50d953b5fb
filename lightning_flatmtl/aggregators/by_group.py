"""A method that aggregates every group of parameters by itself."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, final

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_flatmtl.aggregators._base import Aggregator
from lightning_flatmtl.aggregators._wrapping import Wrapping, checked_aggregator
from lightning_flatmtl.engine import TaskGradients, gram_matrix
from lightning_flatmtl.engine.aggregation import Requires

__all__ = ["ByGroup"]

Groups = Literal["layer", "parameter"] | int | list[str]


@final
class ByGroup(Wrapping):
    r"""A gradient method that aggregates every group of shared parameters by itself.

    The columns of the task Jacobian are split into groups, :math:`G = (G^1, \dots, G^B)`, and
    :math:`d = (A(G^1), \dots, A(G^B))`: tasks that conflict in the last layer and agree in the
    first are weighed otherwise in each. What holds for the direction of :math:`A`, such as that no
    task is harmed, then holds in each group, and so for the whole.

    The method is copied for each group, so one with a state has a state a group. By hand, on a
    matrix without a model, all columns are one group.

    Several processes bring the whole matrix together, as for every method that looks at more than
    inner products.

    Args:
        aggregator: A method on the gradients that leaves the losses as they are, such as
            :class:`MGDA`. To weigh losses as well, wrap this in a :class:`Composition`.
        groups: ``"layer"``, the parameters of one module; ``"parameter"``, each by itself; a number
            of leading parts of their names: 2 makes ``encoder.layer1`` one group; or a list of
            beginnings of names, such as ``["encoder.layer1", "encoder.layer2"]``, where what fits
            none of them is one more group.

    Raises:
        TypeError: If ``aggregator`` is none.
        ValueError: If it weighs losses or looks at no gradient, ``groups`` is none of these, or the
            task gradients are not taken at the parameters.

    Example:
        >>> import torch
        >>> ByGroup(MGDA(), groups=2)(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        tensor([0.9000, 0.3000])
    """

    def __init__(self, aggregator: Aggregator, groups: Groups = "layer") -> None:
        self.aggregator = checked_aggregator("aggregator", aggregator)
        if not aggregator.needs_gradients or aggregator.weighs_losses:
            raise ValueError(
                "`aggregator` must be a method on the gradients that leaves the losses as they "
                f"are, such as MGDA(), got {aggregator!r}. Weights of losses hold for the heads "
                "too and cannot differ by group: use Composition(weighting=..., "
                "aggregator=ByGroup(...))."
            )
        self.groups = _checked(groups)
        self._of_group: dict[str, Aggregator] = {}
        self._told = False

    @property
    @override
    def parts(self) -> Mapping[str, Aggregator]:
        return self._of_group

    @property
    @override
    def made_of(self) -> tuple[Aggregator, ...]:
        return (self.aggregator,)

    @property
    @override
    def requires(self) -> Requires:
        return "matrix"

    @override
    def aggregate(self, gradients: TaskGradients) -> Tensor:
        groups = self._columns(gradients)
        pieces = {
            name: _of_columns(gradients.jacobian, columns) for name, columns in groups.items()
        }
        # Brought to the host at once: a GPU is waited for once.
        grams = torch.stack([gram_matrix(piece) for piece in pieces.values()]).cpu()
        direction = torch.empty_like(gradients.jacobian[0])
        for (name, columns), gram in zip(groups.items(), grams, strict=True):
            shown = replace(gradients, jacobian=pieces[name], gram=gram, parameters=None)
            found = self._method(name).aggregate(shown)
            sizes = [at.stop - at.start for at in columns]
            for at, piece in zip(columns, torch.split(found, sizes), strict=True):
                direction[at] = piece
        return direction

    def _method(self, group: str) -> Aggregator:
        if group not in self._of_group:
            self._of_group[group] = copy.deepcopy(self.aggregator)
        return self._of_group[group]

    def _columns(self, gradients: TaskGradients) -> dict[str, list[slice]]:
        """Where the columns of every group lie, neighbours in one slice."""
        whole = {"all": [slice(0, gradients.jacobian.shape[1])]}
        if gradients.parameters is None:
            if self._in_run:
                raise ValueError(
                    f"{self!r} needs the task gradients at the parameters. Use "
                    "MultiTaskModule(gradients='parameters')."
                )
            return whole
        found: dict[str, list[slice]] = {}
        start = 0
        for name, size in gradients.parameters:
            columns = found.setdefault(self._group(name.replace("_orig_mod.", "")), [])
            if columns and columns[-1].stop == start:
                columns[-1] = slice(columns[-1].start, start + size)
            else:
                columns.append(slice(start, start + size))
            start += size
        self._tell_unused(found)
        return found or whole

    def _group(self, name: str) -> str:
        """The group of a parameter."""
        if self.groups == "parameter":
            return name
        parts = name.split(".")
        if self.groups == "layer":
            return ".".join(parts[:-1]) or name
        if isinstance(self.groups, int):
            return ".".join(parts[: self.groups])
        assert isinstance(self.groups, list)
        return next((start for start in self.groups if _begins(name, start)), "others")

    def _tell_unused(self, found: Mapping[str, object]) -> None:
        if self._told or not isinstance(self.groups, list):
            return
        unused = [start for start in self.groups if start not in found]
        if unused:
            self._told = True
            rank_zero_warn(
                f"Expected every entry of `groups` to be the beginning of a shared parameter's "
                f"name, got {unused}, which is not. `module.named_parameters()` shows the names.",
                category=UserWarning,
            )

    @override
    def reset(self) -> None:
        super().reset()
        self._of_group.clear()
        self._told = False

    @override
    def set_state(self, state: dict[str, Any]) -> None:
        self._of_group.clear()
        for name in state["parts"]:
            self._method(name)
        super().set_state(state)


def _of_columns(matrix: Tensor, columns: Sequence[slice]) -> Tensor:
    """Some columns of a matrix; a view of them where they are neighbours."""
    pieces = [matrix[:, at] for at in columns]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


def _begins(name: str, start: str) -> bool:
    return name == start or name.startswith(f"{start}.")


def _checked(groups: Any) -> Groups:
    if groups in ("layer", "parameter"):
        return groups  # type: ignore[no-any-return]
    if isinstance(groups, int) and not isinstance(groups, bool) and groups >= 1:
        return groups
    if isinstance(groups, Sequence) and not isinstance(groups, str):
        starts = list(groups)
        different = len(set(map(str, starts))) == len(starts)
        if starts and different and all(isinstance(start, str) for start in starts):
            return starts
    raise ValueError(
        "`groups` must be 'layer', 'parameter', a number of leading parts of the parameters' names "
        f"(at least 1), or a list of different beginnings of them, got {groups!r}."
    )
