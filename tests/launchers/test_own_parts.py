"""Two ranks train the parts of a user, which are in a folder outside of the package."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from lrd.checkpoint import store
from tests.helpers import own_parts
from tests.helpers.equality import TIMES, assert_same_final_state
from tests.helpers.launching import (
    command,
    final_state,
    launch,
    signal_all,
    start,
    wait_for,
)
from tests.helpers.tensorboard_events import read_scalars

NUM_STEPS = 80
RECIPE = """
data: {dataset: "my_parts.data:load", batch_size: 24, num_train: 1080, validation: 0.1}
model: {arch: "my_parts.nets:SmallNet", dropout: 0.2}
optimizer: {name: "my_parts.optim:Lion", lr: 3e-3, betas: [0.9, 0.95], weight_decay: 0.1}
lr_dropout: {keep_prob: 0.5}
schedule: {name: "my_parts.schedule:WarmupHoldDecay", unit: step, warmup: 0.1}
trainer: {loss: "my_parts.loss:focal_loss", epochs: 2, ema_decay: 0.9, fingerprint_every: 1}
checkpoint: {every_steps: 5}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's folder: the package `my_parts` and a recipe that names what is in it."""
    folder = tmp_path / "project"
    source = Path(own_parts.__file__).parent
    shutil.copytree(source, folder / "my_parts", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def train_command(run_dir: Path) -> list[str]:
    return command(2, ["-m", "lrd.train", "recipe.yaml", f"run_dir={run_dir}"])


# Slow, because each part is resumed in tests/parts, and other runs are killed.
@pytest.mark.slow
def test_a_killed_run_with_parts_of_the_user_ends_like_one_that_was_not(
    project: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    done = launch(train_command(whole), project)
    assert done.returncode == 0, done.stdout + done.stderr

    killed = tmp_path / "killed"
    process = start(train_command(killed), project)
    wait_for(lambda: 20 in store.list_steps(killed), process)
    signal_all(process, signal.SIGKILL)
    process.communicate(timeout=60)
    step = max(store.list_steps(killed))
    assert 20 <= step < NUM_STEPS

    done = launch(train_command(killed), project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"going on after step {step}" in done.stdout
    assert_same_final_state(killed, whole)

    newest = final_state(whole)[2]
    assert newest.name == store.checkpoint_name(NUM_STEPS)
    assert (newest / "ema.safetensors").exists()

    records = read_scalars(killed)
    expected = read_scalars(whole)
    assert records.keys() == expected.keys()
    assert {"validation/accuracy", "test/ema_accuracy", "train/accuracy"} <= records.keys()
    for tag in records:
        if not tag.startswith(TIMES):
            assert records[tag] == expected[tag], tag
    # It has learned something, so that equal records are not those of a run that does nothing.
    assert expected["validation/ema_accuracy"][-1][1] > 0.5


def test_ranks_with_another_source_of_a_part_refuse_to_start(project: Path, tmp_path: Path) -> None:
    """As on a host where the user forgot to copy a change."""
    other = tmp_path / "other"
    shutil.copytree(project / "my_parts", other / "my_parts")
    with (other / "my_parts" / "optim.py").open("a") as file:
        file.write("\n# another host's file\n")

    script = tmp_path / "start.py"
    script.write_text(
        "import os, sys\n"
        f"folder = {str(other)!r} if os.environ['RANK'] == '1' else {str(project)!r}\n"
        "sys.path.insert(0, folder)\n"
        "from lrd.train import main\n"
        "main(sys.argv[1:])\n"
    )
    run_dir = tmp_path / "run"
    recipe = str(project / "recipe.yaml")
    done = launch(command(2, [str(script), recipe, f"run_dir={run_dir}"]), tmp_path)

    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "optimizer.name" in line]
    assert len(lines) == 1, done.stderr
    assert "my_parts.optim:Lion" in lines[0]
    assert "rank 1" in lines[0]
    assert not run_dir.exists()


@pytest.mark.slow
def test_a_network_that_differs_by_rank_is_refused_before_ddp_meets_it(
    project: Path, tmp_path: Path
) -> None:
    with (project / "my_parts" / "nets.py").open("a") as file:
        file.write(
            "\n\ndef by_rank(num_classes):\n"
            "    import os\n"
            "    return SmallNet(num_classes, channels=4 + int(os.environ['RANK']))\n"
        )
    recipe = ["-m", "lrd.train", "recipe.yaml", "model={arch: 'my_parts.nets:by_rank'}"]
    done = launch(command(2, [*recipe, f"run_dir={tmp_path / 'run'}"]), project)

    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("lrd: ")]
    assert len(lines) == 1, done.stderr
    assert "model.arch" in lines[0]
    assert "rank 1" in lines[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_command_lrd_finds_parts_in_the_folder_where_it_is_started(project: Path) -> None:
    script = Path(sys.executable).with_name("lrd")
    assert os.access(script, os.X_OK)
    done = launch([str(script), "check", "recipe.yaml"], project)
    assert done.returncode == 0, done.stdout + done.stderr

    (project / "my_parts" / "optim.py").unlink()
    done = launch([str(script), "train", "recipe.yaml", "run_dir=other"], project)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "optimizer.name: my_parts.optim:Lion: there is no module" in done.stderr
