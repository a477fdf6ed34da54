"""Small runs in the process of the test, without a launcher."""

from __future__ import annotations

import gc
from pathlib import Path

from accelerate.state import AcceleratorState

from lrd.train import run

RECIPE = """
data: {dataset: digits, batch_size: 240}
model: {arch: resnet18, width: 4}
optimizer: {lr: 0.01}
lr_dropout: {keep_prob: 0.5}
trainer: {epochs: 2, device: cpu}
"""  # 5 steps an epoch


def train(folder: Path, run_dir: Path, *overrides: str) -> None:
    """Run RECIPE, written to `folder`, to its end."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    assert run(str(recipe), [f"run_dir={run_dir}", *overrides]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    gc.collect()
