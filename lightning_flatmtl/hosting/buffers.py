"""Buffers of several processes: the running statistics that each finds in its own samples."""

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

__all__ = ["share_buffers"]


def share_buffers(trainer: Trainer, module: LightningModule) -> None:
    """Give all processes the buffers of the first, as automatic optimization does.

    Lightning's data-parallel training leaves them apart in manual optimization. One broadcast for
    each type of numbers.
    """
    wrapped = trainer.model
    wanted = not isinstance(wrapped, DistributedDataParallel) or wrapped.broadcast_buffers
    if trainer.world_size == 1 or not wanted:
        return
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for buffer in module.buffers():
        by_type.setdefault(buffer.dtype, []).append(buffer)
    with torch.no_grad():
        for buffers in by_type.values():
            flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
            dist.broadcast(flat, src=0)
            pieces = torch.split(flat, [buffer.numel() for buffer in buffers])
            for buffer, piece in zip(buffers, pieces, strict=True):
                buffer.copy_(piece.view_as(buffer))
