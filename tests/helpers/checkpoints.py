"""Checkpoints for tests: states to save, damage to do, and comparisons."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

import lrd
from lrd.checkpoint import store
from lrd.checkpoint.store import TrainState


def make_state(step: int) -> TrainState:
    """Make the state of a run after a few updates: weights of several kinds, and LRDropout."""
    torch.manual_seed(step)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    lrd.LRDropout(optimizer, keep_prob=0.5, seed=(1 << 64) - 1)
    for _ in range(2):
        model(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()

    weights = {key: value.detach() for key, value in model.state_dict().items()}
    weights["transposed"] = torch.randn(3, 2).t()
    weights["half"] = torch.randn(3).bfloat16()
    weights["scalar"] = torch.tensor(1.5)

    schedule = {
        "steps": step,
        "scheduled": [0.1],
        "scheduler": {"last_epoch": step, "milestones": [1, 2]},
    }
    trainer = {
        "step": step,
        "epoch": 1,
        "samples": 64 * step,
        "best": {"step": 1, "accuracy": 0.1 + 0.2},
        "skipped": 2,
        "evaluated": step - 1,
    }
    return TrainState(
        model=weights,
        optimizer={"optimizer": optimizer.state_dict(), "schedule": schedule},
        trainer=trainer,
        ema={key: value + 1 for key, value in weights.items()},
        config={"num_labels": 4, "lrd": {"version": 1, "step": step}},
    )


def same(a: Any, b: Any) -> bool:
    """Whether two nests of dicts, lists, tensors and plain values are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def content(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file below a folder, by its relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def listed(run_dir: Path) -> list[str]:
    """Return the names of all that is in a run's folder of checkpoints."""
    return sorted(path.name for path in store.checkpoints_dir(run_dir).iterdir())


def flip_a_bit(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
