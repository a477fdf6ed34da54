"""All groups of faults, in the order in which they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from . import damage, disks, kills, stops, survivors, wrong
from .lab import Lab, Trial

GROUPS: dict[str, Callable[[Lab], Iterator[Trial]]] = {
    "mutations": damage.mutations,
    "damages": damage.damages,
    "numbers": wrong.numbers,
    "changes": wrong.changes,
    "disks": disks.disks,
    "signals": stops.signals,
    "standstills": stops.standstills,
    "save_phases": kills.save_phases,
    "second_save_phases": kills.second_save_phases,
    "load_phases": kills.load_phases,
    "orphans": kills.orphans,
    "twice": kills.twice_in_a_row,
    "ten": kills.ten_in_a_row,
    "kills": kills.random_kills,
    "survivors": survivors.survivors,
    "launcher_restarts": wrong.launcher_restarts,
}
