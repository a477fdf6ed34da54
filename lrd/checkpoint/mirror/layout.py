"""The names of the objects of a mirror, and which of its checkpoints are whole.

    <mirror>/run.json                           which run it belongs to, see `claim`
    <mirror>/events.out.tfevents.*, metrics.csv the records, as in the run directory
    <mirror>/checkpoints/step-00001234/
        model.safetensors, ...                  as in the run directory
        records.json                            the size and SHA-256 that the records had
        manifest.json                           as in the run directory; written last, deleted first

A checkpoint without its manifest does not count: its upload was interrupted. The records only grow
while a run goes on, so an older checkpoint's are the first bytes of those that are there now.
"""

from __future__ import annotations

from collections import defaultdict

from lrd.checkpoint import manifest, store

CHECKPOINTS = "checkpoints"
RECORDS_FILE = "records.json"
DAMAGED_FILE = f"{manifest.NAME}.damaged"  # of a checkpoint that was found to be damaged


def folder_name(step: int) -> str:
    """The part of the names that the objects of a checkpoint have in common."""
    return f"{CHECKPOINTS}/{store.checkpoint_name(step)}"


def sort_by_step(objects: dict[str, int]) -> dict[int, dict[str, int]]:
    """Sort the objects of a mirror by the checkpoint that they belong to.

    Args:
        objects: name -> size in bytes.

    Returns:
        step -> file -> size in bytes, the oldest step first.
    """
    found: defaultdict[int, dict[str, int]] = defaultdict(dict)
    for name, size in objects.items():
        parts = name.split("/")
        if len(parts) != 3 or parts[0] != CHECKPOINTS:
            continue
        step = store.parse_name(parts[1])
        if step is not None:
            found[step][parts[2]] = size
    return dict(sorted(found.items()))


def whole_steps(by_step: dict[int, dict[str, int]]) -> list[int]:
    """The steps of the checkpoints that have their manifest, oldest first."""
    return [step for step, files in by_step.items() if manifest.NAME in files]
