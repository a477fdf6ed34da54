"""`benchmarks/streaming.py` runs with tiny sizes, and makes the same images in any course."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "streaming.py"
NUM_IMAGES = 300
CLASSES = ("cat", "dog", "owl")


def run(*arguments: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *(str(argument) for argument in arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def read_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each image in a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*.jpg")
    }


@pytest.fixture(scope="module")
def small_images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in CLASSES:
            (folder / part / name).mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def images(small_images) -> Path:
    folder = small_images / "made"
    run("--make", folder, "--source", small_images, "--count", str(NUM_IMAGES))
    return folder


@pytest.mark.slow
def test_the_images_are_made_again_with_the_same_bytes(small_images, images):
    digests = read_digests(images)
    assert len(digests) == NUM_IMAGES + 100
    assert len(set(digests.values())) == len(digests)

    # An earlier course was stopped: images are missing, and one is half written.
    folder = small_images / "again"
    run("--make", folder, "--source", small_images, "--count", "20")
    kept = folder / "train" / "dog" / "0000001.jpg"
    made_at = kept.stat().st_mtime_ns
    (folder / "train" / "cat" / "0000000.jpg").unlink()
    (folder / "train" / "cat" / "0000000.tmp").write_bytes(b"half")
    run("--make", folder, "--source", small_images, "--count", str(NUM_IMAGES))
    assert read_digests(folder) == digests
    assert kept.stat().st_mtime_ns == made_at


@pytest.mark.slow
def test_the_speeds_are_measured(images, tmp_path):
    out = tmp_path / "speed.json"
    tiny = ["--size", "32", "--rounds", "2", "--batches", "1", "--workers", "1"]
    run("--data", images, *tiny, "--out", out)

    facts = json.loads(out.read_text())
    ways = [(row["way"], row["workers"]) for row in facts["rates"]]
    assert sorted(ways) == [
        (way, workers)
        for way in ("files", "files, uint8", "packed", "packed, uint8", "torchvision")
        for workers in (0, 1)
    ]
    for row in facts["rates"]:
        assert row["images_per_s"]["min"] > 0
        assert row["way"] != "torchvision" or row["ratio"]["median"] == 1
    assert all(
        milliseconds > 0 for way in facts["stages_ms"].values() for milliseconds in way.values()
    )
    assert facts["on_paper"]["gpu_images_per_s"] == "not measured"


@pytest.mark.slow
def test_memory_and_start_up_are_measured(images, tmp_path):
    out = tmp_path / "memory.json"
    tiny = ["--size", "32", "--counts", "100", "--epoch-images", "100"]
    run("--data", images, "--memory", *tiny, "--out", out)

    facts = json.loads(out.read_text())
    assert [(row["images"], row["storage"]) for row in facts["rows"]] == [
        (100, "files"),
        (100, "packed"),
    ]
    for row in facts["rows"]:
        assert row["peak"]["processes"] >= 4  # two ranks, each with a worker
        assert row["peak"]["Pss"] > 100e6
        assert row["seconds_to_first_step_next"] > row["seconds_to_load_next"] > 0
    assert [len(row["pss_of_epochs"]) for row in facts["epochs"]] == [5, 5]
    assert not list(images.parent.glob(".made-*"))


@pytest.mark.slow
def test_waiting_is_measured(images, tmp_path):
    out = tmp_path / "wait.json"
    run("--data", images, "--wait", "--size", "32", "--steps", "6", "--out", out)

    rows = json.loads(out.read_text())["rows"]
    assert [(row["storage"], row["rank"]) for row in rows] == [
        (storage, rank) for storage in ("files", "packed") for rank in (0, 1)
    ]
    for row in rows:
        assert 0 < row["share"] < 1
        assert row["step_seconds"]["min"] > 0
