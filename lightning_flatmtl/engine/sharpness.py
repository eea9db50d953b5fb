"""How far and which way the parameters are perturbed for each task (SAM and adaptive SAM)."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

__all__ = ["Arm", "Perturbation", "Point", "Sharpness"]

Point = Literal["separate", "joint"]
Arm = Literal["split", "direct", "second", "each"]
Perturbation = Literal["global", "local"]


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

    Args:
        rho_shared: Radius of the shared parameters, in ``[0, inf)``.
        rho_heads: Radius of each head's parameters, in ``[0, inf)``.
        adaptive: Scale the perturbation by the parameters' magnitude.
        point: Where the second gradients are taken: ``"separate"`` (shared at perturbed shared,
            head at perturbed head) or ``"joint"`` (both at both).
        aggregate: The arm.

    Raises:
        ValueError: If a value is out of its bounds.
    """

    rho_shared: float = 0.05
    rho_heads: float = 0.05
    adaptive: bool = False
    point: Point = "separate"
    aggregate: Arm = "split"
    perturbation: Perturbation = "global"

    def __post_init__(self) -> None:
        check_radius("rho_shared", self.rho_shared)
        check_radius("rho_heads", self.rho_heads)
        kinds = (("point", Point), ("aggregate", Arm), ("perturbation", Perturbation))
        for name, kind in kinds:
            choices = get_args(kind)
            if getattr(self, name) not in choices:
                *others, last = map(repr, choices)
                expected = f"{', '.join(others)} or {last}"
                raise ValueError(f"`{name}` must be {expected}, got {getattr(self, name)!r}.")

    @property
    def active(self) -> bool:
        """Whether there is a second pass at all."""
        return self.rho_shared > 0 or self.rho_heads > 0

    @property
    def splits(self) -> bool:
        """Whether flat parts are told from loss parts."""
        return self.aggregate != "direct"

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
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf:
        raise ValueError(f"`{name}` must be in [0, inf), got {value!r}.")
