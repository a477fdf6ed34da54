"""Exported weights in other people's tools."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lrd
from lrd import recipe as recipes
from lrd.checkpoint import network_config, store
from lrd.checkpoint.export import export_weights
from lrd.parts.models import build_model

transformers = pytest.importorskip("transformers", reason="`make clients` installs it")


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A folder with a network for images of 12 x 10 pixels."""
    recipe = recipes.parse({"model": {"arch": "resnet18", "width": 2}}, "test")
    config = network_config.describe_network(
        recipe,
        classes=["cat", "dog"],
        mean=torch.tensor([120.1, 99.9, 70.3])[:, None, None],
        std=torch.tensor([60.7, 50.3, 80.1])[:, None, None],
        image_size=(12, 10),
    )
    config = network_config.with_results(
        config, step=1, epoch=0, evaluated=0, metrics={}, best=None
    )
    weights = build_model(recipe.model, num_classes=2, seed=0).state_dict()
    trainer = {"step": 1, "best": None}
    state = store.TrainState(weights, {}, trainer, config=config)
    store.save(tmp_path / "run", state)
    export_weights(tmp_path / "run", tmp_path / "exported")
    return tmp_path / "exported"


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
@pytest.mark.parametrize("size", [(12, 10), (31, 47)], ids=["same size", "resized"])
def test_hugging_faces_image_processor_makes_the_same_inputs(exported, backend, size):
    model = lrd.load_model(exported)
    processor = transformers.AutoImageProcessor.from_pretrained(exported, backend=backend)
    generator = np.random.default_rng(0)
    for _ in range(20):
        image = Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8))
        inputs = processor(image, return_tensors="pt")["pixel_values"][0]
        expected = model.preprocess(image)
        if backend == "torchvision" and size != (12, 10):
            # Its resizing may round a pixel to the next value.
            torch.testing.assert_close(inputs, expected, rtol=0, atol=1.01 / 50.3)
        else:
            assert torch.equal(inputs, expected)


def test_hugging_faces_config_has_the_classes(exported):
    config = transformers.PretrainedConfig.from_pretrained(exported)
    assert config.id2label == {0: "cat", 1: "dog"}
    assert config.num_labels == 2
    assert config.image_size == [12, 10]
