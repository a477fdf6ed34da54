"""Trainings on images that stay on disk: their memory, their start, and how long they wait.

`streaming.py --memory` and `streaming.py --wait` call this. The trainings are started by
`accelerate launch` on two CPU ranks, with recipes/imagenet_resnet34_sgd_lrd.yaml and a few
overrides. A rank of `--wait` runs this file as a program:

    streaming_runs.py TRACE RECIPE [section.key=value ...]

trains as `python -m lrd.train` does, and writes how long it waited for each batch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
from common import ROOT, spread, summary

from lrd import console

sys.path.insert(0, str(ROOT))

from tests.helpers.launching import command, environment

RECIPE = str(ROOT / "recipes" / "imagenet_resnet34_sgd_lrd.yaml")
STORAGES = ("files", "packed")
RANKS = 2
EPOCHS = 5
BATCH_SIZE = 32  # over both ranks
STEPS_TO_MEASURE_MEMORY = 20
WARM_UP_STEPS = 3

_SECONDS_BETWEEN_SAMPLES = 0.5
_PSS = re.compile(r"^(Pss|Pss_Anon|Pss_File|Pss_Shmem): +(\d+) kB$", re.MULTILINE)

# A narrow network: what the images take is to be seen.
_NARROW = ["model.arch=resnet18", "model.width=4", "trainer.precision=fp32"]
_QUIET = [
    f"data.batch_size={BATCH_SIZE}",
    "checkpoint.every_steps=0",
    "checkpoint.keep_best=false",
    "trainer.fingerprint_every=0",
    "tracking.every_steps=1",
]

# What the start of a run does with its images, in a process of its own.
_LOAD = """
import sys, time
from lrd import recipe
from lrd.data.datasets import load_dataset
section = recipe.load(sys.argv[1], sys.argv[2:]).data
start = time.perf_counter()
load_dataset(section, seed=0).fingerprint()
print(time.perf_counter() - start)
"""


def size_before_crop(size: int) -> int:
    """Pixels of the shorter side of an image whose centre is an input of this size: 256 for 224."""
    return round(size / 0.875)


def data_overrides(root: Path, storage: str, size: int) -> list[str]:
    return [
        f"data.root={root}",
        f"data.storage={storage}",
        f"data.image_size={size}",
        f"data.resize={size_before_crop(size)}",
    ]


class MemorySampler(Thread):
    """Adds up the memory of all processes below a launcher, twice a second.

    PSS counts what processes share only once: each of n processes has an n-th of it.

    Args:
        launcher: its process id; its own memory does not count.

    Attributes:
        samples: the time, the number of processes, and their PSS in bytes: all of it (`Pss`), what
            is no file (`Pss_Anon`), mapped files (`Pss_File`), and shared memory (`Pss_Shmem`).
    """

    def __init__(self, launcher: int) -> None:
        super().__init__(daemon=True)
        self.samples: list[dict[str, float]] = []
        self._launcher = psutil.Process(launcher)
        self._ended = Event()

    def run(self) -> None:
        while not self._ended.wait(_SECONDS_BETWEEN_SAMPLES):
            try:
                processes = self._launcher.children(recursive=True)
            except psutil.NoSuchProcess:
                return
            sample: dict[str, float] = {"time": time.time(), "processes": 0}
            for process in processes:
                sizes = read_pss(process.pid)
                sample["processes"] += bool(sizes)
                for kind, num_bytes in sizes.items():
                    sample[kind] = sample.get(kind, 0) + num_bytes
            if "Pss" in sample:
                self.samples.append(sample)

    def end(self) -> None:
        self._ended.set()
        self.join()


def read_pss(process: int) -> dict[str, int]:
    """Bytes of a process, by kind; empty if it has ended."""
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return {}
    return {kind: 1024 * int(kilobytes) for kind, kilobytes in _PSS.findall(text)}


def run_training(overrides: list[str], run_dir: Path) -> dict[str, Any]:
    """Train, and sample the memory meanwhile.

    Returns:
        `seconds_to_first_step`, from the command to the end of the first optimizer step;
        `samples`, see `MemorySampler`; and `step_times`, when each step ended.
    """
    target = ["-m", "lrd.train", RECIPE, *_NARROW, *_QUIET, *overrides, f"run_dir={run_dir}"]
    began = time.time()
    with (run_dir.parent / "output").open("w+", encoding="utf-8") as output:
        launcher = subprocess.Popen(
            command(RANKS, target), cwd=ROOT, env=environment(), stdout=output, stderr=output
        )
        sampler = MemorySampler(launcher.pid)
        sampler.start()
        status = launcher.wait()
        sampler.end()
        output.seek(0)
        assert status == 0, output.read()

    step_times = read_step_times(run_dir)
    return {
        "seconds_to_first_step": step_times[0] - began,
        "samples": sampler.samples,
        "step_times": step_times,
    }


def read_step_times(run_dir: Path) -> list[float]:
    """When each step ended, from TensorBoard's file."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    return [
        float(event.wall_time)
        for path in sorted(run_dir.glob("events.out.tfevents.*"))
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
        if value.tag == "train/loss"
    ]


def measure_load(overrides: list[str]) -> float:
    """Measure the seconds in which a run finds, lists and fingerprints its images."""
    output = run_to_end([sys.executable, "-c", _LOAD, RECIPE, *overrides])
    return float(output.split()[-1])


def run_to_end(command: list[str]) -> str:
    """Run a command, which must succeed. Returns what it printed."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def measure_memory(folder: Path, counts: list[int], epoch_images: int, size: int) -> dict[str, Any]:
    """Measure memory and start-up for several numbers of images, and memory over five epochs.

    Args:
        folder: the images that `streaming.py --make` made, packed.
        counts: of training images.
        epoch_images: training images of the run of five epochs.
        size: of the network's inputs, in pixels.
    """
    from streaming_images import count_images, link_images

    from lrd.data.streaming.packing import pack_folder

    available = count_images(folder)
    rows = []
    epochs = []
    # Hard links need the file system of the images.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as name:
        for count in sorted({*counts, epoch_images}):
            assert count <= available, f"{folder} has {available:,} images"
            root = folder
            if count < available:
                root = Path(name) / f"{count}"
                link_images(folder, root, count)
                pack_folder(root, root, size=size_before_crop(size), skip_corrupt=False)
            for storage in STORAGES:
                overrides = data_overrides(root, storage, size)
                if count in counts:
                    rows.append(measure_count(root, overrides, count, storage, Path(name)))
                if count == epoch_images:
                    epochs.append(measure_epochs(overrides, count, storage, Path(name)))
    return {
        "what": "bytes of PSS of all ranks and workers of a host, and seconds",
        "ranks": RANKS,
        "size": size,
        "batch_size": BATCH_SIZE,
        "rows": rows,
        "epochs": epochs,
    }


def measure_count(
    root: Path, overrides: list[str], count: int, storage: str, folder: Path
) -> dict[str, Any]:
    """Measure the first start with some images, and the next one."""
    facts: dict[str, Any] = {"images": count, "storage": storage}
    steps = [*overrides, f"trainer.max_steps={STEPS_TO_MEASURE_MEMORY}"]
    samples: list[dict[str, float]] = []
    for start in ("first", "next"):
        run_dir = folder / f"run-{count}-{storage}-{start}" / "run"
        run_dir.parent.mkdir()
        if start == "first":
            shutil.rmtree(root / ".lrd-cache", ignore_errors=True)
        facts[f"seconds_to_load_{start}"] = measure_load(overrides)
        if start == "first":
            shutil.rmtree(root / ".lrd-cache", ignore_errors=True)
        run = run_training(steps, run_dir)
        facts[f"seconds_to_first_step_{start}"] = run["seconds_to_first_step"]
        samples += run["samples"]
    return {**facts, "peak": max(samples, key=lambda sample: sample["Pss"])}


def measure_epochs(overrides: list[str], count: int, storage: str, folder: Path) -> dict[str, Any]:
    """Measure the memory in each of five epochs."""
    run_dir = folder / f"epochs-{storage}" / "run"
    run_dir.parent.mkdir()
    run = run_training([*overrides, f"trainer.epochs={EPOCHS}"], run_dir)

    times = run["step_times"]
    steps_per_epoch = len(times) // EPOCHS
    ends = [times[epoch * steps_per_epoch - 1] for epoch in range(1, EPOCHS + 1)]
    epochs = []
    for begin, end in pairwise([times[0], *ends]):
        values = [sample["Pss"] for sample in run["samples"] if begin < sample["time"] <= end]
        epochs.append(summary(values) if values else None)
    return {"images": count, "storage": storage, "steps": len(times), "pss_of_epochs": epochs}


def show_memory(facts: dict[str, Any]) -> None:
    rows = []
    for row in facts["rows"]:
        peak = row["peak"]
        rows.append(
            [
                f"{row['images']:,}",
                row["storage"],
                f"{peak['processes']:.0f}",
                f"{peak['Pss'] / 1e6:,.0f}",
                f"{peak.get('Pss_Anon', 0) / 1e6:,.0f}",
                f"{row['seconds_to_load_first']:.2f} / {row['seconds_to_load_next']:.2f}",
                f"{row['seconds_to_first_step_first']:.1f} / "
                f"{row['seconds_to_first_step_next']:.1f}",
            ]
        )
    title = (
        f"{facts['device']}, {facts['cores']} cores, {facts['ranks']} ranks, "
        f"{facts['size']} x {facts['size']} pixels; seconds: first start / next start"
    )
    columns = ["images", "storage", "processes", "PSS, MB", "of it anonymous", "to load, s"]
    console.table(title, [*columns, "to the first step, s"], rows)

    for epochs in facts["epochs"]:
        medians = ", ".join(
            "-" if values is None else f"{values['median'] / 1e6:,.0f}"
            for values in epochs["pss_of_epochs"]
        )
        console.info(
            f"{epochs['images']:,} images, {epochs['storage']}: median PSS of each of {EPOCHS} "
            f"epochs: {medians} MB"
        )


# How long training waits.


def measure_wait(folder: Path, steps: int, size: int) -> dict[str, Any]:
    """Train ResNet-34 and measure the share of the time in which the ranks wait for images."""
    rows = []
    for storage in STORAGES:
        with tempfile.TemporaryDirectory() as name:
            trace = Path(name) / "trace"
            target = [
                str(Path(__file__)),
                str(trace),
                RECIPE,
                *_QUIET,
                *data_overrides(folder, storage, size),
                f"trainer.max_steps={steps}",
                f"run_dir={Path(name) / 'run'}",
            ]
            run_to_end(command(RANKS, target))
            for rank in range(RANKS):
                batches = json.loads(Path(f"{trace}-{rank}.json").read_text(encoding="utf-8"))
                rows.append({"storage": storage, "rank": rank, **describe_wait(batches)})
    return {
        "what": "ResNet-34, the time in which a rank waits for images",
        "ranks": RANKS,
        "size": size,
        "batch_size": BATCH_SIZE,
        "steps": steps,
        "rows": rows,
    }


def describe_wait(batches: list[dict[str, float]]) -> dict[str, Any]:
    """The share of waiting in all steps but the first few.

    Args:
        batches: `begin` and `waited` of each, in seconds.
    """
    counted = batches[WARM_UP_STEPS:]
    seconds = counted[-1]["begin"] - counted[0]["begin"]
    steps = [later["begin"] - earlier["begin"] for earlier, later in pairwise(counted)]
    waits = [batch["waited"] for batch in counted[:-1]]
    return {
        "share": sum(waits) / seconds,
        "step_seconds": summary(steps),
        "wait_seconds": {**summary(waits), "mean": statistics.mean(waits)},
        "images_per_s": BATCH_SIZE * len(steps) / seconds,
    }


def show_wait(facts: dict[str, Any]) -> None:
    rows = [
        [
            row["storage"],
            row["rank"],
            f"{row['share']:.2%}",
            spread(row["step_seconds"]),
            f"{1e3 * row['wait_seconds']['mean']:.1f}",
            f"{row['images_per_s']:.1f}",
        ]
        for row in facts["rows"]
    ]
    title = (
        f"ResNet-34, {facts['size']} x {facts['size']} pixels, batches of {facts['batch_size']}, "
        f"{facts['device']}, {facts['cores']} cores, {facts['ranks']} ranks"
    )
    columns = ["storage", "rank", "waits", "seconds a step", "of it waiting, ms", "images/s"]
    console.table(title, columns, rows)


def train_and_trace(trace: Path, recipe_path: str, overrides: list[str]) -> None:
    """What a rank of `--wait` runs."""
    from lrd import train
    from lrd.data.streaming.streamed import StreamedBatches
    from lrd.distributed.accelerator import check_launch_variables, exit_process
    from lrd.distributed.signals import end_with_launcher

    batches: list[dict[str, float]] = []
    micro_batch = StreamedBatches.micro_batch

    def traced_micro_batch(self: StreamedBatches, step: int, micro_step: int = 0) -> Any:
        begin = time.perf_counter()
        waited_before = self.wait_seconds
        batch = micro_batch(self, step, micro_step)
        batches.append({"begin": begin, "waited": self.wait_seconds - waited_before})
        return batch

    StreamedBatches.micro_batch = traced_micro_batch  # type: ignore[method-assign]
    check_launch_variables()
    end_with_launcher()
    status = train.run(recipe_path, overrides)
    rank = os.environ["RANK"]
    Path(f"{trace}-{rank}.json").write_text(json.dumps(batches), encoding="utf-8")
    exit_process(status)


if __name__ == "__main__":
    train_and_trace(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
