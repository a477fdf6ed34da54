"""ResNets: torchvision's names and shapes behind another stem, weights from a seed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lrd import recipe
from lrd.parts import models, sync_batchnorm
from lrd.torchvision_compat import torchvision


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def build(seed: int = 0, num_classes: int = 10, **section) -> nn.Module:
    return models.build_model(
        recipe.Model(**{"arch": "resnet18", "width": 4, **section}), num_classes, seed
    )


def test_resnet34_has_21282122_parameters():
    with torch.device("meta"):
        model = models.ResNet("resnet34", num_classes=10)
    assert sum(parameter.numel() for parameter in model.parameters()) == 21_282_122


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
def test_names_and_shapes_are_torchvisions_but_for_the_stem_and_the_last_layer(arch):
    with torch.device("meta"):
        small_images = shapes(models.ResNet(arch, num_classes=10))
        stock = shapes(getattr(torchvision.models, arch)())
    assert list(small_images) == list(stock)
    differing = {name for name, shape in small_images.items() if stock[name] != shape}
    assert differing == {"conv1.weight", "fc.weight", "fc.bias"}
    assert small_images["conv1.weight"] == (64, 3, 3, 3)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_behind_the_stem_it_computes_what_torchvisions_network_computes(arch):
    torch.manual_seed(0)
    model = models.ResNet(arch, num_classes=10, width=64).eval()
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
        narrow = shapes(models.ResNet(arch, width=4))
        wide = shapes(models.ResNet(arch, width=64))
    assert list(narrow) == list(wide)
    for name, shape in narrow.items():
        channels = tuple(16 * size if size >= 4 else size for size in shape)
        if name not in ("fc.weight", "fc.bias"):
            assert channels == wide[name], name
    assert (narrow["fc.weight"][0], 16 * narrow["fc.weight"][1]) == wide["fc.weight"]


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
@pytest.mark.parametrize("size", [8, 32])
def test_images_of_any_size_give_one_row_of_logits_each(arch, size):
    model = build(arch=arch, num_classes=7)
    logits = model(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_recipes_num_classes_overrides_the_data_sets():
    assert build(num_classes=10).fc.out_features == 10
    section = recipe.Model(arch="resnet18", width=4, num_classes=3)
    assert models.build_model(section, 10, seed=0).fc.out_features == 3


def weights(seed: int) -> list[Tensor]:
    return list(build(seed=seed).state_dict().values())


def test_the_weights_are_a_function_of_the_seed_alone():
    torch.manual_seed(1)
    first = weights(seed=5)
    torch.manual_seed(2)
    again = weights(seed=5)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


@pytest.mark.parametrize("layer", ["conv1", "fc"])
def test_another_seed_gives_other_weights(layer):
    weight_5 = build(seed=5).get_submodule(layer).weight
    weight_6 = build(seed=6).get_submodule(layer).weight
    assert not torch.equal(weight_5, weight_6)


def test_convolutions_begin_with_he_et_als_scale():
    weight = build(width=16).get_submodule("layer4.0.conv1").weight
    fan_out = weight.shape[0] * 9
    assert float(weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)


def test_building_a_model_does_not_disturb_the_global_generator():
    state = torch.get_rng_state()
    build(seed=5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_building_a_model_does_not_disturb_the_generator_of_a_cuda_device():
    torch.cuda.manual_seed(1)
    state = torch.cuda.get_rng_state()
    build(seed=5)
    assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.parametrize(
    ("device", "kind"), [("cpu", sync_batchnorm.SyncBatchNorm2d), ("cuda", nn.SyncBatchNorm)]
)
def test_sync_batchnorm_replaces_every_batchnorm_and_no_weight(device, kind):
    model = sync_batchnorm.convert_sync_batchnorm(build(), torch.device(device))
    layers = [
        module for name, module in model.named_modules() if "bn" in name or "downsample.1" in name
    ]
    assert {type(layer) for layer in layers} == {kind}

    plain = build().state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, plain[name]), name


def test_sync_batchnorm_on_one_rank_is_batchnorm():
    plain = nn.BatchNorm2d(3)
    synchronized = sync_batchnorm.SyncBatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(plain(x), synchronized(x))
    assert torch.equal(plain.running_var, synchronized.running_var)


def test_sync_batchnorm_sees_the_batches_of_all_ranks(monkeypatch):
    """Each half of a batch stands for one rank; all_reduce gives the sums over both."""
    x = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 3 + 7
    wide = x.double()
    sums = torch.stack([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))])
    monkeypatch.setattr(sync_batchnorm.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(sync_batchnorm.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(sync_batchnorm, "all_reduce", lambda _: sums)
    plain = nn.BatchNorm2d(3)
    synchronized = sync_batchnorm.SyncBatchNorm2d(3)
    torch.testing.assert_close(synchronized(x[:4]), plain(x)[:4])
    torch.testing.assert_close(synchronized.running_mean, plain.running_mean)
    torch.testing.assert_close(synchronized.running_var, plain.running_var)
    assert synchronized.num_batches_tracked == 1
