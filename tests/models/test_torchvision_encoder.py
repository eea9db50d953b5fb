"""torchvision's networks without their last layer, with weights in the true format."""

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import get_model, get_model_weights, list_models

from lightning_flatmtl import ClassificationTask, MultiTaskModule, TaskSAM
from lightning_flatmtl.aggregators import CAGrad
from lightning_flatmtl.models import ConvEncoder, TorchvisionEncoder
from tests.helpers import Pairs, fit, sgd

# Of every way in which torchvision ends its networks: `fc`, `classifier` (linear, a sequence, a
# convolution), `heads`, `head`. Small ones: creating the others takes seconds.
SMALL = {
    "shufflenet_v2_x0_5": ("fc", 1024),
    "mobilenet_v3_small": ("classifier.3", 1024),
    "squeezenet1_1": ("classifier.1", 512),
    "mnasnet0_5": ("classifier.1", 1280),
    "regnet_y_400mf": ("fc", 440),
    "resnet18": ("fc", 512),
}
ON_META = ("alexnet", "densenet121", "efficientnet_b0", "convnext_tiny", "maxvit_t", "swin_t",
           "vgg11", "vit_b_16", "googlenet", "inception_v3")  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_it_is_torchvisions_network_up_to_the_last_layer(name) -> None:
    torch.manual_seed(0)
    encoder = TorchvisionEncoder(name).eval()
    whole = get_model(name, weights=None).eval()
    last, features = SMALL[name]
    state = encoder.net.state_dict()
    missing = whole.load_state_dict(state, strict=False).missing_keys
    assert {key.rpartition(".")[0] for key in missing} == {last}
    seen = []
    whole.get_submodule(last).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found, _ = encoder(images), whole(images)
    assert encoder.out_features == features
    assert found.shape == (2, features)
    if name == "squeezenet1_1":  # a ReLU and the mean over the map come behind its last layer
        seen[0] = seen[0].mean((2, 3))
    torch.testing.assert_close(found, seen[0])


@pytest.mark.parametrize("name", ON_META)
def test_networks_of_other_families(name) -> None:
    with torch.device("meta"):
        encoder = TorchvisionEncoder(name, in_channels=2).eval()
        features = encoder(torch.zeros(1, 2, 224, 224))
    assert features.shape == (1, encoder.out_features)


def test_every_network_for_classification_has_a_name() -> None:
    with pytest.raises(ValueError, match="`name` must be one of alexnet, .*, got 'lenet'") as error:
        TorchvisionEncoder("lenet")
    assert all(name in str(error.value) for name in list_models(module=torchvision.models))


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def written(name: str, path: Path, **given: object) -> dict[str, torch.Tensor]:
    """A file as torchvision publishes them: the state dict of the network with 1000 classes."""
    torch.manual_seed(1)
    state = get_model(name, weights=None, **given).state_dict()
    torch.save(state, path)
    return state


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "squeezenet1_1", "resnet18"])
def test_weights_by_name_are_those_of_the_file(name, hub) -> None:
    url = get_model_weights(name)["IMAGENET1K_V1"].url
    state = written(name, hub / Path(url).name)
    for weights in ("IMAGENET1K_V1", "DEFAULT"):
        encoder = TorchvisionEncoder(name, weights)
        for key, value in encoder.net.state_dict().items():
            assert torch.equal(value, state[key]), key


def test_weights_by_path_and_for_one_channel(tmp_path) -> None:
    path = tmp_path / "weights.pth"
    state = written("resnet18", path)
    encoder = TorchvisionEncoder("resnet18", str(path), in_channels=1)
    assert torch.equal(encoder.net.conv1.weight, state["conv1.weight"].sum(1, keepdim=True))
    assert torch.equal(encoder.net.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])
    grey = torch.randn(1, 1, 64, 64)
    coloured = TorchvisionEncoder("resnet18", str(path))
    with torch.no_grad():
        features = encoder.eval()(grey), coloured.eval()(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(*features, rtol=1e-4, atol=1e-5)


def test_weights_that_do_not_fit_are_refused(tmp_path) -> None:
    path = tmp_path / "weights.pth"
    written("resnet18", path)
    with pytest.raises(
        ValueError, match="`weights` must fit the network, got .* for squeezenet1_1"
    ):
        TorchvisionEncoder("squeezenet1_1", str(path))
    with pytest.raises(
        ValueError, match="`weights` must be one of 'IMAGENET1K_V1', .* for resnet18, or"
    ):
        TorchvisionEncoder("resnet18", "IMAGENET")
    torch.save({"epoch": 3}, path)
    with pytest.raises(ValueError, match="must be a file with a state dict"):
        TorchvisionEncoder("resnet18", str(path))
    for name, channels in (("resnet18", 2), ("inception_v3", 1)):
        with pytest.raises(ValueError, match=f"`weights` of {name} need `in_channels` among"):
            TorchvisionEncoder(name, "DEFAULT", in_channels=channels)
    with pytest.raises(ValueError, match="`in_channels` must be at least 1, got 0"):
        TorchvisionEncoder("resnet18", in_channels=0)


def test_further_arguments_go_to_torchvision() -> None:
    with torch.device("meta"):
        encoder = TorchvisionEncoder("vit_b_16", options={"image_size": 32})
        assert encoder(torch.zeros(1, 3, 32, 32)).shape == (1, 768)


def test_it_trains_under_two_tasks() -> None:
    torch.manual_seed(0)
    encoder = TorchvisionEncoder("shufflenet_v2_x0_5", in_channels=1)
    tasks = [ClassificationTask(name, encoder.out_features, 2) for name in ("a", "b")]
    before = encoder.net.conv1[0].weight.detach().clone()
    targets = {name: torch.tensor([0, 1, 1, 0]) for name in ("a", "b")}
    data = torch.utils.data.DataLoader(Pairs(torch.randn(4, 1, 32, 32), targets), 4)
    fit(MultiTaskModule(encoder, tasks, sgd), [CAGrad(), TaskSAM(0.05)], data)
    assert not torch.equal(encoder.net.conv1[0].weight, before)


def test_hidden_layers_of_the_small_network() -> None:
    encoder = ConvEncoder(widths=(4,), features=6, hidden=(9, 8))
    sizes = [tuple(m.weight.shape) for m in encoder.project if isinstance(m, nn.Linear)]
    assert sizes == [(9, 16), (8, 9), (6, 8)]
    assert encoder(torch.zeros(2, 1, 8, 8)).shape == (2, 6)
    with pytest.raises(ValueError, match="`hidden` must be at least 1, got 0"):
        ConvEncoder(hidden=(0,))
