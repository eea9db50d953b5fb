"""Memory that a step uses again and again."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["Workspace"]


class Workspace:
    """Named buffers, kept between steps.

    A large allocation that is freed after every step costs page faults at every step. Copying or
    pickling a workspace gives an empty one: what it holds means nothing between steps.

    Example:
        >>> import torch
        >>> workspace = Workspace()
        >>> a = workspace.take("rows", (2, 3), torch.float32, torch.device("cpu"))
        >>> b = workspace.take("rows", (2, 3), torch.float32, torch.device("cpu"))
        >>> a.data_ptr() == b.data_ptr()
        True
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """The buffer ``name``, its content undefined, made anew if anything about it differs."""
        buffer = self._buffers.get(name)
        same = (
            buffer is not None
            and buffer.shape == torch.Size(shape)
            and buffer.dtype == dtype
            and buffer.device == device
        )
        if buffer is None or not same:
            self._buffers.pop(name, None)  # free the old one before the new one is made
            buffer = torch.empty(shape, dtype=dtype, device=device)
            self._buffers[name] = buffer
        return buffer

    def clear(self) -> None:
        """Give the memory back."""
        self._buffers.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Workspace":
        return Workspace()

    def __getstate__(self) -> dict[str, Any]:
        return {"_buffers": {}}
