"""`lrd.load_model`: each kind of path, exact inputs, and nothing imported that is not asked for."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import lrd
from lrd import recipe as recipes
from lrd.checkpoint import store
from lrd.checkpoint.export import export_weights
from lrd.checkpoint.network_config import read_config, to_metadata
from lrd.data.batches import Batches
from lrd.data.datasets import load_dataset
from lrd.data.image_folder import read_folder
from lrd.errors import UserError
from lrd.torchvision_compat import torchvision
from tests.helpers.checkpoints import flip_a_bit

LAYOUT2 = Path(__file__).parents[1] / "checkpoint" / "layout2"


def refused(*arguments: object, **more: object) -> str:
    """The one line with which loading is refused."""
    with pytest.raises(UserError) as caught:
        lrd.load_model(*arguments, **more)
    (line,) = str(caught.value).splitlines()
    return line


@pytest.fixture
def exported(run_dir, tmp_path) -> Path:
    export_weights(run_dir, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


@pytest.mark.parametrize("kind", ["run", "checkpoint", "file", "folder"])
@pytest.mark.parametrize("ema", [False, True])
def test_the_same_network_comes_of_each_kind_of_path(run_dir, tmp_path, kind, ema):
    newest, _ = store.find_newest_valid(run_dir)
    path = {"run": run_dir, "checkpoint": newest}.get(kind)
    if path is None:
        path = tmp_path / ("w.safetensors" if kind == "file" else "w")
        export_weights(run_dir, path, ema=ema)

    model = lrd.load_model(path, ema=ema)
    state = store.read(newest)
    expected = state.ema if ema else state.model
    weights = model.network.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert not model.network.training
    assert model.classes == tuple("0123456789")
    assert model.config.lrd.step == 10
    assert model.config.lrd.has_results


def test_best_is_the_checkpoint_of_the_best_evaluation(run_dir):
    newest, _ = store.find_newest_valid(run_dir)
    best_step = store.read_trainer(newest)["best"]["step"]
    assert lrd.load_model(run_dir, best=True).config.lrd.step == best_step
    assert "best is of a run directory" in refused(newest, best=True)


def test_inputs_are_those_of_training_bit_for_bit(folder_run_dir, image_folder):
    model = lrd.load_model(folder_run_dir)
    pixels, _, classes = read_folder(image_folder / "train", 12, skip_corrupt=False)
    assert model.classes == classes

    # The recipe holds images out, and mean and standard deviation are of the others.
    section = recipes.Data(
        dataset="imagefolder", root=str(image_folder), image_size=12, validation=0.1
    )
    batches = Batches(load_dataset(section, seed=0).train, section, seed=0)
    files = sorted((image_folder / "train").glob("*/*.png"))
    assert len(files) == len(pixels)

    for i in (0, 7, len(files) - 1):
        expected = batches.normalize(pixels[i])  # float32 (3, 12, 12)
        with Image.open(files[i]) as image:
            array = np.asarray(image)
            inputs = [files[i], str(files[i]), image, array, pixels[i]]
            inputs.append(torch.from_numpy(array.copy()).permute(2, 0, 1))
            for given in inputs:
                made = model.preprocess(given)
                assert made.dtype == torch.float32
                assert torch.equal(made, expected), type(given)


@pytest.mark.parametrize(
    ("image", "error"),
    [
        (torch.zeros(3, 8, 8), ValueError),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), ValueError),
        (np.zeros((8, 8, 3)), TypeError),
    ],
)
def test_an_array_of_another_type_or_shape_is_refused(run_dir, image, error):
    with pytest.raises(error, match="uint8"):
        lrd.load_model(run_dir).preprocess(image)


def test_predictions_are_sorted_probabilities(run_dir, digits):
    model = lrd.load_model(run_dir)
    images = list(digits.test.pixels[:70])  # more than one batch
    predictions = model.predict(images, top=10)
    inputs = torch.stack([model.preprocess(image) for image in images])
    with torch.no_grad():
        probabilities = model.network(inputs).softmax(1)

    for given, row in zip(predictions, probabilities, strict=True):
        values = [value for _, value in given]
        assert values == sorted(values, reverse=True)
        assert sum(values) == pytest.approx(1.0, abs=1e-5)
        assert given[0][0] == model.classes[int(row.argmax())]
        assert dict(given) == pytest.approx(dict(zip(model.classes, row.tolist(), strict=True)))

    assert len(model.predict(images[0])) == 1
    assert [len(row) for row in model.predict(images[:2], top=3)] == [3, 3]
    assert len(model.predict(images[:1], top=99)[0]) == 10


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda folder: folder / "nowhere", "no such file or folder"),
        (lambda folder: folder, "no weights in it: no checkpoints of a run"),
        (lambda folder: (folder / "x.pt").write_bytes(b"x" * 99) and folder / "x.pt", "cannot be"),
        (lambda folder: (folder / "empty").touch() or folder / "empty", "cannot be read as"),
    ],
)
def test_what_holds_no_weights_is_refused(tmp_path, make, expected):
    assert expected in refused(make(tmp_path))


def test_a_file_that_is_cut_off_is_refused(exported):
    content = exported.read_bytes()
    for size in (4, 100, len(content) // 2, len(content) - 1):
        exported.write_bytes(content[:size])
        assert refused(exported).startswith(f"{exported}: cannot be read as a safetensors file")


def test_a_damaged_checkpoint_is_refused(run_dir, tmp_path):
    newest, _ = store.find_newest_valid(run_dir)
    copy = shutil.copytree(newest, tmp_path / newest.name)
    assert lrd.load_model(copy).config.lrd.step == 10
    flip_a_bit(copy / "model.safetensors")
    assert "model.safetensors: sha256" in refused(copy)


def test_weights_without_a_config_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(2)}, path)
    assert "does not describe its network" in refused(path)
    assert "does not describe its network" in refused(LAYOUT2)


def test_averages_are_refused_where_there_are_none(exported):
    assert "has no averaged weights" in refused(exported, ema=True)


class Names:
    """Sets one value of a config."""

    def __init__(self, *keys: str, value: object) -> None:
        self.keys = keys
        self.value = value

    def __call__(self, config: dict) -> None:
        for key in self.keys[:-1]:
            config = config[key]
        config[self.keys[-1]] = self.value


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (Names("lrd", "version", value=2), "has version 2, this lrd reads 1"),
        (Names("lrd", value=[]), "does not describe its network"),
        (Names("num_labels", value=11), "id2label: has 10 names"),
        (Names("id2label", value={"1": "a"}), "id2label: should name the labels 0, 1, 2"),
        (Names("image_size", value=0), "image_size"),
        (Names("image_size", value=10**9), "image_size"),
        (Names("image_std", value=[1.0, 0.0, 1.0]), "image_std.1: Input should be greater than 0"),
        (Names("image_mean", value=[1.0]), "image_mean"),
        (Names("lrd", "precision", value="fp8"), "lrd.precision"),
        (Names("lrd", "arch_arguments", value={"width": 8}), "has shape"),
        (Names("lrd", "arch_arguments", value={"width": 10**7}), "of memory"),
        (Names("lrd", "arch_arguments", value={"height": 8}), "height"),
        (Names("lrd", "arch_arguments", value={"weights": "/x"}), "no argument of a network"),
        (Names("lrd", "arch", value="resnet34"), "the weights of "),
        (Names("lrd", "arch", value="resnet99"), "is code outside of lrd"),
        (Names("lrd", "arch", value="torchvision:nothing"), "no classifier of this name"),
        (Names("lrd", "arch", value="torchvision.models:resnet18"), "is code outside of lrd"),
        (Names("lrd", "arch", value="timm.models:resnet18"), "is code outside of lrd"),
    ],
)
def test_a_wrong_config_is_refused_in_one_line(exported, edited, change, expected):
    path = edited(exported, change)
    line = refused(path)
    assert expected in line
    assert str(path) in line or line.startswith("model.")


@pytest.mark.parametrize(
    "arguments", [{"pretrained": True}, {"weights_backbone": "x"}, {"checkpoint_path": "x"}]
)
def test_a_file_cannot_have_other_weights_fetched(exported, edited, arguments):
    def change(config: dict) -> None:
        config["lrd"] |= {"arch": "torchvision:resnet18", "arch_arguments": arguments}

    assert "weights are not downloaded" in refused(edited(exported, change))


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """A module `trap_nets` on the Python path; returns whether it was imported."""
    code = "from lrd.parts.resnet import ResNet\n\ndef build(num_classes, width):\n"
    code += "    return ResNet('resnet18', num_classes, width)\n"
    (tmp_path / "trap_nets.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trap_nets", raising=False)
    return lambda: "trap_nets" in sys.modules


def test_a_name_in_a_file_is_imported_only_if_the_caller_says_it_too(exported, edited, trap):
    path = edited(exported, Names("lrd", "arch", value="trap_nets:build"))
    line = refused(path)
    assert not trap()
    assert 'load_model(..., arch="trap_nets:build")' in line
    assert "model.arch=trap_nets:build on the command line" in line

    model = lrd.load_model(path, arch="trap_nets:build")
    assert trap()
    assert torch.equal(
        model.network.state_dict()["fc.weight"],
        lrd.load_model(exported).network.state_dict()["fc.weight"],
    )


def test_torchvisions_networks_are_built_by_name(run_dir, tmp_path):
    network = torchvision.models.squeezenet1_1(num_classes=10)
    config = read_config(store.find_newest_valid(run_dir)[0] / "model.safetensors")
    config["lrd"] |= {"arch": "torchvision:squeezenet1_1", "arch_arguments": {}}
    config["image_size"] = [64, 48]
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(network.state_dict(), path, to_metadata(config))

    model = lrd.load_model(path)
    image = torch.zeros(3, 64, 48, dtype=torch.uint8)
    inputs = model.preprocess(image)[None]  # float32 (1, 3, 64, 48)
    with torch.no_grad():
        assert torch.equal(model.logits(inputs), network.eval()(inputs))
