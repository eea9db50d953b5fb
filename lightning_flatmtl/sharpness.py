"""TaskSAM: the callback that turns method X into F-X."""

from dataclasses import fields
from typing import final

from lightning_flatmtl.engine import Arm, Point, Sharpness
from lightning_flatmtl.engine.sharpness import Perturbation, RowKind, check_radius
from lightning_flatmtl.hosting.callback import MethodCallback
from lightning_flatmtl.hosting.flatness_schedule import FlatnessSchedule

__all__ = ["TaskSAM"]

_ALWAYS = ("rho_shared", "rho_heads", "adaptive", "point", "aggregate", "perturbation")


@final
class TaskSAM(MethodCallback):
    r"""Per-task sharpness-aware minimisation of shared and head parameters.

    Phan et al., *Improving Multi-task Learning via Seeking Task-based Flat Regions*,
    `arXiv:2211.13723 <https://arxiv.org/abs/2211.13723>`_. Beside an aggregator A it makes F-A;
    alone it makes F-LS. Every task perturbs the shared parameters by :math:`\rho\, g / \lVert g
    \rVert` along its own gradient and its head likewise, and a second pass gives the gradients
    there. What the perturbation adds to a task's shared gradient is its flat part; loss parts and
    flat parts are aggregated separately and added.

    The ablations of the paper's Tables 5 and 6 put the same gradients together otherwise. With the
    clean gradients :math:`g_i`, the SAM gradients :math:`s_i` and the flat parts
    :math:`f_i = s_i - g_i` the shared parameters follow

    ============ =========================================================
    `aggregate`  direction
    ============ =========================================================
    ``"split"``  :math:`A(g_1, \dots, g_m) + A(f_1, \dots, f_m)`
    ``"direct"`` :math:`A(s_1, \dots, s_m)`
    ``"second"`` :math:`A(A(g_1, \dots, g_m),\; A(f_1, \dots, f_m))`
    ``"each"``   :math:`A(A(g_1, f_1), \dots, A(g_m, f_m))`
    ============ =========================================================

    Read so from the paper's words, "once more" and "per task first": the inner and the outer A are
    the same, and the order of the rows is that above. The last two want an A that is a function of
    inner products alone; methods that weigh losses, have preferences or learn of tasks, and those
    that look at single entries, are refused. Heads are the same in all four.

    Cost: one more forward and backward pass of the trunk for every task, and a second
    ``[tasks, parameters]`` matrix; where the model is not made of encoder and heads, all heads run
    in these passes. ``refresh``, ``perturbation="common"`` and ``start`` cost less, ``rows`` takes
    less memory. Too large a radius kills training, so that every task gradient is exactly zero
    from then on: start with 0.05 plain or 1 adaptive, or let
    :class:`~lightning_flatmtl.callbacks.RhoFinder` look for one.

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
        aggregate: ``"split"`` is the method; ``"direct"``, ``"second"`` and ``"each"`` are the
            ablations of the table above.
        perturbation: With several processes, ``"global"`` perturbs along the gradient of all their
            samples, as one process would; ``"local"`` lets each perturb along that of its own
            samples (m-sharpness), with less traffic. With one process they are the same.
            ``"common"`` perturbs the shared parameters once for all tasks, along the mean of their
            gradients: one forward pass serves all flat parts. ``"samo"`` is the mix of mean
            gradient and a task's own direction of SAMO (`arXiv:2507.07883
            <https://arxiv.org/abs/2507.07883>`_), parameter by parameter; with
            ``aggregate="direct", point="joint"`` it is the published method.
        refresh: How many tasks an update renews the flat parts of, in turn: an integer of at least
            1, or a number in ``(0, 1)`` for one task in every ``1 / refresh`` updates. The others
            use theirs again, times :math:`\lVert g_i \rVert` over what it was when they were
            renewed. So an update has that many second passes whatever the number of tasks; the
            first one has all. ``None`` renews all in every update, which is the method.
        start: The share of the fit that is trained by the plain method first, in ``[0, 1)``: with
            2/3, flatness comes in the last third.
        rows: Where the flat parts of the shared gradients are: ``"float32"``, as they come, on the
            device; ``"bfloat16"``, in half the memory; ``"cpu"``, on the host.
        rho_warmup: Updates over which the radii grow linearly to their full size, at least 0. On a
            small network radii that killed every training without it trained well with 200.
        samo_beta: Share of the task's own direction in ``"samo"``, in ``[0, 1]``.
        samo_step: Length of the step, times a normal vector, by which ``"samo"`` estimates that
            direction from two losses, in ``(0, inf)``.

    Raises:
        ValueError: If an argument is out of its bounds, or two exclude each other; when a fit
            begins, if ``"second"`` or ``"each"`` stands beside an aggregator that they cannot do
            with.

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
        refresh: int | float | None = None,
        start: float = 0.0,
        rows: RowKind = "float32",
        rho_warmup: int = 0,
        samo_beta: float = 0.5,
        samo_step: float = 0.01,
    ) -> None:
        check_radius("rho", rho)
        self.sharpness = Sharpness(
            rho_shared=rho if rho_shared is None else rho_shared,
            rho_heads=rho if rho_heads is None else rho_heads,
            adaptive=adaptive,
            point=point,
            aggregate=aggregate,
            perturbation=perturbation,
            refresh=refresh,
            rows=rows,
            samo_beta=samo_beta,
            samo_step=samo_step,
        )
        self.schedule = FlatnessSchedule(start, rho_warmup)

    def __repr__(self) -> str:
        # The method itself in full; of what makes it cheaper only what is asked for.
        shown = [
            f"{field.name}={getattr(settings, field.name)!r}"
            for settings in (self.sharpness, self.schedule)
            for field in fields(settings)
            if field.name in _ALWAYS or getattr(settings, field.name) != field.default
        ]
        return f"TaskSAM({', '.join(shown)})"
