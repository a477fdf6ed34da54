"""Which files a folder should hold, with size and SHA-256 of each: a manifest.json that vouches for itself too.

A flipped bit passes torch.load and safetensors without a word, so nothing is loaded whose hashes do not hold. The
manifest ends with the SHA-256 of all it says, and has one way only to be written, so that no changed byte in it goes
unnoticed either: a damaged layout version must not look like another program's checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lrd.errors import first_line

NAME = "manifest.json"
FORMAT = 2
READABLE = (1, FORMAT)  # 1, of lrd 0.1: without `step` and `sha256`


def write(folder: Path, step: int, files: Iterable[str]) -> None:
    """Measure the files and put the manifest beside them."""
    facts = {"format": FORMAT, "step": step, "files": {file: _measure(folder / file) for file in files}}
    (folder / NAME).write_text(_render(facts), encoding="utf-8")


def layout_version(folder: Path) -> Any:
    """The layout version that a manifest vouches for; None where there is no manifest that can be trusted."""
    facts, _ = _read(folder)
    return None if facts is None else facts["format"]


def damage(folder: Path, step: int, files: Iterable[str]) -> str | None:
    """Why a folder is not whole, naming the file; None where size and hash of each file hold.

    Args:
        step: what the folder's name says; a folder under another's name is damaged too.
        files: what must be there.
    """
    facts, fault = _read(folder)
    if facts is None:
        return fault
    if facts["format"] not in READABLE:
        return f"{NAME}: layout version {facts['format']!r}, this lrd reads {', '.join(map(str, READABLE))}"
    if facts.get("step", step) != step:
        return f"{NAME}: is of step {facts['step']}"
    listed = facts.get("files")
    if not isinstance(listed, dict) or set(listed) != set(files):
        return f"{NAME}: does not list the files of a checkpoint"
    for file in files:
        try:
            measured = _measure(folder / file)
        except FileNotFoundError:
            return f"{file}: missing"
        except OSError as error:
            return f"{file}: cannot be read: {first_line(error)}"
        if measured != listed[file]:
            expected = listed[file] if isinstance(listed[file], dict) else {}
            key = next((key for key in measured if measured[key] != expected.get(key)), "entry")
            return f"{file}: {key} is {measured.get(key)}, the manifest says {expected.get(key)}"
    return None


def _read(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """What a manifest says where it can be trusted, else why not."""
    if not (folder / NAME).is_file():
        return None, f"{NAME}: missing"
    try:
        raw = (folder / NAME).read_bytes()
        facts = json.loads(raw)
    except (OSError, ValueError, RecursionError) as error:
        return None, f"{NAME}: cannot be read: {first_line(error)}"
    if not isinstance(facts, dict) or "format" not in facts:
        return None, f"{NAME}: does not list the files of a checkpoint"
    if facts["format"] != 1 or facts.keys() != {"format", "files"}:
        digest = facts.pop("sha256", None)
        if digest is None or raw != _render(facts).encode():
            return None, f"{NAME}: sha256 of what it says is not {digest}"
    return facts, ""


def _render(facts: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return json.dumps({**facts, "sha256": digest}, indent=1) + "\n"


def _measure(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return {"bytes": stream.tell(), "sha256": digest}
