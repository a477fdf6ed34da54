"""A data set of the user's own: the function that a recipe names, and what it may return."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrd import recipe as recipes
from lrd.data.images import Dataset, Images, Part
from lrd.data.storage import require_memory_suffices
from lrd.errors import UserError
from lrd.recipe.named import call_named, check_arguments, import_callable

_CHANNELS = (1, 3)
_INTEGER_TYPES = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
_NUMBER_TYPES = (*_INTEGER_TYPES, "float16", "bfloat16", "float32", "float64")
_RETURNS = (
    "must return (train, test) or (train, test, classes), where train and test are pairs of "
    "pixels and labels, or map-style data sets; a dict with these keys; or an lrd.data.Dataset"
)


def load_own_data(section: recipes.Data, seed: int) -> Dataset:
    """Call the function that a recipe names as its data set, and check what it returns.

    The function gets the further keys of the section as keyword arguments, and besides them
    `root`, `image_size` (if the recipe has it) and `seed`, as far as its signature names them.

    Args:
        section: the `data` section of the recipe.
        seed: the seed of the recipe.

    Returns:
        The training and test images, on the host, in the size in which the function returns them.

    Raises:
        UserError: there is no such function, it takes other arguments, it fails, or what it returns
            is no data set.
    """
    name = section.dataset
    function = import_callable(name, "data.dataset")
    arguments = _collect_arguments(section, seed, function)
    if _is_map_style_class(function):
        train, test = _make_parts(name, function, arguments)  # type: ignore[arg-type]
        return _stream(train, test, None, section, seed)
    returned = call_named(name, "data.dataset", function, **arguments)

    try:
        train, test, classes = _take_apart(returned)
        if _is_map_style(train) and _is_map_style(test):
            return _stream(train, test, classes, section, seed)
        require_memory_suffices(section)
        dataset = _to_dataset(train, test, classes)
        if section.image_size is None:
            _require_equal_sizes(dataset.train, dataset.test)
    except _Fault as fault:
        raise UserError(f"data.dataset: {name} {fault}") from None
    return dataset


# Map-style data sets


def _is_map_style(value: Any) -> bool:
    """Whether something returns samples by their index, and is no array of them."""
    if isinstance(value, Tensor | np.ndarray | list | tuple | dict | str | bytes):
        return False
    return hasattr(value, "__getitem__") and hasattr(value, "__len__")


def _is_map_style_class(value: Any) -> bool:
    """Whether a recipe names a class of such data sets."""
    return inspect.isclass(value) and hasattr(value, "__getitem__") and hasattr(value, "__len__")


def _make_parts(name: str, cls: type, arguments: dict[str, Any]) -> tuple[Any, Any]:
    """Make the training and the test part of a class of the user's.

    Args:
        name: what the recipe names.
        cls: has an argument `train` (True or False) or `split` ("train" or "test").
        arguments: the other arguments.

    Raises:
        UserError: it has neither, the recipe has it too, or the call fails.
    """
    parameters = inspect.signature(cls).parameters
    if "train" in parameters:
        key = "train"
        values: tuple[Any, Any] = (True, False)
    elif "split" in parameters:
        key = "split"
        values = ("train", "test")
    else:
        raise UserError(
            f"data.dataset: {name} needs an argument train (True or False) or split (train or "
            "test); or name a function that returns both parts"
        )
    if key in arguments:
        raise UserError(
            f"data.{key}: lrd makes both parts of {name} and gives it this argument itself; "
            "leave it out"
        )
    train, test = (
        call_named(name, "data.dataset", cls, **arguments, **{key: value}) for value in values
    )
    return train, test


def _stream(train: Any, test: Any, classes: Any, section: recipes.Data, seed: int) -> Dataset:
    from lrd.data.streaming.own import stream_own  # only here: it imports torchvision

    if section.storage not in ("auto", "files"):
        raise UserError(
            f"data.storage: is {section.storage!r}, but {section.dataset} returns samples one by "
            "one; may be 'auto' or 'files'"
        )
    if section.augment != "none" or section.trivial_augment or section.random_erasing:
        raise UserError(
            f"data.augment: {section.dataset} returns samples one by one and changes them itself; "
            "leave augment, trivial_augment and random_erasing out"
        )
    return stream_own(train, test, classes, section, seed)


class _Fault(Exception):
    """What is wrong with a returned value, as the end of a sentence whose subject is its name."""


# Arguments


def _collect_arguments(
    section: recipes.Data, seed: int, function: Callable[..., Any]
) -> dict[str, Any]:
    """The keyword arguments for the user's function.

    Raises:
        UserError: the function does not take them, or needs others.
    """
    names = _argument_names(function)
    for key in type(section).model_fields:
        if key in names and key not in ("root", "image_size"):
            raise UserError(
                f"data.dataset: {section.dataset} has an argument {key}, but the key data.{key} "
                "has a meaning of its own and is not passed on; rename the argument"
            )

    offered: dict[str, Any] = {"root": section.root, "seed": seed}
    if section.image_size is not None:
        offered["image_size"] = section.image_size
    named = {key: value for key, value in offered.items() if key in names}

    arguments = named | section.arguments
    # A class of samples gets these from lrd, see `_make_parts`.
    is_class = _is_map_style_class(function)
    given = {key: None for key in ("train", "split") if is_class and key in names}
    check_arguments(section.dataset, "data", function, given | arguments)
    return arguments


def _argument_names(function: Callable[..., Any]) -> set[str]:
    """The names of the arguments that a function takes by keyword."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some functions written in C have no signature
        return set()

    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {parameter.name for parameter in parameters if parameter.kind in kinds}


# What is returned


def _to_dataset(train_part: Any, test_part: Any, names: Any) -> Dataset:
    train = _to_images(train_part, "training")
    test = _to_images(test_part, "test")

    classes = _count_classes(train.labels) if names is None else _to_class_names(names)
    for images, part in ((train, "training"), (test, "test")):
        low = int(images.labels.min())
        high = int(images.labels.max())
        if low < 0 or high >= len(classes):
            raise _Fault(
                f"returned {part} labels from {low} to {high}; with {len(classes)} classes they "
                f"must be from 0 to {len(classes) - 1}"
            )
    return Dataset(train, test, classes)


def _take_apart(returned: Any) -> tuple[Any, Any, Any]:
    """Training part, test part, and the names of the classes or None."""
    if isinstance(returned, Dataset):
        if returned.validation is not None:
            raise _Fault(
                "returned validation images; leave them in the training part and set "
                "data.validation, which holds out a part of it"
            )
        return returned.train, returned.test, returned.classes

    if isinstance(returned, Mapping):
        keys = ", ".join(str(key) for key in returned)
        if not {"train", "test"} <= set(returned) <= {"train", "test", "classes"}:
            raise _Fault(f"returned a dict with the keys {keys or '(none)'}; it {_RETURNS}")
        return returned["train"], returned["test"], returned.get("classes")

    if isinstance(returned, tuple | list):
        if len(returned) not in (2, 3):
            raise _Fault(f"returned {len(returned)} values; it {_RETURNS}")
        train, test, *rest = returned
        return train, test, rest[0] if rest else None

    raise _Fault(f"returned {_kind(returned)}; it {_RETURNS}")


def _to_images(part: Any, name: str) -> Images:
    if isinstance(part, Images):
        part = (part.pixels, part.labels)
    if not isinstance(part, tuple | list) or len(part) != 2:
        raise _Fault(f"returned {_kind(part)} as its {name} part; it {_RETURNS}")

    pixels = _to_pixels(part[0], name)  # uint8 (N, 3, H, W)
    labels = _to_labels(part[1], name)  # int64 (N,)
    if len(pixels) != len(labels):
        raise _Fault(f"returned {len(pixels)} {name} images, but {len(labels)} {name} labels")
    return Images(pixels, labels)


def _to_pixels(value: Any, part: str) -> Tensor:
    """Convert an array or tensor of pixels.

    Args:
        value: uint8 (N, H, W), (N, C, H, W) or (N, H, W, C), where C is 1 or 3.
        part: "training" or "test", for messages.

    Returns:
        uint8 (N, 3, H, W), contiguous.
    """
    _require_array(value, f"{part} pixels")
    shape = tuple(value.shape)
    if 0 in shape:
        raise _Fault(f"returned no {part} images: pixels of shape {shape}")
    if _type_name(value) != "uint8":
        raise _Fault(f"returned {part} pixels of type {_type_name(value)}{_advise(value)}")

    pixels = _to_tensor(value)
    if pixels.ndim == 3:
        pixels = pixels[:, None]  # uint8 (N, 1, H, W)
    elif pixels.ndim == 4:
        is_first = shape[1] in _CHANNELS
        is_last = shape[3] in _CHANNELS
        if is_first and is_last:
            raise _Fault(
                f"returned {part} pixels of shape {shape}, whose channels may be first or last; "
                "images with a side of 1 or 3 pixels are not supported"
            )
        if is_last:
            pixels = pixels.permute(0, 3, 1, 2)  # uint8 (N, C, H, W)

    if pixels.ndim != 4 or pixels.shape[1] not in _CHANNELS:
        raise _Fault(
            f"returned {part} pixels of shape {shape}; must be (N, H, W), (N, C, H, W) or "
            "(N, H, W, C) with 1 or 3 channels"
        )
    return pixels.expand(-1, 3, -1, -1).contiguous()


def _to_labels(value: Any, part: str) -> Tensor:
    """Convert labels.

    Args:
        value: an array, tensor or list of integers of any type, (N,) or (N, 1).
        part: "training" or "test", for messages.

    Returns:
        int64 (N,).
    """
    if isinstance(value, tuple | list):
        try:
            value = np.asarray(value)
        except (ValueError, TypeError, RuntimeError):  # lists of several lengths, and the like
            raise _Fault(f"returned a list of {part} labels that are no integers") from None
    _require_array(value, f"{part} labels")

    shape = tuple(value.shape)
    if 0 in shape:
        raise _Fault(f"returned no {part} labels: labels of shape {shape}")
    if _type_name(value) not in _INTEGER_TYPES:
        raise _Fault(
            f"returned {part} labels of type {_type_name(value)}; must be integers that count the "
            "classes from 0"
        )
    if len(shape) != 1 and (len(shape) != 2 or shape[1] != 1):
        raise _Fault(f"returned {part} labels of shape {shape}; must be (N,)")

    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
    if array.max() > torch.iinfo(torch.int64).max:
        raise _Fault(f"returned {part} labels up to {array.max()}")
    return torch.from_numpy(array.reshape(-1).astype(np.int64))


def _count_classes(labels: Tensor) -> tuple[str, ...]:
    """Name the classes by their labels, each of which must occur.

    Args:
        labels: of the training images, int64 (N,).
    """
    found = np.unique(labels.numpy())  # int64 (number of classes,), sorted
    gaps = np.flatnonzero(found != np.arange(len(found)))
    if found[0] < 0:
        raise _Fault(f"returned the training label {found[0]}; labels count from 0")
    if len(gaps):
        raise _Fault(
            f"returned training labels up to {found[-1]}, but none is {gaps[0]}; labels count from "
            "0, and a class may be without images only if the names of the classes are returned"
        )
    return tuple(str(label) for label in found)


def _to_class_names(names: Any) -> tuple[str, ...]:
    if isinstance(names, np.ndarray) and names.ndim == 1:
        names = names.tolist()
    if not isinstance(names, tuple | list) or not names:
        raise _Fault(f"returned {_kind(names)} as the names of the classes; must be a list of them")

    classes = tuple(str(name) for name in names)
    repeated = [name for name, count in Counter(classes).items() if count > 1]
    if repeated:
        raise _Fault(f"returned two classes named {repeated[0]!r}")
    return classes


def _require_equal_sizes(train: Part, test: Part) -> None:
    _, train_height, train_width = train.image_shape
    _, test_height, test_width = test.image_shape
    if (train_height, train_width) != (test_height, test_width):
        raise _Fault(
            f"returned training images of {train_height} x {train_width} pixels, but test images "
            f"of {test_height} x {test_width}; data.image_size resizes all of them"
        )


# Arrays and tensors


def _require_array(value: Any, name: str) -> None:
    is_dense_tensor = isinstance(value, Tensor) and value.layout == torch.strided
    if not is_dense_tensor and not isinstance(value, np.ndarray):
        raise _Fault(f"returned {_kind(value)} as {name}; must be a NumPy array or a dense tensor")


def _type_name(value: NDArray[Any] | Tensor) -> str:
    if isinstance(value, Tensor):
        return str(value.dtype).removeprefix("torch.")
    return value.dtype.name


def _to_tensor(value: NDArray[Any] | Tensor) -> Tensor:
    """The same numbers as a tensor on the host; copied only where that is needed."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    # torch takes no negative strides, and warns about an array that cannot be written.
    return torch.from_numpy(np.require(value, requirements=["C", "W", "E"]))


def _advise(pixels: NDArray[Any] | Tensor) -> str:
    """How pixels of a wrong type become uint8, as the end of a message."""
    must = "must be uint8 from 0 to 255"
    kind = _type_name(pixels)
    if kind not in _NUMBER_TYPES:
        return f"; {must}"

    values = pixels.detach().cpu().double().numpy() if isinstance(pixels, Tensor) else pixels
    low = values.min()  # nan if there is any
    high = values.max()
    if np.isnan(low):
        return f", and some are NaN; {must}"
    if low < 0 or high > 255:
        return f" from {low:g} to {high:g}; {must}"

    scaled = "(255 * pixels).round()" if "float" in kind and high <= 1 else "pixels"
    conversion = "to(torch.uint8)" if isinstance(pixels, Tensor) else "astype('uint8')"
    return f" from {low:g} to {high:g}; {must}: convert with {scaled}.{conversion}"


def _kind(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return "nothing" if value is None else f"a value of type {type(value).__name__}"
