"""Under which circumstances each start of a run computed its steps.

Masks, order and augmentation are functions of a position. The last bits of a sum depend on more: on
how many ranks and threads it was computed, on which processor and by which version of torch. Each
checkpoint therefore lists the starts that led to it. So a step of any of them can be computed again
(`lrd.replay`).

    "starts": [
        {"step": 0, "ranks": 2, "threads": 1, "device": "cpu", "processor": "...", ...},
        {"step": 100, "recipe": {...}},      it went on after step 100
        {"step": 130, "ranks": 3}
    ]

An entry has what has changed since the one before it. A start that changed settings which affect
the results (`checkpoint.allow_changed`) leaves the recipe of those before it in their last entry.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

STEP = "step"
RECIPE = "recipe"
RECIPE_SECTIONS = ("tracking", "checkpoint", "trainer")  # that are among the circumstances
LENGTH_KEYS = {"epochs", "max_steps", "eval_every"}  # of the recipe's `trainer`


@dataclass(frozen=True)
class Start:
    """One start of a run, up to the next one.

    Attributes:
        step: steps that were done when it began.
        circumstances: `ranks`, `threads` (of each rank), `device`, `processor`, `versions`,
            `lrd_source` (a digest of lrd's source files), `sources` (of own parts, by their key);
            `tracking`, `checkpoint` and `trainer`: what in these sections of the recipe decides
            what is recorded, and when it is evaluated and saved.
        recipe: the settings by which it trained, as they are in `config.json`; None: those of the
            next start that has one, or else those of the checkpoint.
    """

    step: int
    circumstances: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] | None = None


def add_start(
    saved: list[dict[str, Any]],
    step: int,
    circumstances: dict[str, Any],
    changed_recipe: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """The list of starts with one more.

    Starts at the same or a later step left nothing: what they computed was lost.

    Args:
        saved: the list in the checkpoint that the new start goes on from.
        step: steps that are done when the new start begins.
        circumstances: as in `Start`.
        changed_recipe: the recipe of the checkpoint, if the new start has another one.
    """
    starts = parse_starts(saved)
    earlier = [start for start in starts if start.step < step]

    # The oldest recipe among those that left nothing is the one by which `earlier` trained.
    lost_recipes = [start.recipe for start in starts if start.step >= step and start.recipe]
    recipe = lost_recipes[0] if lost_recipes else changed_recipe
    if earlier and recipe is not None and earlier[-1].recipe is None:
        earlier[-1] = Start(earlier[-1].step, earlier[-1].circumstances, recipe)

    return render_starts([*earlier, Start(step, circumstances)])


def describe_fork(forked_from: dict[str, Any]) -> str:
    """Say which run a run was forked from, in one line."""
    line = f"forked from {forked_from['run']} at step {forked_from['step']}"
    if not forked_from.get("manifest"):
        return line
    return (
        f"{line}, computed from its checkpoint of step {forked_from['checkpoint']} "
        f"(manifest {forked_from['manifest']})"
    )


def parse_starts(saved: Any) -> list[Start]:
    """Read the list of starts of a checkpoint, with all circumstances in each.

    Returns:
        The starts in their order; empty if the checkpoint has no such list.
    """
    starts: list[Start] = []
    circumstances: dict[str, Any] = {}
    for entry in saved if isinstance(saved, list) else []:
        values = dict(entry)
        step = int(values.pop(STEP))
        recipe = values.pop(RECIPE, None)
        circumstances = {**circumstances, **values}
        starts.append(Start(step, circumstances, recipe))
    return starts


def render_starts(starts: list[Start]) -> list[dict[str, Any]]:
    """The inverse of `parse_starts`."""
    entries: list[dict[str, Any]] = []
    known: dict[str, Any] = {}
    for start in starts:
        changed = {
            key: value for key, value in start.circumstances.items() if known.get(key) != value
        }
        entry = {STEP: start.step, **changed}
        if start.recipe is not None:
            entry[RECIPE] = start.recipe
        entries.append(entry)
        known = start.circumstances
    return entries
