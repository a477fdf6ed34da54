"""The campaign of bad inputs: a part of it here, all of it in the slow test."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from lrd.recipe.schema import Recipe, section_types
from tests.inputs.__main__ import all_inputs
from tests.inputs.cases import Input, accepted, refused, training
from tests.inputs.lab import Lab, Outcome, judge
from tests.inputs.saved_runs import remove_finished_run

# Beside the values of a recipe: one input for each kind of fault that once ended in a trace-back,
# hung, or passed in silence.
_NAMED = {
    "recipe files: a billion laughs under a known key",
    "recipe files: a list that contains itself",
    "recipe files: is a FIFO",
    "overrides: seed=[/x] (9 characters)",
    "optimizers: SGD: optimizer.dampening=abc",
    "optimizers: SGD: optimizer.foreach=abc",
    "optimizers: SGD: optimizer.differentiable=true",
    "folders of images: data.image_size=100000000",
    "folders of images: a FIFO named .png",
    "folders of images: one class",
    "folders of images: a class folder that is not UTF-8",
    "folders of images: val/ in place of test/",
    "folders of images: float TIFF with nan",
    'run directories: "a\\0b"',
    "run directories: ~nobody-here",
    "run directories: status.json is a folder",
    "values together: data.batch_size=1 data.image_size=2",
    "values of a recipe: model.width=100000000",
    "values of a recipe: optimizer.lr=1e300",
    "ranks: WORLD_SIZE=abc",
    "ranks: WORLD_SIZE=4",
    "ranks: WORLD_SIZE=-1",
    "ranks: RANK=abc",
    "ranks: LOCAL_RANK=abc",
    "ranks: RANK=5 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29555",
    "variables: LRD_FUSED=abc",
    "variables: ACCELERATE_MIXED_PRECISION=fp16",
    "commands: lrd check recipe.yaml model.width=100000000",
    "commands: lrd runs nothing",
}
_EVERY = 40  # of the values of a recipe


def _describe(outcomes: list[Outcome]) -> str:
    return "\n".join(
        f"{outcome.input.full_name}: {outcome.problem}" for outcome in outcomes if outcome.problem
    )


def test_there_are_at_least_300_inputs_with_names_of_their_own():
    names = Counter(input.full_name for input in all_inputs())
    assert len(names) >= 300
    assert [name for name, count in names.items() if count > 1] == []
    assert set(names) >= _NAMED


def test_each_key_of_a_recipe_is_given_bad_values():
    words = {word for input in all_inputs() for word in input.command}
    changed = {word.partition("=")[0] for word in words if "=" in word}

    keys = set()
    for name, field in Recipe.model_fields.items():
        sections = section_types(field)
        keys |= {f"{name}.{key}" for section in sections for key in section.model_fields}
        keys |= set() if sections else {name}
    assert keys - changed == set()


def test_a_part_of_the_campaign(tmp_path):
    inputs = all_inputs()
    values = [input for input in inputs if input.group == "values of a recipe"]
    refused_values = [input for input in values if input.expected.statuses == (2,)]
    named = [input for input in inputs if input.full_name in _NAMED]

    outcomes = list(Lab(tmp_path, jobs=2).run([*refused_values[::_EVERY], *named]))

    assert _describe(outcomes) == ""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_campaign(tmp_path):
    try:
        outcomes = list(Lab(tmp_path, jobs=2).run(all_inputs()))
    finally:
        remove_finished_run()

    assert _describe(outcomes) == ""


@pytest.mark.parametrize(
    ("status", "output", "errors", "problem"),
    [
        (2, "", "lrd: seed: is 'abc', should be a valid integer\n", ""),
        (0, "", "", "status 0 in place of 2"),
        (1, "", "lrd: seed\n", "status 1 in place of 2"),
        (None, "", "", "was still running"),
        (2, "", "", "no error"),
        (2, "", "lrd: something is wrong\n", "does not name 'seed'"),
        (2, "", "Warning: seed\n", "another form"),
        (2, "", 20 * "lrd: seed\n", "has 20 lines"),
        (2, "", f"lrd: seed {3000 * 'x'}\n", "characters"),
        (2, "", "Traceback (most recent call last):\nseed\n", "trace-back"),
        (2, "", "terminate called without an active exception\n", "trace-back"),
    ],
)
def test_the_judge_of_an_input_that_must_be_refused(status, output, errors, problem):
    bad = Input("group", "seed=abc", refused("seed"), training("seed=abc"))
    found = judge(Outcome(bad, status, 1.0, output, errors), limit=10.0)
    assert problem in found
    assert bool(found) == bool(problem)


def test_the_judge_wants_a_reason_for_silence():
    silent = Input("group", "seed=1", accepted(""), training("seed=1"))
    assert judge(Outcome(silent, 0, 1.0, "", ""), limit=10.0) == "passes in silence"


def test_the_lab_finds_what_a_refusal_leaves_behind(tmp_path):
    def make_run(folder: Path) -> None:
        (folder / "run").mkdir()

    command = ("sh", "-c", "mkdir -p run && touch run/half && echo 'lrd: seed' >&2 && exit 2")
    lab = Lab(tmp_path, jobs=1)

    anew = lab.run_one(Input("group", "new", refused("seed"), command))
    again = lab.run_one(Input("group", "old", refused("seed"), command, prepare=make_run))

    assert anew.problem == "refuses, and leaves half in a new run directory"
    assert again.problem == "refuses, and changes half in the run directory"
