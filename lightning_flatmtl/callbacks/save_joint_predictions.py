"""Joint predictions, written to a table."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from typing_extensions import override

from lightning_flatmtl.prediction import JointLabels, JointPrediction
from lightning_flatmtl.task import MultiLabelTask

__all__ = ["SaveJointPredictions"]


@final
class SaveJointPredictions(BasePredictionWriter):
    """Writes the joint prediction of every sample in ``predict``, as a CSV file.

    One file per process and data loader, ``loader_0_rank_0.csv``, with a row for each sample: its
    index in the data, the label of every task (of a multi-label task those that hold, as ``0 3``),
    the ``probability`` of all of them together, and whether it has ``abstained``. See
    :class:`~lightning_flatmtl.JointPrediction`.

    Args:
        folder: Where to write; it is made if there is none.
        threshold: The smallest joint probability that is answered, in [0, 1].
        classes: The tasks that take part, with the number of their classes; by default all.
        multi_label: The tasks with several labels that go together; by default those that are a
            :class:`~lightning_flatmtl.MultiLabelTask`.

    Raises:
        ValueError: If an argument is out of its bounds.

    Example:
        >>> from lightning_flatmtl.callbacks import SaveJointPredictions
        >>> callbacks = [SaveJointPredictions("predictions", threshold=0.8)]
    """

    def __init__(
        self,
        folder: str = "predictions",
        threshold: float = 0.5,
        classes: dict[str, int] | None = None,
        multi_label: list[str] | None = None,
    ) -> None:
        super().__init__(write_interval="epoch")
        self.folder = Path(folder)
        self.joint = JointPrediction(threshold, classes, multi_label or ())
        self._asked = multi_label is not None

    @override
    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Join the tasks of every sample and write them."""
        tasks = getattr(pl_module, "tasks", ())
        if not self._asked:
            self.joint.multi_label = tuple(t.name for t in tasks if isinstance(t, MultiLabelTask))
        self.folder.mkdir(parents=True, exist_ok=True)
        # With a single data loader Lightning leaves the outer list out.
        loaders = predictions if isinstance(predictions[0], list) else [predictions]
        for number, (batches, indices) in enumerate(zip(loaders, batch_indices, strict=True)):
            samples = [i for batch in indices for i in batch]
            path = self.folder / f"loader_{number}_rank_{trainer.global_rank}.csv"
            self._write(path, self.joint(batches), samples)

    def _write(self, path: Path, joint: JointLabels, samples: Sequence[int]) -> None:
        columns = [[_word(label) for label in labels.tolist()] for labels in joint.labels.values()]
        probabilities = [f"{p:.6g}" for p in joint.probability.tolist()]
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["sample", *joint.labels, "probability", "abstained"])
            writer.writerows(
                zip(samples, *columns, probabilities, joint.abstained.tolist(), strict=True)
            )


def _word(label: Any) -> str:
    """A label; of several those that hold."""
    if isinstance(label, list):
        return " ".join(str(i) for i, holds in enumerate(label) if holds)
    return str(label)
