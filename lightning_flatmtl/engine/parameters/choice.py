"""Which columns the task Jacobian of a step has."""

from lightning_flatmtl.engine.parameters.backward import HiddenBlocks
from lightning_flatmtl.engine.parameters.blocks import Blocks, ParameterBlocks, Setting
from lightning_flatmtl.engine.parameters.features import FeatureBlocks
from lightning_flatmtl.engine.parameters.sharded import ShardedBlocks
from lightning_flatmtl.engine.passes.base import Passes
from lightning_flatmtl.engine.sharpness import Sharpness

__all__ = ["blocks_for"]


def blocks_for(setting: Setting, passes: Passes, sharpness: Sharpness | None) -> Blocks:
    """The columns of the task Jacobian: the shared parameters, or the features."""
    if passes.without_matrix:
        _refuse_unfit(setting, sharpness)
    if setting.processes.sharded:
        if sharpness is not None and sharpness.perturbation == "local":
            raise ValueError(
                "With sharded parameters no process has gradients of its own, got "
                "TaskSAM(perturbation='local'). Use 'global'."
            )
        if sharpness is not None and (sharpness.keeps or sharpness.perturbation == "samo"):
            raise ValueError(
                "With sharded parameters TaskSAM cannot keep flat parts or use SAMO, got "
                f"refresh={sharpness.refresh}, rows={sharpness.rows!r}, "
                f"perturbation={sharpness.perturbation!r}. Use perturbation='common' or start=... "
                "for less cost, or strategy='ddp'."
            )
        return ShardedBlocks(setting)
    if setting.partition.needs_backward:
        return HiddenBlocks(setting)
    blocks = ParameterBlocks(setting)
    if not passes.at_features or not blocks.shared.params:
        return blocks
    if sharpness is not None:
        raise ValueError(
            "TaskSAM perturbs parameters and needs `gradients='parameters'`, got 'features'. "
            "Remove one of the two."
        )
    with setting.failure.kept():
        return FeatureBlocks(setting, passes.features)
    return FeatureBlocks(setting, None)  # like a process that has no features to send


def _refuse_unfit(setting: Setting, sharpness: Sharpness | None) -> None:
    """Refuse what the Gram matrix cannot be found for without the rows."""
    if sharpness is not None:
        raise ValueError(
            "TaskSAM needs the rows of the task Jacobian, `gradients='parameters'`, got 'gram'. "
            "Remove one of the two."
        )
    if setting.processes.size > 1:
        raise ValueError(
            "With `gradients='gram'` one process has the whole batch, got "
            f"{setting.processes.size}: the Gram matrix of summed rows needs the rows. Use "
            "`gradients='parameters'`."
        )
    if setting.partition.needs_backward:
        raise ValueError(
            "With `gradients='gram'` the graph must show every parameter, got a reentrant "
            "checkpoint. Use `checkpoint(..., use_reentrant=False)`, or `gradients='parameters'`."
        )
