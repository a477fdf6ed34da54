"""What the benchmarks share: circumstances, median and spread, the file of results."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
from pathlib import Path
from typing import Any

import accelerate
import torch

import lrd
from lrd import console

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RECIPE = str(ROOT / "recipes" / "digits_resnet34_sgd_lrd.yaml")


def circumstances(device: str) -> dict[str, Any]:
    """Commit, machine and versions: what a figure is worth nothing without."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return {
        "commit": commit or "unknown",
        "device": torch.cuda.get_device_name() if device == "cuda" else models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "lrd": lrd.__version__,
    }


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def spread(values: dict[str, float], digits: int = 2) -> str:
    """A summary for a table's cell."""
    return "{median:.{d}f} ({min:.{d}f} to {max:.{d}f})".format(**values, d=digits)


def write(out: Path, facts: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    console.say(f"written: {out}")
