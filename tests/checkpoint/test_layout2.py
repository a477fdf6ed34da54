"""A checkpoint that an earlier version of lrd wrote can still be resumed, to the same results.

`layout2/checkpoints` has step 20 of a run on one rank, written before the modules moved into
folders. `layout2/expected` has what that version wrote when it went on to step 44: the weights, the
scalars of TensorBoard, and the machine that computed them. Do not write these files anew: if this
test fails, the code has changed what the checkpoints of users mean.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lrd.checkpoint import store
from tests.helpers.launching import RECIPE, launch
from tests.helpers.tensorboard_events import read_scalars

LAYOUT2 = Path(__file__).parent / "layout2"
FIRST_STEP = 20
LAST_STEP = 44
OVERRIDES = [
    "model.arch=resnet18",
    "model.width=2",
    "data.batch_size=64",
    "data.augment=crop",
    "checkpoint.every_steps=5",
    "trainer.epochs=2",
    "tracking.probes=4",
    "schedule.name=MultiStepLR",
    "schedule.unit=step",
    "schedule.milestones=[25,35]",
    "schedule.warmup_steps=8",
]


def describe_machine() -> dict[str, str]:
    """Return what decides about the rounding of a float: the processor, and torch."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    processor = dict(line.replace("\t", "").split(": ", 1) for line in lines if ": " in line)
    keys = ("vendor_id", "cpu family", "model", "model name")
    return {
        **{key: processor.get(key, "") for key in keys},
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with the old checkpoint, after today's code went on to the last step."""
    run_dir = tmp_path_factory.mktemp("layout2") / "run"
    shutil.copytree(LAYOUT2 / "checkpoints", store.checkpoints_dir(run_dir))
    assert store.find_newest_valid(run_dir) == (store.checkpoint_path(run_dir, FIRST_STEP), [])

    command = [sys.executable, "-m", "lrd.train", RECIPE, *OVERRIDES, f"run_dir={run_dir}"]
    ended = launch(command)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"going on after step {FIRST_STEP}" in ended.stdout
    return run_dir


def read_expected(name: str) -> dict:
    return json.loads((LAYOUT2 / "expected" / name).read_text())


def test_the_manifest_of_an_old_checkpoint_verifies():
    assert store.list_steps(LAYOUT2) == [FIRST_STEP]
    assert store.find_damage(store.checkpoint_path(LAYOUT2, FIRST_STEP)) is None


def test_a_run_resumed_from_an_old_checkpoint_has_the_same_masks_lr_and_losses(resumed):
    expected = read_expected("scalars.json")
    scalars = read_scalars(resumed)
    assert len([tag for tag in expected["values"] if tag.startswith("probes/")]) == 4

    for tag, expected_values in expected["values"].items():
        assert [step for step, _ in scalars[tag]] == expected["steps"]
        values = [value for _, value in scalars[tag]]

        # Masks and lr do not depend on how a processor rounds; losses do.
        if tag == "train/loss":
            assert values == pytest.approx(expected_values, rel=1e-2)
        else:
            assert values == expected_values, tag


def test_a_run_resumed_from_an_old_checkpoint_ends_with_the_same_weights(resumed):
    newest, damaged = store.find_newest_valid(resumed)
    assert newest == store.checkpoint_path(resumed, LAST_STEP)
    assert damaged == []

    weights = store.read(newest).model
    expected = safetensors.torch.load_file(LAYOUT2 / "expected" / "model.safetensors")
    assert weights.keys() == expected.keys()

    is_same_machine = describe_machine() == read_expected("machine.json")
    for name, weight in weights.items():
        if is_same_machine:
            assert torch.equal(weight, expected[name]), name
        else:
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=2e-2, msg=name)
