"""Predictions of inputs from out of the domain of the training data."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lightning_flatmtl.hosting.untraced import untraced
from lightning_flatmtl.module import MultiTaskModule

__all__ = ["Source", "batches_of", "checked_source", "predict", "prepare"]

Source = LightningDataModule | Iterable[Any] | Callable[[], Iterable[Any]]


def checked_source(source: Any) -> Source | None:
    """A source of batches as it is.

    Raises:
        ValueError: If it cannot be gone through again and again.
    """
    usable = isinstance(source, Iterable | LightningDataModule) or callable(source)
    if source is None or (usable and not isinstance(source, Iterator | str | Mapping | type)):
        return source
    raise ValueError(
        "`ood` must be a data loader, a data module, or a function that returns an iterable of "
        f"batches, got {source!r}."
    )


def batches_of(source: Source | None, trainer: Trainer, module: LightningModule) -> Any:
    """An iterable of the batches, ``None`` if there is no source.

    Args:
        source: As given; ``None`` for ``ood_dataloader`` of the Trainer's data module or of the
            module, if one of them has it.
        trainer: The Trainer.
        module: The module.
    """
    if source is None:
        owners = (getattr(trainer, "datamodule", None), module)
        makers = (getattr(owner, "ood_dataloader", None) for owner in owners)
        maker = next((maker for maker in makers if callable(maker)), None)
        return None if maker is None else maker()
    if isinstance(source, LightningDataModule):
        return getattr(source, "ood_dataloader", source.test_dataloader)()
    return source if isinstance(source, Iterable) else source()


def prepare(source: Source | None, trainer: Trainer) -> None:
    """Let a data module of its own make its data, as the Trainer does with that of the training."""
    if not isinstance(source, LightningDataModule):
        return
    if trainer.local_rank == 0:
        source.prepare_data()
    trainer.strategy.barrier("lightning_flatmtl.ood")
    source.setup("test")


def predict(
    trainer: Trainer,
    module: LightningModule,
    batches: Any,
    limit: int | None,
    use: Callable[[Mapping[str, Any]], None],
) -> None:
    """Hand the logits of every batch over by task; nothing else stays of it.

    Args:
        trainer: The Trainer, which is evaluating.
        module: Its module. Buffers, attributes and metrics are as before, nothing is logged, and
            the random streams go on as if nothing had been.
        batches: An iterable.
        limit: The most batches to take.
        use: Is given what is predicted.

    Raises:
        MisconfigurationException: If the module does not say what it predicts.
    """
    if not isinstance(batches, Iterable):
        raise MisconfigurationException(
            "The source of data out of domain must give an iterable of batches, such as a data "
            f"loader, got {type(batches).__name__}."
        )
    precision = trainer.precision_plugin
    with untraced(module), torch.no_grad():
        for i, given in enumerate(islice(batches, limit)):
            batch = module._on_before_batch_transfer(precision.convert_input(given))
            batch = trainer.strategy.batch_to_device(batch)
            with precision.predict_step_context():
                outputs = _predicted(module, batch, i)
            use(_by_task(outputs, module))


def _predicted(module: LightningModule, batch: Any, index: int) -> Any:
    if type(module).predict_step not in {
        LightningModule.predict_step,
        MultiTaskModule.predict_step,
    }:
        return module.predict_step(batch, index)
    inputs = batch[0] if isinstance(batch, tuple | list) else batch
    try:
        return module(inputs)
    except NotImplementedError as error:
        raise MisconfigurationException(_expected(module, "none of them")) from error


def _by_task(outputs: Any, module: LightningModule) -> Mapping[str, Any]:
    if isinstance(outputs, Mapping):
        found = outputs.get("logits", outputs)
        if isinstance(found, Mapping):
            return found
    raise MisconfigurationException(_expected(module, f"an object of {type(outputs).__name__}"))


def _expected(module: LightningModule, got: str) -> str:
    return (
        "For the entropy out of domain `predict_step(batch, batch_idx)` or `forward(inputs)` of "
        f"{type(module).__name__} must return {{task: logits}}, got {got}. Override "
        "`predict_step`, or remove `ood` and `ood_dataloader`."
    )
