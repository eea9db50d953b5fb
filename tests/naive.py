"""Algorithm 1 written naively: deep copies, one task at a time, no code of the package.

Everything is recomputed from the model function at explicit parameter values; nothing is cached,
nothing is solved in Gram space. Used to check the engine in float64.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

Params = dict[str, Tensor]


def gradient(loss_of: Callable[[Params], Tensor], at: Params, names: list[str]) -> Params:
    """Gradient of ``loss_of`` with respect to the entries ``names``, zero where unused."""
    leaves = {k: v.detach().clone().requires_grad_(k in names) for k, v in at.items()}
    loss = loss_of(leaves)
    if not names:
        return {}
    grads = torch.autograd.grad(loss, [leaves[k] for k in names], allow_unused=True)
    return {
        k: torch.zeros_like(at[k]) if g is None else g.detach()
        for k, g in zip(names, grads, strict=True)
    }


def perturb(at: Params, grads: Params, rho: float, adaptive: bool) -> Params:
    scaled = {k: (at[k].abs() if adaptive else 1.0) * g for k, g in grads.items()}
    norm = torch.sqrt(sum((g**2).sum() for g in scaled.values())) if scaled else torch.tensor(0.0)
    moved = dict(at)
    if norm > 0:
        for k, g in grads.items():
            factor = at[k] ** 2 if adaptive else 1.0
            moved[k] = at[k] + rho * factor * g / norm
    return moved


def vector(grads: Params) -> Tensor:
    return torch.cat([g.reshape(-1) for g in grads.values()])


ARMS = {
    "split": lambda g, f, a: a(g) + a(f),
    "direct": lambda g, f, a: a(g + f),
    "second": lambda g, f, a: a(torch.stack([a(g), a(f)])),
    "each": lambda g, f, a: a(torch.stack([a(pair) for pair in torch.stack([g, f], 1)])),
}
"""The direction from loss parts, flat parts and an aggregator of rows."""


def f_mtl_gradients(
    losses: dict[str, Callable[[Params], Tensor]],
    params: Params,
    shared: list[str],
    heads: dict[str, list[str]],
    aggregate: Callable[[Tensor, Tensor], Tensor],
    *,
    rho: float = 0.0,
    rho_heads: float | None = None,
    adaptive: bool = False,
    point: str = "separate",
    arm: str = "split",
) -> Params:
    """The update direction of every parameter; ``aggregate(rows, losses)`` is method X."""
    rho_heads = rho if rho_heads is None else rho_heads
    loss_rows, sam_rows, result = [], [], {}
    values = torch.stack([f(params).detach() for f in losses.values()])
    for task, loss_of in losses.items():
        g_sh = gradient(loss_of, params, shared)
        g_ns = gradient(loss_of, params, heads[task])
        at_sh = perturb(params, g_sh, rho, adaptive)
        at_ns = perturb(params, g_ns, rho_heads, adaptive)
        if point == "joint":
            both = {k: at_sh[k] if k in shared else at_ns[k] for k in params}
            at_sh = at_ns = both
        s_sh = gradient(loss_of, at_sh, shared)
        s_ns = gradient(loss_of, at_ns, heads[task])
        loss_rows.append(vector(g_sh))
        sam_rows.append(vector(s_sh))
        result.update(s_ns)
    g, s = torch.stack(loss_rows), torch.stack(sam_rows)
    if rho == 0 and rho_heads == 0:
        direction = aggregate(g, values)
    else:
        direction = ARMS[arm](g, s - g, lambda rows: aggregate(rows, values))
    start = 0
    for k in shared:
        n = params[k].numel()
        result[k] = direction[start : start + n].view_as(params[k])
        start += n
    return result


# Aggregators, by brute force on the rows themselves.


def ls(rows: Tensor, losses: Tensor) -> Tensor:
    return rows.sum(0)


def _on_supports(rows: Tensor, solve: Callable[[Tensor], Tensor]) -> list[Tensor]:
    found = []
    for size in range(1, len(rows) + 1):
        for support in itertools.combinations(range(len(rows)), size):
            weights = torch.zeros(len(rows), dtype=rows.dtype)
            weights[list(support)] = solve(rows[list(support)])
            if bool((weights >= -1e-14).all()):
                found.append(weights)
    return found


def mgda(rows: Tensor, losses: Tensor) -> Tensor:
    """Affine min-norm point of every subset of rows; the best feasible one."""

    def affine(sub: Tensor) -> Tensor:
        base, diffs = sub[0], sub[1:] - sub[0]
        if not len(diffs):
            return torch.ones(1, dtype=rows.dtype)
        tail = torch.linalg.lstsq(diffs.T, -base[:, None]).solution[:, 0]
        return torch.cat([1 - tail.sum()[None], tail])

    return min((w @ rows for w in _on_supports(rows, affine)), key=lambda d: d.norm().item())


def mgda_l2(rows: Tensor, losses: Tensor) -> Tensor:
    return _mgda_scaled(rows, rows.norm(dim=1))


def mgda_loss(rows: Tensor, losses: Tensor) -> Tensor:
    return _mgda_scaled(rows, losses)


def mgda_loss_plus(rows: Tensor, losses: Tensor) -> Tensor:
    return _mgda_scaled(rows, losses * rows.norm(dim=1))


def _mgda_scaled(rows: Tensor, scale: Tensor) -> Tensor:
    normalised = rows / scale[:, None]
    target = mgda(normalised, scale)
    weights = torch.linalg.lstsq(normalised.T, target[:, None]).solution[:, 0]
    return weights @ rows


def pcgrad(rows: Tensor, losses: Tensor) -> Tensor:
    """Only for two tasks, where the order does not matter."""
    a, b = rows
    projected = []
    for g, other in ((a, b), (b, a)):
        dot = g @ other
        projected.append(g - dot / (other @ other) * other if dot < 0 else g)
    return projected[0] + projected[1]


def imtl_g(rows: Tensor, losses: Tensor) -> Tensor:
    """The closed form of the paper: alpha_2.. = g_1 U' (D U')^-1."""
    units = rows / rows.norm(dim=1, keepdim=True)
    if len(rows) == 1:
        return rows[0]
    d, u = rows[0] - rows[1:], units[0] - units[1:]
    tail = rows[0] @ u.T @ torch.linalg.inv(d @ u.T)
    return torch.cat([1 - tail.sum()[None], tail]) @ rows


def cagrad(c: float, rescale: bool = True) -> Callable[[Tensor, Tensor], Tensor]:
    """Golden-section search, for two tasks, on the published one-dimensional objective."""

    def direction(rows: Tensor, losses: Tensor) -> Tensor:
        g0 = rows.mean(0)

        def slope(w: Tensor) -> Tensor:
            w = w.detach().requires_grad_()
            gw = w * rows[0] + (1 - w) * rows[1]
            value = gw @ g0 + c * g0.norm() * gw.norm()
            return torch.autograd.grad(value, w)[0]

        low, high = (torch.tensor(v, dtype=rows.dtype) for v in (0.0, 1.0))
        if slope(low) >= 0:
            high = low
        elif slope(high) <= 0:
            low = high
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (low, middle) if slope(middle) > 0 else (middle, high)
        w = (low + high) / 2
        gw = w * rows[0] + (1 - w) * rows[1]
        d = g0 + c * g0.norm() / gw.norm() * gw
        return d / (1 + c**2) if rescale else d

    return direction
