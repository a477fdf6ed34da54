"""lrd's ResNets: torchvision's names and shapes behind another stem."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lrd.parts.resnet import ResNet
from lrd.torchvision_compat import torchvision


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def test_resnet34_has_21282122_parameters():
    with torch.device("meta"):
        model = ResNet("resnet34", num_classes=10)
    assert sum(parameter.numel() for parameter in model.parameters()) == 21_282_122


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
def test_names_and_shapes_are_torchvisions_but_for_the_stem_and_the_last_layer(arch):
    with torch.device("meta"):
        small_images = shapes(ResNet(arch, num_classes=10))
        stock = shapes(getattr(torchvision.models, arch)())
    assert list(small_images) == list(stock)
    differing = {name for name, shape in small_images.items() if stock[name] != shape}
    assert differing == {"conv1.weight", "fc.weight", "fc.bias"}
    assert small_images["conv1.weight"] == (64, 3, 3, 3)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_behind_the_stem_it_computes_what_torchvisions_network_computes(arch):
    torch.manual_seed(0)
    model = ResNet(arch, num_classes=10, width=64).eval()
    stock = getattr(torchvision.models, arch)().eval()

    # Give torchvision's network the same stem and last layer, then the same weights.
    stock.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    stock.maxpool = nn.Identity()
    stock.fc = model.fc
    stock.load_state_dict(model.state_dict())

    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(model(images), stock(images))


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
def test_a_narrow_network_has_the_same_names_and_fewer_channels(arch):
    with torch.device("meta"):
        narrow = shapes(ResNet(arch, width=4))
        wide = shapes(ResNet(arch, width=64))
    assert list(narrow) == list(wide)
    for name, shape in narrow.items():
        channels = tuple(16 * size if size >= 4 else size for size in shape)
        if name not in ("fc.weight", "fc.bias"):
            assert channels == wide[name], name
    assert (narrow["fc.weight"][0], 16 * narrow["fc.weight"][1]) == wide["fc.weight"]
