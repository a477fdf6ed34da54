"""What a file of weights says of its network, validated: it may come from anyone."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from lrd.checkpoint import network_config
from lrd.errors import UserError

_Side = Annotated[int, Field(gt=0, le=1 << 14)]  # pixels
_Size = Annotated[int, Field(gt=0)]


class Training(BaseModel):
    """What is under the key `lrd`.

    Attributes:
        version: of this part's layout.
        weights: `network`, or `ema` for their moving averages.
        arch: the recipe's `model.arch`.
        arch_arguments: the arguments that the recipe gave it.
        precision: of the evaluation, `fp32` or `bf16`.
        world_size: number of ranks.
        recipe: the recipe, without `run_dir`.
        step: optimizer steps that the weights have taken.
        evaluated: step of the latest evaluation; 0: none.
        metrics: of that evaluation.
        versions: of lrd and the packages that wrote the file.
    """

    version: int
    weights: Literal["network", "ema"]
    arch: str
    arch_arguments: dict[str, Any]
    precision: Literal["fp32", "bf16"]
    world_size: _Size = 1
    recipe: dict[str, Any]
    step: int = 0
    evaluated: int = 0
    metrics: dict[str, Any] = {}
    versions: dict[str, str] = {}

    @property
    def has_results(self) -> bool:
        """Whether `metrics` are those of these weights, and not of an earlier step."""
        return bool(self.metrics) and self.evaluated == self.step


class NetworkConfig(BaseModel):
    """The config of a network; `lrd.checkpoint.network_config` writes it.

    Attributes:
        num_labels: size of the network's output.
        id2label: name of each class, by its label.
        image_size: of the inputs in pixels; height and width if they differ.
        resize: pixels of an image's shorter side before its centre is cut out; None: as few as
            the inputs have.
        image_mean: mean of each channel over the training set, in [0, 255].
        image_std: standard deviation of each channel.
        lrd: what lrd needs beside Hugging Face's keys.
    """

    num_labels: Annotated[int, Field(gt=0, le=1 << 24)]
    id2label: dict[int, str]
    image_size: _Side | tuple[_Side, _Side]
    resize: _Side | None = None
    image_mean: tuple[float, float, float]
    image_std: tuple[
        Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]
    ]
    lrd: Training

    @model_validator(mode="after")
    def _require_a_name_for_each_label(self) -> NetworkConfig:
        if sorted(self.id2label) != list(range(len(self.id2label))):
            raise ValueError("id2label: should name the labels 0, 1, 2, ...")
        if len(self.id2label) != self.num_labels:
            raise ValueError(f"id2label: has {len(self.id2label)} names, num_labels is different")
        return self

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of each class, by its label."""
        return tuple(self.id2label[label] for label in range(self.num_labels))

    @property
    def height_and_width(self) -> tuple[int, int]:
        """Of the inputs, in pixels."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else size


def parse_config(values: dict[str, Any], source: str) -> NetworkConfig:
    """Validate a config.

    Args:
        values: as they were read from JSON.
        source: the file, for messages.

    Raises:
        UserError: it is no config of lrd, or a newer one, or a value is missing or wrong.
    """
    if not isinstance(values.get("lrd"), dict):
        raise UserError(
            f"{source}: does not describe its network, as weights from lrd before checkpoint "
            "layout 3 and from other programs do not; only "
            "safetensors.torch.load_file can load it"
        )

    version = values["lrd"].get("version")
    if version != network_config.CONFIG_VERSION:
        raise UserError(
            f"{source}: its description of the network has version {version!r}, this lrd reads "
            f"{network_config.CONFIG_VERSION}"
        )

    try:
        return NetworkConfig.model_validate(values)
    except ValidationError as error:
        fault = error.errors()[0]
        # Within a union, pydantic adds the names of the types to the key.
        key = ".".join(str(part) for part in fault["loc"])
        message = fault["msg"].removeprefix("Value error, ")
        raise UserError(f"{source}: {key}: {message}" if key else f"{source}: {message}") from None
