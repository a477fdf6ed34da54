"""Run directories as runs leave them, without any training."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from lrd import recipe as recipes
from lrd.study.grid import GridRun, Study, load_study

BASE = """
data: {dataset: digits, batch_size: 120}
model: {arch: resnet18, width: 4}
optimizer: {lr: 0.05, momentum: 0.9}
trainer: {epochs: 3, device: cpu}
"""
STUDY = """
title: Does it help?
base: base.yaml
seeds: 2
baseline: SGD
accuracy_goal: 0.8
arms:
  SGD:
  LRD 0.5:
    set: {lr_dropout.keep_prob: 0.5}
"""
STEPS_PER_EPOCH = 11  # 1437 images in batches of 120


def write_study(folder: Path, study: str = STUDY, base: str = BASE) -> Path:
    """Write a recipe and a study of it. Returns the path of the study."""
    (folder / "base.yaml").write_text(base)
    path = folder / "small.yaml"
    path.write_text(study)
    return path


def load(folder: Path, study: str = STUDY) -> Study:
    return load_study(write_study(folder, study), folder / "runs", [])


def record(
    run: GridRun,
    test_accuracies: list[float],
    state: str = "finished",
    recipe: recipes.Recipe | None = None,
    **status: object,
) -> None:
    """Write what a run leaves: its recipe, status and metrics.

    Args:
        run: the run.
        test_accuracies: after each epoch; the accuracy of its batches is 0.1 lower in the last
            step and 0.3 lower in the others.
        state: as status.json has it.
        recipe: what the run was started with; None: what the study says.
        status: further values of status.json.
    """
    run.run_dir.mkdir(parents=True)
    (run.run_dir / "recipe.yaml").write_text((recipe or run.recipe).dump())
    steps = STEPS_PER_EPOCH * len(test_accuracies)
    values = {"state": state, "step": steps, "started": 100.0, "updated": 160.0, **status}
    (run.run_dir / "status.json").write_text(json.dumps(values))

    columns = ["step", "epoch", "train/loss", "train/accuracy", "test/loss", "test/accuracy"]
    with (run.run_dir / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for step in range(1, steps + 1):
            epoch = 1 + (step - 1) // STEPS_PER_EPOCH
            accuracy = test_accuracies[epoch - 1]
            if step % STEPS_PER_EPOCH == 0:
                writer.writerow([step, epoch, 0.5, accuracy - 0.1, 1 - accuracy, accuracy])
            else:
                writer.writerow([step, epoch, 1.5, accuracy - 0.3, "", ""])
