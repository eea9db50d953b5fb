"""Weighted sums of task gradients, finite wherever the sum itself is."""

import math

import torch
from torch import Tensor

from lightning_flatmtl.engine.aggregation import TaskGradients
from lightning_flatmtl.engine.errors import NonFiniteError
from lightning_flatmtl.engine.gradients.gram import column_blocks, wide_type

__all__ = [
    "bounded_factor",
    "refuse_infinite_direction",
    "refuse_infinite_sum",
    "refuse_infinite_weights",
    "scaled",
    "weighted_rows",
]

_SAFE = 2.0**100
"""Factors between its inverse and it neither overflow nor lose digits in 32 bits."""

_CANCELLATION = 16.0
"""Terms this much longer than their sum are added in float64, which costs some more time."""


def weighted_rows(
    weights: Tensor,
    part: TaskGradients,
    method: object,
    rows: Tensor | None = None,
    onto: Tensor | None = None,
    gain: float = 1.0,
    empty: bool = False,
) -> Tensor:
    """``gain * weights @ rows`` in the precision of the rows, whatever autocast says.

    A weight may be beyond the range of the rows where the product is not (1e39 of a row of 1e-39),
    and terms may nearly cancel: then the sum is taken in float64. All this is decided from the Gram
    matrix, on the host.

    Args:
        weights: Shape ``[m]``, float64 on the CPU.
        part: What the weights were computed from.
        method: What has computed them, for the message.
        rows: Shape ``[m, d]``; those of ``part`` by default, or a process's share of them.
        onto: A vector ``[d]`` to add the result to, in place; a new one by default.
        gain: A common factor, so that the mean over processes is right.
        empty: Whether what ``onto`` holds is undefined, so that the result takes its place.

    Raises:
        NonFiniteError: If the sum is beyond the range of the rows; the message names the method and
            the task with the longest term.
    """
    rows = part.jacobian if rows is None else rows
    narrow = torch.promote_types(rows.dtype, torch.float32)
    total = float((weights * part.gram.diagonal().sqrt()).abs().sum())
    length = refuse_infinite_sum(weights, part, method, narrow)
    weights = weights * gain
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        if narrow != torch.float64 and not _is_plain(weights, total * abs(gain), length):
            target = torch.empty_like(rows[0]) if onto is None else onto
            if onto is None or empty:
                target.zero_()
            return _add_carefully(weights, rows, target)
        plain = weights.to(rows.device, narrow)
        if onto is None:
            return torch.mv(rows.T.to(narrow), plain).to(rows.dtype)
        if rows.dtype != onto.dtype or rows.device != onto.device:
            return onto.add_(_in_blocks(plain, rows).to(onto))  # of rows that are kept elsewhere
        return onto.addmv_(rows.T, plain, beta=0.0 if empty else 1.0)


def _length(weights: Tensor, gram: Tensor, total: float) -> float:
    """The norm of the weighted sum; NaN or infinite if a weight is."""
    if total == 0 or not math.isfinite(total):
        return total
    shares = weights / total
    return total * math.sqrt(max(0.0, float(shares @ gram @ shares)))


def _is_plain(weights: Tensor, total: float, length: float) -> bool:
    """Whether a sum in 32 bits keeps to the rounding error of its result."""
    used = weights[weights != 0].abs()
    if len(used) == 0:
        return True
    lowest, highest = used.aminmax()
    inside = float(lowest) * _SAFE >= 1 and float(highest) <= _SAFE
    return inside and total <= _SAFE and total <= _CANCELLATION * length


def _add_carefully(weights: Tensor, rows: Tensor, onto: Tensor) -> Tensor:
    """Add the sum in float64 (on MPS, which has none, with factors of half the magnitude)."""
    wide = wide_type(rows.device)
    root = weights.abs().sqrt()
    first = root.to(rows.device, wide)[:, None]
    second = (root * weights.sign()).to(rows.device, wide)
    start = 0
    for block in column_blocks(rows):
        piece = torch.mv((block.to(wide) * first).T, second)
        onto[start : start + len(piece)] += piece.to(onto)
        start += len(piece)
    return onto


def _in_blocks(weights: Tensor, rows: Tensor) -> Tensor:
    """The weighted sum in the type of the weights, without a copy of all rows in it."""
    blocks = column_blocks(rows)
    pieces = [torch.mv(block.T.to(weights.dtype), weights) for block in blocks]
    return torch.cat(pieces) if pieces else weights.new_zeros(0)


def scaled(row: Tensor, factor: float) -> Tensor:
    """``factor * row``, also where ``factor`` is beyond the range of the row's type."""
    if factor == 0 or row.dtype == torch.float64 or 1 / _SAFE <= abs(factor) <= _SAFE:
        return row * factor
    root = math.sqrt(abs(factor))
    return row * root * math.copysign(root, factor)


def bounded_factor(factor: float, dtype: torch.dtype) -> float:
    """``factor``, or the largest that a backward pass in ``dtype`` can begin with.

    Room is left for the loss scale and for what the layers multiply it by.
    """
    bound: float = torch.finfo(dtype).max ** 0.8
    return min(factor, bound)


def refuse_infinite_weights(weights: Tensor | None, tasks: tuple[str, ...], method: object) -> None:
    """Refuse weights of the losses that are NaN or infinite.

    Raises:
        NonFiniteError: If there is one; the message names method and task.
    """
    if weights is None:
        return
    for task, weight in zip(tasks, weights.tolist(), strict=True):
        if not math.isfinite(weight):
            raise NonFiniteError(
                f"The weights of {method!r} must be finite, got {weight} for task '{task}'. "
                f"Rescale the loss of that task, or use another aggregator."
            )


def refuse_infinite_sum(
    weights: Tensor, part: TaskGradients, method: object, dtype: torch.dtype
) -> float:
    """Refuse weights with which the sum of the rows is beyond the range of ``dtype``.

    Returns:
        The length of the sum, from the Gram matrix.

    Raises:
        NonFiniteError: If so; the message names the method and the task with the longest term.
    """
    terms = (weights * part.gram.diagonal().sqrt()).abs()
    length = _length(weights, part.gram, float(terms.sum()))
    if not length <= torch.finfo(dtype).max:
        raise _infinite(method, part, weights, terms)
    return length


def refuse_infinite_direction(finite: bool, part: TaskGradients, method: object) -> None:
    """Refuse a direction that was not computed as a weighted sum and is not ``finite``.

    Raises:
        NonFiniteError: If so; the message names the method and the task of the longest gradient.
    """
    if not finite:
        raise _infinite(method, part, None, part.gram.diagonal().sqrt())


def _infinite(
    method: object, part: TaskGradients, weights: Tensor | None, terms: Tensor
) -> NonFiniteError:
    # NaN counts as the longest.
    worst = int(torch.where(terms.isfinite(), terms, torch.inf).argmax())
    norm = float(part.gram[worst, worst].sqrt())
    weight = "" if weights is None else f" and the weight {float(weights[worst]):.3g}"
    return NonFiniteError(
        f"The direction of {method!r} must be finite, got one beyond the range of its type. The "
        f"largest share is that of task '{part.tasks[worst]}', whose gradient has the norm "
        f"{norm:.3g}{weight}. Rescale the loss of that task, or use another aggregator."
    )
