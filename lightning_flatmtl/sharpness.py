"""TaskSAM: the callback that turns method X into F-X."""

from typing import final

from lightning_flatmtl.engine import Arm, Point, Sharpness
from lightning_flatmtl.engine.sharpness import Perturbation, check_radius
from lightning_flatmtl.hosting.callback import MethodCallback

__all__ = ["TaskSAM"]


@final
class TaskSAM(MethodCallback):
    r"""Per-task sharpness-aware minimisation of shared and head parameters.

    Phan et al., *Improving Multi-task Learning via Seeking Task-based Flat Regions*,
    `arXiv:2211.13723 <https://arxiv.org/abs/2211.13723>`_. Beside an aggregator A it makes F-A;
    alone it makes F-LS. Every task perturbs the shared parameters by :math:`\rho\, g / \lVert g
    \rVert` along its own gradient and its head likewise, and a second pass gives the gradients
    there. What the perturbation adds to a task's shared gradient is its flat part; loss parts and
    flat parts are aggregated separately and added.

    Cost: one more forward and backward pass of the trunk for every task, and a second
    ``[tasks, parameters]`` matrix; where the model is not made of encoder and heads, all heads run
    in these passes. Too large a radius kills training, so that every task gradient is exactly zero
    from then on: start with 0.05 plain or 1 adaptive.

    Args:
        rho: Radius of both perturbations, in ``[0, inf)``; 0 runs no second pass at all.
        rho_shared: Radius for the shared parameters, if another than ``rho``.
        rho_heads: Radius for the heads' parameters, if another than ``rho``.
        adaptive: Perturb by :math:`\rho\, w^2 g / \lVert |w|\, g \rVert` (ASAM), which does not
            depend on how the parameters are scaled. Published runs use it with ``rho=2`` on a
            ResNet-18.
        point: ``"separate"`` takes the shared gradient at perturbed shared parameters and the head
            gradient at perturbed head parameters (arXiv v4, Algorithm 1); ``"joint"`` takes both
            where both are perturbed (ICCV text, published code).
        aggregate: ``"split"`` is the method; ``"direct"`` aggregates the SAM gradients themselves,
            an ablation.
        perturbation: With several processes, ``"global"`` perturbs along the gradient of all their
            samples, as one process would; ``"local"`` lets each perturb along that of its own
            samples (m-sharpness), with less traffic. With one process they are the same.

    Raises:
        ValueError: If an argument is out of its bounds.

    Example:
        >>> TaskSAM(rho=1.0, adaptive=True).sharpness.rho_shared
        1.0
    """

    role = "TaskSAM"

    def __init__(
        self,
        rho: float = 0.05,
        *,
        rho_shared: float | None = None,
        rho_heads: float | None = None,
        adaptive: bool = False,
        point: Point = "separate",
        aggregate: Arm = "split",
        perturbation: Perturbation = "global",
    ) -> None:
        check_radius("rho", rho)
        self.sharpness = Sharpness(
            rho_shared=rho if rho_shared is None else rho_shared,
            rho_heads=rho if rho_heads is None else rho_heads,
            adaptive=adaptive,
            point=point,
            aggregate=aggregate,
            perturbation=perturbation,
        )

    def __repr__(self) -> str:
        return f"TaskSAM{repr(self.sharpness).removeprefix('Sharpness')}"
