"""docs/data.md: its data set of single samples loads, and draws as the page says."""

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import lrd
from lrd import recipe as recipes
from lrd.data.datasets import load_dataset
from lrd.job.setup import build_batches

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
NUM_TRAINING_IMAGES = 16


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> recipes.Recipe:
    """The recipe of the page, with the module and the images that it names."""
    _, _, rest = PAGE.partition("\n### Samples one by one\n")
    blocks = dict(re.findall(r"^```(python|yaml)\n(.*?)^```$", rest, re.MULTILINE | re.DOTALL)[:2])
    recipe = recipes.parse(yaml.safe_load(blocks["yaml"]), "recipe.yaml")
    (tmp_path / "my_parts").mkdir()
    (tmp_path / "my_parts" / "samples.py").write_text(blocks["python"])

    rng = np.random.default_rng(0)
    for part, count in (("train", NUM_TRAINING_IMAGES), ("test", 4)):
        folder = tmp_path / recipe.data.root / part
        folder.mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (50 + i, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{('cat', 'dog')[i % 2]}.{i}.jpg")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [os.fspath(tmp_path), *sys.path])
    for name in ("my_parts", "my_parts.samples"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return recipe


@pytest.mark.parametrize("name", ["Photos", "load"])
def test_the_data_set_of_single_samples_makes_the_same_batches_with_any_workers(recipe, name):
    recipe.data.dataset = f"my_parts.samples:{name}"
    size = recipe.data.image_size
    made = {}
    for workers in (0, recipe.data.workers):
        recipe.data.workers = workers
        dataset = load_dataset(recipe.data, recipe.seed)
        assert dataset.classes == ("cat", "dog")
        assert (len(dataset.train), len(dataset.test)) == (NUM_TRAINING_IMAGES, 4)

        batches = build_batches(dataset.train, recipe, num_classes=2, rank=0, world_size=1)
        made[workers] = [batches.micro_batch(step) for step in (0, 1, 2)]
        batches.close()

    alone, with_workers = made.values()
    for (inputs, labels), (expected_inputs, expected_labels) in zip(
        with_workers, alone, strict=True
    ):
        assert inputs.shape == (recipe.data.batch_size, 3, size, size)
        assert torch.equal(inputs, expected_inputs)
        assert torch.equal(labels, expected_labels)
    assert not torch.equal(alone[0][0], alone[2][0])  # the second epoch begins with step 2


def test_a_sample_draws_what_the_generator_of_its_position_draws(recipe, monkeypatch):
    recipe.data.workers = 0
    recipe.data.validation = 0.0
    dataset = load_dataset(recipe.data, recipe.seed)
    drawn = []

    def draw(self, index: int) -> tuple[torch.Tensor, int]:
        drawn.append(torch.rand(2))
        size = recipe.data.image_size
        return torch.zeros((3, size, size), dtype=torch.uint8), 0

    monkeypatch.setattr(sys.modules["my_parts.samples"].Photos, "__getitem__", draw)

    batches = build_batches(dataset.train, recipe, num_classes=2, rank=0, world_size=1)
    step = batches.steps_per_epoch + 1  # in the second epoch
    batches.micro_batch(step)
    for index, values in zip(batches.indices(step).tolist(), drawn, strict=True):
        generator = lrd.data.generator(recipe.seed, 1, index)
        assert torch.equal(torch.rand(2, generator=generator), values)
