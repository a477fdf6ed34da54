"""Starting from the weights in a file: what fits, what is left out, what is refused."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from lrd import recipe as recipes
from lrd.errors import UserError
from lrd.parts.models import build_model
from lrd.parts.optimizers import build_optimizer
from lrd.parts.weights import load_weights

ROOT = Path(__file__).parents[2]
ARCH = "tests.helpers.own_parts.nets:SmallNet"


def build(num_classes: int = 10, seed: int = 0, **arguments) -> nn.Module:
    return build_model(recipes.Model(arch=ARCH, **arguments), num_classes, seed)


def clone(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def save(path: Path, tensors: dict[str, Tensor]) -> Path:
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    return path


def section(path: Path | str, reset: str | list[str] | None = None) -> recipes.Model:
    return recipes.Model(arch=ARCH, weights=str(path), reset=reset or [])


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return list(first) == list(second) and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


def refused(path: Path | str, reset: str | list[str] | None = None) -> str:
    """The line with which a file is refused; the network is then unchanged."""
    model = build()
    before = clone(model)
    with pytest.raises(UserError) as caught:
        load_weights(model, section(path, reset))
    assert equal(clone(model), before)
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.fixture
def source() -> dict[str, Tensor]:
    """The weights of another network, after a training step for BatchNorm's statistics."""
    model = build(seed=1)
    model(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    return clone(model)


def test_all_weights_and_buffers_are_loaded(tmp_path, source, capsys):
    path = save(tmp_path / "w.safetensors", source)
    model = build()
    digest = load_weights(model, section(path))
    assert equal(clone(model), source)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert capsys.readouterr().out == f"model.weights: 9 tensors from {path}\n"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_the_prefixes_of_ddp_and_compile_are_removed(tmp_path, source, prefix):
    path = save(
        tmp_path / "w.safetensors", {prefix + name: value for name, value in source.items()}
    )
    model = build()
    load_weights(model, section(path))
    assert equal(clone(model), source)


def test_a_prefix_that_only_some_names_have_is_a_name(tmp_path, source):
    source["module.fc.weight"] = source.pop("fc.weight")
    line = refused(save(tmp_path / "w.safetensors", source))
    assert "1 missing in the file: fc.weight" in line
    assert "1 that the network does not have: module.fc.weight" in line


def test_what_a_pattern_of_reset_matches_keeps_its_random_weights(tmp_path, source, capsys):
    """The last layer of the file has another number of classes."""
    source["fc.weight"] = torch.ones(1000, 16)
    source["fc.bias"] = torch.ones(1000)
    path = save(tmp_path / "w.safetensors", source)
    model = build()
    fresh = clone(model)
    load_weights(model, section(path, "fc.*"))

    loaded = clone(model)
    for name, value in loaded.items():
        expected = fresh if name.startswith("fc.") else source
        assert torch.equal(value, expected[name]), name
    line = f"model.weights: 7 tensors from {path}; reset: fc.bias, fc.weight\n"
    assert capsys.readouterr().out == line


def test_reset_leaves_out_tensors_of_the_file_too(tmp_path, source):
    """An auxiliary output that the network does not have."""
    source["aux.weight"] = torch.ones(3)
    path = save(tmp_path / "w.safetensors", source)
    model = build()
    load_weights(model, section(path, ["aux.*", "fc.bias"]))
    assert torch.equal(model.state_dict()["fc.weight"], source["fc.weight"])
    assert not torch.equal(model.state_dict()["fc.bias"], source["fc.bias"])


def test_batchnorms_count_of_batches_may_be_missing(tmp_path, source):
    """Weights that were made with an early torch do not contain it."""
    del source["features.1.num_batches_tracked"]
    model = build()
    load_weights(model, section(save(tmp_path / "w.safetensors", source)))
    assert torch.equal(
        model.state_dict()["features.1.running_var"], source["features.1.running_var"]
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_converted_and_a_line_says_so(tmp_path, source, capsys, dtype):
    halves = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in source.items()
    }
    model = build()
    load_weights(model, section(save(tmp_path / "w.safetensors", halves)))
    for name, value in model.state_dict().items():
        assert value.dtype == source[name].dtype
        assert torch.equal(value, halves[name].to(value.dtype))
    assert f"8 tensors of {tmp_path}/w.safetensors are {dtype}" in capsys.readouterr().out


def test_a_file_that_does_not_fit_is_described_in_one_line(tmp_path, source):
    source["fc.weight"] = torch.ones(1000, 16)
    source["fc.bias"] = torch.ones(1000)
    for name in ("features.1.weight", "features.1.bias"):
        del source[name]
    for i in range(5):
        source[f"fc.extra{i}"] = torch.ones(1)

    line = refused(save(tmp_path / "w.safetensors", source))
    assert line.startswith(f"model.weights: {tmp_path}/w.safetensors does not fit {ARCH}: ")
    assert "fc.weight ((1000, 16) in the file, (10, 16) in the network)" in line
    assert "2 missing in the file: features.1.weight, features.1.bias;" in line
    assert "5 that the network does not have: fc.extra0, fc.extra1, fc.extra2 and 2 more;" in line
    assert line.endswith("model.reset='[fc.*, features.*]'")


def test_the_advice_is_an_override_that_works(tmp_path, source):
    source["fc.weight"] = torch.ones(1000, 16)
    source["fc.bias"] = torch.ones(1000)
    path = save(tmp_path / "w.safetensors", source)
    advice = refused(path).rpartition("e.g. ")[2]

    (tmp_path / "r.yaml").write_text(f"model: {{arch: '{ARCH}', weights: {path}}}")
    recipe = recipes.load(tmp_path / "r.yaml", shlex.split(advice))
    load_weights(build(), recipe.model)


def test_integers_are_no_float_weights(tmp_path, source):
    source["fc.bias"] = torch.ones(10, dtype=torch.int64)
    line = refused(save(tmp_path / "w.safetensors", source))
    assert "fc.bias (torch.int64 in the file, torch.float32 in the network)" in line


def test_weights_of_an_unrelated_network_are_refused(tmp_path):
    path = save(tmp_path / "w.safetensors", {"encoder.0": torch.ones(2)})
    assert "encoder.0" in refused(path)
    assert "features.0.weight" in refused(path)
    assert refused(save(tmp_path / "empty.safetensors", {})).count("none") == 1


def test_a_pattern_that_matches_nothing_is_refused(tmp_path, source):
    path = save(tmp_path / "w.safetensors", source)
    line = refused(path, ["fc.*", "head.*"])
    assert line.startswith("model.reset: 'head.*' matches no tensor")


def test_a_reset_of_everything_is_refused(tmp_path, source):
    line = refused(save(tmp_path / "w.safetensors", source), "*")
    assert line.startswith("model.reset: leaves out all tensors of ")


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_damaged_file_is_refused(tmp_path, source, cut):
    path = save(tmp_path / "w.safetensors", source)
    path.write_bytes(path.read_bytes()[:cut])
    assert f"{path} is damaged" in refused(path)


def test_what_is_no_file_is_refused(tmp_path):
    assert "No such file" in refused(tmp_path / "w.safetensors")
    assert "is a folder" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert "not a regular file" in refused(tmp_path / "pipe.safetensors")
    assert "null byte" in refused("a\0b.safetensors")
    assert "too long" in refused(f"{'a' * 300}.safetensors")


def test_a_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "r.yaml").write_text("model: {weights: ~/w.safetensors}")
    recipe = recipes.load(tmp_path / "r.yaml")
    assert recipe.model.weights == f"{tmp_path}/w.safetensors"


def test_a_file_of_torch_save_is_refused_with_a_command_that_converts_it(
    tmp_path, source, monkeypatch
):
    path = tmp_path / "my weights.pth"
    torch.save(source, path)
    line = refused(path)
    command = re.search(r"converted by: (python .*)$", line)
    assert command is not None

    python, flag, code, *files = shlex.split(command[1])
    assert (python, flag) == ("python", "-c")
    monkeypatch.setattr(sys, "argv", ["-c", *files])
    exec(compile(code, "command", "exec"), {})  # a new process would import torch anew
    model = build()
    load_weights(model, section(tmp_path / "my weights.safetensors"))
    assert equal(clone(model), source)


def test_the_recipe_for_fine_tuning_trains_head_and_backbone_with_their_lr(tmp_path):
    """On digits and with ResNet-18 in place of ResNet-34: the weights, one step, what moved."""
    pretrained = build_model(recipes.Model(arch="torchvision:resnet18"), 1000, seed=1)
    path = save(tmp_path / "w.safetensors", pretrained.state_dict())

    recipe = recipes.load(
        ROOT / "recipes" / "imagefolder_resnet34_finetune.yaml",
        ["model.arch=torchvision:resnet18", f"model.weights={path}", "lr_dropout="],
    )
    model = build_model(recipe.model, 10, recipe.seed)
    fresh = clone(model)
    load_weights(model, recipe.model)
    loaded = clone(model)
    assert torch.equal(loaded["fc.weight"], fresh["fc.weight"])
    assert torch.equal(loaded["layer4.1.conv2.weight"], pretrained.layer4[1].conv2.weight)

    optimizer = build_optimizer(model, recipe)
    lrs = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert 0 < lrs["group0"] < lrs["head"]

    images = torch.linspace(-1, 1, 4 * 3 * 32 * 32).view(4, 3, 32, 32)
    nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        lr = lrs["head" if name.startswith("fc.") else "group0"]
        decay = recipe.optimizer.weight_decay * loaded[name]
        expected = loaded[name] - lr * (gradients[name] + decay)  # the first step of SGD
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-7)
