"""Rows that outlive a pass: on the device, there in 16 bits, or on the host."""

from typing import Any

import torch
from torch import Tensor

from lightning_flatmtl.engine.sharpness import RowKind

__all__ = ["RowStore"]


class RowStore:
    """Memory ``[slots, width]`` for rows that are written one by one and read together.

    On the host it is pinned where the gradients are on a GPU, and a row goes there on a stream of
    its own, beside the backward pass of the next one.

    Args:
        kind: Where and how the rows are kept.
        slots: The number of rows; all begin as zeros.
        like: A row as it comes, ``[width]``.
    """

    def __init__(self, kind: RowKind, slots: int, like: Tensor) -> None:
        self._host = kind == "cpu" and like.device.type != "cpu"
        dtype = torch.bfloat16 if kind == "bfloat16" else like.dtype
        pinned = self._host and like.device.type == "cuda"
        self.device = like.device
        self.rows = torch.zeros(
            slots,
            len(like),
            dtype=dtype,
            device=torch.device("cpu") if kind == "cpu" else like.device,
            pin_memory=pinned,
        )
        """The rows, to be read after :meth:`settle`."""
        self._stream: Any = torch.cuda.Stream(like.device) if pinned else None  # type: ignore[no-untyped-call]
        self._sent: list[tuple[Tensor, Any]] = []

    @torch.no_grad()
    def put(self, slot: int, row: Tensor, weight: float = 1.0) -> None:
        """Move a row towards ``row`` by ``weight``; 1 puts it there, whatever was there before."""
        kept = self.rows[slot]
        if weight != 1.0:
            self.settle()
            mean = kept.to(row.device, row.dtype).lerp_(row, weight)
            kept.copy_(mean)
        elif self._stream is None:
            kept.copy_(row)
        else:
            self._send(kept, row)

    def _send(self, kept: Tensor, row: Tensor) -> None:
        """Copy a row to the host, on the other stream; ``row`` may be written again at once."""
        here = torch.cuda.current_stream(self.device)
        if len(self._sent) == 2:  # as many copies as are under way at a time
            _, earlier = self._sent.pop(0)
            here.wait_event(earlier)
        row = row.clone()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            kept.copy_(row, non_blocking=True)
            row.record_stream(self._stream)
            self._sent.append((row, self._stream.record_event()))

    def settle(self) -> None:
        """Wait for the copies that are under way."""
        self._sent.clear()
        if self._stream is not None:
            self._stream.synchronize()

    @torch.no_grad()
    def zero(self, slot: int) -> None:
        """Make a row zeros."""
        self.settle()
        self.rows[slot].zero_()
