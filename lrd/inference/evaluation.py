"""Accuracy and loss of a loaded network on labelled images, by class.

The images go through the function that evaluates during training, in the same batches and the same
precision, so on the same machine the accuracy is the training run's to the last image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from lrd import recipe as recipes
from lrd.checkpoint import network_config
from lrd.data import datasets
from lrd.data.image_folder import list_folder, read_folder
from lrd.data.images import Images, Part
from lrd.distributed import hardware
from lrd.distributed.accelerator import start_rank
from lrd.distributed.roll_call import RollCall
from lrd.errors import UserError, summarize
from lrd.inference.loading import LoadedModel, load_model
from lrd.job.evaluation import evaluate
from lrd.recipe.schema import is_own

_PARTS = ("test", "validation")
_ARCH_KEY = "model.arch"
_CHANGEABLE = ("data.", "trainer.", f"{_ARCH_KEY}=")  # what an override may begin with


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        classes: name of each class, by its label.
        confusion: number of images by true and by predicted class, int64 (classes, classes).
        loss: mean cross-entropy, nats.
        recorded: the training run's own metrics on the same images, `loss` and `accuracy`; empty
            where there are none.
        images: what was evaluated, in words.
    """

    classes: tuple[str, ...]
    confusion: Tensor
    loss: float
    recorded: dict[str, float]
    images: str

    @property
    def num_images(self) -> int:
        return int(self.confusion.sum())

    @property
    def num_correct(self) -> int:
        return int(self.confusion.trace())

    @property
    def accuracy(self) -> float:
        """In [0, 1]."""
        return self.num_correct / self.num_images

    def most_confused_with(self, label: int) -> tuple[str, int] | None:
        """The class that images of a class are most often mistaken for, and how often."""
        mistakes = self.confusion[label].clone()  # int64 (classes,)
        mistakes[label] = 0
        count = int(mistakes.max())
        return (self.classes[int(mistakes.argmax())], count) if count else None


def evaluate_path(
    path: Path,
    *,
    data: Path | None = None,
    part: str = "test",
    best: bool = False,
    ema: bool = False,
    overrides: Sequence[str] = (),
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[LoadedModel, Evaluation]:
    """Evaluate the weights in a run or file.

    Args:
        path: what `load_model` takes.
        data: a folder with images in `<class>/` or `test/<class>/`; default: the recipe's data.
        part: `test`, or `validation` for the images that the recipe holds out.
        best: of a run directory, take the checkpoint of the best evaluation.
        ema: take the moving averages of the weights.
        overrides: keys of the recipe to change, each as `section.key=value`: `data.*`, `trainer.*`
            and `model.arch`.
        on_batch: called after each batch with the number of images that are done, and of all.

    Raises:
        UserError: see `load_model`; or the images are missing, or of other classes.
    """
    if part not in _PARTS:
        raise UserError(f"part: is {part!r}, may be {' or '.join(_PARTS)}")
    if data is not None and part != "test":
        raise UserError("part: there is no validation part in a folder of images")
    arch = _read_arch(overrides)

    # On the CPU first: the recipe in the file says which device is to be taken.
    model = load_model(path, best=best, ema=ema, arch=arch)
    recipe = recipes.parse(model.config.lrd.recipe, str(model.path), overrides)
    recipe = hardware.resolve_auto(recipe)
    accelerator = start_rank(recipe.trainer, {}, RollCall())
    _move(model, recipe, accelerator.device)

    if data is not None:
        images = _read_images(data, model, recipe.data)
        name = str(data)
        recorded: dict[str, float] = {}
    else:
        images = _load_part(model, recipe, part, overrides)
        name = f"{part} images of {recipe.data.dataset}"
        recorded = _recorded_metrics(model, part)

    images = images.to(accelerator.device)
    confusion, loss = evaluate_images(accelerator, model, images, recipe.data.batch_size, on_batch)
    return model, Evaluation(model.classes, confusion, loss, recorded, name)


def evaluate_images(
    accelerator: Accelerator,
    model: LoadedModel,
    images: Part,
    batch_size: int,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Tensor, float]:
    """Evaluate a network in the batches in which the ranks of the training run did.

    Args:
        accelerator: with the precision of the evaluation; of a single process.
        model: on the device of `images`.
        images: at least one.
        batch_size: images of one forward pass of one rank.
        on_batch: see `evaluate_path`.

    Returns:
        The number of images by true and by predicted class, int64 (classes, classes), and the mean
        loss in nats.
    """
    num_classes = len(model.classes)
    counts = torch.zeros(num_classes**2, dtype=torch.int64)  # by true and predicted class
    num_done = 0

    def count(logits: Tensor, labels: Tensor) -> None:
        nonlocal num_done
        cells = labels * num_classes + logits.argmax(1)  # int64 (batch,)
        counts.add_(torch.bincount(cells.cpu(), minlength=num_classes**2))
        num_done += len(labels)
        on_batch(num_done, len(images))

    world_size = model.config.lrd.world_size
    loss_sum = 0.0

    for rank in range(world_size):
        begin = len(images) * rank // world_size
        end = len(images) * (rank + 1) // world_size
        if begin == end:
            continue

        metrics = evaluate(
            accelerator=accelerator,
            model=model.network,
            images=images.slice(begin, end),
            normalize=model.normalize,
            batch_size=batch_size,
            observe=count,
        )
        assert metrics is not None, "there is no stop signal"
        loss_sum += metrics["loss"] * (end - begin)
    model.network.eval()  # `evaluate` leaves it in training mode

    return counts.view(num_classes, num_classes), loss_sum / len(images)


def _read_arch(overrides: Sequence[str]) -> str | None:
    """The value of an override of `model.arch`; None if there is none.

    Raises:
        UserError: an override is of a key that makes no difference here.
    """
    arch = None
    for override in overrides:
        if not override.startswith(_CHANGEABLE):
            raise UserError(
                f"{override}: only data.*, trainer.* and {_ARCH_KEY} can be changed here"
            )
        key, _, value = override.partition("=")
        if key == _ARCH_KEY:
            arch = value
    return arch


def _move(model: LoadedModel, recipe: recipes.Recipe, device: torch.device) -> None:
    """Move a network to a device and make it what it was in training there."""
    model.device = device
    model.network.to(device)
    if recipe.trainer.channels_last and device.type != "cpu":
        model.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if recipe.trainer.compile:
        model.network.compile()


def _recorded_metrics(model: LoadedModel, part: str) -> dict[str, float]:
    """The metrics that the training run recorded for these weights; see `evaluate_parts`."""
    training = model.config.lrd
    if not training.has_results:
        return {}

    prefix = "" if part == "test" else f"{part}_"
    if training.weights == network_config.EMA:
        prefix += "ema_"
    names = ("loss", "accuracy")
    if not all(isinstance(training.metrics.get(prefix + name), float) for name in names):
        return {}
    return {name: training.metrics[prefix + name] for name in names}


def _load_part(
    model: LoadedModel, recipe: recipes.Recipe, part: str, overrides: Sequence[str]
) -> Part:
    """Load the images that a recipe names, with the labels of the network's classes."""
    is_confirmed = any(override.startswith("data.dataset=") for override in overrides)
    if is_own(recipe.data.dataset) and not is_confirmed:
        raise UserError(
            f"{model.path}: its images come from {recipe.data.dataset}, which is code outside of "
            f"lrd; to have it imported, say data.dataset={recipe.data.dataset}, or name a folder "
            "of images with --data"
        )

    dataset = datasets.load_dataset(recipe.data, recipe.seed)
    if part not in dataset.evaluated_parts:
        raise UserError(f"{model.path}: its recipe holds no images out: data.validation is 0")
    images = dataset.evaluated_parts[part]

    _, height, width = images.image_shape
    if (height, width) != model.config.height_and_width:
        expected = " x ".join(str(size) for size in model.config.height_and_width)
        raise UserError(
            f"{recipe.data.dataset}: its images have {height} x {width} pixels, the network was "
            f"trained with {expected}"
        )
    return _relabel(images, dataset.classes, model, recipe.data.dataset)


def _read_images(folder: Path, model: LoadedModel, section: recipes.Data) -> Part:
    """Read images from `folder/<class>/` or `folder/test/<class>/`."""
    test_folder = folder / "test"
    if test_folder.is_dir() and any(entry.is_dir() for entry in test_folder.iterdir()):
        folder = test_folder

    height, width = model.config.height_and_width
    if height != width:
        raise UserError(
            f"--data: the network's images have {height} x {width} pixels, "
            "and a folder of images is read as squares"
        )

    try:
        _, classes = list_folder(folder)  # before anything is decoded
        _require_classes(classes, model, str(folder))
        pixels, labels, classes = read_folder(
            folder, height, section.skip_corrupt, section.evaluation_resize(height)
        )
    except UserError as error:
        raise UserError(str(error).replace("data.root: ", "--data: ")) from None
    return _relabel(Images(pixels, labels), classes, model, str(folder))


def _require_classes(classes: Sequence[str], model: LoadedModel, source: str) -> None:
    unknown = [repr(name) for name in classes if name not in model.classes]
    if unknown:
        known = summarize(model.classes, limit=10)
        raise UserError(
            f"{source}: the network has no class {summarize(unknown)}; its classes are {known}"
        )


def _relabel(images: Part, classes: Sequence[str], model: LoadedModel, source: str) -> Part:
    """Give images the network's labels; the classes are matched by their names."""
    _require_classes(classes, model, source)
    labels = torch.tensor([model.classes.index(name) for name in classes])  # int64 (classes,)
    return images.relabel(labels)


def as_json(model: LoadedModel, evaluation: Evaluation) -> dict[str, Any]:
    """All that was found, as JSON values."""
    classes = []
    for label, name in enumerate(evaluation.classes):
        count = int(evaluation.confusion[label].sum())
        correct = int(evaluation.confusion[label, label])
        confused = evaluation.most_confused_with(label)
        classes.append(
            {
                "class": name,
                "images": count,
                "correct": correct,
                "accuracy": correct / count if count else None,
                "most_confused_with": confused[0] if confused else None,
            }
        )
    return {
        "weights": str(model.path),
        "kind": model.config.lrd.weights,
        "step": model.config.lrd.step,
        "images": evaluation.images,
        "num_images": evaluation.num_images,
        "num_correct": evaluation.num_correct,
        "accuracy": evaluation.accuracy,
        "loss": evaluation.loss,
        "recorded": evaluation.recorded or None,
        "classes": classes,
        "confusion": evaluation.confusion.tolist(),
    }
