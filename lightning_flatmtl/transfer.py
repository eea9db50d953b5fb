"""The encoder of a trained module, for other tasks."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_flatmtl._yaml import load_yaml

__all__ = ["load_encoder"]

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_forward_module", "_checkpoint_wrapped_module"}
"""What torch.compile, FSDP, Lightning's strategies and checkpointing add to names."""
_PLACES = ("encoder.", "backbone.", "")
_SHOWN = 8


def load_encoder(
    checkpoint: str | PathLike[str] | dict[str, Any],
    encoder: nn.Module | None = None,
    cut: str | Sequence[str] = (),
    skip: str | Sequence[str] = (),
    prefix: str | None = None,
    strict: bool = True,
    weights_only: bool = True,
) -> nn.Module:
    """Take the encoder out of a checkpoint, for new heads and other tasks.

    The weights go into ``encoder``. Without one it is built anew from what is written beside them:
    the hyperparameters of the checkpoint, if they have ``encoder`` as ``class_path`` and
    ``init_args``, or the ``config.yaml`` that ``flatmtl fit`` writes into the folder of the run.

    The checkpoint is one of Lightning (``.ckpt``) or a saved ``state_dict``, of the whole module or
    of the encoder alone. What ``torch.compile``, DDP and FSDP add to names is taken off.

    Args:
        checkpoint: Its path, or what has been loaded from there.
        encoder: Where the weights go; changed in place.
        cut: Names of layers of the encoder that are cut off, such as ``"fc"``: an ``nn.Identity``
            takes their place, and the checkpoint's weights of theirs are left.
        skip: Names of layers that keep the weights they have.
        prefix: What the names of the encoder's weights begin with in the checkpoint, such as
            ``"net.trunk"``. By default it is found: ``"encoder"``, ``"backbone"`` or nothing.
        strict: Whether every weight of the encoder must be in the checkpoint, and the other way
            round. If not, what fits is loaded, and a warning says what does not.
        weights_only: Whether to read tensors and plain values only, so that a file from elsewhere
            can run no code. Its hyperparameters may need ``False``.

    Returns:
        The encoder, on the device where it was, not frozen: see Lightning's
        ``BackboneFinetuning``, for which a :class:`MultiTaskModule` has its encoder as
        ``backbone``.

    Raises:
        ValueError: If weights are missing, unexpected, or of another shape, with ``strict``; if
            none fits; if a name in ``cut`` or ``skip`` is unknown; or if there is no encoder and
            nothing to build it from.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_flatmtl import MultiTaskModule, Task, load_encoder
        >>> def trunk():
        ...     return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> trained = MultiTaskModule(trunk(), [Task("a", nn.Linear(4, 1), nn.MSELoss())])
        >>> encoder = load_encoder(trained.state_dict(), trunk(), cut="2")
        >>> torch.equal(encoder[0].weight, trained.encoder[0].weight), encoder[2]
        (True, Identity())
        >>> other = MultiTaskModule(encoder, [Task("b", nn.Linear(16, 3), nn.CrossEntropyLoss())])
    """
    content = _read(checkpoint, weights_only)
    if encoder is None:
        encoder = _built(content, checkpoint)
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"`encoder` must be an nn.Module, got {type(encoder).__name__}.")
    cut, skip = _names(cut), _names(skip)
    own = {_clean(name): name for name in encoder.state_dict()}
    saved = _of_encoder(_weights(content), own, prefix)
    for argument, layers in (("cut", cut), ("skip", skip)):
        _refuse_unknown(argument, layers, [*own, *saved], encoder)
    left = (*cut, *skip)
    own = {name: actual for name, actual in own.items() if not _below(name, left)}
    saved = {name: value for name, value in saved.items() if not _below(name, left)}
    _load(encoder, own, saved, strict)
    for layer in cut:
        _replace(encoder, layer)
    return encoder


def _read(checkpoint: str | PathLike[str] | Mapping[str, Any], weights_only: bool) -> Any:
    if isinstance(checkpoint, Mapping):
        return checkpoint
    path = Path(checkpoint)
    if path.is_dir():
        raise ValueError(
            f"`checkpoint` must be a file, got the folder {path}. Make one file of a sharded "
            "checkpoint: `python -m lightning.pytorch.utilities.consolidate_checkpoint FOLDER`."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=weights_only)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"`checkpoint` must hold tensors and plain values only, got more in {path}: "
            f"{str(error).splitlines()[0]} Pass `weights_only=False` if you trust the file."
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"`checkpoint` must hold a checkpoint or a state_dict, got {type(content).__name__} "
            f"in {path}."
        )
    return content


def _weights(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors by name, whatever the model was wrapped into."""
    inner = content.get("state_dict", content)
    found = {_clean(str(k)): v for k, v in inner.items() if isinstance(v, Tensor)}
    if found and all(name.startswith("module.") for name in found):  # of DDP itself
        found = {name.removeprefix("module."): value for name, value in found.items()}
    if not found:
        raise ValueError(
            f"`checkpoint` must have weights under 'state_dict' or by name, got the keys "
            f"{list(content)[:_SHOWN]}."
        )
    return found


def _of_encoder(
    weights: Mapping[str, Tensor], own: Iterable[str], prefix: str | None
) -> dict[str, Tensor]:
    """The weights of the encoder under its own names."""
    if prefix is not None:
        place = f"{prefix.removesuffix('.')}." if prefix else ""
        found = _under(weights, place)
        if not found:
            begins = sorted({name.partition(".")[0] for name in weights})
            raise ValueError(
                f"`prefix` must be what names in the checkpoint begin with, got {prefix!r}; they "
                f"begin with {begins[:_SHOWN]}."
            )
        return found
    candidates = [_under(weights, place) for place in _PLACES]
    return max(candidates, key=lambda found: len(found.keys() & set(own)))


def _under(weights: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
    return {n.removeprefix(place): value for n, value in weights.items() if n.startswith(place)}


def _load(
    encoder: nn.Module, own: Mapping[str, str], saved: Mapping[str, Tensor], strict: bool
) -> None:
    state = encoder.state_dict()
    shapes = {name: state[actual].shape for name, actual in own.items()}
    fitting = {n for n in own if n in saved and saved[n].shape == shapes[n]}
    problems = {
        "missing in the checkpoint": [name for name in own if name not in saved],
        "unknown to the encoder": [name for name in saved if name not in own],
        "of another shape": [
            f"{name} {list(saved[name].shape)}, expected {list(shapes[name])}"
            for name in own
            if name in saved and name not in fitting
        ],
    }
    said = "; ".join(f"{what}: {_listed(names)}" for what, names in problems.items() if names)
    if said and (strict or not fitting):
        advice = (
            "Build the encoder as it was trained, name layers in `cut` or `skip`, or pass "
            "`strict=False` to load what fits"
            if fitting
            else "Look at `prefix`, and at how the encoder is built"
        )
        raise ValueError(
            f"The checkpoint must have the weights of {type(encoder).__name__}, got {said}. "
            f"{advice}."
        )
    if said:
        rank_zero_warn(f"`load_encoder` has left out {said}.")
    encoder.load_state_dict({own[name]: saved[name] for name in fitting}, strict=False)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _refuse_unknown(
    argument: str, layers: Iterable[str], names: Sequence[str], encoder: nn.Module
) -> None:
    modules = {_clean(name) for name, _ in encoder.named_modules()}
    for layer in layers:
        if layer not in modules and not any(_below(name, (layer,)) for name in names):
            raise ValueError(
                f"`{argument}` must name layers of the encoder, got '{layer}'. It has "
                f"{_listed([name for name, _ in encoder.named_children()])}."
            )


def _replace(encoder: nn.Module, layer: str) -> None:
    """Put an identity in the place of a layer, if it is there."""
    actual = {_clean(name): name for name, _ in encoder.named_modules()}
    if layer in actual:
        parent, _, name = actual[layer].rpartition(".")
        setattr(encoder.get_submodule(parent), name, nn.Identity())


def _below(name: str, layers: Iterable[str]) -> bool:
    return any(name == layer or name.startswith(f"{layer}.") for layer in layers)


def _clean(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _names(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _built(content: Mapping[str, Any], checkpoint: Any) -> nn.Module:
    """The encoder as it is described in the checkpoint or in the folder of its run."""
    parameters = content.get("hyper_parameters")
    found = parameters.get("encoder") if isinstance(parameters, Mapping) else None
    if isinstance(found, nn.Module):
        return found
    if not _is_recipe(found) and not isinstance(checkpoint, Mapping):
        found = _from_config(Path(checkpoint))
    if not _is_recipe(found):
        raise ValueError(
            "`encoder` must be given: neither the hyperparameters of the checkpoint nor a "
            "config.yaml in the folder of its run says how to build one. Pass one that is built as "
            "in training."
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--encoder", type=nn.Module)
    # Older versions of jsonargparse have the longer name only.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    built: nn.Module = instantiate(parser.parse_object({"encoder": found})).encoder
    return built


def _is_recipe(found: Any) -> bool:
    return isinstance(found, Mapping) and "class_path" in found


def _from_config(path: Path) -> Any:
    """``model.init_args.encoder`` of the run's config.yaml, two folders up at most."""
    for folder in list(path.resolve().parents)[:3]:
        file = folder / "config.yaml"
        if file.is_file():
            config = load_yaml(file.read_text("utf-8"))
            for key in ("model", "init_args", "encoder"):
                config = config.get(key) if isinstance(config, Mapping) else None
            return config
    return None
