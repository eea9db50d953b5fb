"""What tasks with a prediction for every pixel have in common."""

from torch import nn

from lightning_flatmtl.models.dense_head import DenseHead

__all__ = ["dense_head"]


def dense_head(head: nn.Module | None, in_channels: int | None, out_channels: int) -> nn.Module:
    """The head that is given, or one for features of ``in_channels``.

    Raises:
        ValueError: If both or none of them are given.
    """
    if (head is None) == (in_channels is None):
        got = "both" if head is not None else "neither"
        raise ValueError(
            "One of `head` and `in_channels` must be given, to make a DenseHead for features of so "
            f"many channels, got {got}."
        )
    return head if in_channels is None else DenseHead(in_channels, out_channels)  # type: ignore[return-value]
