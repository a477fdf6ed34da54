"""The manifest of a checkpoint: size and SHA-256 of each of its files, and a SHA-256 of itself.

torch.load and safetensors load a file with a flipped bit without an error. Therefore nothing is
loaded before the size and the hash of each file have been compared with `manifest.json`.

The manifest contains the SHA-256 of its own entries, and the same entries are always written as the
same bytes. So a changed byte in the manifest is noticed too. Otherwise a flipped bit in the layout
version would make a damaged checkpoint look like one that another version of lrd wrote.

Manifests are chained: each has the SHA-256 of the one before it (`previous`). So a checkpoint that
was replaced by another valid one is found as long as its successor is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lrd.errors import first_line

NAME = "manifest.json"
LAYOUT_VERSION = 3  # the layout version that is written
READABLE_VERSIONS = (2, 3)


@dataclass(frozen=True)
class Link:
    """Names a manifest.

    Attributes:
        step: of its checkpoint.
        sha256: its own SHA-256, which stands in it.
    """

    step: int
    sha256: str


def write_manifest(
    folder: Path, step: int, files: Iterable[str], previous: Link | None = None
) -> None:
    """Measure the files in a folder and write the manifest beside them.

    Args:
        folder: the folder of one checkpoint.
        step: the step that the checkpoint belongs to.
        files: names of the files in `folder`.
        previous: the manifest of the checkpoint before this one; None: there is none.
    """
    text = render(step, {file: measure(folder / file) for file in files}, previous)
    (folder / NAME).write_text(text, encoding="utf-8")


def render(step: int, measured: dict[str, Any], previous: Link | None = None) -> str:
    """The text of the manifest of a step, from what `measure` says of each file by its name."""
    entries = {"format": LAYOUT_VERSION, "step": step, "files": measured}
    if previous is not None:
        entries["previous"] = asdict(previous)
    return _render(entries)


def read_link(folder: Path) -> Link | None:
    """The link to a folder's manifest; None if there is no valid one."""
    entries, _ = _read(folder)
    if entries is None or not isinstance(entries.get("step"), int):
        return None
    return Link(entries["step"], _digest(entries))


def read_previous(folder: Path) -> Link | None:
    """What a folder's manifest says of the one before it; None if it says nothing."""
    entries, _ = _read(folder)
    previous = {} if entries is None else entries.get("previous", {})
    try:
        return Link(int(previous["step"]), str(previous["sha256"]))
    except (TypeError, KeyError, ValueError):
        return None


def layout_version(folder: Path) -> Any:
    """Return the layout version in a folder's manifest, or None if there is no valid manifest."""
    entries, _ = _read(folder)
    return None if entries is None else entries["format"]


def read_files(folder: Path) -> dict[str, Any]:
    """Return what a valid manifest says of each file: file name -> size and SHA-256.

    Raises:
        OSError: there is no valid manifest.
    """
    entries, error_line = _read(folder)
    if entries is None or not isinstance(entries.get("files"), dict):
        raise OSError(None, error_line or f"{NAME}: does not list the files of a checkpoint")
    files: dict[str, Any] = entries["files"]
    return files


def parse_files(raw: bytes) -> dict[str, Any]:
    """Return what the bytes of a manifest say of each file; see `read_files`.

    Raises:
        ValueError: they are not those of a valid manifest.
    """
    entries, error_line = _parse(raw)
    if entries is None or not isinstance(entries.get("files"), dict):
        raise ValueError(error_line.removeprefix(f"{NAME}: ") or "does not list files")
    files: dict[str, Any] = entries["files"]
    return files


def find_damage(
    folder: Path, step: int, required: dict[int, set[str]], optional: set[str]
) -> str | None:
    """Compare a folder with its manifest.

    Args:
        folder: the folder of one checkpoint.
        step: the step in the folder's name. A folder that was renamed to another step counts as
            damaged.
        required: for each layout version, names of the files that must be there.
        optional: names of the files that may be there too.

    Returns:
        One line that names the first file that is wrong and the reason; None if the size and the
        hash of each file match.
    """
    entries, error_line = _read(folder)
    if entries is None:
        return error_line

    version = entries["format"]
    if version not in READABLE_VERSIONS:
        readable = " and ".join(str(readable) for readable in READABLE_VERSIONS)
        return f"{NAME}: layout version {version!r}, this lrd reads {readable}"

    if entries.get("step") != step:
        return f"{NAME}: is of step {entries.get('step')}"

    listed = entries.get("files")
    if not isinstance(listed, dict) or set(listed) - optional != required[version]:
        return f"{NAME}: does not list the files of a checkpoint"

    for file in listed:
        try:
            measured = measure(folder / file)
        except FileNotFoundError:
            return f"{file}: missing"
        except OSError as error:
            return f"{file}: cannot be read: {first_line(error)}"

        if measured != listed[file]:
            return f"{file}: {_describe_difference(measured, listed[file])}"

    return None


def _describe_difference(measured: dict[str, Any], listed: Any) -> str:
    """Name the first entry of a file that differs from the manifest's."""
    expected = listed if isinstance(listed, dict) else {}

    # If all measured entries match, the manifest lists something more than those.
    differing = [key for key in measured if measured[key] != expected.get(key)]
    key = differing[0] if differing else "entry"
    return f"{key} is {measured.get(key)}, the manifest says {expected.get(key)}"


def _read(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """Read a manifest. Returns its entries and "", or None and a line with the reason."""
    if not (folder / NAME).is_file():
        return None, f"{NAME}: missing"

    try:
        raw = (folder / NAME).read_bytes()
    except OSError as error:
        return None, f"{NAME}: cannot be read: {first_line(error)}"
    return _parse(raw)


def _parse(raw: bytes) -> tuple[dict[str, Any] | None, str]:
    """Read the bytes of a manifest. Returns as `_read`."""
    try:
        entries = json.loads(raw)
    except (ValueError, RecursionError) as error:
        return None, f"{NAME}: cannot be read: {first_line(error)}"

    if not isinstance(entries, dict) or "format" not in entries:
        return None, f"{NAME}: does not list the files of a checkpoint"

    digest = entries.pop("sha256", None)
    if digest is None and entries["format"] in READABLE_VERSIONS:
        return None, f"{NAME}: sha256 of its entries is missing"

    # Another layout need not have a digest, so its version is reported as it stands. Those that are
    # read here never get to this line with one damaged byte: without the digest they were refused
    # above; with another version they still have a digest.
    if digest is None:
        return entries, ""

    # Comparing all bytes covers the digest too: _render computes it again.
    if raw != _render(entries).encode():
        return None, f"{NAME}: sha256 of its entries is not {digest}"
    return entries, ""


def _render(entries: dict[str, Any]) -> str:
    """Return the text of a manifest: the entries, and the SHA-256 of them as the last one."""
    return json.dumps({**entries, "sha256": _digest(entries)}, indent=1) + "\n"


def _digest(entries: dict[str, Any]) -> str:
    """The SHA-256 of a manifest's entries."""
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def measure(path: Path) -> dict[str, Any]:
    """Return the size of a file in bytes and its SHA-256.

    Raises:
        OSError: it cannot be read, or is no file: to open a FIFO would wait for a writer.
    """
    if path.exists() and not path.is_file():
        raise OSError(None, "is not a file")
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return {"bytes": stream.tell(), "sha256": digest}
