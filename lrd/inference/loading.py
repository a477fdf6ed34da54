"""`lrd.load_model`: the network of a run or an exported file, its preprocessing and its classes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from lrd import recipe as recipes
from lrd.checkpoint import export, manifest, network_config, store
from lrd.data import batches
from lrd.data.decoding import read_image, to_pixels
from lrd.errors import UserError, first_line
from lrd.inference.config import NetworkConfig, parse_config
from lrd.parts.models import build_model
from lrd.recipe.named import MODEL_COLLECTIONS
from lrd.recipe.schema import ARCHITECTURES

_BATCH_SIZE = 64  # images of one forward pass in `predict`

# A path, a Pillow image, uint8 (H, W, C) or (H, W) as an array, or uint8 (3, H, W) as a tensor.
AnyImage = str | os.PathLike[str] | Image.Image | NDArray[np.uint8] | Tensor


@dataclass
class LoadedModel:
    """A trained network with all that its use needs.

    Attributes:
        network: the network, in evaluation mode. Input: what `preprocess` returns, stacked to
            float32 (N, 3, H, W). Output: logits (N, number of classes).
        classes: name of each class, by its label.
        config: what the file says of the network: the recipe, the results, ...
        path: the file of the weights.
        device: where the network is.
    """

    network: nn.Module
    classes: tuple[str, ...]
    config: NetworkConfig
    path: Path
    device: torch.device

    def preprocess(self, image: AnyImage) -> Tensor:
        """Make the network's input of an image, exactly as in training.

        An image of another size is resized as in training's evaluations: bilinear, so that its
        shorter side fits, and the centre is taken.

        Args:
            image: a path, a Pillow image, an array of uint8 (H, W) or (H, W, C), or a tensor of
                uint8 (3, H, W).

        Returns:
            float32 (3, height, width), on `device`.

        Raises:
            UserError: a file is missing or is no image.
            TypeError, ValueError: an array or tensor has another type or shape.
        """
        pixels = self.to_pixels(image).to(self.device)
        return self.normalize(pixels)

    def to_pixels(self, image: AnyImage) -> Tensor:
        """`preprocess` before the normalization: uint8 (3, height, width), on the CPU."""
        height, width = self.config.height_and_width
        if isinstance(image, Tensor):
            if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
                raise ValueError(
                    f"a tensor must be uint8 (3, H, W), is {image.dtype} {tuple(image.shape)}"
                )
            if image.shape[1:] == (height, width):
                return image.cpu()
            image = image.permute(1, 2, 0).cpu().numpy()  # uint8 (H, W, 3)

        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8:
                raise TypeError(f"an array must be uint8, is {image.dtype}")
            image = Image.fromarray(image)

        if isinstance(image, Image.Image):
            pixels = to_pixels(image, height, width, self.config.resize)
        else:
            pixels = read_image(Path(image), height, width, self.config.resize)
        return torch.from_numpy(pixels.copy())  # contiguous, and its own memory

    def normalize(self, pixels: Tensor) -> Tensor:
        """Scale each channel with mean and standard deviation of the training set.

        Args:
            pixels: uint8 (any number, 3, H, W), on any device.

        Returns:
            float32 of the same shape, on the same device.
        """
        mean = torch.tensor(self.config.image_mean, device=pixels.device)[:, None, None]
        std = torch.tensor(self.config.image_std, device=pixels.device)[:, None, None]
        return batches.normalize(pixels, mean, std)

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> Tensor:
        """Run the network in the precision in which training evaluated it.

        Args:
            inputs: float32 (N, 3, H, W).

        Returns:
            float32 (N, number of classes).
        """
        with self._autocast():
            return self.network(inputs).float()  # type: ignore[no-any-return]

    def _autocast(self) -> AbstractContextManager[None]:
        is_bf16 = self.config.lrd.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=is_bf16)

    def predict(
        self, images: AnyImage | Sequence[AnyImage], top: int = 5
    ) -> list[list[tuple[str, float]]]:
        """The most probable classes of images.

        Args:
            images: a list of what `preprocess` takes; a single one counts as a list of one.
            top: number of classes.

        Returns:
            For each image the classes with their probabilities, the most probable first.
        """
        if not isinstance(images, list | tuple):
            images = [images]  # type: ignore[list-item]

        predictions = []
        for start in range(0, len(images), _BATCH_SIZE):
            chunk = images[start : start + _BATCH_SIZE]
            inputs = torch.stack([self.preprocess(image) for image in chunk])
            probabilities = self.logits(inputs).softmax(dim=1)  # float32 (N, classes)

            best = probabilities.topk(min(top, len(self.classes)), dim=1)
            for values, labels in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                names = [self.classes[label] for label in labels]
                predictions.append(list(zip(names, values, strict=True)))
        return predictions


def load_model(
    path: str | os.PathLike[str],
    *,
    best: bool = False,
    ema: bool = False,
    device: str | torch.device = "cpu",
    arch: str | None = None,
) -> LoadedModel:
    """Load a trained network for inference.

    No code from the files is run, and no module is imported because a file names it.

    Args:
        path: a file or folder that `lrd checkpoints --export` wrote, a checkpoint, or a run
            directory, of which the newest valid checkpoint is taken.
        best: of a run directory, take the checkpoint of the best evaluation.
        ema: take the moving averages of the weights. An exported file contains either these or the
            weights themselves; with `ema` the latter is refused.
        device: where the network is to be.
        arch: the network's `model.arch` in the recipe, if that is code of the user's own. It is
            imported from the Python path.

    Raises:
        UserError: there are no such weights, they are damaged or do not describe their network, or
            the network is code of the user's own and `arch` is not given, or the device is missing.
    """
    weights_path, values = _find_weights(Path(path), best, ema)
    config = parse_config(values, str(weights_path))

    try:
        weights = safetensors.torch.load_file(weights_path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{weights_path}: cannot be read: {first_line(error)}") from None
    network = _build_network(config, weights, weights_path, arch)

    device = torch.device(device)
    try:
        network = network.to(device).eval().requires_grad_(False)
    except (AssertionError, RuntimeError) as error:  # torch without CUDA, or no such GPU
        raise UserError(f"device: {device} cannot be used: {first_line(error)}") from None
    # As `lrd.job.setup` does it.
    if config.lrd.recipe.get("trainer", {}).get("channels_last") and device.type != "cpu":
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return LoadedModel(network, config.classes, config, weights_path, device)


def _find_weights(path: Path, best: bool, ema: bool) -> tuple[Path, dict[str, Any]]:
    """Find the file of the weights, and read what it says of its network."""
    if path.is_dir() and store.checkpoints_dir(path).is_dir():
        weights_path = export.weights_file(export.find_checkpoint(path, best), ema)
        return weights_path, network_config.read_config(weights_path)

    if best:
        raise UserError(f"{path}: best is of a run directory, and this is none")

    if (path / manifest.NAME).is_file():
        damage = store.find_damage(path)
        if damage is not None:
            raise UserError(f"{path}: {damage}")
        weights_path = export.weights_file(path, ema)
        return weights_path, network_config.read_config(weights_path)

    if path.is_dir():
        weights_path = path / store.MODEL_FILE
        if not weights_path.is_file():
            raise UserError(
                f"{path}: no weights in it: no checkpoints of a run, no checkpoint's files, and no "
                f"{store.MODEL_FILE} with {store.CONFIG_FILE}"
            )
        values = _read_config_file(path / store.CONFIG_FILE)
    elif path.is_file():
        weights_path = path
        values = network_config.read_config(path)
    else:
        raise UserError(f"{path}: no such file or folder")

    _require_weights(values, weights_path, ema)
    return weights_path, values


def _read_config_file(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from None
    return values if isinstance(values, dict) else {}


def _require_weights(values: dict[str, Any], path: Path, ema: bool) -> None:
    """Refuse an exported file with weights where averages are asked for."""
    section = values.get("lrd")
    found = section.get("weights") if isinstance(section, dict) else None
    if ema and found != network_config.EMA:
        raise UserError(
            f"{path}: has no averaged weights; export them with lrd checkpoints RUN --ema --export"
        )


def _build_network(
    config: NetworkConfig, weights: dict[str, Tensor], path: Path, arch: str | None
) -> nn.Module:
    """Build the network and load the weights into it.

    Raises:
        UserError: see `load_model`; or the weights are those of another network.
    """
    arch = arch or _require_known_arch(config.lrd.arch, path)
    section = _model_section(arch, config, path)

    network = build_model(section, config.num_labels, seed=0)
    _require_same_shapes(network.state_dict(), weights, path)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        last_line = str(error).splitlines()[-1].strip()
        raise UserError(f"{path}: its weights do not fit {arch}: {last_line}") from None
    return network


def _require_known_arch(arch: str, path: Path) -> str:
    """Refuse a network outside of lrd, torchvision and timm: a file must not have it imported."""
    collection, has_colon, _ = arch.partition(":")
    if arch in ARCHITECTURES or (has_colon and collection in MODEL_COLLECTIONS):
        return arch
    raise UserError(
        f"{path}: its network is {arch}, which is code outside of lrd; to have it imported, say "
        f'load_model(..., arch="{arch}"), or model.arch={arch} on the command line'
    )


def _model_section(arch: str, config: NetworkConfig, path: Path) -> recipes.Model:
    arguments = config.lrd.arch_arguments
    for key in recipes.Model.model_fields.keys() - {"width"}:
        if key in arguments:
            raise UserError(f"{path}: lrd.arch_arguments: {key} is no argument of a network")
    return recipes.parse({"model": {"arch": arch, **arguments}}, str(path)).model


def _require_same_shapes(expected: dict[str, Any], weights: dict[str, Tensor], path: Path) -> None:
    """Refuse weights of another network, by the first name or shape that differs."""
    for name, tensor in expected.items():
        if not isinstance(tensor, Tensor):  # what a network adds to its state_dict
            continue
        if name not in weights:
            raise UserError(f"{path}: the weights of {name} are missing")
        if weights[name].shape != tensor.shape:
            found = tuple(weights[name].shape)
            raise UserError(
                f"{path}: {name} has shape {found}, the network has {tuple(tensor.shape)}"
            )
    for name in weights:
        if name not in expected:
            raise UserError(f"{path}: has weights of {name}, which the network does not have")
