"""A folder of images that stay on disk, as files or packed, as a data set."""

from __future__ import annotations

import hashlib
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lrd import recipe as recipes
from lrd.data.batches import normalization
from lrd.data.decoding import Region, UnreadableImageError
from lrd.data.image_folder import cache_folder
from lrd.data.images import Dataset
from lrd.data.streaming.file_index import index_folder
from lrd.data.streaming.loader import count_workers
from lrd.data.streaming.packed import PackedSource, open_pack, read_sealed, seal
from lrd.data.streaming.readers import ImageReader
from lrd.data.streaming.sources import FileSource, Source
from lrd.data.streaming.streamed import StreamedImages
from lrd.errors import UserError
from lrd.host import require_memory

_IMAGES_FOR_STATISTICS = 1024


def load_folder(section: recipes.Data, seed: int, storage: str) -> Dataset:
    """The data set of a folder of images that stay on disk.

    Args:
        section: the `data` section of the recipe.
        seed: the seed of the recipe.
        storage: `files` or `packed`.

    Raises:
        UserError: a folder or an image is missing, classes differ, or a pack is not there or old.
    """
    root = Path(section.root)
    sources: dict[str, Source]
    if storage == "packed":
        sources, classes = _open_packs(root, section)
    else:
        sources, classes = _index_files(root, section)

    size = section.image_size or _first_image_height(sources["train"], section.skip_corrupt)
    require_memory(3 * size * size, f"data.image_size: is {size}", "each image")
    mean, std = _find_statistics(sources["train"], section, size, root / "train")

    parts = {}
    for name, source in sources.items():
        reader = ImageReader(source, section, seed, size, mean.flatten().tolist())
        parts[name] = StreamedImages(
            reader=reader,
            image_shape=(3, size, size),
            dtype=torch.uint8,
            storage=storage,
            digest=source.digest,
            workers=count_workers(section),
            mean=mean,
            std=std,
        )
    return Dataset(parts["train"], parts["test"], classes)


def _index_files(root: Path, section: recipes.Data) -> tuple[dict[str, Source], tuple[str, ...]]:
    sources: dict[str, Source] = {}
    for part in ("train", "test"):
        index = index_folder(root / part)
        digest = index.content_digest() if section.fingerprint == "contents" else None
        sources[part] = FileSource(index, digest)
    return sources, index.classes


def _open_packs(root: Path, section: recipes.Data) -> tuple[dict[str, Source], tuple[str, ...]]:
    sources: dict[str, Source] = {}
    classes: tuple[str, ...] = ()
    for part in ("train", "test"):
        pack = open_pack(root, part)
        if pack is None:
            raise UserError(
                f"data.storage: is 'packed', but {root} has no packed {part} images; "
                f"make them: lrd data pack {root}"
            )
        folder = root / part
        if folder.is_dir() and index_folder(folder).digest != pack.source_digest:
            raise UserError(
                f"data.storage: is 'packed', but the files in {folder} are not those that were "
                f"packed; pack them again: lrd data pack {root} --size {pack.size}"
            )

        size = section.image_size or pack.size
        needed = section.evaluation_resize(size) or size
        if pack.size < needed:
            raise UserError(
                f"data.storage: the packed images of {root} have {pack.size} pixels on their "
                f"shorter side, {needed} are needed: lrd data pack {root} --size {needed}"
            )
        sources[part] = pack
        classes = pack.classes
    return sources, classes


def _first_image_height(source: Source, skip_corrupt: bool) -> int:
    """Height in pixels of the first image that can be read."""

    def whole(height: int, width: int) -> Region:
        return Region(0, 0, height, width)

    for index in range(len(source.labels)):
        try:
            _, height, width = source.read_region(index, whole, size=1 << 30).shape
        except UnreadableImageError as error:
            if not skip_corrupt:
                raise UserError(
                    f"{source.describe(index)}: not a readable image ({error}); "
                    "with data.image_size it would not be needed"
                ) from None
            continue

        # What is smaller than a pack's size was left as it is.
        if isinstance(source, PackedSource) and min(height, width) >= source.size:
            raise UserError(
                "data.image_size: is missing; it cannot be found out from images that were "
                f"resized when they were packed (their shorter side has {source.size} pixels)"
            )
        return height
    raise UserError(f"{source.describe(0)}: not a readable image, nor is any other of its part")


def _find_statistics(
    source: Source, section: recipes.Data, size: int, folder: Path
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, from images that are evenly spaced in the part.

    Returns:
        Both float32 (3, 1, 1), from 0 to 255.
    """
    if section.mean is not None and section.std is not None:
        return normalization(section, torch.zeros((1, 3, 1, 1), dtype=torch.uint8))

    resize = section.evaluation_resize(size)
    key = f"{source.digest} {size} {resize} {section.skip_corrupt} {_IMAGES_FOR_STATISTICS}"
    name = f"{folder.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.statistics"
    cache = cache_folder(folder) / name
    mean, std = _read_statistics(cache) or _measure_statistics(source, section, size, resize, cache)

    if section.mean is not None:
        mean = [255.0 * value for value in section.mean]
    if section.std is not None:
        std = [255.0 * value for value in section.std]
    return torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]


def _read_statistics(cache: Path) -> tuple[list[float], list[float]] | None:
    try:
        values = read_sealed(cache)
    except (OSError, ValueError):
        return None
    return values["mean"], values["std"]


def _measure_statistics(
    source: Source, section: recipes.Data, size: int, resize: int | None, cache: Path
) -> tuple[list[float], list[float]]:
    count = min(len(source.labels), _IMAGES_FOR_STATISTICS)
    indices = np.linspace(0, len(source.labels) - 1, count).astype(int).tolist()
    with ThreadPoolExecutor() as pool:
        read = partial(_read_or_skip, source, section, size, resize)
        images = [pixels for pixels in pool.map(read, indices) if pixels is not None]
    if not images:
        raise UserError(f"{source.describe(0)}: not readable, like {count - 1} other images")

    plain = section.model_copy(update={"mean": None, "std": None})
    mean, std = normalization(plain, torch.stack(images))
    values = {"mean": mean.flatten().tolist(), "std": std.flatten().tolist()}
    temporary = cache.with_name(
        f"{cache.name}.{uuid.uuid4().hex}.tmp"
    )  # hosts may share the folder
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(seal(values))
        temporary.replace(cache)
    except OSError:  # the next start measures them again
        with suppress(OSError):
            temporary.unlink()
    return values["mean"], values["std"]


def _read_or_skip(
    source: Source, section: recipes.Data, size: int, resize: int | None, index: int
) -> Tensor | None:
    try:
        return source.read_centre(index, size, resize)
    except UnreadableImageError as error:
        if section.skip_corrupt:
            return None
        raise UserError(
            f"{source.describe(index)}: not a readable image ({error}); "
            "data.skip_corrupt=true takes another image in place of such files"
        ) from None
