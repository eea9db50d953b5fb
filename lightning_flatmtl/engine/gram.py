"""The Gram matrix of the task gradients, in float64."""

import math

import torch
from torch import Tensor

__all__ = ["column_blocks", "gram_matrix", "squared_norms", "wide_type"]

_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Entries that are widened to float64 at a time: what a CPU cache holds, what feeds a GPU."""


def wide_type(device: torch.device) -> torch.dtype:
    """Float64 where the device has it; Apple's MPS has not."""
    return torch.float32 if device.type == "mps" else torch.float64


@torch.no_grad()
def gram_matrix(jacobian: Tensor) -> Tensor:
    r"""Inner products of all pairs of task gradients, :math:`K = G G^\top`.

    Accumulated in float64 over blocks of columns, so that neither precision nor a second copy of
    the Jacobian is lost to it.

    Args:
        jacobian: One row per task, shape ``[m, d]``, any floating type.

    Returns:
        The symmetric ``[m, m]`` Gram in float64, on the device of ``jacobian``.

    Example:
        >>> import torch
        >>> gram_matrix(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([[25.,  4.],
                [ 4.,  1.]], dtype=torch.float64)
    """
    m = len(jacobian)
    wide = wide_type(jacobian.device)
    with torch.autocast(jacobian.device.type, enabled=False):
        if jacobian.dtype == wide:
            gram = jacobian @ jacobian.T
        else:
            gram = torch.zeros(m, m, dtype=wide, device=jacobian.device)
            for block in column_blocks(jacobian):
                widened = block.to(wide)
                gram.addmm_(widened, widened.T)
    return gram.to(torch.float64) if wide != torch.float64 else gram


@torch.no_grad()
def squared_norms(rows: Tensor, scale: Tensor | None = None) -> Tensor:
    """Squared L2 norms of ``rows`` ``[m, d]``, each entry first multiplied by ``scale`` ``[d]``.

    Returns:
        ``[m]``, float64, on the device of ``rows``.
    """
    m = len(rows)
    wide = wide_type(rows.device)
    total = torch.zeros(m, dtype=wide, device=rows.device)
    step = _step(rows.device, m)
    for start in range(0, rows.shape[1], step):
        block = rows[:, start : start + step].to(wide)
        if scale is not None:
            block = block * scale[start : start + step]
        total += block.square_().sum(dim=1) if block.dtype != rows.dtype else block.square().sum(1)
    return total


def _step(device: torch.device, rows: int) -> int:
    return max(1024, math.ceil(_CHUNK.get(device.type, 1 << 20) / max(1, rows)))


def column_blocks(matrix: Tensor) -> tuple[Tensor, ...]:
    """Views of some columns each, as many as are worth widening at a time."""
    if matrix.shape[1] == 0:
        return ()
    return torch.split(matrix, _step(matrix.device, len(matrix)), dim=1)
