"""Networks: weights from a seed, what a recipe may name, and what is refused before the run."""

from __future__ import annotations

import json
import random
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lrd import recipe
from lrd.errors import UserError
from lrd.parts import models, sync_batchnorm
from lrd.parts.random_layers import read_generators
from lrd.recipe import named
from lrd.train import run

ROOT = Path(__file__).parents[2]
NETS = "tests.helpers.own_parts.nets"


def build(seed: int = 0, num_classes: int = 10, **section) -> nn.Module:
    return models.build_model(
        recipe.Model(**{"arch": "resnet18", "width": 4, **section}), num_classes, seed
    )


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


# Networks of torchvision, timm and the user's own


def build_named(arch: str, seed: int = 0, num_classes: int = 10, **arguments) -> nn.Module:
    return models.build_model(recipe.Model(arch=arch, **arguments), num_classes, seed)


def refused(arch: str, image_size: int = 8, **arguments) -> str:
    """The line with which a network is refused, when it is built or when it is run."""
    section = recipe.Model(arch=arch, **arguments)

    def build_and_check() -> None:
        model = models.build_model(section, 10, seed=0)
        models.check_model(model, section, (3, image_size, image_size), 10)

    with pytest.raises(UserError) as caught:
        build_and_check()
    line = str(caught.value)
    assert "\n" not in line
    return line


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    other = second.state_dict()
    return all(torch.equal(value, other[name]) for name, value in first.state_dict().items())


def test_an_own_network_gets_num_classes_and_the_further_keys():
    model = build_named(f"{NETS}:SmallNet", num_classes=7, channels=5, dropout=0.25)
    assert model.fc.weight.shape == (7, 20)
    assert model.dropout.p == 0.25


def test_an_own_network_gets_the_recipes_width_only_if_there_is_one():
    assert "width" in refused(f"{NETS}:SmallNet", width=8)
    build_named(f"{NETS}:SmallNet")


@pytest.mark.parametrize("arch", [f"{NETS}:SmallNet", f"{NETS}:build_with_all_generators"])
def test_weights_of_an_own_network_are_a_function_of_the_seed_alone(arch):
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    first = build_named(arch, seed=(1 << 63) - 1)
    random.seed(2)
    np.random.seed(2)
    torch.manual_seed(2)
    assert same_weights(first, build_named(arch, seed=(1 << 63) - 1))
    assert not same_weights(first, build_named(arch, seed=5))


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ],
)
def test_building_and_checking_disturb_no_global_generator(device):
    torch.zeros((), device=device)  # a CUDA device has a generator from now on
    section = recipe.Model(arch=f"{NETS}:build_with_all_generators", dropout=0.5)
    before = read_generators(torch.device(device))
    model = models.build_model(section, 10, seed=5).to(device)
    models.check_model(model, section, (3, 8, 8), 10)
    assert read_generators(torch.device(device)) == before


def test_checking_leaves_a_network_as_it_was():
    section = recipe.Model(arch=f"{NETS}:Counting")
    model = models.build_model(section, 10, seed=5)
    model.features[1].eval()  # not all modules are in the same mode
    modes = [module.training for module in model.modules()]
    buffers = dict(model.named_buffers())

    models.check_model(model, section, (3, 8, 8), 10)
    assert [module.training for module in model.modules()] == modes
    assert all(buffers[name] is buffer for name, buffer in model.named_buffers())
    assert same_weights(model, models.build_model(section, 10, seed=5))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_weights_of_torchvisions_network_have_torchvisions_names():
    model = build_named("torchvision:resnet18", num_classes=3)
    assert model.conv1.weight.shape == (64, 3, 7, 7)
    assert model.fc.weight.shape == (3, 512)


@pytest.mark.parametrize(
    ("arch", "arguments", "parts"),
    [
        ("SmallNet", {"chanels": 8}, ["model.chanels", "did you mean channels?", "dropout"]),
        ("SmallNet", {"pretrained": True}, ["model.pretrained", "no such argument"]),
        ("pass_on", {"chanels": 8}, ["model.chanels", "no such argument", "'chanels'"]),
        ("needs_depth", {}, ["model.depth", "is missing"]),
        ("without_num_classes", {}, ["model.num_classes", "it has channels"]),
        ("no_module", {}, ["returns a str", "torch.nn.Module"]),
        ("raises", {}, ["ValueError", "10 classes are too many", "nets.py, line"]),
        ("running_generator", {}, ["two calls give other values of fc.weight"]),
        ("other_layers", {}, ["two calls give two networks", ".weight"]),
        ("lazy", {}, ["1.weight", "lazy"]),
        ("frozen", {}, ["no parameters that can be trained"]),
        ("wrong_size", {}, ["gives (2, 5)", "(2, 10)"]),
        ("Tuple", {}, ["a tuple in eval mode", "(2, 10)"]),
        ("TupleInTraining", {}, ["a tuple in training mode", "(2, 10)"]),
        ("Unused", {}, ["aux.weight, aux.bias", "requires_grad=False"]),
        ("RandomInEval", {}, ["draws random numbers in eval mode"]),
        ("Integers", {}, ["torch.int64", "float"]),
        ("FailsInBackward", {}, ["backward", "RuntimeError", "no way back"]),
        ("SmalNet", {}, ["did you mean SmallNet?"]),
    ],
)
def test_an_own_network_with_a_fault_is_refused_in_one_line(arch, arguments, parts):
    line = refused(f"{NETS}:{arch}", **arguments)
    assert line.startswith("model.")
    assert [part for part in parts if part not in line] == []


@pytest.mark.parametrize(
    ("arch", "arguments", "parts"),
    [
        ("torchvision:resnet35", {}, ["model.arch", "did you mean", "resnet34"]),
        ("torchvision:fasterrcnn_resnet50_fpn", {}, ["no classifier of this name"]),
        ("torchvision:resnet18", {"pretrained": True}, ["model.pretrained", "model.weights"]),
        ("torchvision:resnet18", {"weights_backbone": "x"}, ["model.weights_backbone"]),
        ("torchvision.models:resnet18", {"pretrained": True}, ["model.pretrained"]),
        ("torchvision:resnet18", {"group": 1}, ["model.group", "did you mean groups?"]),
        ("torchvision:resnet18", {"width": 8}, ["model.width", "no such argument"]),
        # torchvision itself ignores an unknown argument of this network.
        ("torchvision:mobilenet_v3_small", {"dropot": 0.1}, ["did you mean dropout?"]),
        ("torchvision:googlenet", {}, ["GoogLeNetOutputs", "model.aux_logits=false"]),
        ("torchvision:vit_b_32", {"num_layers": 1}, ["model.arch", "num_layers"]),
    ],
)
def test_a_network_of_torchvision_with_a_fault_is_refused_in_one_line(arch, arguments, parts):
    line = refused(arch, image_size=32, **arguments)
    assert [part for part in parts if part not in line] == []


def test_images_that_are_too_small_are_refused_in_one_line():
    line = refused("torchvision:squeezenet1_1", image_size=8)
    assert "images of 8x8 pixels" in line
    assert "too small" in line


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    def import_nothing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(models.importlib, "import_module", import_nothing)
    assert "pip install timm" in refused("timm:resnet26d")


def test_check_model_of_resnet34_takes_less_than_a_second():
    section = recipe.Model(arch="resnet34")
    model = models.build_model(section, 10, seed=0)
    seconds = []
    for _ in range(3):  # other processes may use the cores too
        start = time.process_time()
        models.check_model(model, section, (3, 32, 32), 10)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "image_size", "arguments"),
    [
        ("alexnet", 63, {}),
        ("convnext_tiny", 32, {}),
        ("densenet121", 32, {}),
        ("efficientnet_b0", 32, {}),
        ("googlenet", 32, {"aux_logits": False}),
        ("inception_v3", 75, {"aux_logits": False}),
        ("mnasnet0_5", 32, {}),
        ("mobilenet_v3_small", 32, {"width_mult": 0.5}),
        ("regnet_y_400mf", 32, {}),
        ("resnet18", 32, {}),
        ("shufflenet_v2_x0_5", 32, {}),
        ("squeezenet1_1", 32, {}),
        ("swin_t", 32, {}),
        ("vgg11_bn", 32, {}),
        ("vit_b_16", 32, {"image_size": 32}),
    ],
)
def test_the_families_of_torchvision_can_be_used(arch, image_size, arguments):
    section = recipe.Model(arch=f"torchvision:{arch}", **arguments)
    model = models.build_model(section, 7, seed=0)
    models.check_model(model, section, (3, image_size, image_size), 7)


@pytest.mark.parametrize(
    ("arch", "image_size", "arguments"),
    [
        ("resnet26d", 32, {"drop_path_rate": 0.1}),
        ("resnet18.a1_in1k", 32, {}),
        ("vit_tiny_patch16_224", 32, {"img_size": 32}),
        ("mobilenetv3_small_050", 32, {"drop_rate": 0.2}),
    ],
)
def test_networks_of_timm_can_be_used(arch, image_size, arguments):
    pytest.importorskip("timm", reason="the extra timm installs it")
    section = recipe.Model(arch=f"timm:{arch}", **arguments)
    model = models.build_model(section, 7, seed=0)
    models.check_model(model, section, (3, image_size, image_size), 7)


@pytest.mark.parametrize(
    ("arch", "arguments", "parts"),
    [
        ("resnet26e", {}, ["did you mean", "resnet26"]),
        ("hf-hub:timm/resnet18", {}, ["no classifier of this name"]),
        ("resnet26d", {"pretrained": True}, ["model.pretrained", "model.weights"]),
        ("resnet26d", {"checkpoint_path": "x.pth"}, ["model.checkpoint_path", "model.weights"]),
        ("resnet26d", {"features_only": True}, ["gives a list"]),
        ("resnet26d", {"drop_rat": 0.1}, ["model.drop_rat", "did you mean drop_rate?"]),
    ],
)
def test_a_network_of_timm_with_a_fault_is_refused_in_one_line(arch, arguments, parts):
    pytest.importorskip("timm", reason="the extra timm installs it")
    line = refused(f"timm:{arch}", **arguments)
    assert [part for part in parts if part not in line] == []


@pytest.mark.parametrize("name", ["key", "name", "function", "section"])
def test_an_argument_may_have_any_name(name):
    """Also that of a parameter of the functions that pass it on."""
    assert named.call_named("x", "model.arch", lambda **arguments: arguments, **{name: 1})


# The blocks of a network in shards


def block_names(model: nn.Module) -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    return [names[block] for block in models.residual_blocks(model)]


def on_meta(arch: str, **arguments) -> nn.Module:
    from lrd.torchvision_compat import torchvision

    with torch.device("meta"):
        return torchvision.models.get_model(arch, weights=None, **arguments)


def test_the_blocks_of_a_resnet_are_its_residual_blocks():
    expected = [
        f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in range((0, 3, 4, 6, 3)[stage])
    ]
    assert block_names(build(arch="resnet34")) == expected
    assert block_names(on_meta("resnet34")) == expected


def test_the_blocks_of_a_transformer_are_its_layers():
    assert block_names(on_meta("vit_b_32")) == [
        f"encoder.layers.encoder_layer_{i}" for i in range(12)
    ]


def test_of_blocks_within_blocks_the_outer_ones_count():
    stages = ("block1", "block2", "block3", "block4")
    model = build_named("torchvision:regnet_y_400mf")  # its code does not work on meta
    assert block_names(model) == [f"trunk_output.{name}" for name in stages]


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU())])
def test_a_network_without_repeated_modules_has_no_blocks(model):
    assert models.residual_blocks(model) == []
    assert models.residual_blocks(build_named(f"{NETS}:SmallNet")) == []


def test_a_block_is_a_module_whose_class_is_repeated():
    first, second = build_named(f"{NETS}:SmallNet"), build_named(f"{NETS}:SmallNet")
    assert models.residual_blocks(nn.Sequential(first, nn.ReLU())) == []
    assert models.residual_blocks(nn.ModuleList([first, nn.ReLU(), second])) == [first, second]


# The page of the documentation


def test_the_example_of_the_documentation_trains(tmp_path, monkeypatch, one_thread):
    page = (ROOT / "docs" / "parts.md").read_text(encoding="utf-8")
    text = page.partition("## The network")[2]
    code = re.search(r"```python\n(# my_parts/nets\.py\n.*?)```", text, re.DOTALL)
    recipe_text = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)

    (tmp_path / "my_parts").mkdir()
    (tmp_path / "my_parts" / "nets.py").write_text(code[1])
    (tmp_path / "recipe.yaml").write_text(recipe_text[1])
    monkeypatch.chdir(tmp_path)  # the folder in which a command starts is searched for modules
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_parts", raising=False)

    assert run("recipe.yaml", ["trainer.device=cpu", "run_dir=run"]) == 0
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "finished"
    assert status["best_accuracy"] > 0.2  # a tenth is chance
    for name in ("my_parts", "my_parts.nets"):
        sys.modules.pop(name)
