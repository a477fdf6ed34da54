"""What inference needs to know of a network: `config.json`, and the metadata of the weights' files.

The keys are those of Hugging Face's `config.json` and `preprocessor_config.json` where there are
such keys. What lrd needs beyond these is under the key `lrd`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lrd import __version__
from lrd import recipe as recipes
from lrd.errors import UserError, first_line

CONFIG_VERSION = 1  # of what is under the key `lrd`

NETWORK = "network"  # the weights that were trained
EMA = "ema"  # their moving averages

_METADATA_KEY = "lrd"

# Two runs that differ in these alone end with the same bits, and so with the same files.
_RECIPE_KEYS_LEFT_OUT = {"run_dir", "checkpoint", "tracking"}
_BILINEAR = 2  # Pillow's number


def describe_network(
    recipe: recipes.Recipe,
    classes: Sequence[str],
    mean: Tensor,
    std: Tensor,
    image_size: Sequence[int],
    world_size: int = 1,
) -> dict[str, Any]:
    """Describe a network and how its inputs are made, as JSON values.

    Args:
        recipe: what is trained; `auto` is resolved. Its `run_dir`, and how often it saves and
            records, are left out.
        classes: name of each class, by its label.
        mean: mean of each channel over the training set, float32 (3, 1, 1), in [0, 255].
        std: standard deviation of each channel, as `mean`.
        image_size: height and width of the images in pixels.
        world_size: number of ranks, which split the images of an evaluation.
    """
    num_outputs = recipe.model.num_classes or len(classes)
    names = [str(name) for name in classes]
    # Outputs without a class get the name that Hugging Face gives them.
    names += [f"LABEL_{label}" for label in range(len(names), num_outputs)]

    height, width = (int(size) for size in image_size)
    arguments = dict(recipe.model.arguments)
    if recipe.model.width is not None:
        arguments["width"] = recipe.model.width

    return {
        "architectures": [recipe.model.arch],
        "model_type": "lrd",
        "num_labels": num_outputs,
        "id2label": {str(label): name for label, name in enumerate(names)},
        "label2id": {name: label for label, name in enumerate(names)},
        "num_channels": 3,
        "image_size": height if height == width else [height, width],
        "resize": recipe.data.evaluation_resize(height),
        "image_mean": mean.flatten().tolist(),
        "image_std": std.flatten().tolist(),
        "lrd": {
            "version": CONFIG_VERSION,
            "weights": NETWORK,
            "arch": recipe.model.arch,
            "arch_arguments": arguments,
            "precision": recipe.trainer.precision,
            "world_size": world_size,
            "recipe": recipe.model_dump(mode="json", exclude=_RECIPE_KEYS_LEFT_OUT),
        },
    }


def read_recipe(config: dict[str, Any]) -> dict[str, Any] | None:
    """The recipe in a `config.json`; None in that of a checkpoint of a former version."""
    section = config.get("lrd")
    recipe = section.get("recipe") if isinstance(section, dict) else None
    return recipe if isinstance(recipe, dict) else None


def with_results(
    config: dict[str, Any],
    step: int,
    epoch: int,
    evaluated: int,
    metrics: dict[str, Any],
    best: dict[str, Any] | None,
) -> dict[str, Any]:
    """Add what a run has reached to what `describe_network` returned.

    Args:
        config: it is not changed.
        step: optimizer steps done.
        epoch: whole epochs done.
        evaluated: step of the latest evaluation; 0: none.
        metrics: of the latest evaluation.
        best: the evaluation with the best accuracy, with its `step`; None if there is none.
    """
    results = {
        "step": step,
        "epoch": epoch,
        "evaluated": evaluated,
        "metrics": dict(metrics),
        "best": best,
    }
    return {**config, "lrd": {**config["lrd"], **results}}


def for_weights(config: dict[str, Any], weights: str, versions: dict[str, str]) -> dict[str, Any]:
    """The config for one of the two files of weights in a checkpoint.

    Args:
        config: what `with_results` returned. If it is empty, so is the result.
        weights: NETWORK or EMA.
        versions: of Python and the packages.
    """
    if not config:
        return {}
    more = {"weights": weights, "versions": {"lrd": __version__, **versions}}
    return {**config, "lrd": {**config["lrd"], **more}}


def preprocessor_config(config: dict[str, Any]) -> dict[str, Any]:
    """The `preprocessor_config.json` with which Hugging Face's image processors make the inputs.

    Mean and standard deviation are in units of the pixels' values, so there is no rescaling.
    """
    size = config["image_size"]
    if isinstance(size, int):
        resizing = {
            "image_processor_type": "BitImageProcessor",
            "size": {"shortest_edge": config.get("resize") or size},
            "do_center_crop": True,
            "crop_size": {"height": size, "width": size},
        }
    else:
        height, width = size
        resizing = {
            "image_processor_type": "ViTImageProcessor",
            "size": {"height": height, "width": width},
        }
    return {
        **resizing,
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": _BILINEAR,
        "do_rescale": False,
        "rescale_factor": 1.0,
        "do_normalize": True,
        "image_mean": config["image_mean"],
        "image_std": config["image_std"],
    }


def to_metadata(config: dict[str, Any]) -> dict[str, str]:
    """The metadata of a safetensors file: the format of its tensors, and the config as JSON."""
    return {"format": "pt", _METADATA_KEY: json.dumps(config)}


def read_config(path: Path) -> dict[str, Any]:
    """Read the config in the metadata of a safetensors file; empty if there is none.

    Raises:
        UserError: it is no safetensors file, or it is cut off.
    """
    try:
        with safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {}).get(_METADATA_KEY, "{}"))
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be read as a safetensors file: {first_line(error)}"
        ) from None
    return config if isinstance(config, dict) else {}
