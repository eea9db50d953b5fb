"""The Gram matrix of the task gradients, in float64."""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["column_blocks", "cross_gram", "gram_matrix", "squared_norms", "wide_type"]

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
            bands = _bands(m)
            for block in _widened(jacobian):
                for rows in bands:
                    gram[rows, : rows.stop].addmm_(block[rows], block[: rows.stop].T)
            if len(bands) > 1:
                gram = gram.tril() + gram.tril(-1).T
    return gram.to(torch.float64) if wide != torch.float64 else gram


@torch.no_grad()
def cross_gram(left: Tensor, right: Tensor, device: torch.device | None = None) -> Tensor:
    """Inner products of the rows ``[m, d]`` of one matrix with those ``[n, d]`` of another.

    Args:
        left: Any floating type, on any device.
        right: The same; it may be the same matrix.
        device: Where to compute; by default that of ``left``.

    Returns:
        ``[m, n]`` in float64, accumulated in it, on ``device``.
    """
    device = left.device if device is None else device
    wide = wide_type(device)
    gram = torch.zeros(len(left), len(right), dtype=wide, device=device)
    with torch.autocast(device.type, enabled=False):
        step = _step(device, len(left) + len(right))
        for start in range(0, left.shape[1], step):
            columns = slice(start, start + step)
            block = left[:, columns].to(device, wide, non_blocking=True)
            other = (
                block if right is left else right[:, columns].to(device, wide, non_blocking=True)
            )
            gram.addmm_(block, other.T)
    return gram.to(torch.float64)


@torch.no_grad()
def squared_norms(rows: Tensor, scale: Tensor | None = None) -> Tensor:
    """Squared L2 norms of ``rows`` ``[m, d]``, each entry first multiplied by ``scale`` ``[d]``.

    Returns:
        ``[m]``, float64, on the device of ``rows``.
    """
    m = len(rows)
    total = torch.zeros(m, dtype=wide_type(rows.device), device=rows.device)
    start = 0
    for block in _widened(rows):
        if scale is not None:
            block.mul_(scale[start : start + block.shape[1]])
            start += block.shape[1]
        total += block.square_().sum(dim=1)
    return total


def _widened(matrix: Tensor) -> Iterator[Tensor]:
    """The column blocks in float64, to be used up one by one.

    All lie in the same memory, which stays in the cache: a new piece for each costs page faults, a
    sixth of the time for two rows.
    """
    blocks = column_blocks(matrix)
    shape = blocks[0].shape if blocks else (0, 0)
    buffer = torch.empty(shape, dtype=wide_type(matrix.device), device=matrix.device)
    for block in blocks:
        yield buffer[:, : block.shape[1]].copy_(block)


def _bands(m: int) -> list[slice]:
    """Bands of rows; of each only what lies left of its end is computed, the rest is mirrored.

    Products of fewer rows are too small to gain from being cut.
    """
    count = max(1, m // 80)
    cuts = [m * i // count for i in range(count + 1)]
    return [slice(low, high) for low, high in pairwise(cuts)]


def _step(device: torch.device, rows: int) -> int:
    return max(1024, math.ceil(_CHUNK.get(device.type, 1 << 20) / max(1, rows)))


def column_blocks(matrix: Tensor) -> tuple[Tensor, ...]:
    """Views of some columns each, as many as are worth widening at a time."""
    if matrix.shape[1] == 0:
        return ()
    return torch.split(matrix, _step(matrix.device, len(matrix)), dim=1)
