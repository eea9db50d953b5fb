"""Parameters frozen and thawed within a fit, as by Lightning's BackboneFinetuning.

Two things that Lightning leaves out there: a run that resumes after the thaw goes on frozen
(https://github.com/Lightning-AI/pytorch-lightning/issues/21901), and data-parallel training does
not average what was frozen at its beginning, so that processes drift apart
(https://github.com/Lightning-AI/pytorch-lightning/issues/20340).
"""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

__all__ = ["ThawedInParallel", "save_frozen", "thaw_as_saved"]

_KEY = "lightning_flatmtl.frozen"


def save_frozen(trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Add what is frozen, if a callback freezes and thaws."""
    if _finetunes(trainer):
        checkpoint[_KEY] = [n for n, p in module.named_parameters() if not p.requires_grad]


def thaw_as_saved(trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Thaw what was thawed when the checkpoint was written, and is to go on so."""
    if _KEY not in checkpoint or not _finetunes(trainer) or not trainer.training:
        return
    frozen = set(checkpoint[_KEY])
    thawed = {p for name, p in module.named_parameters() if name not in frozen}
    for p in thawed:
        p.requires_grad_(True)
    for layer in module.modules():
        if isinstance(layer, _BatchNorm) and layer.weight in thawed:
            layer.track_running_stats = True  # what a finetuning callback has switched off


class ThawedInParallel:
    """Lets data-parallel training average anew over what is trained, whenever that changes."""

    def __init__(self) -> None:
        self._trained: list[bool] = []

    def begin(self, module: LightningModule) -> None:
        """What is trained when the processes are put together."""
        self._trained = _trained(module)

    def before_batch(self, trainer: Trainer, module: LightningModule) -> None:
        """Put the processes together again if something was frozen or thawed since."""
        strategy: Any = trainer.strategy
        if trainer.world_size == 1 or not isinstance(strategy.model, DistributedDataParallel):
            return
        trained = _trained(module)
        if trained != self._trained:
            strategy.model = strategy.model.module
            strategy.configure_ddp()
            self._trained = trained


def _trained(module: LightningModule) -> list[bool]:
    return [p.requires_grad for p in module.parameters()]


def _finetunes(trainer: Trainer) -> bool:
    """Whether a callback is one of Lightning's for finetuning, in either of its two packages."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return any(kind.__name__ == "BaseFinetuning" for c in callbacks for kind in type(c).__mro__)
