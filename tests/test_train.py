"""Every optimizer, schedule and switch of a recipe: a run in two parts equals the run in one, bit for bit."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from launching import final_state, scalars
from test_resume import assert_equal

from lrd.optim import NAMES as OPTIMIZERS
from lrd.schedules import NAMES as SCHEDULES
from lrd.train import run

RECIPE = """
data: {dataset: digits, batch_size: 240}
model: {arch: resnet18, width: 4}
optimizer: {lr: 0.01}
lr_dropout: {keep_prob: 0.5}
trainer: {epochs: 2, device: cpu}
"""  # 5 steps an epoch
GROUPS = "optimizer.groups=[{name: head, match: fc.*, lr: 0.1, keep_prob: 0.8}, {match: '*bn?.*', weight_decay: 0}]"
PLATEAU = ["schedule.name=ReduceLROnPlateau", "schedule.patience=0", "schedule.threshold=1.0"]
CASES = {
    "SGD, no LRD": ["lr_dropout=null", "optimizer.momentum=0.9"],
    "SGD with Nesterov, groups": [GROUPS, "optimizer.momentum=0.9", "optimizer.nesterov=true"],
    "SGD, bf16": ["optimizer.momentum=0.9", "optimizer.weight_decay=5e-4", "trainer.precision=bf16"],
    "Adam, rows, rescaled": ["optimizer.name=Adam", "lr_dropout.granularity=row", "lr_dropout.rescale=true"],
    "AdamW, StepLR": [
        *("optimizer.name=AdamW", "schedule.name=StepLR", "schedule.step_size=2", "schedule.unit=step"),
        "schedule.warmup_steps=3",
    ],
    "Adamax, MultiStepLR": ["optimizer.name=Adamax", "schedule.name=MultiStepLR", "schedule.milestones=[1]"],
    "NAdam, ExponentialLR": ["optimizer.name=NAdam", "schedule.name=ExponentialLR", "schedule.gamma=0.9"],
    "RAdam, CosineAnnealingLR": [
        *("optimizer.name=RAdam", "schedule.name=CosineAnnealingLR", "schedule.unit=step", "schedule.warmup_steps=6"),
    ],
    "Adagrad, ReduceLROnPlateau": ["optimizer.name=Adagrad", *PLATEAU],
    "Adadelta, LambdaLR": [
        *("optimizer.name=Adadelta", "schedule.name=LambdaLR", "schedule.lr_lambda=1 - t / total"),
        "schedule.unit=step",
    ],
    "RMSprop, accumulation and clipping": [
        *("optimizer.name=RMSprop", "trainer.accumulation_steps=3", "trainer.clip_norm=0.1"),
    ],
    "Rprop, channels_last, crop and flip": [
        *("optimizer.name=Rprop", "trainer.channels_last=true", "data.augment=crop_flip"),
    ],
    "ASGD, deterministic": ["optimizer.name=ASGD", "trainer.deterministic=true"],
}


def test_every_optimizer_and_schedule_that_a_recipe_can_name_has_its_case() -> None:
    named = " ".join(CASES)
    assert [name for name in (*OPTIMIZERS, *SCHEDULES) if name not in named and name != "constant"] == []


@pytest.fixture(autouse=True)
def one_thread_and_ordinary_algorithms():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def train(path: Path, run_dir: Path, *overrides: str) -> None:
    recipe = path / "recipe.yaml"
    recipe.write_text(RECIPE)
    assert run(str(recipe), [f"run_dir={run_dir}", *overrides]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    gc.collect()


def in_two_parts(tmp_path: Path, overrides: list[str]) -> None:
    train(tmp_path, tmp_path / "whole", *overrides, "trainer.max_steps=8")
    for steps in (3, 8):
        train(tmp_path, tmp_path / "parts", *overrides, f"trainer.max_steps={steps}")
    (weights, optimizer, _), (expected_weights, expected_optimizer, _) = (
        final_state(tmp_path / name) for name in ("parts", "whole")
    )
    assert_equal(weights, expected_weights)
    assert_equal(optimizer, expected_optimizer)
    records, expected = (scalars(tmp_path / name) for name in ("parts", "whole"))
    assert records["train/loss"] == expected["train/loss"]
    assert [step for step, _ in records["train/loss"]] == list(range(1, 9))
    for tag in expected:
        if tag.startswith(("lr", "probes")):
            assert records[tag] == expected[tag], tag


@pytest.mark.parametrize("name", CASES)
def test_a_run_in_two_parts_equals_the_run_in_one(tmp_path: Path, name: str) -> None:
    in_two_parts(tmp_path, CASES[name])


@pytest.mark.slow
def test_a_compiled_run_in_two_parts_equals_the_run_in_one(tmp_path: Path) -> None:
    in_two_parts(tmp_path, ["trainer.compile=true"])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_on_cuda_a_deterministic_run_in_two_parts_equals_the_run_in_one(tmp_path: Path, name: str) -> None:
    in_two_parts(tmp_path, [*CASES[name], "trainer.device=cuda", "trainer.deterministic=true"])
