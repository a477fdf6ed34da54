"""Runs whose weights the tests use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lrd import recipe as recipes
from lrd.checkpoint.network_config import read_config, to_metadata
from lrd.data.datasets import Dataset, load_dataset
from tests.helpers.training import train


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load_dataset(recipes.Data(dataset="digits"), seed=0)


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the digits with averages of the weights, after 10 steps."""
    folder = tmp_path_factory.mktemp("digits")
    train(folder, folder / "run", "trainer.ema_decay=0.5", "optimizer.lr=0.05")
    return folder / "run"


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory, digits: Dataset) -> Path:
    """Digits as image files that are no squares and larger than the network's input."""
    root = tmp_path_factory.mktemp("images")
    for part, images in (("train", digits.train), ("test", digits.test)):
        for i in range(300 if part == "train" else 150):
            pixels = images.pixels[i].permute(1, 2, 0).numpy()  # uint8 (8, 8, 3)
            folder = root / part / f"digit {int(images.labels[i])}"
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(pixels).resize((20, 24), Image.Resampling.BICUBIC)
            image.save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def folder_run_dir(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    """A finished run on `image_folder` in bfloat16, with images held out."""
    folder = tmp_path_factory.mktemp("folder")
    train(
        folder,
        folder / "run",
        "data.dataset=imagefolder",
        f"data.root={image_folder}",
        "data.image_size=12",
        "data.batch_size=50",
        "data.validation=0.1",
        "trainer.precision=bf16",
        "trainer.ema_decay=0.5",
    )
    return folder / "run"


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a file of weights with another config."""

    def edit(source: Path, change: Callable[[dict], None]) -> Path:
        config = json.loads(json.dumps(read_config(source)))
        change(config)
        out = tmp_path / "edited.safetensors"
        weights = {name: torch.clone(tensor) for name, tensor in load_file(source).items()}
        save_file(weights, out, to_metadata(config))
        return out

    return edit
