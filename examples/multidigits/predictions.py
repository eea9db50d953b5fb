r"""Keeps what `flatmtl predict` predicts, which Lightning throws away otherwise.

PYTHONPATH=examples/multidigits flatmtl predict --config examples/multidigits/f_cagrad.yaml \
    --ckpt_path runs/multidigits/f_cagrad/version_0/checkpoints/best.ckpt \
    --trainer.callbacks+=predictions.SavePredictions --trainer.callbacks.folder=predictions
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor


class SavePredictions(BasePredictionWriter):
    """Writes one file per process and data loader, ``{task: outputs}`` in the order of the data.

    Args:
        folder: Where to write; it is made if there is none.
    """

    def __init__(self, folder: str = "predictions") -> None:
        super().__init__(write_interval="epoch")
        self.folder = Path(folder)

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Join the batches of every task and write them, with the indices of their samples."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # With a single data loader Lightning leaves the outer list out.
        loaders = [predictions] if isinstance(predictions[0], dict) else predictions
        for number, (batches, indices) in enumerate(zip(loaders, batch_indices, strict=True)):
            outputs: dict[str, Tensor] = {
                task: torch.cat([batch[task].cpu() for batch in batches]) for task in batches[0]
            }
            samples = [i for batch in indices for i in batch]
            path = self.folder / f"loader_{number}_rank_{trainer.global_rank}.pt"
            torch.save({"outputs": outputs, "samples": samples}, path)
