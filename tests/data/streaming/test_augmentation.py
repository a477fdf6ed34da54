"""Random changes to an image are torchvision's, on draws that are a function of the position."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from lrd import recipe as recipes
from lrd.data.decoding import read_region
from lrd.data.positions import generator, seed_for_sample
from lrd.data.streaming.augmentation import Augmentation
from lrd.data.streaming.file_index import index_folder
from lrd.data.streaming.readers import ImageReader
from lrd.data.streaming.sources import FileSource

SEED = 5
SIZE = 24
SHAPES = [(47, 61), (61, 47), (40, 40), (30, 95), (95, 30), (24, 24), (17, 33)]  # below 2 x SIZE
MEAN = [12.3, 200.6, 80.5]
COLOUR = [12.0, 201.0, 80.0]  # MEAN, rounded


def section_of(root: Path, **values) -> recipes.Data:
    settings = {"augment": "resized_crop", "image_size": SIZE, **values}
    recipe = recipes.parse({"data": {"dataset": "imagefolder", "root": str(root), **settings}}, "r")
    return recipe.data


def save_folder(folder: Path, suffix: str) -> list[Tensor]:
    """Save an image of each shape; return them as they are decoded, uint8 (3, H, W)."""
    rng = np.random.default_rng(0)
    (folder / "a").mkdir(parents=True)
    images = []
    for number, (height, width) in enumerate(SHAPES):
        small = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        image.save(folder / "a" / f"{number}.{suffix}")
        with Image.open(folder / "a" / f"{number}.{suffix}") as saved:
            images.append(v2.functional.pil_to_tensor(saved.convert("RGB")))
    return images


def make_reader(folder: Path, section: recipes.Data, size: int = SIZE) -> ImageReader:
    return ImageReader(FileSource(index_folder(folder)), section, SEED, size, MEAN)


def transforms_of(section: recipes.Data) -> v2.Compose:
    """What a recipe says, as a user of torchvision would write it."""
    transforms: list[v2.Transform] = []
    if section.augment == "resized_crop":
        scale = (section.crop_scale, 1.0)
        transforms.append(v2.RandomResizedCrop(section.image_size, scale=scale, antialias=True))
        transforms.append(v2.RandomHorizontalFlip())
    if section.trivial_augment:
        transforms.append(v2.TrivialAugmentWide())
    if section.random_erasing:
        transforms.append(v2.RandomErasing(section.random_erasing, value=COLOUR))
    return v2.Compose(transforms)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize(
    "values",
    [
        pytest.param({}, id="crop and flip"),
        pytest.param({"crop_scale": 0.9}, id="large crops"),
        pytest.param({"crop_scale": 0.001}, id="small crops"),
        pytest.param({"trivial_augment": True}, id="TrivialAugment"),
        pytest.param({"random_erasing": 0.5}, id="erasing"),
        pytest.param({"trivial_augment": True, "random_erasing": 1.0}, id="all"),
    ],
)
def test_an_image_is_changed_as_torchvision_changes_it(tmp_path, suffix, values):
    images = save_folder(tmp_path, suffix)
    section = section_of(tmp_path, **values)
    reader = make_reader(tmp_path, section)
    transform = transforms_of(section)

    for epoch in range(8):
        for index, image in enumerate(images):
            pixels = reader.read(epoch, index).pixels
            seed_for_sample(SEED, epoch, index)
            assert torch.equal(pixels, transform(image)), (epoch, index)


@pytest.mark.parametrize("augment", ["none", "crop", "crop_flip"])
def test_an_image_of_the_inputs_size_is_changed_further_as_torchvision_does(tmp_path, augment):
    """Its crop, whose draws are those of images in memory, comes first."""
    save_folder(tmp_path, "png")
    values = {"trivial_augment": True, "random_erasing": 0.5}
    section = section_of(tmp_path, augment=augment, **values)
    reader = make_reader(tmp_path, section)
    plain = make_reader(tmp_path, section_of(tmp_path, augment=augment))
    transform = transforms_of(section)

    for epoch in range(5):
        for index in range(len(SHAPES)):
            unchanged = plain.read(epoch, index).pixels
            seed_for_sample(SEED, epoch, index)
            pixels = reader.read(epoch, index).pixels
            seed_for_sample(SEED, epoch, index)
            assert torch.equal(pixels, transform(unchanged)), (epoch, index)


def test_a_crop_at_a_reduced_scale_differs_little(tmp_path):
    """The only difference from torchvision: large crops are decoded smaller."""
    Image.radial_gradient("L").resize((400, 300)).save(tmp_path / "a.jpg", quality=95)
    image = v2.functional.pil_to_tensor(Image.open(tmp_path / "a.jpg").convert("RGB"))
    section = section_of(tmp_path)
    augmentation = Augmentation(section, SIZE, MEAN)
    transform = transforms_of(section)

    differences = []
    for index in range(60):
        seed_for_sample(SEED, 0, index)
        region = read_region(tmp_path / "a.jpg", augmentation.choose_region, SIZE)
        pixels = augmentation.finish(region)
        seed_for_sample(SEED, 0, index)
        difference = pixels.int() - transform(image).int()
        differences.append(float(difference.abs().max()))
    assert max(differences) > 0.0
    assert max(differences) < 12.0  # of 255


def test_changes_are_a_function_of_the_position(tmp_path):
    save_folder(tmp_path, "png")
    reader = make_reader(tmp_path, section_of(tmp_path))
    in_order = [reader.read(epoch, index).pixels for epoch in (0, 1) for index in range(3)]
    backwards = [reader.read(epoch, index).pixels for epoch in (1, 0) for index in (2, 1, 0)]
    for first, second in zip(in_order, reversed(backwards), strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(in_order[0], in_order[3])

    evaluated = reader.read(None, 0).pixels
    torch.manual_seed(123)
    assert torch.equal(reader.read(None, 0).pixels, evaluated)


@pytest.mark.parametrize("crop_scale", [0.08, 0.5, 1.0])
def test_areas_and_shapes_of_crops_have_the_distribution_of_the_paper(crop_scale):
    """Area uniform, shape log-uniform, drawn again up to ten times until the crop fits.

    The reference is NumPy's, on draws of its own (Szegedy et al., arXiv 1409.4842).
    """
    height, width = 300, 400
    augmentation = Augmentation(section_of(Path(), crop_scale=crop_scale), SIZE, MEAN)
    areas, aspects = [], []
    for index in range(800):
        seed_for_sample(SEED, 0, index)
        region = augmentation.choose_region(height, width)
        assert 0 <= region.top <= height - region.height
        assert 0 <= region.left <= width - region.width
        areas.append(region.height * region.width / (height * width))
        aspects.append(region.width / region.height)

    rng = np.random.default_rng(0)
    drawn_areas = rng.uniform(crop_scale, 1.0, (20_000, 10))
    drawn_aspects = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), (20_000, 10)))
    widths = np.sqrt(drawn_areas * drawn_aspects * height * width)
    heights = np.sqrt(drawn_areas / drawn_aspects * height * width)
    fits = (widths <= width + 0.5) & (heights <= height + 0.5)
    first = fits.argmax(1)
    rows = np.arange(len(first))
    # None of the ten fits: the whole image, whose shape is 4:3.
    expected_areas = np.where(fits.any(1), drawn_areas[rows, first], 1.0)
    expected_aspects = np.where(fits.any(1), drawn_aspects[rows, first], 4 / 3)

    assert min(areas) >= crop_scale - 0.01
    quantiles = [0.1, 0.25, 0.5, 0.75, 0.9]
    for found, expected in ((areas, expected_areas), (aspects, expected_aspects)):
        difference = np.quantile(found, quantiles) - np.quantile(expected, quantiles)
        assert np.abs(difference).max() < 0.06


def test_half_of_the_crops_are_mirrored():
    augmentation = Augmentation(section_of(Path()), SIZE, MEAN)
    marked = torch.zeros((3, SIZE, SIZE), dtype=torch.uint8)
    marked[:, :, 0] = 1
    num_mirrored = 0
    for index in range(1000):
        seed_for_sample(SEED, 0, index)
        pixels = augmentation.finish(marked)
        assert torch.equal(pixels, marked) or torch.equal(pixels, marked.flip(2))
        num_mirrored += not torch.equal(pixels, marked)
    assert 440 < num_mirrored < 560


def test_seeds_are_those_of_the_public_generator():
    for position in ((0, 0, 0), (1, 2, 3), (2**63 - 1, 2**40, 2**31)):
        seed_for_sample(*position)
        expected = generator(*position)
        assert torch.equal(torch.rand(9), torch.rand(9, generator=expected))


def test_all_generators_are_seeded_each_with_numbers_of_its_own():
    def draw(*position: int) -> tuple[float, ...]:
        seed_for_sample(*position)
        return float(torch.rand(())), float(np.random.random()), random.random()

    first = draw(1, 2, 3)
    assert draw(1, 2, 3) == first
    others = [draw(2, 2, 3), draw(1, 3, 3), draw(1, 2, 4)]
    numbers = [number for drawn in (first, *others) for number in drawn]
    assert len(set(numbers)) == len(numbers)
