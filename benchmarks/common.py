"""What the benchmarks share: circumstances, median and spread, the file of results."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import lrd

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RECIPE = str(ROOT / "recipes" / "digits_resnet34_sgd_lrd.yaml")
ACCELERATE = [str(Path(sys.executable).with_name("accelerate")), "launch"]

# The beginning of a bare script on Accelerate, to compare with: lrd's network and nothing else.
BARE_TRAINING = """
import torch
from accelerate import Accelerator
from lrd.parts.resnet import ResNet

accelerator = Accelerator(cpu=True)
network = ResNet()
optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
network, optimizer = accelerator.prepare(network, optimizer)
images = torch.rand(64 // accelerator.num_processes, 3, 8, 8)
labels = torch.zeros(len(images), dtype=torch.long)
"""
RESNET34_PARAMETERS = 21_282_122  # with ten classes


def circumstances(device: str) -> dict[str, Any]:
    """Return commit, machine and versions, without which a figure is worth nothing.

    Args:
        device: `cpu` or `cuda`.
    """
    return {
        "commit": find_commit(),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accelerate": _find_version("accelerate"),
        "lrd": lrd.__version__,
    }


def find_commit() -> str:
    """Return the commit of this checkout; `-dirty` after it says that something else is measured.

    Results do not count: a benchmark that writes them would make the next one dirty. A copy without
    git may have a file COMMIT in its place.
    """
    git = ["git", "-C", str(ROOT)]
    head = [*git, "rev-parse", "--short=12", "HEAD"]
    changes = [*git, "status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results"]
    try:
        commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(changes, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        file = ROOT / "COMMIT"
        return file.read_text(encoding="utf-8").strip() if file.is_file() else "unknown"
    return f"{commit}-dirty" if changed else commit


def _find_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    names = re.findall(r"model name\s*: (.*)", text)
    return names[0] if names else platform.machine()


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def spread(values: dict[str, float], number_format: str = ".2f") -> str:
    """Format a summary for a cell of a table."""
    median = format(values["median"], number_format)
    smallest = format(values["min"], number_format)
    largest = format(values["max"], number_format)
    return f"{median} ({smallest} to {largest})"


def write(out: Path, facts: dict[str, Any]) -> None:
    """Write the file of results."""
    from lrd import console  # needs rich, and on_gpu.py has to start without it

    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    console.info(f"written: {out}")
