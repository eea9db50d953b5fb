"""Parameters of which each process holds a part (FSDP2)."""

from collections.abc import Sequence
from functools import partial
from typing import final

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_flatmtl.engine.parameters.backward import BackwardBlocks, local_part
from lightning_flatmtl.engine.parameters.blocks import Setting
from lightning_flatmtl.engine.parameters.flat_parameters import FlatParameters

__all__ = ["ShardedBlocks", "reshard"]


@final
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
    def _layout(self, params: Sequence[Tensor]) -> FlatParameters:
        here = [local_part(p.detach()) for p in params]
        # The copies that layers have made have the values from before a move.
        return FlatParameters(params, here, partial(reshard, self.module))


def reshard(module: nn.Module) -> None:
    """Let every sharded layer of ``module`` free what it has brought together for a pass."""
    for layer in module.modules():
        if isinstance(layer, FSDPModule):
            layer.reshard()
