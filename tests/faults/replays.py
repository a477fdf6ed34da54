"""Faults in copies of a run, which `lrd diff` and `lrd verify` must find: their step and tensor.

    python -m tests.faults.replays [--faults 200] [--honest 50] [--seed 0] [--out FILE]

Runs and replays are single ranks in this process (15 steps, checkpoints after 5, 10 and 15). Each
fault is drawn at random: which step, which tensor or tag, which element.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import track

from lrd.checkpoint import store
from lrd.data.positions import BatchOrder
from lrd.replay.computing.state import name_values, parameter_names
from lrd.replay.diff import RunDiff, diff, locate
from lrd.replay.history import read_history
from lrd.replay.records import read_records
from lrd.replay.verify import verify
from tests.helpers.launching import ROOT
from tests.helpers.replaying import (
    FlipBit,
    replays_in_this_process,
    tamper_with_checkpoint,
    tamper_with_record,
    train,
)

NUM_STEPS = 15
STEPS_PER_EPOCH = 5
CHECKPOINTS = (5, 10, 15)
OWN_DATA = "tests.helpers.own_parts.changed_digits:load"


class Campaign:
    """Makes faults in copies of a run, and says of each whether it was found.

    Args:
        folder: for the runs.
        seed: draws the faults.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.patch = pytest.MonkeyPatch()
        self.number = 0

        self.run = self.train("whole")
        self.scheduled = self.train("scheduled", *self.schedule("1 + 0 * t"))
        self.with_own_data = self.train("own", *self.data(-1))
        self.tensors = self.name_tensors()

    def train(self, name: str, *overrides: str) -> Path:
        run_dir = self.folder / name / "run"
        train(run_dir, *overrides)
        return run_dir

    def new_name(self) -> str:
        self.number += 1
        return f"copy-{self.number}"

    def copy(self) -> Path:
        return Path(shutil.copytree(self.run, self.folder / self.new_name() / "run"))

    @staticmethod
    def schedule(factor: str) -> list[str]:
        return ["schedule.name=LambdaLR", f"schedule.lr_lambda={factor}", "schedule.unit=step"]

    @staticmethod
    def data(changed: int) -> list[str]:
        # With mean and deviation of the images the change would be in all steps.
        return [
            f"data.dataset={OWN_DATA}",
            f"data.changed={changed}",
            "data.mean=[0.3, 0.3, 0.3]",
            "data.std=[0.3, 0.3, 0.3]",
        ]

    def name_tensors(self) -> dict[str, int]:
        """All weights, buffers and momentum buffers of a step, with their numbers of elements."""
        from lrd import recipe as recipes
        from lrd.parts.models import build_model
        from lrd.parts.optimizers import build_optimizer

        recipe = recipes.load(self.folder / "whole" / "recipe.yaml")
        network = build_model(recipe.model, 10, 0)
        names = parameter_names(network, build_optimizer(network, recipe))
        values = name_values(store.read(store.checkpoint_path(self.run, 10)), names)
        return {
            name: value.numel()
            for name, value in values.items()
            if isinstance(value, torch.Tensor) and value.numel()
        }

    def draw_tensor(self, only_weights: bool) -> tuple[str, int]:
        names = [name for name in self.tensors if not (only_weights and "(" in name)]
        name = self.random.choice(names)
        return name, self.random.randrange(self.tensors[name])

    # The faults: each returns "" if it was found, or what was found in its place.

    def flipped_bit(self) -> str:
        step = self.random.randint(6, NUM_STEPS)
        name, element = self.draw_tensor(only_weights=False)
        copied = self.copy()
        flip = FlipBit(step, name, element)
        result = RunDiff(equal_until=5)
        with replays_in_this_process(self.patch, flip, of_run=copied):
            locate((read_history(self.run), read_history(copied)), NUM_STEPS, result)
        difference = result.difference
        if result.step != step or difference is None:
            return f"a bit of {name} after step {step}: found step {result.step}"
        is_exact = (difference.name, difference.num_elements) == (name, 1)
        return "" if is_exact else f"a bit of {name}: found {difference.describe()}"

    def other_lr(self) -> str:
        step = self.random.randint(1, NUM_STEPS)
        other = self.train(self.new_name(), *self.schedule(f"0.5 if t == {step - 1} else 1"))
        with replays_in_this_process(self.patch):
            result = diff(self.scheduled, other)
        found = (result.record and result.record.step, result.record and result.record.tag)
        is_found = found == (step, "lr/group0") and result.step == step
        return "" if is_found else f"the lr of step {step}: found {found}, {result.step}"

    def other_sample(self) -> str:
        changed = self.random.randrange(1440)
        order = BatchOrder(1440, 240, 0, 0, 1, 1)
        steps_per_epoch = order.steps_per_epoch
        step = 1 + next(i for i in range(steps_per_epoch) if changed in order.indices(i).tolist())
        other = self.train(self.new_name(), *self.data(changed))
        with replays_in_this_process(self.patch):
            result = diff(self.with_own_data, other)
        is_found = result.data is not None and result.step == step
        return "" if is_found else f"sample {changed} of step {step}: found {result.step}"

    def changed_checkpoint(self) -> str:
        step = self.random.choice(CHECKPOINTS)
        name, element = self.draw_tensor(only_weights=True)
        copied = self.copy()
        tamper_with_checkpoint(copied, step, name, element)
        with replays_in_this_process(self.patch):
            result = verify(copied)
        faults = [window for window in result.windows if window.fault]
        if not faults or (faults[0].step, faults[0].name) != (step, name):
            return f"{name} of checkpoint {step}: found {faults[:1]}"
        has_broken_chain = bool(result.faults)
        if has_broken_chain != (step != CHECKPOINTS[-1]):
            return f"checkpoint {step}: the chain says {result.faults}"
        return ""

    def changed_record(self) -> str:
        copied = self.copy()
        records = read_records(copied)
        step = self.random.randint(1, NUM_STEPS)
        tag = self.random.choice(sorted(records[step]))
        tamper_with_record(copied, step, tag)
        with replays_in_this_process(self.patch):
            verified = verify(copied)
            compared = diff(self.run, copied)
        faults = [window for window in verified.windows if window.fault]
        if [(window.step, window.name) for window in faults] != [(step, tag)]:
            return f"{tag} of step {step}: verify found {faults}"
        found = compared.record
        is_found = found is not None and (found.step, found.tag) == (step, tag)
        is_told = len(compared.not_reproduced) == 1 and str(copied) in compared.not_reproduced[0]
        return "" if is_found and is_told else f"{tag} of step {step}: diff found {compared}"

    def other_threads(self) -> str:
        """Whether the bits differ with two threads depends on the processor."""
        torch.set_num_threads(2)
        try:
            other = self.train(self.new_name(), f"seed={self.random.randrange(3)}")
            seed = f"seed={read_history(other).recipe_at(0)['seed']}"
        finally:
            torch.set_num_threads(1)
        one = self.train(self.new_name(), seed)
        first = first_step_that_differs(one, other)
        with replays_in_this_process(self.patch):
            result = diff(one, other)
        is_named = result.circumstances.get("threads") == (1, 2)
        is_found = result.step == first if first is not None else result.are_equal
        return "" if is_named and is_found else f"threads: {first}, found {result.step}"

    def honest(self) -> str:
        """A second run of the same recipe, or a copy: nothing may be found."""
        seed = f"seed={self.random.randrange(1000)}"
        one = self.train(self.new_name(), seed)
        other = self.train(self.new_name(), seed)
        with replays_in_this_process(self.patch):
            verified = verify(one)
            compared = diff(one, other)
        is_quiet = verified.is_valid and compared.are_equal
        return "" if is_quiet else f"{seed}: {verified.windows}, {compared}"


def first_step_that_differs(one: Path, other: Path) -> int | None:
    """By the records: losses and norms of a few hundred weights differ if any bit does."""
    first = read_records(one)
    second = read_records(other)
    return next((step for step in sorted(first) if first[step] != second[step]), None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--honest", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="lrd-faults-"))
    began = time.monotonic()
    with silence():
        campaign = Campaign(folder, arguments.seed)
    kinds: dict[str, tuple[float, Callable[[], str]]] = {
        "one bit of a tensor at a step of a replay": (0.35, campaign.flipped_bit),
        "another lr in one step": (0.15, campaign.other_lr),
        "one pixel of a sample": (0.15, campaign.other_sample),
        "one bit of a checkpoint, with a valid manifest": (0.15, campaign.changed_checkpoint),
        "one bit of a record": (0.175, campaign.changed_record),
        "two threads in place of one": (0.025, campaign.other_threads),
    }
    counts = {name: round(share * arguments.faults) for name, (share, _) in kinds.items()}
    counts["honest pairs"] = arguments.honest
    makers = {name: maker for name, (_, maker) in kinds.items()} | {"honest pairs": campaign.honest}

    rows = []
    console = Console()
    for name, count in counts.items():
        failures = []
        for _ in track(range(count), name, transient=True):
            with silence():
                failure = makers[name]()
            if failure:
                failures.append(failure)
        rows.append({"fault": name, "made": count, "as_expected": count - len(failures)})
        console.print(f"{name}: {count - len(failures)} of {count} as expected")
        for failure in failures:
            console.print(f"  {failure}")

    shutil.rmtree(folder)
    if arguments.out is not None:
        facts = {**circumstances(), "seconds": time.monotonic() - began, "rows": rows}
        arguments.out.write_text(json.dumps(facts, indent=1) + "\n")
    return int(any(row["made"] != row["as_expected"] for row in rows))


@contextlib.contextmanager
def silence() -> Any:
    """A context in which runs print nothing."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def circumstances() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "commit": commit.stdout.strip()[:12],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
    }


if __name__ == "__main__":
    raise SystemExit(main())
