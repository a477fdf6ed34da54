"""Numbers that are not finite and replicas that differ: found before the optimizer's step, or before a checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from disturbed import AT, FAULTS, PARAMETER
from launching import RECIPE, ROOT, SMALL, command, launch, scalars

from lrd import data, recipe

OVERRIDES = ["trainer.max_steps=27", "checkpoint.every_steps=5", "trainer.fingerprint_every=2"]  # 22 steps an epoch


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("disturbed")
    done = launch(command(2, [str(ROOT / "tests" / "disturbed.py"), str(folder), RECIPE, *SMALL, *OVERRIDES]))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def ranks(out: Path) -> list[dict[str, Any]]:
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", FAULTS)
def test_the_ranks_agree_on_what_happened(ranks: list[dict[str, Any]], name: str) -> None:
    of_each = {"finite"}  # a forward pass that went wrong leaves its rank's running statistics so
    first, second = ({key: rank[name][key] for key in rank[name].keys() - of_each} for rank in ranks)
    assert first == second


def test_without_a_fault_nothing_is_skipped(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["nothing"] == {
        "message": "", "step": 27, "skipped": 0, "checkpoints": [25, 27], "finite": True
    }  # fmt: skip


@pytest.mark.parametrize("name", ["nan loss", "nan gradient"])
def test_the_run_stops_before_the_step_and_names_step_rank_and_samples(ranks: list[dict[str, Any]], name: str) -> None:
    facts = ranks[0][name]
    (line,) = facts["message"].splitlines()
    assert line.startswith(f"step {AT}: the {'loss' if name == 'nan loss' else 'gradient'}")
    assert "rank 1 on " in line
    assert "rank 0" not in line
    assert (PARAMETER in line) == (name == "nan gradient")
    assert facts["step"] == AT - 1
    assert facts["checkpoints"] == [5, 10]
    section = recipe.load(RECIPE, SMALL)
    batches = data.Batches(data.load(section.data, 0).train, section.data, 0, rank=1, world_size=2)
    assert f"training samples {', '.join(map(str, batches.indices(AT - 1)[:8].tolist()))}, ... 32 in all" in line


@pytest.mark.parametrize("name", ["nan loss, skipped", "nan gradient, skipped"])
def test_a_step_is_skipped_on_all_ranks_together(out: Path, ranks: list[dict[str, Any]], name: str) -> None:
    facts = ranks[0][name]
    assert facts == {"message": "", "step": 27, "skipped": 1, "checkpoints": [25, 27], "finite": True}
    assert json.loads((out / name / "status.json").read_text())["skipped"] == 1
    seen = {tag: dict(points) for tag, points in scalars(out / name).items()}
    assert [seen["train/skipped"][step] for step in (AT - 1, AT, 27)] == [0, 1, 1]
    assert [step for step, value in seen["lr_effective/group0"].items() if value == 0] == [AT]
    assert all(seen[tag][AT] == 0 for tag in seen if tag.startswith("probes/"))
    assert seen["lr/group0"][AT] > 0
    assert [step for step, norm in seen["train/grad_norm"].items() if not math.isfinite(norm)] == [AT]


def test_steps_that_cannot_be_taken_one_after_the_other_end_the_run(ranks: list[dict[str, Any]]) -> None:
    facts = ranks[0]["nan gradients, skipped"]
    assert facts["message"].startswith(f"step {AT + 10}: 11 steps in a row are not finite, the last: the gradient")
    assert facts["skipped"] == 10


def test_one_flipped_bit_on_one_rank_stops_the_run_and_no_checkpoint_follows(ranks: list[dict[str, Any]]) -> None:
    facts = ranks[0]["flipped bit"]
    assert facts["message"].startswith(f"step {AT}: the replicas differ, first in {PARAMETER}: rank 0 on ")
    assert facts["checkpoints"] == [5, 10]
