"""Where the images of a data set are kept while it is trained on: `data.storage`."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Literal

from lrd import console
from lrd import recipe as recipes
from lrd.data.decoding import open_image, upright
from lrd.data.image_folder import is_image_name, list_classes
from lrd.errors import UserError
from lrd.host import ranks_on_host, total_bytes
from lrd.recipe.schema import is_own

PACK_FOLDER = ".lrd-pack"  # in `data.root`; it has a folder for each part
PACK_FILE = "pack.json"  # written last

Storage = Literal["memory", "files", "packed"]

# Of the host's memory, for the images of all its ranks together.
_LARGEST_PART_OF_MEMORY = 0.5


def choose_storage(section: recipes.Data) -> Storage:
    """Where the images are to be kept: what the recipe says, or what `auto` is on this host.

    Raises:
        UserError: the data set cannot be kept there.
    """
    if section.dataset != "imagefolder":
        if not is_own(section.dataset):
            require_memory_suffices(section)
        return "memory"

    needs_files = section.augment == "resized_crop" or _changes_single_images(section)
    if section.storage == "memory" and section.augment == "resized_crop":
        raise UserError(
            "data.storage: is 'memory', where all images have the size of the inputs; "
            "resized_crop cuts parts out of larger ones: files or packed"
        )
    if section.storage == "memory" and needs_files:
        raise UserError(
            "data.storage: is 'memory', where images are not changed one by one; "
            "trivial_augment and random_erasing need files or packed"
        )
    if section.augment == "resized_crop" and section.image_size is None:
        raise UserError("data.image_size: is missing, resized_crop needs it (224 is usual)")
    if section.storage != "auto":
        return section.storage

    pack = Path(section.root) / PACK_FOLDER
    has_pack = all((pack / part / PACK_FILE).is_file() for part in ("train", "test"))
    if has_pack and not (pack.parent / "train").exists():
        return "packed"
    if needs_files:
        return "packed" if has_pack else "files"
    needed = _bytes_in_memory(section)
    limit = _LARGEST_PART_OF_MEMORY * total_bytes()
    if needed <= limit:
        return "memory"

    storage: Storage = "packed" if has_pack else "files"
    console.info(
        f"data.storage: auto is {storage} here: in memory the images would take "
        f"{needed / 1e9:,.1f} GB of {total_bytes() / 1e9:,.1f} GB"
    )
    return storage


def require_memory_suffices(section: recipes.Data) -> None:
    """Refuse what only images in files can have, for a data set that is in memory.

    Raises:
        UserError: the recipe asks for it.
    """
    if section.storage in ("files", "packed"):
        raise UserError(
            f"data.storage: is {section.storage!r}, but {section.dataset} is in memory; only "
            "imagefolder has files"
        )
    if section.augment == "resized_crop":
        raise UserError(
            "data.augment: is 'resized_crop', which cuts parts out of images of their original "
            "size; only imagefolder has these"
        )
    if _changes_single_images(section):
        key = "trivial_augment" if section.trivial_augment else "random_erasing"
        raise UserError(
            f"data.{key}: {section.dataset} is in memory, where images are not changed one by one; "
            "those of imagefolder are"
        )


def _changes_single_images(section: recipes.Data) -> bool:
    """Whether training images of the inputs' size are changed one by one."""
    return section.trivial_augment or section.random_erasing > 0.0


def _bytes_in_memory(section: recipes.Data) -> int:
    """What the images would take on this host, where each rank has all of them."""
    root = Path(section.root)
    size = section.image_size

    num_images = 0
    for part in ("train", "test"):
        folder = root / part
        if part == "test" and not folder.is_dir():
            continue  # what is wrong with it is reported later
        for name in list_classes(folder):
            files = [entry for entry in os.scandir(folder / name) if is_image_name(entry.name)]
            num_images += len(files)
            if size is None and files:
                size = _height_of_first(sorted(Path(entry.path) for entry in files))
    return num_images * 3 * (size or 0) ** 2 * ranks_on_host()


def _height_of_first(files: list[Path]) -> int | None:
    """Height of the first image that can be opened; None if none can."""
    for path in files:
        with suppress(Exception), open_image(path) as image:  # decoding will report it
            return upright(image).height
    return None
