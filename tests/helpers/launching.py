"""Starts real processes through the real launcher."""

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

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "recipes" / "digits_resnet34_sgd_lrd.yaml")
TIMEOUT = 120  # seconds

# Overrides of the recipe: a small model whose replicas are compared after every step.
SMALL = [
    "model.arch=resnet18",
    "model.width=4",
    "data.batch_size=64",
    "trainer.fingerprint_every=1",
]

# Overrides of the recipe: two epochs of 22 steps each, so step 10 is in the middle of an epoch.
STEPS = [
    "trainer.epochs=2",
    "checkpoint.every_steps=5",
    "data.augment=crop",
]


def command(
    ranks: int, target: list[str], config: str = "cpu.yaml", restarts: int = 0
) -> list[str]:
    """Build the command that starts a program on a number of ranks.

    Args:
        ranks: how many. A single CPU rank needs no launcher.
        target: `-m module` or a script, and its arguments.
        config: a file in launch/accelerate.
        restarts: how often the launcher may start the ranks again.
    """
    if ranks == 1 and config == "cpu.yaml":
        return [sys.executable, *target]

    config_file = str(ROOT / "launch" / "accelerate" / config)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config_file]
    return [*launcher, "--num_processes", str(ranks), "--max_restarts", str(restarts), *target]


def train_command(
    ranks: int, run_dir: Path, *overrides: str, config: str = "cpu.yaml", restarts: int = 0
) -> list[str]:
    """Build the command that trains the recipe with SMALL and further overrides."""
    target = ["-m", "lrd.train", RECIPE, f"run_dir={run_dir}", *SMALL, *overrides]
    return command(ranks, target, config, restarts)


def environment() -> dict[str, str]:
    """Return the variables that launched processes get: one thread for each rank."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "COLUMNS": "200"}


def launch(
    arguments: list[str], folder: Path = ROOT, timeout: float = TIMEOUT
) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder to its end, which must come within a time in seconds."""
    return subprocess.run(
        arguments,
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def start(arguments: list[str], folder: Path = ROOT) -> subprocess.Popen[str]:
    """Start a command in a folder; its errors come with its output."""
    return subprocess.Popen(
        arguments,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def signal_all(launcher: subprocess.Popen[str], signal_number: int) -> None:
    """Send a signal to a launcher and all its ranks."""
    # Each rank has a session of its own, so a signal to the process group would not reach it.
    process = psutil.Process(launcher.pid)
    for target in [*process.children(recursive=True), process]:
        target.send_signal(signal_number)


def rank_processes(launcher: subprocess.Popen[str], ranks: int) -> list[psutil.Process]:
    """Return the processes of a launcher's ranks, rank 0 first."""
    children = psutil.Process(launcher.pid).children()
    processes = [child for child in children if "RANK" in child.environ()]
    assert len(processes) == ranks
    return sorted(processes, key=lambda process: int(process.environ()["RANK"]))


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until `condition` holds; fail if the process ends before."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"the condition did not hold within {TIMEOUT} s"
        time.sleep(0.01)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def final_state(run_dir: Path) -> tuple[dict[str, torch.Tensor], dict[str, object], Path]:
    """Load the newest checkpoint of a run.

    Returns:
        The weights, the content of optimizer.pt, and the checkpoint's folder.
    """
    newest = sorted((run_dir / "checkpoints").glob("step-*"))[-1]
    weights = safetensors.torch.load_file(newest / "model.safetensors")
    optimizer = torch.load(newest / "optimizer.pt", weights_only=True)
    return weights, optimizer, newest
