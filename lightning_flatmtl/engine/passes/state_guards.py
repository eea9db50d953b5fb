"""What a module is after a second pass: what it was before."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

from lightning_flatmtl.engine.errors import FlatMTLError
from lightning_flatmtl.engine.passes.attributes import AttributeSnapshot
from lightning_flatmtl.engine.passes.buffers import BufferSnapshot, frozen_statistics

__all__ = ["ModuleSnapshot", "frozen_module", "frozen_parameters_unmoved", "noted_as_second_pass"]


class ModuleSnapshot:
    """Buffers and plain attributes of a module, so that a pass can begin where another did.

    Args:
        module: The module.
        layers: Its modules by name; to look for them is most of the work for a model of many heads.
    """

    def __init__(
        self, module: nn.Module, layers: Sequence[tuple[str, nn.Module]] | None = None
    ) -> None:
        layers = list(module.named_modules()) if layers is None else layers
        self._buffers = BufferSnapshot(module, [layer for _, layer in layers])
        self._attributes = AttributeSnapshot(module, layers)

    def put_back(self) -> None:
        """Let both be what they were."""
        self._attributes.put_back()
        self._buffers.put_back()

    def changed(self) -> list[str]:
        """The attributes that are not what they were and cannot be put back."""
        return self._attributes.changed()


_warned: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
"""The attributes that a module's user has been told of."""


@contextmanager
def frozen_module(
    module: nn.Module, start: ModuleSnapshot | None = None
) -> Iterator[Callable[[], None]]:
    """Run the block, then give ``module`` its buffers and plain attributes back.

    What cannot be put back is compared, and a warning names it once.

    Yields a function that winds both back to ``start``, for a block of several passes each of which
    is to begin there: a step that reads what it changes is then the same function.

    Args:
        module: The module.
        start: What was before the clean pass; by default what is before the block.
    """
    now = ModuleSnapshot(module)
    try:
        with frozen_statistics(module):
            yield (now if start is None else start).put_back
    finally:
        now.put_back()
    told = _warned.setdefault(module, set())
    new = [name for name in now.changed() if name not in told]
    if new:
        told.update(new)
        warnings.warn(
            f"A further run of the step on the same batch has changed {_listed(new)}, which cannot "
            "be put back: it changes several times a batch. Change it in `on_train_batch_end`, or "
            "only if `second_pass(self)` is false, see lightning_flatmtl.takeover.second_pass.",
            UserWarning,
            stacklevel=2,
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


@contextmanager
def noted_as_second_pass() -> Iterator[None]:
    """Let every error of the block say that the step has run once without it."""
    try:
        yield
    except Exception as error:
        error.add_note(
            "This is a second pass: the step has run once on this batch without an error and was "
            "being run again at other parameters (TaskSAM, FAMO). Look for what it can do only "
            "once; `lightning_flatmtl.takeover.second_pass(self)` is true meanwhile."
        )
        raise


@contextmanager
def frozen_parameters_unmoved(module: nn.Module) -> Iterator[None]:
    """Run the block and refuse it if it has moved a parameter that is not trained.

    Raises:
        FlatMTLError: If there is such a parameter, for example of an averaged teacher.
    """
    frozen = [(n, p) for n, p in module.named_parameters() if not p.requires_grad]
    before = [p._version for _, p in frozen if not p.is_inference()]
    yield
    if before != [p._version for _, p in frozen if not p.is_inference()]:
        names = [n for n, _ in frozen[:3]]
        raise FlatMTLError(
            "A pass at perturbed parameters has changed a parameter that is not trained (among "
            f"{len(frozen)} such as {names}), so it would change several times a batch. Change it "
            "in `on_train_batch_end`, or only if `second_pass(self)` is false, see "
            "lightning_flatmtl.takeover.second_pass."
        )
