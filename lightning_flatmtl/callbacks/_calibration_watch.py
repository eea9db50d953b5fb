"""What one evaluation shows of the classifications among the tasks, in all processes."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer

from lightning_flatmtl.callbacks._calibration_sums import Sums, add_up, everyones
from lightning_flatmtl.callbacks._classification import Kind, kind_by_loss, labelled
from lightning_flatmtl.hosting.host import Host
from lightning_flatmtl.hosting.names import nearest

__all__ = ["Wanted", "Watch"]

Wanted = Mapping[str, Kind | None]
"""The tasks that are asked for, and their kinds as far as they are told."""

_HOW = (
    '`validation_step` (and `test_step`) must return {"logits": {task: logits}, "targets": {task: '
    "labels}}"
)


Key = tuple[int, str]
"""A data loader and a task."""

Classes = tuple[Kind, int]
"""What classification a task is, and the number of its classes."""


class _Seen(NamedTuple):
    """What a process has seen of a task on a data loader."""

    classes: Classes
    probabilities: bool
    """Whether every sample had a distribution in the place of logits."""
    samples: int


class Watch:
    """Adds up what the steps of one evaluation predict.

    An error is kept until all processes meet: the others would wait for the one that has it.

    Args:
        module: The module.
        wanted: The tasks to look at; ``None`` for all that are classifications.
        n_bins: The number of bins of the confidence.
        device: Where the predictions are.
    """

    def __init__(
        self, module: LightningModule, wanted: Wanted | None, n_bins: int, device: torch.device
    ) -> None:
        self._module, self._wanted = module, wanted
        self._n_bins, self._device = n_bins, device
        self._faults: list[str] = []
        self._names: list[str] = []
        self._left_out: set[str] = set()
        self.loader = 0
        """The data loader of the batch at hand."""
        self.last_loader = 0
        """The last one that any process has drawn from."""
        self.sums: dict[Key, Sums] = {}
        """By data loader and task."""

    def see(self, task: str, logits: Any, target: Any) -> None:
        """Add what a batch has of one task."""
        if task not in self._names:
            self._names.append(task)
        if task in self._left_out or (self._wanted is not None and task not in self._wanted):
            return
        try:
            self._add(task, logits, target)
        except MisconfigurationException as error:
            self._faults.append(str(error))
            self._left_out.add(task)

    def see_outputs(self, outputs: Any) -> None:
        """Add what a step of an existing module has returned."""
        if outputs is None:
            return
        parts = [outputs.get(k) for k in ("logits", "targets")] if _is_map(outputs) else []
        if not parts or not all(map(_is_map, parts)):
            got = f"the keys {list(outputs)}" if _is_map(outputs) else type(outputs).__name__
            self._faults.append(
                f"For Calibration {_HOW}, got {got}. Return them, or remove the callback."
            )
            return
        logits, targets = parts
        for task, of_task in logits.items():
            if of_task is None or targets.get(task) is None:
                continue
            self.see(str(task), of_task, targets[task])

    def _add(self, task: str, logits: Any, target: Any) -> None:
        kind, ignored = self._known(task)
        batch = labelled(task, logits, target, kind, ignored, self._wanted is not None)
        if batch is None:
            if self._wanted is not None:
                raise MisconfigurationException(_no_classification(task, logits, target))
            self._left_out.add(task)
            return
        key = self.loader, task
        if key not in self.sums:
            self.sums[key] = Sums(batch.kind, batch.classes, self._n_bins, self._device)
        known = self.sums[key]
        _refuse_other(task, (known.kind, known.classes), (batch.kind, batch.classes))
        known.update(batch)

    def _known(self, task: str) -> tuple[Kind | Literal["other"] | None, int | None]:
        """What is told of a task: its kind, and the label that its loss ignores."""
        told = None if self._wanted is None else self._wanted[task]
        tasks = self._module.tasks if isinstance(self._module, Host) else ()
        loss = next((t.loss for t in tasks if t.name == task), None)
        return told or kind_by_loss(loss), getattr(loss, "ignore_index", None)

    def agree(self, trainer: Trainer) -> None:
        """Bring the findings of all processes together; to be called in all of them.

        Raises:
            MisconfigurationException: If any of them has seen what is not to be.
        """
        mine = {
            key: _Seen((of.kind, of.classes), of.probabilities, of.count)
            for key, of in self.sums.items()
        }
        answers = everyones(trainer, (self.loader, self._faults, self._names, self._left_out, mine))
        loaders, faults, names, left_out, seen = zip(*answers, strict=True)
        for told in (fault for of_process in faults for fault in of_process):
            raise MisconfigurationException(told)
        self.last_loader = max(loaders)
        self._names = list(dict.fromkeys(name for of_process in names for name in of_process))
        self._left_out = set().union(*left_out)
        found = _of_all(seen)
        for task in {task: None for _, task in found if task not in self._left_out}:
            _refuse_probabilities(task, [s for (_, name), s in found.items() if name == task])
        # In the same order in all processes, and those too that this one has nothing of.
        self.sums = {
            key: self.sums.get(key) or Sums(*of.classes, self._n_bins, self._device)
            for key, of in sorted(found.items(), key=self._place)
            if key[1] not in self._left_out and of.samples
        }
        add_up(trainer, [metric for of_task in self.sums.values() for metric in of_task.metrics])

    def _place(self, item: tuple[Key, Any]) -> tuple[int, int]:
        """Where a task on a data loader stands among the others: in the order of the tasks."""
        (loader, task), _ = item
        return loader, self._names.index(task)

    def refuse_nothing(self) -> None:
        """After a whole evaluation: refuse that there is nothing to be said.

        Raises:
            MisconfigurationException: If a task that is asked for has not come, or if no
                classification has.
        """
        unknown = [task for task in self._wanted or () if task not in self._names]
        if unknown and not isinstance(self._module, Host):
            raise MisconfigurationException(
                f"`tasks` of Calibration must be tasks of the module, got '{unknown[0]}' beside "
                f"{self._names}. {nearest(unknown[0], self._names)}Correct the name."
            )
        if self._names and not self.sums and self._left_out >= set(self._names):
            raise MisconfigurationException(
                f"Calibration expects a classification among the tasks, got {self._names}, none of "
                "which has logits [n, classes, ...] with integer labels [n, ...], or binary logits "
                "with labels 0 and 1 of their shape. Remove the callback."
            )
        if not self._names:
            raise MisconfigurationException(
                "Calibration has seen no predictions in a whole evaluation. "
                + (
                    "Call `self.update_metrics(task, logits, target)` in your `losses`, "
                    "`task_loss` or `validation_step`"
                    if isinstance(self._module, Host)
                    else f"{_HOW[0].upper()}{_HOW[1:]}"
                )
                + ", or remove the callback."
            )


def _is_map(value: Any) -> bool:
    return isinstance(value, Mapping)


def _no_classification(task: str, logits: Any, target: Any) -> str:
    shown = ", ".join(
        f"{name} of shape {list(x.shape)} and type {x.dtype}"
        if isinstance(x, torch.Tensor)
        else f"{name} of type {type(x).__name__}"
        for name, x in {"predictions": logits, "targets": target}.items()
    )
    return (
        f"`tasks` of Calibration must be classifications, got '{task}' with {shown}. Expected "
        "logits [n, classes, ...] with integer targets [n, ...], or binary logits with targets of "
        "their shape. Correct `tasks`."
    )


def _of_all(processes: Sequence[Mapping[Key, _Seen]]) -> dict[Key, _Seen]:
    """What all processes together have seen."""
    found: dict[Key, _Seen] = {}
    for of_process in processes:
        for key, seen in of_process.items():
            known = found.get(key, _Seen(seen.classes, True, 0))
            _refuse_other(key[1], known.classes, seen.classes)
            probabilities = known.probabilities and (seen.probabilities or not seen.samples)
            found[key] = _Seen(seen.classes, probabilities, known.samples + seen.samples)
    return found


def _refuse_other(task: str, known: Classes, found: Classes) -> None:
    if known == found:
        return
    raise MisconfigurationException(
        f"Calibration expects task '{task}' to have the same classes in every batch, got "
        f"{found[0]} logits of {found[1]} classes after {known[0]} ones of {known[1]}. Say which "
        f'it is: `tasks={{"{task}": "multiclass"}}`, or leave the task out of `tasks`.'
    )


def _refuse_probabilities(task: str, seen: Sequence[_Seen]) -> None:
    kinds = {of.classes[0] for of in seen}
    if (
        kinds == {"multiclass"}
        and all(of.probabilities for of in seen)
        and any(of.samples for of in seen)
    ):
        raise MisconfigurationException(
            f"Calibration expects logits, got probabilities from task '{task}': every prediction "
            "is non-negative and sums to 1. Predict what the softmax takes, or the logarithm of "
            "the probabilities, or leave the task out of `tasks`."
        )
