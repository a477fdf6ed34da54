"""Real processes through the real launcher, for the tests."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import safetensors.torch
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]
RECIPE = str(ROOT / "recipes" / "digits_resnet34_sgd_lrd.yaml")
SMALL = ["model.arch=resnet18", "model.width=4", "data.batch_size=64", "trainer.fingerprint_every=1"]
STEPS = ["trainer.epochs=2", "checkpoint.every_steps=5", "data.augment=crop"]  # 22 steps an epoch: 10 is in the middle
TIMEOUT = 120


def command(ranks: int, target: list[str], config: str = "cpu.yaml", restarts: int = 0) -> list[str]:
    """`target` (`-m module` or a script, and its arguments) on so many ranks; one CPU rank needs no launcher."""
    if ranks == 1 and config == "cpu.yaml":
        return [sys.executable, *target]
    config_file = str(ROOT / "launch" / "accelerate" / config)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config_file]
    return [*launcher, "--num_processes", str(ranks), "--max_restarts", str(restarts), *target]


def train_command(ranks: int, run_dir: Path, *overrides: str, config: str = "cpu.yaml", restarts: int = 0) -> list[str]:
    return command(ranks, ["-m", "lrd.train", RECIPE, f"run_dir={run_dir}", *SMALL, *overrides], config, restarts)


def environment() -> dict[str, str]:
    """One thread a rank, whatever the number of ranks; nothing of a launcher that runs the tests themselves."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "COLUMNS": "200"}


def launch(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIMEOUT, check=False
    )


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def signal_all(process: subprocess.Popen[str], number: int) -> None:
    """To the launcher and its ranks: each rank has a session of its own, so the process group is not enough."""
    for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        one.send_signal(number)


def rank_processes(launcher: subprocess.Popen[str], ranks: int) -> list[psutil.Process]:
    """The launcher's ranks, rank 0 first."""
    own = [one for one in psutil.Process(launcher.pid).children() if "RANK" in one.environ()]
    assert len(own) == ranks
    return sorted(own, key=lambda one: int(one.environ()["RANK"]))


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until `condition` holds, while the process lives."""
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def final_state(run_dir: Path) -> tuple[dict[str, torch.Tensor], dict[str, object], Path]:
    newest = sorted((run_dir / "checkpoints").glob("step-*"))[-1]
    weights = safetensors.torch.load_file(newest / "model.safetensors")
    return weights, torch.load(newest / "optimizer.pt", weights_only=True), newest


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """tag -> (step, value) as TensorBoard reads them."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
