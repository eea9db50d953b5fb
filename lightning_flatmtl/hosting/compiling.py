"""torch.compile beside an engine that differentiates one graph several times."""

from typing import Any

import torch
import torch._functorch.config as functorch_config
from lightning.pytorch import LightningModule

__all__ = ["CompiledParts", "SeveralBackwards"]

_TAG = "lightning_flatmtl: several backward passes"


class SeveralBackwards:
    """While it holds, compiled graphs keep what a further backward pass needs.

    By default a compiled backward pass reuses the memory of what it was given ("donated buffers")
    and refuses ``retain_graph=True``. Graphs that were compiled with the default must not be taken
    up again either, or gradients are silently wrong: what is in memory is forgotten, and what is on
    disk has another key. Tested with torch 2.13 and 2.15.
    """

    def __init__(self) -> None:
        compiler_config: Any = torch.compiler.config
        self._saved = functorch_config.donated_buffer, compiler_config.cache_key_tag
        if functorch_config.donated_buffer:
            torch.compiler.reset()
        functorch_config.donated_buffer = False
        compiler_config.cache_key_tag = _TAG

    def release(self) -> None:
        """Put the settings back."""
        compiler_config: Any = torch.compiler.config
        functorch_config.donated_buffer, compiler_config.cache_key_tag = self._saved


class CompiledParts:
    """Moves the compilation of a whole module to its encoder and heads.

    ``torch.compile(module)`` compiles ``training_step``, which holds the engine: nothing to
    compile. What it is meant for are the forward passes.

    Args:
        module: A MultiTaskModule, compiled or not.
        names: The methods to compile in the place of ``training_step``.
    """

    def __init__(self, module: LightningModule, names: tuple[str, ...]) -> None:
        self._module = module
        self._names: tuple[str, ...] = ()
        context = getattr(module, "_compiler_ctx", None)
        if context is None:
            return
        self._step = vars(module).pop("training_step", None)
        self._names = names
        for name in names:
            setattr(module, name, context["dynamo_ctx"](getattr(module, name)))

    def release(self) -> None:
        """Put the module back as it was."""
        for name in self._names:
            delattr(self._module, name)
        if self._names and self._step is not None:
            self._module.training_step = self._step  # type: ignore[method-assign]
        self._names = ()
