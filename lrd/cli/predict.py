"""`lrd predict`: the most probable classes of images."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from lrd import console
from lrd.data.image_folder import SUFFIXES
from lrd.distributed import hardware
from lrd.errors import EXIT_OK, UserError
from lrd.inference.loading import LoadedModel, load_model

_KEYS = ("model.arch", "trainer.device")  # that can be overridden
_DEVICES = ("auto", "cpu", "cuda")
_CHUNK = 64  # images that are decoded before the network sees them


def predict(
    path: Path,
    arguments: list[str],
    top: int,
    best: bool,
    ema: bool,
    as_json: bool,
) -> int:
    """Print the most probable classes of images.

    Args:
        path: what `lrd.load_model` takes.
        arguments: image files, folders of them, and overrides of `model.arch` (a network of the
            user's own, to be imported) and `trainer.device` (default: a GPU if there is one).
        top: number of classes for each image.
        best, ema: see `lrd.load_model`.
        as_json: print JSON in place of the table; messages then go to standard error.

    Returns:
        The exit status: 2 if an image could not be read. The others are shown all the same.

    Raises:
        UserError: the weights cannot be used, or there is no image at all.
    """
    with console.messages_on_stderr() if as_json else nullcontext():
        overrides, files = _split(arguments)
        device = overrides.get("trainer.device", "auto")
        model = load_model(
            path,
            best=best,
            ema=ema,
            device="cpu" if hardware.uses_cpu(device) else "cuda",
            arch=overrides.get("model.arch"),
        )
        results, errors = _predict_files(model, files, top)

    if as_json:
        console.info(json.dumps(results, indent=1, ensure_ascii=False))
    elif results:
        _print_table(results)
    for line in errors:
        console.error(line)
    return UserError.status if errors else EXIT_OK


def _split(arguments: list[str]) -> tuple[dict[str, str], list[Path]]:
    """Tell overrides and images apart; the images below a folder take its place.

    Raises:
        UserError: an override is of another key, or there is no image.
    """
    overrides = {}
    files = []
    for argument in arguments:
        path = Path(argument)
        key, equals, value = argument.partition("=")
        if equals and not path.exists():
            if key not in _KEYS or (key == "trainer.device" and value not in _DEVICES):
                raise UserError(
                    f"{argument}: may be an image, model.arch=module:function, "
                    f"or trainer.device={' or '.join(_DEVICES)}"
                )
            overrides[key] = value
            continue

        if not path.is_dir():
            files.append(path)
            continue

        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not found:
            raise UserError(f"{path}: no image in it")
        files += found

    if not files:
        raise UserError("predict: name at least one image")
    return overrides, files


def _predict_files(
    model: LoadedModel, files: list[Path], top: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns the predictions for each image that can be read, and a line for each other one."""
    results: list[dict[str, Any]] = []
    errors = []

    chunks = [files[start : start + _CHUNK] for start in range(0, len(files), _CHUNK)]
    progress: Iterable[list[Path]] = chunks
    if len(chunks) > 1:
        progress = console.track(chunks, "predicting", total=len(chunks))
    for chunk in progress:
        names: list[Path] = []
        pixels: list[Tensor] = []  # uint8 (3, height, width) each
        for file in chunk:
            try:
                pixels.append(model.to_pixels(file))
                names.append(file)
            except UserError as error:
                errors.append(str(error))

        for file, classes in zip(names, model.predict(pixels, top), strict=True):
            predictions = [{"class": name, "probability": value} for name, value in classes]
            results.append({"image": str(file), "predictions": predictions})
    return results, errors


def _print_table(results: list[dict[str, Any]]) -> None:
    rows = []
    for result in results:
        image = result["image"]
        for prediction in result["predictions"]:
            rows.append([image, prediction["class"], f"{prediction['probability']:.4f}"])
            if console.stdout.is_terminal:  # in a pipe each line has the name, for grep
                image = ""
    console.listing(["image", "class", "probability"], rows, leave_out=[], wrap="class")
