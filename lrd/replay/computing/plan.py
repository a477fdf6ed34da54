"""What is to be computed again: legs of a run, each under one set of circumstances."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Leg:
    """Consecutive steps of a run that are computed under the same circumstances.

    Attributes:
        recipe: by which they were computed, as `Recipe.model_dump` has it.
        ranks: how many took part.
        threads: of each rank; None: as many as a run would have here.
        on_cpu: whether they were computed on the CPU.
        first: steps done when the leg begins.
        last: steps done when it ends.
        checkpoint: the state to begin with; None: that before the first step. `SAVED` is the state
            that the leg before has saved.
        has_other_recipe: whether the checkpoint is of a start with another recipe, so that its
            settings need not be those of this leg.
        settings: those that affect the results, as the next checkpoint of the same start has them;
            None: there is none.
        observes_from: the first step that is observed; those before only lead there.
        expected: the checkpoint that the end is compared with; None: it is not compared.
        skips_last_evaluation: whether the run had not evaluated when it saved the state at the end.
        evaluates_at_end: whether the run evaluated after the last step, whatever the recipe says.
        saves: whether the state at the end is saved, for the leg after it or for a fork.
    """

    recipe: dict[str, Any]
    ranks: int
    threads: int | None
    on_cpu: bool
    first: int
    last: int
    checkpoint: str | None
    has_other_recipe: bool = False
    settings: dict[str, Any] | None = None
    observes_from: int = 0
    expected: str | None = None
    skips_last_evaluation: bool = False
    evaluates_at_end: bool = False
    saves: bool = False

    def can_follow(self, other: Leg) -> bool:
        """Whether the same processes can go on with this leg after another one.

        A saved state is read by new processes, because their circumstances or recipe differ.
        """
        return (
            self.checkpoint not in (None, SAVED)
            and not self.has_other_recipe
            and not other.has_other_recipe
            and self.recipe == other.recipe
            and (self.ranks, self.threads, self.on_cpu)
            == (other.ranks, other.threads, other.on_cpu)
            # With it the momentum is each rank's own between two checkpoints.
            and self.recipe["trainer"].get("gradient_exchange") != "kept"
        )


SAVED = "saved"


@dataclass
class Watch:
    """What is observed in the steps of a plan.

    Attributes:
        digests: a digest of each tensor after each step.
        records: the scalars that the run records.
        dump_at: the state after this step, whole.
        norms: the norms of gradients, updates and weights, by parameter.
        nonfinite: the first value that is not finite, and the module it came from. The replay ends
            there.
        samples: step and number of ranks: the images that each of these saw are saved.
        profile: a trace of the observed steps.
    """

    digests: bool = False
    records: bool = False
    dump_at: int | None = None
    norms: bool = False
    nonfinite: bool = False
    samples: list[tuple[int, int]] = field(default_factory=list)
    profile: bool = False


@dataclass
class Plan:
    """The legs that one group of processes computes.

    Attributes:
        legs: in their order.
        watch: what is observed.
        out: the folder that gets the results.
        name: of the run, for the progress bar.
    """

    legs: list[Leg]
    watch: Watch
    out: str
    name: str = ""

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Plan:
        values = json.loads(path.read_text(encoding="utf-8"))
        legs = [Leg(**leg) for leg in values.pop("legs")]
        watch = Watch(**values.pop("watch"))
        return cls(legs=legs, watch=watch, **values)


def group_legs(legs: Sequence[Leg]) -> list[list[Leg]]:
    """Legs that the same processes can compute, one after the other."""
    groups: list[list[Leg]] = []
    for leg in legs:
        if groups and leg.can_follow(groups[-1][-1]):
            groups[-1].append(leg)
        else:
            groups.append([leg])
    return groups
