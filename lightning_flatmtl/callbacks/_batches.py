"""The batches of a Trainer's data, drawn once more without a trace in what draws them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader

__all__ = ["batches_of", "unmoved"]


def batches_of(
    trainer: Trainer, module: LightningModule, stage: str, limit: int | None = None
) -> Iterator[tuple[Any, int]]:
    """The batches of this process on its device, with their numbers.

    Of several data loaders that are gone through one after the other, the first. Generators and
    the state of loaders that have one are afterwards as before; the global random streams are the
    caller's affair.

    Args:
        trainer: A Trainer that is running.
        module: Its module.
        stage: ``"train"``, ``"val"`` or ``"test"``.
        limit: The most batches; the Trainer's own limits hold, too.
    """
    loader, own_limit = _loader_of(trainer, stage)
    ends = [n for n in (own_limit, limit) if n is not None]
    with unmoved(loader.combined.flattened if isinstance(loader, _Together) else [loader]):
        drawn = islice(loader, min(ends) if ends else None)
        for i, batch in enumerate(drawn):
            yield _on_device(trainer, module, batch), i


def _loader_of(trainer: Trainer, stage: str) -> tuple[Any, int | None]:
    """The iterable over batches, and the most of them."""
    fit = trainer.fit_loop
    if stage == "train":
        combined, limits = fit._combined_loader, [fit.max_batches]
    else:
        loop = trainer.test_loop if stage == "test" else trainer.validate_loop
        loop = fit.epoch_loop.val_loop if trainer.state.fn == "fit" else loop
        if loop._combined_loader is None:  # the fit has had no validation
            loop.setup_data()
        combined, limits = loop._combined_loader, loop._max_batches
    assert combined is not None
    if combined._mode == "sequential":
        return combined.flattened[0], _finite(limits[0])
    # One of our own, so that the loop's is not disturbed.
    together = CombinedLoader(combined.iterables, combined._mode)
    if stage != "train":
        together.limits = limits
        return _Together(together), None
    return _Together(together), _finite(limits[0])


def _finite(limit: float) -> int | None:
    return None if limit == float("inf") else int(limit)


class _Together:
    """A combined loader that gives nothing but its batches.

    Args:
        combined: The loader.
    """

    def __init__(self, combined: CombinedLoader) -> None:
        self.combined = combined

    def __iter__(self) -> Iterator[Any]:
        for batch, _, _ in self.combined:
            yield batch


@contextmanager
def unmoved(loaders: Sequence[Any]) -> Iterator[None]:
    """Run the block, then let the loaders be where they were."""
    stateful = [
        (part, part.state_dict())
        for part in loaders
        if hasattr(part, "state_dict") and hasattr(part, "load_state_dict")
    ]
    streams = [(g, g.get_state()) for part in loaders for g in _generators(part)]
    try:
        yield
    finally:
        for part, state in stateful:
            part.load_state_dict(state)
        for generator, state in streams:
            generator.set_state(state)


def _generators(loader: Any) -> list[torch.Generator]:
    """The private generators of a data loader and its samplers."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    parts = (
        loader,
        getattr(loader, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    )
    found = [getattr(part, "generator", None) for part in parts]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _on_device(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """What Lightning's loops make of a batch before a step gets it."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
