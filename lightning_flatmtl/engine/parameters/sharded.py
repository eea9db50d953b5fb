"""Parameters of which each process holds a part (FSDP2)."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_flatmtl.engine.parameters.backward import BackwardBlocks, local_part
from lightning_flatmtl.engine.parameters.blocks import Setting
from lightning_flatmtl.engine.parameters.flat import Layout

__all__ = ["ShardedBlocks", "reshard"]


class ShardedBlocks(BackwardBlocks):
    """The columns of the task Jacobian that lie in this process.

    Args:
        setting: What is known of the step.

    Raises:
        ValueError: If a trainable parameter is not sharded.
    """

    def __init__(self, setting: Setting) -> None:
        whole = [list(p.shape) for p in setting.trainable if not isinstance(p, DTensor)]
        if whole:
            raise ValueError(
                "With sharded parameters every trainable one must be sharded, got "
                f"{len(whole)} that are not, of shapes {whole[:3]}. Call `fully_shard` on the "
                "encoder and on every head in `configure_model`."
            )
        super().__init__(setting)

    @override
    def _layout(self, params: Sequence[Tensor]) -> Layout:
        return _ShardedLayout(params, self.module)


class _ShardedLayout(Layout):
    """The parts of parameters that lie in this process."""

    def __init__(self, params: Sequence[Tensor], module: nn.Module) -> None:
        super().__init__(params)
        self.tensors = [local_part(p.detach()) for p in params]
        self.sizes = [t.numel() for t in self.tensors]
        self.numel = sum(self.sizes)
        self._module = module

    @override
    def restore(self, saved: Tensor) -> None:
        super().restore(saved)
        reshard(self._module)  # the copies have the values from before

    @override
    def add(self, row: Tensor, factor: float, scale: Tensor | None = None) -> None:
        super().add(row, factor, scale)
        reshard(self._module)


def reshard(module: nn.Module) -> None:
    """Let every sharded layer of ``module`` free what it has brought together for a pass."""
    for layer in module.modules():
        if isinstance(layer, FSDPModule):
            layer.reshard()
