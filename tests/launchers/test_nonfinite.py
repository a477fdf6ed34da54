"""Losses and gradients that are not finite, and replicas that differ.

They are found before the optimizer's step, or before the next checkpoint.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lrd import recipe as recipes
from lrd.data import datasets
from lrd.data.batches import Batches
from tests.helpers.launching import RECIPE, ROOT, SMALL, command, launch
from tests.helpers.run_with_faults import AT, FAULTS, PARAMETER
from tests.helpers.tensorboard_events import read_scalars

RUN_WITH_FAULTS = str(ROOT / "tests" / "helpers" / "run_with_faults.py")

# An epoch has 22 steps.
OVERRIDES = [
    "trainer.max_steps=27",
    "checkpoint.every_steps=5",
    "trainer.fingerprint_every=2",
]


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks have run the job with each of the faults."""
    folder = tmp_path_factory.mktemp("faults")
    done = launch(command(2, [RUN_WITH_FAULTS, str(folder), RECIPE, *SMALL, *OVERRIDES]))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def ranks(out_dir: Path) -> list[dict[str, Any]]:
    """For each rank, what it saw of each fault."""
    return [json.loads((out_dir / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", FAULTS)
def test_the_ranks_agree_on_what_happened(ranks: list[dict[str, Any]], name: str) -> None:
    # A forward pass that goes wrong on one rank leaves that rank's running statistics not finite.
    may_differ = {"finite"}
    facts_0, facts_1 = (
        {key: value for key, value in rank[name].items() if key not in may_differ} for rank in ranks
    )
    assert facts_0 == facts_1


def test_without_a_fault_nothing_is_skipped(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["nothing"] == {
        "message": "",
        "step": 27,
        "skipped": 0,
        "checkpoints": [25, 27],
        "finite": True,
    }


@pytest.mark.parametrize("name", ["nan loss", "nan gradient"])
def test_the_run_stops_before_the_step_and_names_step_rank_and_samples(
    ranks: list[dict[str, Any]], name: str
) -> None:
    facts = ranks[0][name]
    assert facts["step"] == AT - 1
    assert facts["checkpoints"] == [5, 10]

    (line,) = facts["message"].splitlines()
    what = name.removeprefix("nan ")
    assert line.startswith(f"step {AT}: the {what}")
    assert "rank 1 on " in line
    assert "rank 0" not in line
    assert (PARAMETER in line) == (name == "nan gradient")

    recipe = recipes.load(RECIPE, SMALL)
    images = datasets.load_dataset(recipe.data, 0).train
    batches = Batches(images, recipe.data, 0, rank=1, world_size=2)
    samples = ", ".join(str(index) for index in batches.indices(AT - 1)[:8].tolist())
    assert f"training samples {samples}, ... 32 in all" in line


@pytest.mark.parametrize("name", ["nan loss, skipped", "nan gradient, skipped"])
def test_a_step_is_skipped_on_all_ranks_together(
    out_dir: Path, ranks: list[dict[str, Any]], name: str
) -> None:
    assert ranks[0][name] == {
        "message": "",
        "step": 27,
        "skipped": 1,
        "checkpoints": [25, 27],
        "finite": True,
    }
    assert json.loads((out_dir / name / "status.json").read_text())["skipped"] == 1

    records = {tag: dict(points) for tag, points in read_scalars(out_dir / name).items()}
    assert [records["train/skipped"][step] for step in (AT - 1, AT, 27)] == [0, 1, 1]
    assert [step for step, lr in records["lr_effective/group0"].items() if lr == 0] == [AT]
    assert all(records[tag][AT] == 0 for tag in records if tag.startswith("probes/"))
    assert records["lr/group0"][AT] > 0

    norms = records["train/grad_norm"]
    assert [step for step, norm in norms.items() if not math.isfinite(norm)] == [AT]


def test_too_many_skipped_steps_in_a_row_end_the_run(ranks: list[dict[str, Any]]) -> None:
    facts = ranks[0]["nan gradients, skipped"]
    assert facts["skipped"] == 10
    assert facts["message"].startswith(
        f"step {AT + 10}: 11 steps in a row are not finite, the last: the gradient"
    )


def test_one_flipped_bit_on_one_rank_stops_the_run_and_no_checkpoint_follows(
    ranks: list[dict[str, Any]],
) -> None:
    facts = ranks[0]["flipped bit"]
    assert facts["checkpoints"] == [5, 10]
    assert facts["message"].startswith(
        f"step {AT}: the replicas differ, first in {PARAMETER}: rank 0 on "
    )
