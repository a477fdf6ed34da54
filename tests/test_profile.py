"""`trainer.profile`: the trace is there, of the right steps, and the run is the same."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from launching import final_state
from test_resume import assert_equal
from test_train import one_thread_and_ordinary_algorithms, train  # noqa: F401

from lrd import profile
from lrd.errors import UserError
from lrd.recipe import Recipe, parse


def events(run_dir: Path) -> list[str]:
    with gzip.open(run_dir / "profile" / "rank0.json.gz", "rt", encoding="utf-8") as file:
        return [event.get("name", "") for event in json.load(file)["traceEvents"]]


def test_the_trace_holds_the_steps_asked_for_and_the_run_is_the_same(tmp_path: Path, capsys) -> None:
    for name, more in (("with", ["trainer.profile=2"]), ("without", [])):
        train(tmp_path, tmp_path / name, *more, f"trainer.max_steps={profile.WARM_UP + 4}")
    names = events(tmp_path / "with")
    assert sum(name.startswith("Optimizer.step#SGD") for name in names) == 2
    assert "aten::conv2d" in names
    assert "aten::convolution_backward" in names
    assert not (tmp_path / "without" / "profile").exists()
    said = capsys.readouterr().out
    assert said.count("rank0.json.gz") == 1
    (weights, optimizer, _), (expected_weights, expected_optimizer, _) = (
        final_state(tmp_path / name) for name in ("with", "without")
    )
    assert_equal(weights, expected_weights)
    assert_equal(optimizer, expected_optimizer)


def test_a_run_that_ends_among_them_writes_those_it_has(tmp_path: Path) -> None:
    train(tmp_path, tmp_path / "run", "trainer.profile=50", f"trainer.max_steps={profile.WARM_UP + 1}")
    assert sum(name.startswith("Optimizer.step#SGD") for name in events(tmp_path / "run")) == 1


@pytest.mark.parametrize("steps", [1, profile.WARM_UP])
def test_a_run_too_short_for_a_trace_says_so(tmp_path: Path, capfd, steps: int) -> None:
    train(tmp_path, tmp_path / "run", "trainer.profile=2", f"trainer.max_steps={steps}")
    assert f"no trace: {steps} step(s), and the first {profile.WARM_UP} are not recorded" in capfd.readouterr().out
    assert not (tmp_path / "run" / "profile").exists()


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, capsys) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").write_text("in the way")
    train(tmp_path, tmp_path / "run", "trainer.profile=1", f"trainer.max_steps={profile.WARM_UP + 2}")
    assert "trainer.profile: " in capsys.readouterr().err


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "10:5"])
def test_other_values_get_one_line(value) -> None:
    with pytest.raises(UserError) as caught:
        parse({"trainer": {"profile": value}}, "recipe")
    assert str(caught.value).startswith(f"recipe: trainer.profile: is {value!r}, ")
    assert len(str(caught.value).splitlines()) == 1


def test_it_is_no_part_of_the_mathematics() -> None:
    assert Recipe.model_validate({"trainer": {"profile": 3}}).mathematics() == Recipe().mathematics()
