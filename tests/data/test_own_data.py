"""Data sets of the user's own: what a function may take and return, and what is refused."""

import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from lrd import recipe as recipes
from lrd.cli.app import app
from lrd.data import Dataset, Images, datasets
from lrd.data.batches import Batches
from lrd.errors import UserError
from tests.helpers.own_parts import data as own_parts_data

ROOT = Path(__file__).parents[2]
OWN = "tests.helpers.own_parts.data:load"

# Values of all kinds, and different in each channel, row and column.
GRAY = np.arange(6 * 8 * 5, dtype=np.uint8).reshape(6, 8, 5)  # (N, H, W)
RGB = np.stack([GRAY, GRAY + 50, GRAY + 100], axis=1)  # uint8 (N, 3, H, W)
LABELS = np.array([0, 1, 2, 0, 1, 2])


@pytest.fixture
def own(monkeypatch):
    """Make a function a data set that a recipe can name; return its `data` section."""

    def make_section(load, **keys) -> recipes.Data:
        module = ModuleType("own_data")
        module.load = load
        monkeypatch.setitem(sys.modules, "own_data", module)
        return recipes.Data(dataset="own_data:load", **keys)

    return make_section


@pytest.fixture
def users_folder(tmp_path, monkeypatch):
    """The folder in which a command is started; what is imported from it is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if name.startswith("my_"):
            del sys.modules[name]


def load(section: recipes.Data, seed: int = 0) -> Dataset:
    return datasets.load_dataset(section, seed)


def refusal(section: recipes.Data) -> str:
    """The one line with which a data set is refused."""
    with pytest.raises(UserError) as caught:
        load(section)
    (line,) = str(caught.value).splitlines()
    return line


def parts(pixels=GRAY, labels=LABELS, test_pixels=GRAY, test_labels=LABELS, classes=None) -> dict:
    """What a function returns, for images in three classes."""
    returned = {"train": (pixels, labels), "test": (test_pixels, test_labels)}
    return returned if classes is None else {**returned, "classes": classes}


def test_a_data_set_of_ones_own_is_loaded():
    section = recipes.Data(dataset=OWN, num_train=40, noise=0)
    dataset = load(section)
    assert dataset.train.pixels.shape == (40, 3, 8, 8)
    assert dataset.test.pixels.shape == (32, 3, 8, 8)
    assert dataset.classes == own_parts_data.CLASSES
    assert dataset.train.labels.tolist() == 10 * [0, 1, 2, 3]
    assert dataset.train.pixels.unique().tolist() == [60, 180]
    assert datasets.count_training_images(section, seed=0) == 40


# Which pixels are accepted


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        pytest.param(GRAY, GRAY[:, None], id="N H W"),
        pytest.param(GRAY[:, None], GRAY[:, None], id="N 1 H W"),
        pytest.param(GRAY[..., None], GRAY[:, None], id="N H W 1"),
        pytest.param(RGB, RGB, id="N 3 H W"),
        pytest.param(RGB.transpose(0, 2, 3, 1), RGB, id="N H W 3"),
        pytest.param(torch.from_numpy(GRAY), GRAY[:, None], id="tensor"),
        pytest.param(torch.from_numpy(RGB).permute(0, 2, 3, 1), RGB, id="tensor N H W 3"),
        pytest.param(RGB[:, ::-1], RGB[:, ::-1], id="negative strides"),
        pytest.param(np.broadcast_to(GRAY[:1], GRAY.shape), GRAY[:1, None], id="read-only"),
    ],
)
def test_pixels_of_each_layout_become_n_3_h_w(own, pixels, expected):
    dataset = load(own(lambda: parts(pixels, test_pixels=pixels)))
    for images in (dataset.train, dataset.test):
        assert images.pixels.dtype == torch.uint8
        assert images.pixels.shape == (6, 3, 8, 5)
        assert images.pixels.is_contiguous()
        assert np.array_equal(images.pixels.numpy(), np.broadcast_to(expected, (6, 3, 8, 5)))


INTEGER_TYPES = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", ">i4"]


@pytest.mark.parametrize(
    "labels",
    [
        *[pytest.param(LABELS.astype(kind), id=kind) for kind in INTEGER_TYPES],
        pytest.param(torch.from_numpy(LABELS), id="tensor"),
        pytest.param(torch.from_numpy(LABELS).to(torch.uint16), id="uint16 tensor"),
        pytest.param(LABELS.tolist(), id="list"),
        pytest.param(LABELS[:, None].astype(np.uint8), id="column"),
    ],
)
def test_labels_of_each_integer_type_become_int64(own, labels):
    dataset = load(own(lambda: parts(labels=labels)))
    assert dataset.train.labels.dtype == torch.int64
    assert dataset.train.labels.tolist() == LABELS.tolist()


# What a function may return

IMAGES = Images(torch.from_numpy(RGB), torch.from_numpy(LABELS))


@pytest.mark.parametrize(
    ("returned", "expected_classes"),
    [
        pytest.param(((RGB, LABELS), (RGB, LABELS)), "012", id="pair"),
        pytest.param([[RGB, LABELS], [RGB, LABELS]], "012", id="lists"),
        pytest.param(((RGB, LABELS), (RGB, LABELS), ["a", "b", "c"]), "abc", id="triple"),
        pytest.param(parts(RGB, test_pixels=RGB), "012", id="dict"),
        pytest.param(parts(RGB, test_pixels=RGB, classes=np.array(list("abc"))), "abc", id="names"),
        pytest.param({"train": IMAGES, "test": IMAGES}, "012", id="Images"),
        pytest.param(Dataset(IMAGES, IMAGES, ("a", "b", "c")), "abc", id="Dataset"),
    ],
)
def test_a_data_set_may_be_returned_in_several_forms(own, returned, expected_classes):
    dataset = load(own(lambda: returned))
    assert np.array_equal(dataset.train.pixels.numpy(), RGB)
    assert dataset.test.labels.tolist() == LABELS.tolist()
    assert dataset.classes == tuple(expected_classes)


def test_a_class_with_a_name_may_be_without_images(own):
    assert len(load(own(lambda: parts(classes=["a", "b", "c", "d"]))).classes) == 4


FLOATS = GRAY / np.float32(255)
WITH_NAN = np.where(GRAY == 7, np.float64("nan"), GRAY)


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        # What is returned
        (None, ["nothing", "(train, test)"]),
        (7, ["type int", "(train, test)"]),
        ((RGB, LABELS, RGB, LABELS), ["4 values", "(train, test)"]),
        ((RGB, RGB), ["type ndarray", "training"]),
        (((RGB, LABELS), RGB), ["type ndarray", "test"]),
        (((RGB,), (RGB,)), ["tuple of 1", "training"]),
        ({}, ["(none)"]),
        ({"train": (GRAY, LABELS)}, ["the keys train;"]),
        ({**parts(), "validation": (GRAY, LABELS)}, ["validation"]),
        (Dataset(IMAGES, IMAGES, ("a", "b", "c"), IMAGES), ["data.validation"]),
        # The type of the pixels
        (parts(FLOATS), ["float32", "from 0 to 0.9", "(255 * pixels).round().astype('uint8')"]),
        (parts(torch.from_numpy(FLOATS)), ["float32", "(255 * pixels).round().to(torch.uint8)"]),
        (parts(torch.from_numpy(FLOATS).bfloat16()), ["bfloat16", "(255 * pixels)"]),
        (parts(GRAY.astype(float)), ["float64", "pixels.astype('uint8')"]),
        (parts(FLOATS - 1), ["float32", "from -1 to"]),
        (parts(WITH_NAN), ["float64", "NaN"]),
        (parts(test_pixels=GRAY.astype(int)), ["test pixels", "int64", "pixels.astype('uint8')"]),
        (parts(GRAY > 9), ["bool", "uint8"]),
        (parts(GRAY.astype(object)), ["object", "uint8"]),
        (parts(GRAY.tolist()), ["list of 6", "training pixels"]),
        (parts(torch.from_numpy(GRAY).to_sparse()), ["type Tensor", "training pixels"]),
        # The shape of the pixels
        (parts(GRAY[0]), ["(8, 5)", "(N, H, W)"]),
        (parts(RGB[:, :2]), ["(6, 2, 8, 5)"]),
        (parts(np.uint8(3)), ["type uint8"]),
        (parts(np.array(3, np.uint8)), ["()"]),
        (parts(RGB[None]), ["(1, 6, 3, 8, 5)"]),
        (parts(RGB[..., :3]), ["(6, 3, 8, 3)", "first or last"]),
        (parts(RGB[:, :, :3].transpose(0, 2, 3, 1)), ["(6, 3, 5, 3)", "first or last"]),
        (parts(GRAY[:0], LABELS[:0]), ["no training images"]),
        (parts(GRAY[:, :0]), ["no training images", "(6, 0, 5)"]),
        (parts(test_pixels=GRAY[:0], test_labels=LABELS[:0]), ["no test images"]),
        (parts(test_pixels=GRAY[:, :4]), ["8 x 5", "4 x 5", "data.image_size"]),
        # The labels
        (parts(labels=LABELS[:5]), ["6 training images", "5 training labels"]),
        (parts(labels=LABELS[:0]), ["no training labels"]),
        (parts(test_labels=[]), ["no test labels"]),
        (parts(labels=LABELS + 1), ["up to 3", "none is 0"]),
        (parts(labels=LABELS - 1), ["label -1"]),
        (parts(labels=2 * LABELS), ["up to 4", "none is 1"]),
        (parts(labels=LABELS + 1, classes=["a", "b", "c"]), ["from 1 to 3", "from 0 to 2"]),
        (parts(test_labels=LABELS + 1), ["test labels from 1 to 3", "from 0 to 2"]),
        (parts(test_labels=LABELS - 1), ["test labels from -1 to 1"]),
        (parts(labels=LABELS.astype(float)), ["float64", "integers"]),
        (parts(labels=LABELS > 0), ["bool", "integers"]),
        (parts(labels=np.array(list("abcabc"))), ["str", "integers"]),
        (parts(labels=list("abcabc")), ["str", "integers"]),
        (parts(labels=[[0], [1, 2]]), ["no integers"]),
        (parts(labels=[10**30] * 6), ["object", "integers"]),
        (parts(labels=np.array([2**64 - 1] * 6, np.uint64)), ["18446744073709551615"]),
        (parts(labels=np.eye(6, dtype=int)), ["(6, 6)", "(N,)"]),
        (parts(labels=None), ["nothing as training labels"]),
        # The classes
        (parts(classes="abc"), ["type str", "names of the classes"]),
        (parts(classes={"a", "b", "c"}), ["type set", "names of the classes"]),
        (parts(classes=["a", "b"]), ["labels from 0 to 2", "2 classes"]),
        (parts(classes=[]), ["list of 0", "names of the classes"]),
        (parts(classes=["a", "b", "a"]), ["'a'"]),
        (parts(labels=0 * LABELS, test_labels=0 * LABELS), ["one class, '0'"]),
        (parts(labels=1 + 0 * LABELS, classes=["a", "b", "c"]), ["one class, 'b'"]),
    ],
)
def test_what_is_no_data_set_is_refused_in_one_line(own, returned, expected):
    line = refusal(own(lambda: returned))
    assert line.startswith("data.dataset: ")
    assert "own_data:load" in line
    for text in expected:
        assert text in line


# What a function takes


def test_a_function_gets_what_its_signature_names(own):
    seen = {}

    def record(root, image_size, *, seed, noise=1.0, name="x"):
        seen.update(root=root, image_size=image_size, seed=seed, noise=noise, name=name)
        return parts()

    load(own(record, root="folder", image_size=8, noise="1e-3", name="1e-3x"), seed=5)
    assert seen == {"root": "folder", "image_size": 8, "seed": 5, "noise": 1e-3, "name": "1e-3x"}


def test_a_function_that_names_nothing_gets_the_further_keys_alone(own):
    seen = {}

    def record(**keys):
        seen.update(keys)
        return parts()

    load(own(record, root="folder", image_size=8, noise=2))
    assert seen == {"noise": 2}


def test_a_function_keeps_its_default_if_the_recipe_has_no_image_size(own):
    def make(image_size=6):
        return parts(GRAY[:, :image_size, :5], test_pixels=GRAY[:, :image_size, :5])

    assert load(own(make)).train.pixels.shape == (6, 3, 6, 5)


def test_images_are_resized_to_image_size(own):
    for size in (5, 7, 8):  # 5 and 8 are a side of the images
        dataset = load(own(lambda: parts(test_pixels=GRAY[:, :4]), image_size=size))
        assert dataset.train.pixels.shape == (6, 3, size, size)
        assert dataset.test.pixels.shape == (6, 3, size, size)
        assert dataset.train.pixels.dtype == torch.uint8

    pixels = np.arange(6 * 49, dtype=np.uint8).reshape(6, 7, 7)
    as_it_is = load(own(lambda: parts(pixels, test_pixels=pixels), image_size=7))
    assert np.array_equal(as_it_is.train.pixels[:, 2].numpy(), pixels)


@pytest.mark.parametrize(
    ("dataset", "keys", "expected"),
    [
        (OWN, {"nois": 1.0}, ["data.nois: ", "(did you mean noise?)", "num_train"]),
        ("own_data:needs_path", {}, ["data.path: ", "needs_path"]),
        ("own_data:needs_image_size", {}, ["data.image_size: ", "needs_image_size"]),
        ("own_data:takes_num_samples", {}, ["data.dataset: ", "data.num_samples", "rename"]),
        ("own_data:takes_positions", {}, ["data.dataset: ", "takes_positions"]),
        ("own_data:fails", {}, ["data.dataset: ", "KeyError", "test_own_data.py, line"]),
        ("own_data:number", {}, ["data.dataset: ", "not a function"]),
        ("own_data:nothing", {}, ["data.dataset: ", "has no nothing"]),
        ("no_such_module:load", {}, ["data.dataset: ", "no_such_module"]),
        ("own data:load", {}, ["data.dataset: ", "module:attribute"]),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_in_one_line(
    monkeypatch, dataset, keys, expected
):
    module = ModuleType("own_data")
    module.needs_path = lambda path: parts()
    module.needs_image_size = lambda image_size: parts()
    module.takes_num_samples = lambda num_samples=5: parts()
    module.takes_positions = lambda path, /: parts()
    module.fails = lambda: {}["train"]
    module.number = 5
    monkeypatch.setitem(sys.modules, "own_data", module)

    line = refusal(recipes.Data(dataset=dataset, **keys))
    for text in expected:
        assert text in line


def test_a_built_in_data_set_has_no_further_keys():
    with pytest.raises(UserError, match=r"^r\.yaml: data\.noise: unknown key"):
        recipes.parse({"data": {"dataset": "digits", "noise": 1.0}}, "r.yaml")


# Fingerprints, batches, and the command line


def test_two_loads_of_one_data_set_have_one_fingerprint():
    section = recipes.Data(dataset=OWN, validation=0.25)
    fingerprint = load(section).fingerprint()
    assert load(section).fingerprint() == fingerprint
    assert load(section, seed=1).fingerprint() != fingerprint
    other_noise = recipes.Data(dataset=OWN, validation=0.25, noise=21.0)
    assert load(other_noise).fingerprint() != fingerprint


def test_a_function_that_returns_other_data_at_each_call_is_found_by_the_fingerprint(own):
    """Ranks compare it before the first step, and a resume with that of the checkpoint."""
    rng = np.random.default_rng()

    def draw():
        return parts(rng.integers(0, 256, GRAY.shape, dtype=np.uint8))

    section = own(draw)
    assert load(section).fingerprint() != load(section).fingerprint()


def test_batches_are_made_of_images_that_are_not_square(own):
    section = own(parts, batch_size=6, augment="crop_flip")
    batches = Batches(load(section).train, section, seed=0)
    inputs, labels = batches.micro_batch(step=0)
    assert inputs.shape == (6, 3, 8, 5)
    assert sorted(labels.tolist()) == sorted(LABELS.tolist())


RECIPE = """
data: {dataset: "my_data:load", batch_size: 8, validation: 0.25}
schedule: {name: StepLR, step_size: 1}
trainer: {epochs: 2}
"""
MODULE = """
import numpy as np

def load():
    labels = np.arange(32) % 2
    pixels = np.zeros((32, 8, 8), np.uint8)
    return (pixels, labels), (pixels, labels)
"""


def test_lr_draws_a_recipe_with_data_of_ones_own(users_folder):
    (users_folder / "recipe.yaml").write_text(RECIPE)
    (users_folder / "my_data.py").write_text(MODULE)

    result = CliRunner().invoke(app, ["lr", "recipe.yaml", "-o", "lr.png"])
    assert result.exit_code == 0, result.output
    assert "drawn as if" not in result.output
    assert (users_folder / "lr.png").exists()


# The documentation


def test_the_example_of_the_documentation_is_loaded(users_folder):
    """Its function reads a file that this test writes, and the recipe beside it names it."""
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    _, _, rest = page.partition("\n### Images in memory\n")
    blocks = dict(re.findall(r"^```(python|yaml)\n(.*?)^```$", rest, re.MULTILINE | re.DOTALL)[:2])
    section = recipes.parse(yaml.safe_load(blocks["yaml"]), "recipe.yaml").data
    module = users_folder / "my_parts" / "data.py"
    file = users_folder / section.root / "photos.npz"
    for path in (module, file):
        path.parent.mkdir(parents=True)
    module.write_text(blocks["python"])

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (200, 10, 12, 3), dtype=np.uint8)
    np.savez(file, pixels=pixels, labels=np.arange(200) % 2)
    dataset = load(section)

    assert dataset.train.pixels.shape[1:] == (3, section.image_size, section.image_size)
    num_images = [len(dataset.train), len(dataset.validation), len(dataset.test)]
    assert num_images == [144, 16, 40]
    assert dataset.classes == ("cat", "dog")
