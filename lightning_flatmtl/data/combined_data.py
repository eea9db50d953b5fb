"""Several data modules as one."""

from __future__ import annotations

from typing import Any, Literal, get_args

import lightning.pytorch as pl
from lightning.pytorch.utilities import CombinedLoader
from typing_extensions import override

from lightning_flatmtl.data._checks import check
from lightning_flatmtl.data._task_order import Order
from lightning_flatmtl.data.task_loader import TaskLoader

__all__ = ["CombinedData"]

_Mode = Literal["min_size", "max_size_cycle", "max_size"]


class CombinedData(pl.LightningDataModule):
    """A data module for each task, together: several data sets in one YAML file.

    Training batches are those of a :class:`TaskLoader`, or of Lightning's ``CombinedLoader``, as
    ``order`` says. Validation and test go through every data set once (``"max_size"``).

    Args:
        modules: A data module for each task. One with several tasks, whose batches are ``(inputs,
            {task: target})``, has a name of its own, which is that of no task. No task may be in
            two of them.
        order: ``"round_robin"``, ``"proportional"`` or ``"temperature"``, with one or some tasks
            in a step; or ``"max_size_cycle"``, ``"min_size"`` or ``"max_size"``, with all.
        temperature: As in :class:`TaskLoader`.
        steps: As in :class:`TaskLoader`.
        tasks_per_step: As in :class:`TaskLoader`.
        seed: As in :class:`TaskLoader`.

    Raises:
        ValueError: If there is no data module, the order is not known, or something is given that
            the order has no use for.

    Example:
        >>> import torch
        >>> from lightning.pytorch import LightningDataModule
        >>> from torch.utils.data import TensorDataset
        >>> from lightning_flatmtl.data import CombinedData
        >>> few, many = (
        ...     LightningDataModule.from_datasets(TensorDataset(torch.zeros(n, 8)), batch_size=32)
        ...     for n in (640, 6400)
        ... )
        >>> data = CombinedData({"digit": few, "odd": many}, "temperature", temperature=2.0)
        >>> data.setup("fit")
        >>> len(data.train_dataloader())  # 20 and 200 batches
        220
    """

    def __init__(
        self,
        modules: dict[str, pl.LightningDataModule],
        order: Order | _Mode = "max_size_cycle",
        temperature: float = 1.0,
        steps: int | None = None,
        tasks_per_step: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check(bool(modules), "modules", "at least one data module", "none")
        orders = [*get_args(Order), *get_args(_Mode)]
        check(order in orders, "order", f"among {orders}", repr(order))
        if order in get_args(_Mode) and (temperature, steps, tasks_per_step) != (1.0, None, 1):
            raise ValueError(
                f"`temperature`, `steps` and `tasks_per_step` must be left out with order "
                f"'{order}', whose steps have all tasks. Use one of {list(get_args(Order))}."
            )
        self.modules = dict(modules)
        self.order = order
        self._settings: dict[str, Any] = {
            "temperature": temperature,
            "steps": steps,
            "tasks_per_step": tasks_per_step,
            "seed": seed,
        }

    @override
    def prepare_data(self) -> None:
        for module in self.modules.values():
            module.prepare_data()

    @override
    def setup(self, stage: str) -> None:
        for module in self.modules.values():
            module.trainer = self.trainer
            module.setup(stage)

    @override
    def teardown(self, stage: str) -> None:
        for module in self.modules.values():
            module.teardown(stage)

    @override
    def train_dataloader(self) -> CombinedLoader:
        loaders = {name: module.train_dataloader() for name, module in self.modules.items()}
        if self.order in get_args(_Mode):
            return CombinedLoader(loaders, self.order)  # type: ignore[arg-type]
        return TaskLoader(loaders, self.order, **self._settings)  # type: ignore[arg-type]

    @override
    def val_dataloader(self) -> CombinedLoader:
        loaders = {name: module.val_dataloader() for name, module in self.modules.items()}
        return CombinedLoader(loaders, "max_size")

    @override
    def test_dataloader(self) -> CombinedLoader:
        loaders = {name: module.test_dataloader() for name, module in self.modules.items()}
        return CombinedLoader(loaders, "max_size")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {name: module.state_dict() for name, module in self.modules.items()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, module in self.modules.items():
            module.load_state_dict(state_dict[name])
