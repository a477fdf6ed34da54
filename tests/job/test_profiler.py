"""`trainer.profile`: the trace has the right steps, and the run's results stay the same."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from lrd.errors import UserError
from lrd.job import profiler
from lrd.recipe import Recipe, parse
from tests.helpers.equality import assert_same_final_state
from tests.helpers.training import train

pytestmark = pytest.mark.usefixtures("one_thread")


def event_names(run_dir: Path) -> list[str]:
    """Read the names of all events in a run's trace."""
    with gzip.open(run_dir / "profile" / "rank0.json.gz", "rt", encoding="utf-8") as file:
        return [event.get("name", "") for event in json.load(file)["traceEvents"]]


def count_steps(names: list[str]) -> int:
    return sum(name.startswith("Optimizer.step#SGD") for name in names)


def test_the_trace_has_the_steps_asked_for_and_the_results_stay_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    max_steps = f"trainer.max_steps={profiler.WARM_UP_STEPS + 4}"
    train(tmp_path, tmp_path / "with", "trainer.profile=2", max_steps)
    train(tmp_path, tmp_path / "without", max_steps)

    names = event_names(tmp_path / "with")
    assert count_steps(names) == 2
    assert "aten::conv2d" in names
    assert "aten::convolution_backward" in names
    assert not (tmp_path / "without" / "profile").exists()
    assert capsys.readouterr().out.count("rank0.json.gz") == 1
    assert_same_final_state(tmp_path / "with", tmp_path / "without")


def test_a_run_that_ends_during_the_recorded_steps_writes_those_that_it_did(
    tmp_path: Path,
) -> None:
    max_steps = f"trainer.max_steps={profiler.WARM_UP_STEPS + 1}"
    train(tmp_path, tmp_path / "run", "trainer.profile=50", max_steps)
    assert count_steps(event_names(tmp_path / "run")) == 1


@pytest.mark.parametrize("steps", [1, profiler.WARM_UP_STEPS])
def test_a_run_too_short_for_a_trace_reports_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], steps: int
) -> None:
    train(tmp_path, tmp_path / "run", "trainer.profile=2", f"trainer.max_steps={steps}")
    message = (
        f"no trace: the run took {steps} step(s), "
        f"and the first {profiler.WARM_UP_STEPS} are not recorded"
    )
    assert message in capfd.readouterr().out
    assert not (tmp_path / "run" / "profile").exists()


def test_a_trace_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").write_text("in the way")
    max_steps = f"trainer.max_steps={profiler.WARM_UP_STEPS + 2}"
    train(tmp_path, tmp_path / "run", "trainer.profile=1", max_steps)
    assert "trainer.profile: " in capsys.readouterr().err


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "10:5"])
def test_other_values_get_one_line(value: object) -> None:
    with pytest.raises(UserError) as caught:
        parse({"trainer": {"profile": value}}, "recipe")
    message = str(caught.value)
    assert message.startswith(f"recipe: trainer.profile: is {value!r}, ")
    assert len(message.splitlines()) == 1


def test_it_does_not_affect_the_results() -> None:
    recipe = Recipe.model_validate({"trainer": {"profile": 3}})
    assert recipe.result_settings() == Recipe().result_settings()
