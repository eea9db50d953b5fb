"""torchvision's networks for classification as trunks, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import get_model, get_model_weights, list_models
from typing_extensions import override

__all__ = ["TorchvisionEncoder"]

_CLASSES = 1000  # of the published weights
# Their training has classifiers in the middle of the network, and they scale images by themselves.
_AUXILIARY = ("googlenet", "inception_v3")


class TorchvisionEncoder(nn.Module):
    r"""Any of torchvision's networks for classification, without its last layer.

    ``torchvision.models.list_models(module=torchvision.models)`` has the names: AlexNet, VGG,
    DenseNet, EfficientNet, ConvNeXt, MobileNet, RegNet, Swin, ViT and others. The layer that makes
    logits is replaced by the identity; what was in front of it stays, dropout and hidden layers of
    a classifier included. Parameters keep torchvision's names. For ResNets of other widths, stems
    and grids see :class:`ResNetEncoder`.

    GoogLeNet and Inception come without their auxiliary classifiers. Images must be as large as the
    network wants them, most want 32 pixels or more; a vision transformer takes those of its
    ``image_size`` alone, 224 or what ``options`` says.

    Shapes:
        ``[batch, in_channels, height, width]`` to ``[batch, out_features]``.

    Args:
        name: The network, as torchvision names it, such as ``"mobilenet_v3_small"``.
        weights: Pretrained weights by torchvision's name, such as ``"DEFAULT"`` or
            ``"IMAGENET1K_V1"``, downloaded on first use, or the path of a file with a state dict of
            this network, as torchvision's own ``.pth`` files are. The last layer in it is not used.
        in_channels: Channels of the images, at least 1. With other than 3 the first convolution is
            a new one; with weights and 1 channel its kernels are the sums over the three.
        options: Further arguments of torchvision's function that builds the network, such as
            ``{"image_size": 64}`` or ``{"dropout": 0.1}``.

    Attributes:
        out_features: How many features the heads get.

    Raises:
        ValueError: If the name or the weights are not known, a file does not fit the network, or
            the channels do not fit the weights.

    Example:
        >>> import torch
        >>> from lightning_flatmtl.models import TorchvisionEncoder
        >>> encoder = TorchvisionEncoder("shufflenet_v2_x0_5", in_channels=1)
        >>> encoder(torch.zeros(2, 1, 36, 36)).shape
        torch.Size([2, 1024])
    """

    def __init__(
        self,
        name: str,
        weights: str | None = None,
        in_channels: int = 3,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        known = list_models(module=models)
        if name not in known:
            raise ValueError(f"`name` must be one of {', '.join(known)}, got {name!r}.")
        if in_channels < 1:
            raise ValueError(f"`in_channels` must be at least 1, got {in_channels}.")
        if weights is not None and in_channels not in _fitting(name):
            raise ValueError(
                f"`weights` of {name} need `in_channels` among {list(_fitting(name))}, got "
                f"{in_channels}. Drop `weights`, or give images of so many channels."
            )
        state = None if weights is None else _read(name, weights)
        given = dict(options or {})
        if name in _AUXILIARY:
            given = {"aux_logits": False, "init_weights": weights is None, **given}
            given["transform_input"] = weights is not None
        net = get_model(name, weights=None, **given)
        last, classifier = _last_layer(net, given.get("num_classes", _CLASSES))
        self.out_features = classifier.weight.shape[1]
        net.set_submodule(last, nn.Identity())
        if in_channels != 3:
            _take_channels(net, in_channels)
        if state is not None:
            _load(net, state, last, f"{weights}, for {name}")
        self.net = net

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Map images ``[batch, in_channels, height, width]`` to features ``[batch, features]``."""
        features: Tensor = self.net(images)
        return features


def _fitting(name: str) -> tuple[int, ...]:
    return (3,) if name in _AUXILIARY else (1, 3)


def _read(name: str, weights: str) -> dict[str, Tensor]:
    """The state dict of weights by name or by path."""
    kinds = get_model_weights(name)
    if weights in kinds.__members__:
        state: dict[str, Tensor] = kinds[weights].get_state_dict(progress=True, check_hash=True)
        return state
    if not Path(weights).is_file():
        known = ", ".join(repr(kind) for kind in kinds.__members__)
        raise ValueError(
            f"`weights` must be one of {known} for {name}, or the path of a file, got {weights!r}."
        )
    found = torch.load(weights, map_location="cpu", weights_only=True)
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(
            f"`weights` must be a file with a state dict (names and tensors), as `torch.save("
            f"net.state_dict(), path)` writes it, got {weights!r} with a {type(found).__name__}."
        )
    return found


def _last_layer(net: nn.Module, classes: int) -> tuple[str, nn.Linear | nn.Conv2d]:
    """The name of the layer that makes the logits, and the layer."""
    for name, layer in reversed(list(net.named_modules())):
        if isinstance(layer, nn.Linear | nn.Conv2d) and len(layer.weight) == classes:
            return name, layer
    raise ValueError(f"`name` must be that of a network with {classes} classes at its end.")


def _take_channels(net: nn.Module, channels: int) -> None:
    """Replace the first convolution by one for images of other channels."""
    name, first = next((n, m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d))
    net.set_submodule(
        name,
        nn.Conv2d(
            channels,
            first.out_channels,
            first.kernel_size,  # type: ignore[arg-type]
            first.stride,  # type: ignore[arg-type]
            first.padding,  # type: ignore[arg-type]
            bias=first.bias is not None,
        ),
    )


def _load(net: nn.Module, state: dict[str, Tensor], last: str, source: str) -> None:
    """Load all but the last layer and the auxiliary classifiers."""
    own = net.state_dict()
    aside = (f"{last}.", "aux1.", "aux2.", "AuxLogits.")
    state = {key: value for key, value in state.items() if not key.startswith(aside)}
    for key, value in own.items():
        given = state.get(key)
        if given is not None and given.ndim == 4 and value.shape[1] == 1 != given.shape[1] == 3:
            state[key] = given.sum(1, keepdim=True)
    wrong = [k for k in own if k not in state or own[k].shape != state[k].shape]
    wrong += [key for key in state if key not in own]
    if wrong:
        raise ValueError(
            f"`weights` must fit the network, got {source}, where {len(wrong)} names or shapes "
            f"differ, the first of them '{wrong[0]}'."
        )
    net.load_state_dict(state)
