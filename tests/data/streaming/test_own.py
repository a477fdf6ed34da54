"""Map-style data sets of the user's own: the same bytes in any worker, and one line for a fault."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Subset, TensorDataset
from torchvision import tv_tensors
from torchvision.transforms import v2

import lrd.data
from lrd import recipe as recipes
from lrd.data.datasets import count_training_images, load_dataset
from lrd.data.positions import seed_for_sample
from lrd.data.streaming.streamed import StreamedBatches, StreamedImages
from lrd.errors import UserError
from lrd.job.setup import build_batches

SEED = 4
SIZE = 8
COUNT = 20
CLASSES = ["a", "b", "c"]

# uint8 (N, 3, H, W), different in each place.
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, 3, SIZE, SIZE), dtype=np.uint8)
LABELS = [index % 3 for index in range(COUNT)]

opened: list[StreamedBatches] = []


@pytest.fixture(autouse=True)
def closed_batches() -> Iterator[None]:
    """No worker outlives its test."""
    yield
    while opened:
        opened.pop().close()


@pytest.fixture
def own(monkeypatch):
    """Make something a data set that a recipe can name; return the recipe."""

    def make_recipe(load: Any, **keys: Any) -> recipes.Recipe:
        module = ModuleType("own_samples")
        module.load = load
        monkeypatch.setitem(sys.modules, "own_samples", module)
        data = {"dataset": "own_samples:load", "batch_size": 5, "workers": 0, **keys}
        return recipes.parse({"data": data, "seed": SEED}, "r.yaml")

    return make_recipe


class Samples:
    """A plain class with a length and samples; `make` makes a sample of its index."""

    classes = CLASSES

    def __init__(self, make: Callable[[int], Any] | None = None, count: int = COUNT) -> None:
        self.make = make or (lambda index: (torch.from_numpy(PIXELS[index]), LABELS[index]))
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


class TorchSamples(Samples, TorchDataset):
    """The same, as a data set of torch."""


def load(recipe: recipes.Recipe) -> lrd.data.Dataset:
    return load_dataset(recipe.data, recipe.seed)


def refusal(recipe: recipes.Recipe) -> str:
    """The one line with which a data set is refused."""
    with pytest.raises(UserError) as caught:
        load(recipe)
    (line,) = str(caught.value).splitlines()
    return line


def make_batches(recipe: recipes.Recipe, rank: int = 0, world_size: int = 1) -> StreamedBatches:
    batches = build_batches(load(recipe).train, recipe, len(CLASSES), rank, world_size)
    assert isinstance(batches, StreamedBatches)
    opened.append(batches)
    return batches


def with_workers(recipe: recipes.Recipe, workers: int) -> recipes.Recipe:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": workers})})


def read_steps(batches: StreamedBatches, steps: range) -> list[tuple[Tensor, Tensor]]:
    return [batches.micro_batch(step) for step in steps]


def read_all(part: Any) -> tuple[Tensor, Tensor]:
    pixels, labels = zip(*part.read(0, len(part), 6), strict=True)
    return torch.cat(pixels), torch.cat(labels)


# What a recipe may name


class WithTrain(TorchSamples):
    """A class whose parts are chosen as torchvision's data sets are."""

    def __init__(self, train: bool, root: str = "", noise: float = 0.0) -> None:
        super().__init__(count=COUNT if train else 7)
        self.root = root
        self.noise = noise


class WithSplit(Samples):
    def __init__(self, *, split: str, image_size: int = SIZE) -> None:
        super().__init__(count={"train": COUNT, "test": 7}[split])
        assert image_size == SIZE


def returns_three() -> Any:
    train, test = Samples(), Samples(count=7)
    train.classes = None
    return train, test, CLASSES


def returns_subsets() -> Any:
    samples = TorchSamples()
    return Subset(samples, list(range(COUNT))), Subset(samples, list(range(7))), CLASSES


def returns_tensors() -> Any:
    """The labels are tensors too."""
    tensors = torch.from_numpy(PIXELS), torch.tensor(LABELS)
    return TensorDataset(*tensors), TensorDataset(*(tensor[:7] for tensor in tensors)), CLASSES


@pytest.mark.parametrize(
    ("named", "keys"),
    [
        (lambda: (Samples(), Samples(count=7)), {}),
        (lambda: [TorchSamples(), TorchSamples(count=7)], {}),
        (lambda: {"train": Samples(), "test": Samples(count=7), "classes": tuple(CLASSES)}, {}),
        (returns_three, {}),
        (returns_subsets, {}),
        (returns_tensors, {}),
        (WithTrain, {}),
        (WithTrain, {"root": "folder", "noise": 0.5}),
        (WithSplit, {}),
        (WithSplit, {"image_size": SIZE}),
        (WithSplit, {"storage": "files"}),
    ],
)
def test_a_data_set_may_be_named_in_several_forms(own, named, keys):
    recipe = own(named, **keys)
    dataset = load(recipe)
    assert dataset.classes == tuple(CLASSES)
    assert isinstance(dataset.train, StreamedImages)
    for part, count in ((dataset.train, COUNT), (dataset.test, 7)):
        assert part.image_shape == (3, SIZE, SIZE)
        pixels, labels = read_all(part)
        assert np.array_equal(pixels.numpy(), PIXELS[:count])
        assert labels.tolist() == LABELS[:count]
    assert count_training_images(recipe.data, recipe.seed) == COUNT
    if "noise" in keys:
        assert dataset.train.reader._dataset.noise == 0.5
        assert dataset.train.reader._dataset.root == "folder"


HWC = PIXELS.transpose(0, 2, 3, 1)
GRAY = PIXELS[:, :1]


def expand(gray: np.ndarray) -> np.ndarray:
    return np.broadcast_to(gray, PIXELS.shape)


def read_only(index: int) -> np.ndarray:
    pixels = PIXELS[index].copy()
    pixels.flags.writeable = False
    return pixels


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        pytest.param(lambda i: Image.fromarray(HWC[i]), PIXELS, id="PIL"),
        pytest.param(lambda i: Image.fromarray(GRAY[i, 0]), expand(GRAY), id="PIL gray"),
        pytest.param(
            lambda i: Image.fromarray(GRAY[i, 0].astype(np.uint16) * 257),
            expand(GRAY),
            id="PIL 16 bit",
        ),
        pytest.param(lambda i: HWC[i], PIXELS, id="uint8 H W 3"),
        pytest.param(lambda i: GRAY[i].transpose(1, 2, 0), expand(GRAY), id="uint8 H W 1"),
        pytest.param(lambda i: PIXELS[i], PIXELS, id="uint8 3 H W"),
        pytest.param(lambda i: PIXELS[i, ::-1], PIXELS[:, ::-1], id="negative strides"),
        pytest.param(read_only, PIXELS, id="read-only"),
        pytest.param(lambda i: torch.from_numpy(GRAY[i]), expand(GRAY), id="tensor 1 H W"),
        pytest.param(lambda i: tv_tensors.Image(PIXELS[i]), PIXELS, id="torchvision's tensor"),
        pytest.param(
            lambda i: torch.tensor(PIXELS[i] / 255).requires_grad_(),
            (PIXELS / 255).astype(np.float32),
            id="float64 tensor with a gradient",
        ),
        pytest.param(
            lambda i: (PIXELS[i] / 255).astype(np.float32),
            (PIXELS / 255).astype(np.float32),
            id="float32 array",
        ),
        pytest.param(
            lambda i: torch.from_numpy(PIXELS[i]).half(), PIXELS.astype(np.float32), id="float16"
        ),
    ],
)
def test_images_of_each_form_become_3_h_w(own, make, expected):
    dataset = load(own(lambda: 2 * (Samples(lambda index: (make(index), LABELS[index])),)))
    pixels, labels = read_all(dataset.train)
    assert np.array_equal(pixels.numpy(), expected)
    assert pixels.dtype == (torch.uint8 if expected.dtype == np.uint8 else torch.float32)
    assert labels.tolist() == LABELS
    assert dataset.train.dtype == pixels.dtype


@pytest.mark.parametrize(
    "convert",
    [
        np.int64,
        np.uint8,
        np.array,
        torch.tensor,
        lambda label: torch.tensor([label]),
        lambda label: np.array([[label]]),
    ],
)
def test_labels_of_each_form_become_int64(own, convert):
    make = lambda index: (PIXELS[index], convert(LABELS[index]))  # noqa: E731
    _, labels = read_all(load(own(lambda: (Samples(make), Samples(make)))).train)
    assert labels.dtype == torch.int64
    assert labels.tolist() == LABELS


def test_integers_are_normalized_and_floats_are_not(own):
    inputs, _ = make_batches(own(lambda: (Samples(), Samples()))).micro_batch(0)
    assert abs(float(inputs.mean())) < 0.1
    assert abs(float(inputs.std()) - 1.0) < 0.1

    make = lambda index: (PIXELS[index] / np.float32(255), LABELS[index])  # noqa: E731
    batches = make_batches(own(lambda: (Samples(make), Samples(make))))
    inputs, _ = batches.micro_batch(0)
    assert torch.equal(inputs, torch.from_numpy(PIXELS / np.float32(255))[batches.indices(0)])


# Samples are a function of the position


TRANSFORM = v2.Compose(
    [
        v2.RandomResizedCrop(SIZE),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(0.5, 0.5, 0.5),
        v2.RandomErasing(0.5),
    ]
)


def draw_from_all(index: int) -> tuple[Tensor, int]:
    """Transforms of torchvision, and numbers of NumPy and Python."""
    pixels = TRANSFORM(torch.from_numpy(PIXELS[index]))
    pixels[0, 0, 0] = np.random.randint(256)
    pixels[0, 0, 1] = random.randrange(256)
    return pixels, LABELS[index]


def load_random() -> Any:
    return Samples(draw_from_all), Samples(draw_from_all, count=7)


MIXED = {"mixup": 0.4}


@pytest.mark.parametrize("keys", [{}, MIXED])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_samples_do_not_depend_on_workers_or_the_start(own, workers, keys):
    recipe = own(load_random, **keys)
    batches = make_batches(recipe)
    expected = read_steps(batches, range(8))  # two epochs
    assert not torch.equal(expected[0][0], expected[4][0])

    again = make_batches(with_workers(recipe, workers))
    again.end_step = 8
    for step in (0, 1, 5, 6, 7, 2, 3, 4):  # not in order: a resume, and a jump back
        inputs, labels = again.micro_batch(step)
        assert torch.equal(inputs, expected[step][0])
        assert torch.equal(labels, expected[step][1])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_global_batch(own, world_size):
    recipe = own(load_random, **MIXED, batch_size=8)
    whole = make_batches(recipe)
    ranks = [make_batches(recipe, rank, world_size) for rank in range(world_size)]
    for step in range(3):
        inputs, labels = whole.micro_batch(step)
        parts = [batches.micro_batch(step) for batches in ranks]
        assert torch.equal(torch.cat([part for part, _ in parts]), inputs)
        assert torch.equal(torch.cat([part for _, part in parts]), labels)


def test_the_generators_begin_at_the_samples_position(own):
    """Whatever is held out: the index is that in the user's data set."""
    recipe = own(load_random, validation=0.3)
    batches = make_batches(recipe)
    train = load(recipe).train
    for step in (0, 1, 4):
        epoch = step // batches.steps_per_epoch
        kept = train.reader._indices
        expected = []
        for index in batches.indices(step).tolist():
            seed_for_sample(SEED, epoch, int(kept[index]))
            expected.append(draw_from_all(kept[index])[0])
        inputs, _ = batches.micro_batch(step)
        assert torch.equal(inputs, batches.normalize(torch.stack(expected)))


def test_torchs_generator_is_the_public_one(own):
    make = lambda index: (torch.rand(3, SIZE, SIZE), LABELS[index])  # noqa: E731
    batches = make_batches(own(lambda: (Samples(make), Samples(make))))
    for step in (0, 5):
        inputs, _ = batches.micro_batch(step)
        for pixels, index in zip(inputs, batches.indices(step).tolist(), strict=True):
            generator = lrd.data.generator(SEED, step // batches.steps_per_epoch, index)
            assert torch.equal(pixels, torch.rand(3, SIZE, SIZE, generator=generator))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_may_ask_for_a_generator(own, workers):
    """For example for noise that is the same in each epoch."""

    def make(index: int) -> tuple[Tensor, int]:
        generator = lrd.data.generator(seed=7, epoch=0, index=index)
        return torch.rand(3, SIZE, SIZE, generator=generator), LABELS[index]

    batches = make_batches(own(lambda: (Samples(make), Samples(make)), workers=workers))
    batches.end_step = 5
    of_sample = {}
    for step in range(5):
        inputs, _ = batches.micro_batch(step)
        for pixels, index in zip(inputs, batches.indices(step).tolist(), strict=True):
            assert torch.equal(of_sample.setdefault(index, pixels), pixels)


def test_evaluated_samples_are_the_same_each_time(own):
    dataset = load(own(load_random))
    first, _ = read_all(dataset.test)
    torch.manual_seed(99)
    second, _ = read_all(load(own(load_random, workers=2)).test)
    assert torch.equal(first, second)


def test_loading_leaves_the_global_generators_alone(own):
    def draw() -> tuple[float, ...]:
        return float(torch.rand(())), float(np.random.random()), random.random()

    numbers = []
    for loads in (False, True):
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        if loads:
            load(own(load_random))
        numbers.append(draw())
    assert numbers[0] == numbers[1]


def test_held_out_samples_are_not_trained_on(own):
    recipe = own(lambda: (Samples(), Samples(count=7)), validation=0.25)
    dataset = load(recipe)
    train, _ = read_all(dataset.train)
    held_out, labels = read_all(dataset.validation)
    assert (len(train), len(held_out)) == (15, 5)
    found = sorted(pixels.tobytes() for pixels in torch.cat([train, held_out]).numpy())
    assert found == sorted(pixels.tobytes() for pixels in PIXELS)
    assert labels.shape == (5,)


def test_the_fingerprint_is_of_a_few_samples(own):
    fingerprint = load(own(load_random)).fingerprint()
    assert load(own(load_random, workers=1)).fingerprint() == fingerprint
    changes = [
        lambda: (Samples(draw_from_all), Samples(draw_from_all, count=8)),
        lambda: (*load_random(), ["a", "b", "d"]),
        lambda: (Samples(), Samples(count=7)),
    ]
    for change in changes:
        assert load(own(change)).fingerprint() != fingerprint


# Faults


def sample(**changes: Any) -> tuple[Any, Any]:
    return changes.get("image", PIXELS[0]), changes.get("label", 0)


class Opaque:
    """Something that is no image."""


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (None, ["is NoneType", "a pair of image and label"]),
        (PIXELS[0], ["is ndarray", "a pair of image and label"]),
        ((PIXELS[0],), ["is tuple", "a pair of image and label"]),
        ((PIXELS[0], 0, 1), ["is tuple", "a pair of image and label"]),
        (sample(image=None), ["NoneType", "tensor or array"]),
        (sample(image=Opaque()), ["Opaque", "tensor or array"]),
        (sample(image=PIXELS[0].tolist()), ["list", "tensor or array"]),
        (sample(image=PIXELS[0, 0]), ["uint8 (8, 8)", "(3, H, W)"]),
        (sample(image=PIXELS[0, :2]), ["uint8 (2, 8, 8)", "(3, H, W)"]),
        (sample(image=PIXELS[:2]), ["uint8 (2, 3, 8, 8)", "(3, H, W)"]),
        (sample(image=PIXELS[0].astype(int)), ["int64 (3, 8, 8)", "uint8 or float32"]),
        (sample(image=torch.ones(3, 8, 8) > 0), ["bool (3, 8, 8)", "uint8 or float32"]),
        (sample(image=PIXELS[0].astype(object)), ["TypeError"]),
        (sample(image=PIXELS[0].astype("U1")), ["TypeError"]),
        (sample(image=HWC[0] / 255), ["float32 (8, 8, 3)", "(3, H, W)"]),
        (sample(label=None), ["the label None", "an integer"]),
        (sample(label="cat"), ["the label 'cat'", "an integer"]),
        (sample(label=1.0), ["the label 1.0", "an integer"]),
        (sample(label=True), ["the label True", "an integer"]),
        (sample(label=torch.tensor(0.5)), ["the label tensor(0.5000)", "an integer"]),
        (sample(label=torch.eye(9)), ["the label tensor(", "an integer"]),
        (sample(label=np.array([0, 1])), ["the label array([0, 1])", "an integer"]),
        (sample(label=-1), ["the label -1", "from 0 and below 3"]),
        (sample(label=3), ["the label 3", "from 0 and below 3"]),
    ],
)
def test_a_sample_that_is_none_is_refused_in_one_line(own, item, expected):
    line = refusal(own(lambda: (Samples(lambda index: item), Samples())))
    assert line.startswith("data.dataset: own_samples:load: sample 0 ")
    for text in expected:
        assert text in line


def fault_at(index: int, fault: Callable[[], Any]) -> Callable[[int], Any]:
    """A sample of an index fails in training; it is not among those that are tried at the start."""

    def make(asked: int) -> Any:
        is_training = (
            torch.initial_seed() != lrd.data.generator(SEED, (1 << 64) - 1, asked).initial_seed()
        )
        return fault() if asked == index and is_training else sample()

    return make


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (lambda: {}["key"], "failed: KeyError: 'key' (test_own.py, line "),
        (lambda: sys.exit(3), "failed: SystemExit: 3 (test_own.py, line "),
        (lambda: next(iter([])), "failed: StopIteration (test_own.py, line "),
        (lambda: None, "is NoneType, should be a pair of image and label"),
        (lambda: sample(image=PIXELS[0, :, :5]), "uint8 (3, 5, 8), the first sample has (3, 8, 8)"),
        (lambda: sample(image=np.ones((3, 8, 8), "f4")), "float32 (3, 8, 8), the first sample ui"),
        (lambda: sample(label=7), "has the label 7, should be from 0 and below 3"),
    ],
)
def test_a_fault_in_the_middle_is_one_line(own, workers, fault, expected):
    samples = Samples(fault_at(13, fault))
    batches = make_batches(own(lambda: (samples, Samples()), workers=workers))
    batches.end_step = 4
    with pytest.raises(UserError) as caught:
        read_steps(batches, range(4))

    step = next(step for step in range(4) if 13 in batches.indices(step).tolist())
    assert batches._next == (step, 0), "the batches before it were read"
    (line,) = str(caught.value).splitlines()
    assert line.startswith("data.dataset: own_samples:load: sample 13 ")
    assert expected in line
    assert ("(worker " in line) == (workers > 0)


def test_held_out_samples_are_named_by_their_own_index(own):
    batches = make_batches(own(lambda: (Samples(fault_at(13, dict)), Samples()), validation=0.5))
    kept = batches.images.reader._indices
    assert 13 in kept, "choose another sample"
    with pytest.raises(UserError, match="sample 13 is dict"):
        read_steps(batches, range(2))


class Counts(Samples):
    """Draws from a generator of its own, which moves."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(0)

    def __getitem__(self, index: int) -> Any:
        return self.rng.integers(0, 256, (3, SIZE, SIZE), dtype=np.uint8), 0


class InPlace(Samples):
    """Changes the pixels that it keeps, and returns them."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels = PIXELS.copy()

    def __getitem__(self, index: int) -> Any:
        self.pixels[index] += 1
        return torch.from_numpy(self.pixels[index]), 0


class ChangesLabel(Samples):
    calls = 0

    def __getitem__(self, index: int) -> Any:
        type(self).calls += 1
        return PIXELS[0], type(self).calls % 2


@pytest.mark.parametrize("samples", [Counts, InPlace, ChangesLabel])
def test_samples_that_differ_when_they_are_read_again_are_refused(own, samples):
    line = refusal(own(lambda: (samples(), Samples())))
    assert line.startswith("data.dataset: own_samples:load: sample 0 differs when it is read again")
    assert "lrd.data.generator" in line


def test_a_sample_with_nan_does_not_differ_from_itself(own):
    make = lambda index: (torch.full((3, SIZE, SIZE), torch.nan), 0)  # noqa: E731
    assert len(load(own(lambda: (Samples(make), Samples(make)))).train) == COUNT


class Lengthless(Samples):
    def __len__(self) -> int:
        raise NotImplementedError


def without_classes(classes: Any = None) -> Any:
    samples = Samples()
    samples.classes = classes
    return samples, Samples()


@pytest.mark.parametrize(
    ("named", "keys", "expected"),
    [
        (lambda: (Samples(count=0), Samples()), {}, "its train part is empty"),
        (lambda: (Samples(), Samples(count=0)), {}, "its test part is empty"),
        (lambda: (Lengthless(), Samples()), {}, "len() failed: NotImplementedError (test_own.py"),
        (lambda: without_classes(), {}, "the names of the classes are not known"),
        (lambda: without_classes("abc"), {}, "the names of the classes are not known"),
        (lambda: without_classes({"a", "b"}), {}, "the names of the classes are not known"),
        (lambda: without_classes(["a"]), {}, "at least two classes"),
        (lambda: without_classes(["a", "b", "a"]), {}, "different names"),
        (lambda: (Samples(), Samples(lambda index: (PIXELS[0, :, 1:], 0))), {}, "(3, 7, 8), the f"),
        (lambda: (Samples(), Samples()), {"image_size": 16}, "data.image_size: is 16, but"),
        (lambda: (Samples(), Samples()), {"storage": "memory"}, "data.storage: is 'memory'"),
        (lambda: (Samples(), Samples()), {"storage": "packed"}, "data.storage: is 'packed'"),
        (lambda: (Samples(), Samples()), {"augment": "crop"}, "data.augment: "),
        (lambda: (Samples(), Samples()), {"trivial_augment": True}, "data.augment: "),
        (lambda: (Samples(), Samples()), {"random_erasing": 0.5}, "data.augment: "),
        (lambda: (Samples(), PIXELS), {}, "type Samples as its training part"),
        (Samples, {}, "needs an argument train (True or False) or split"),
        (WithTrain, {"train": True}, "data.train: lrd makes both parts of own_samples:load"),
        (WithSplit, {"split": "train"}, "data.split: lrd makes both parts of own_samples:load"),
    ],
)
def test_a_data_set_that_cannot_be_used_is_refused_in_one_line(own, named, keys, expected):
    line = refusal(own(named, **keys))
    assert line.startswith("data.")
    assert expected in line


def test_the_mean_of_floats_cannot_be_set(own):
    make = lambda index: (torch.rand(3, SIZE, SIZE), 0)  # noqa: E731
    line = refusal(own(lambda: (Samples(make), Samples(make)), mean=[0.5, 0.5, 0.5]))
    assert line.startswith("data.mean: ")


@pytest.mark.parametrize(
    "keys",
    [
        {"storage": "files"},
        {"storage": "packed"},
        {"augment": "resized_crop", "image_size": 8},
        {"trivial_augment": True},
        {"random_erasing": 0.5},
    ],
)
def test_arrays_of_ones_own_are_refused_what_images_in_memory_cannot_have(own, keys):
    part = (PIXELS, np.array(LABELS))
    line = refusal(own(lambda: (part, part), **keys))
    assert line.startswith(f"data.{next(iter(keys))}: ")
    assert "own_samples:load" in line or "resized_crop" in line
