"""With every optimizer, schedule and switch, a run in two parts equals the run in one part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lrd.parts.optimizers import NAMES as OPTIMIZERS
from lrd.recipe.schema import SCHEDULES
from lrd.train import measure_accuracy
from tests.helpers.equality import assert_same_final_state
from tests.helpers.tensorboard_events import read_scalars
from tests.helpers.training import train

pytestmark = pytest.mark.usefixtures("one_thread")

GROUPS = (
    "optimizer.groups=[{name: head, match: fc.*, lr: 0.1, keep_prob: 0.8}, "
    "{match: '*bn?.*', weight_decay: 0}]"
)

# Overrides of the recipe.
CASES = {
    "SGD, no LRD": ["lr_dropout=null", "optimizer.momentum=0.9"],
    "SGD with Nesterov, groups": [GROUPS, "optimizer.momentum=0.9", "optimizer.nesterov=true"],
    "SGD, bf16": [
        "optimizer.momentum=0.9",
        "optimizer.weight_decay=5e-4",
        "trainer.precision=bf16",
    ],
    "Adam, rows, rescaled": [
        "optimizer.name=Adam",
        "lr_dropout.granularity=row",
        "lr_dropout.rescale=true",
    ],
    "AdamW, StepLR": [
        "optimizer.name=AdamW",
        "schedule.name=StepLR",
        "schedule.step_size=2",
        "schedule.unit=step",
        "schedule.warmup_steps=3",
    ],
    "Adamax, MultiStepLR": [
        "optimizer.name=Adamax",
        "schedule.name=MultiStepLR",
        "schedule.milestones=[1]",
    ],
    "NAdam with Magma, groups, ExponentialLR": [
        GROUPS,
        "optimizer.name=NAdam",
        "lr_dropout.kind=magma",
        "schedule.name=ExponentialLR",
        "schedule.gamma=0.9",
    ],
    "RAdam, CosineAnnealingLR": [
        "optimizer.name=RAdam",
        "schedule.name=CosineAnnealingLR",
        "schedule.unit=step",
        "schedule.warmup_steps=6",
    ],
    "Adagrad, ReduceLROnPlateau": [
        "optimizer.name=Adagrad",
        "schedule.name=ReduceLROnPlateau",
        "schedule.patience=0",
        "schedule.threshold=1.0",
    ],
    "Adadelta, LambdaLR": [
        "optimizer.name=Adadelta",
        "schedule.name=LambdaLR",
        "schedule.lr_lambda=1 - t / total",
        "schedule.unit=step",
    ],
    "RMSprop, accumulation and clipping": [
        "optimizer.name=RMSprop",
        "trainer.accumulation_steps=3",
        "trainer.clip_norm=0.1",
    ],
    "Rprop, channels_last, crop and flip": [
        "optimizer.name=Rprop",
        "trainer.channels_last=true",
        "data.augment=crop_flip",
        # Not 4: on a CPU without AVX-512, torch 2.13 corrupts its memory in the backward pass of a
        # 1x1 convolution with stride 2 from 4 to 8 channels in channels_last.
        "model.width=8",
    ],
    "ASGD, deterministic": ["optimizer.name=ASGD", "trainer.deterministic=true"],
    "SGD, OneCycleLR, average, held-out images, mixed images, smoothed labels": [
        "optimizer.momentum=0.9",
        "schedule.name=OneCycleLR",
        "schedule.max_lr=0.1",
        "schedule.unit=step",
        "trainer.ema_decay=0.75",
        "trainer.label_smoothing=0.1",
        "data.validation=0.1",
        "data.mixup=0.4",
        "data.cutmix=1.0",
    ],
    "SGD, SequentialLR of LinearLR and PolynomialLR, no decay of norms and biases": [
        "optimizer.weight_decay=0.1",
        "optimizer.decay_norms_and_biases=false",
        "schedule.name=SequentialLR",
        "schedule.schedules=[{name: LinearLR}, {name: PolynomialLR, power: 2}]",
        "schedule.milestones=[4]",
        "schedule.unit=step",
    ],
    "Adam, CosineAnnealingWarmRestarts, network with dropout": [
        "optimizer.name=Adam",
        "schedule.name=CosineAnnealingWarmRestarts",
        "schedule.T_0=3",
        "schedule.unit=step",
        "model={arch: 'tests.helpers.own_parts.nets:SmallNet', dropout: 0.5}",
    ],
    "SGD, ConstantLR, own loss": [
        "schedule.name=ConstantLR",
        "schedule.unit=step",
        "trainer.loss=tests.helpers.own_parts.loss:focal_loss",
    ],
}


def test_every_optimizer_and_schedule_that_a_recipe_can_name_has_a_case() -> None:
    all_cases = " ".join(CASES)
    names = {*OPTIMIZERS, *SCHEDULES} - {"constant"}
    assert [name for name in sorted(names) if name not in all_cases] == []


def assert_two_parts_equal_one(tmp_path: Path, overrides: list[str]) -> None:
    """Run 8 steps in one start and in two, and compare."""
    train(tmp_path, tmp_path / "whole", *overrides, "trainer.max_steps=8")
    train(tmp_path, tmp_path / "parts", *overrides, "trainer.max_steps=3")
    train(tmp_path, tmp_path / "parts", *overrides, "trainer.max_steps=8")
    assert_same_final_state(tmp_path / "parts", tmp_path / "whole")

    records = read_scalars(tmp_path / "parts")
    expected_records = read_scalars(tmp_path / "whole")
    assert [step for step, _ in records["train/loss"]] == list(range(1, 9))
    for tag in expected_records:
        if tag == "train/loss" or tag.startswith(("lr", "probes")):
            assert records[tag] == expected_records[tag], tag
    # The last step is evaluated in both; the first start's last step is not an epoch's end.
    for tag in expected_records:
        if tag.startswith(("test/", "validation/")):
            assert records[tag][-1] == expected_records[tag][-1], tag


# The others differ by torch's arithmetic alone.
QUICK_CASES = [
    "SGD with Nesterov, groups",
    "NAdam with Magma, groups, ExponentialLR",
    "Adagrad, ReduceLROnPlateau",
    "RMSprop, accumulation and clipping",
    "SGD, OneCycleLR, average, held-out images, mixed images, smoothed labels",
    "Adam, CosineAnnealingWarmRestarts, network with dropout",
]


@pytest.mark.parametrize(
    "name",
    [
        *QUICK_CASES,
        *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name not in QUICK_CASES),
    ],
)
def test_a_run_in_two_parts_equals_the_run_in_one(tmp_path: Path, name: str) -> None:
    assert_two_parts_equal_one(tmp_path, CASES[name])


@pytest.mark.slow
def test_a_compiled_run_in_two_parts_equals_the_run_in_one(tmp_path: Path) -> None:
    assert_two_parts_equal_one(tmp_path, ["trainer.compile=true"])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_on_cuda_a_deterministic_run_in_two_parts_equals_the_run_in_one(
    tmp_path: Path, name: str
) -> None:
    assert_two_parts_equal_one(
        tmp_path, [*CASES[name], "trainer.device=cuda", "trainer.deterministic=true"]
    )


def test_the_accuracy_on_mixed_images_counts_the_likeliest_class() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 2.0], [1.0, 0.0, 0.0]])
    assert measure_accuracy(logits, torch.tensor([0, 2, 2, 1])) == 0.5

    mixed = torch.tensor([[0.6, 0.4, 0.0], [0.3, 0.0, 0.7], [0.0, 0.4, 0.6], [0.1, 0.9, 0.0]])
    assert measure_accuracy(logits, mixed) == 0.5
