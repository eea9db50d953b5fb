"""How far and which way the parameters are perturbed for each task (SAM and adaptive SAM)."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

__all__ = ["Arm", "Perturbation", "Point", "RowKind", "Sharpness"]

Point = Literal["separate", "joint"]
Arm = Literal["split", "direct", "second", "each"]
Perturbation = Literal["global", "local", "common", "samo"]
RowKind = Literal["float32", "bfloat16", "cpu"]


@dataclass(frozen=True)
class Sharpness:
    r"""The settings of Algorithm 1's perturbations.

    Plain: :math:`\epsilon = \rho\, g / \lVert g \rVert`. Adaptive (ASAM):
    :math:`\epsilon = \rho\, w^2 g / \lVert |w|\, g \rVert`, elementwise. Shared and head part are
    each measured by their own norm.

    What the shared parameters follow is the arm: with the clean gradients :math:`g_i`, the SAM
    gradients :math:`s_i`, the flat parts :math:`f_i = s_i - g_i` and an aggregation :math:`A`

    - ``"split"``, the method: :math:`A(g_1, \dots, g_m) + A(f_1, \dots, f_m)`;
    - ``"direct"``: :math:`A(s_1, \dots, s_m)`;
    - ``"second"``: :math:`A(A(g_1, \dots, g_m), A(f_1, \dots, f_m))`;
    - ``"each"``: :math:`A(A(g_1, f_1), \dots, A(g_m, f_m))`.

    Where the shared parameters do not move there are no flat parts, and every arm is
    :math:`A(g_1, \dots, g_m)`. Heads are the same in all arms.

    What the shared parameters are perturbed along, with :math:`\bar g` the mean of the
    :math:`g_i`:

    - ``"global"``: :math:`g_i` over the samples of all processes; ``"local"``: over those of this
      one;
    - ``"common"``: :math:`\bar g` for every task, so that one forward pass serves all of them;
    - ``"samo"``: tensor by tensor :math:`(1 - \beta)\, \bar g + \beta\, \lVert \bar g \rVert\,
      \hat g_i / \lVert \hat g_i \rVert`, with :math:`\hat g_i` estimated by two forward passes
      (`arXiv:2507.07883 <https://arxiv.org/abs/2507.07883>`_).

    Args:
        rho_shared: Radius of the shared parameters, in ``[0, inf)``.
        rho_heads: Radius of each head's parameters, in ``[0, inf)``.
        adaptive: Scale the perturbation by the parameters' magnitude.
        point: Where the second gradients are taken: ``"separate"`` (shared at perturbed shared,
            head at perturbed head) or ``"joint"`` (both at both).
        aggregate: The arm.
        perturbation: What the shared parameters are perturbed along.
        refresh: How many tasks an update renews the flat parts of, in turn; the others use theirs
            again. An integer of at least 1, or a number in ``(0, 1)``: one task in every
            ``1 / refresh`` updates. ``None`` renews all.
        rows: How the flat parts of the shared gradients are kept: in the precision of the
            gradients, in bfloat16, or on the host.
        samo_beta: :math:`\beta`, the share of the task's own direction, in ``[0, 1]``.
        samo_step: The length of the step by which :math:`\hat g_i` is estimated, times a standard
            normal vector, in ``(0, inf)``.

    Raises:
        ValueError: If a value is out of its bounds, or two exclude each other.
    """

    rho_shared: float = 0.05
    rho_heads: float = 0.05
    adaptive: bool = False
    point: Point = "separate"
    aggregate: Arm = "split"
    perturbation: Perturbation = "global"
    refresh: int | float | None = None
    rows: RowKind = "float32"
    samo_beta: float = 0.5
    samo_step: float = 0.01

    def __post_init__(self) -> None:
        check_radius("rho_shared", self.rho_shared)
        check_radius("rho_heads", self.rho_heads)
        kinds = {
            "point": Point,
            "aggregate": Arm,
            "perturbation": Perturbation,
            "rows": RowKind,
        }
        for name, kind in kinds.items():
            choices = get_args(kind)
            if getattr(self, name) not in choices:
                *others, last = map(repr, choices)
                expected = f"{', '.join(others)} or {last}"
                raise ValueError(f"`{name}` must be {expected}, got {getattr(self, name)!r}.")
        check_refresh(self.refresh)
        if not _is_number(self.samo_beta) or not 0 <= self.samo_beta <= 1:
            raise ValueError(f"`samo_beta` must be in [0, 1], got {self.samo_beta!r}.")
        if not _is_number(self.samo_step) or not 0 < self.samo_step < math.inf:
            raise ValueError(f"`samo_step` must be in (0, inf), got {self.samo_step!r}.")
        if self.keeps and not self.splits:
            what = f"refresh={self.refresh}" if self.rows == "float32" else f"rows={self.rows!r}"
            raise ValueError(
                f"{what} is about flat parts, which aggregate='direct' does not tell from the "
                "rest. Use aggregate='split', or leave it out."
            )

    @property
    def active(self) -> bool:
        """Whether there is a second pass at all."""
        return self.rho_shared > 0 or self.rho_heads > 0

    @property
    def splits(self) -> bool:
        """Whether flat parts are told from loss parts."""
        return self.aggregate != "direct"

    @property
    def keeps(self) -> bool:
        """Whether flat parts are kept: for later steps, or otherwise than as they come."""
        return self.refresh is not None or self.rows != "float32"

    @property
    def nests(self) -> bool:
        """Whether directions are aggregated once more."""
        return self.aggregate in {"second", "each"}

    @property
    def moves_shared(self) -> bool:
        """Whether the shared gradient is taken at another point than the clean one."""
        return self.rho_shared > 0 or (self.point == "joint" and self.rho_heads > 0)

    @property
    def moves_heads(self) -> bool:
        """Whether the head gradients are taken at another point than the clean one."""
        return self.rho_heads > 0 or (self.point == "joint" and self.rho_shared > 0)


def check_radius(name: str, value: float) -> None:
    """Refuse a radius that is not a number in ``[0, inf)``; NaN is refused too."""
    if not _is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"`{name}` must be in [0, inf), got {value!r}.")


def check_refresh(value: int | float | None) -> None:
    """Refuse what is neither ``None``, nor a whole number of tasks, nor a share of updates."""
    if value is None:
        return
    if not _is_number(value) or not (0 < value < 1 or (isinstance(value, int) and value >= 1)):
        raise ValueError(
            f"`refresh` must be an integer >= 1, a number in (0, 1) or None, got {value!r}."
        )


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
