"""Training from files that worker processes read: resume, kills, signals, and files that go bad."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from accelerate.state import AcceleratorState
from PIL import Image
from typer.testing import CliRunner, Result

from lrd import recipe as recipes
from lrd.checkpoint import store
from lrd.checkpoint.run_dir import read_status
from lrd.cli.app import app
from lrd.data.datasets import load_dataset
from lrd.data.positions import BatchOrder
from lrd.errors import EXIT_STOPPED
from lrd.job.setup import build_batches
from tests.helpers.equality import assert_same_final_state, metrics_without_speed
from tests.helpers.launching import (
    TIMEOUT,
    command,
    launch,
    rank_processes,
    signal_all,
    start,
    wait_for,
)
from tests.helpers.metrics_csv import read_metrics

HOST = socket.gethostname()
NUM_CLASSES = 4
NUM_TRAIN = 96
NUM_TEST = 32
BATCH_SIZE = 8
STEPS_PER_EPOCH = NUM_TRAIN // BATCH_SIZE
EPOCHS = 3
NUM_STEPS = EPOCHS * STEPS_PER_EPOCH
EVERY_STEPS = 5  # checkpoints, so that nearly all of them are in the middle of an epoch
SEED = 3

RECIPE = f"""
seed: {SEED}
data: {{dataset: imagefolder, storage: files, workers: 1, image_size: 16, augment: resized_crop,
       batch_size: {BATCH_SIZE}}}
model: {{arch: resnet18, width: 4}}
optimizer: {{name: SGD, lr: 0.02, momentum: 0.9}}
lr_dropout: {{keep_prob: 0.5}}
schedule: {{name: CosineAnnealingLR, unit: step}}
trainer: {{epochs: {EPOCHS}, device: cpu, precision: fp32, fingerprint_every: 1}}
checkpoint: {{every_steps: {EVERY_STEPS}, keep_best: false}}
"""

OWN_DATA = f"""
import os
import time
from pathlib import Path

import numpy as np
from torch.utils.data import get_worker_info

num_reads = 0  # of training samples by this worker


class Noise:
    classes = ("dark", "bright")

    def __init__(self, split, fault="", faulty_from=10**9, slow_test=False):
        self.split = split
        self.fault = fault
        self.faulty_from = faulty_from
        self.slow_test = slow_test

    def __len__(self):
        return {NUM_TRAIN} if self.split == "train" else {NUM_TEST}

    def __getitem__(self, index):
        fault = ""
        if get_worker_info() is not None:
            fault = self.next_fault()
        if fault == "raise":
            raise ValueError("no such sample")
        if fault == "exit":
            os._exit(7)

        image = np.random.default_rng(index).integers(0, 128, (16, 16, 3))
        image = image + np.random.randint(0, 8) + 64 * (index % 2)
        return image.astype(np.uint8)[: 8 if fault == "shape" else 16], index % 2

    def next_fault(self):
        global num_reads
        if self.split == "train":
            num_reads += 1
            return self.fault if num_reads >= self.faulty_from else ""
        if self.slow_test:
            Path("evaluating").touch()
            time.sleep(0.1)
        return ""
"""


# Runs


def make_images(root: Path) -> None:
    """Write small JPEG and PNG files of `NUM_CLASSES` classes, which differ by their colour."""
    rng = np.random.default_rng(0)
    for part, count in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        for index in range(count):
            label = index % NUM_CLASSES
            height, width = rng.integers(24, 41, size=2)
            image = rng.normal(70, 30, (height, width, 3))
            image[..., label % 3] += 40 * label
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            suffix = "png" if index % 5 == 0 else "jpg"
            pixels = image.clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{index:03}.{suffix}")


@pytest.fixture(autouse=True)
def no_process_outlives_its_test(tmp_path: Path) -> Iterator[None]:
    """Ends what a test that failed has left behind."""
    yield
    for process in living(children_with(tmp_path)):
        process.kill()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images. No test may change it."""
    root = tmp_path_factory.mktemp("data") / "images"
    make_images(root)
    (root.parent / "recipe.yaml").write_text(RECIPE)
    return root


@pytest.fixture
def changing_images(images: Path, tmp_path: Path) -> Path:
    """A copy of the folder of images, for a test that damages it."""
    root = tmp_path / "data" / "images"
    shutil.copytree(images, root)
    shutil.copy(images.parent / "recipe.yaml", root.parent)
    return root


def train_command(images: Path, run_dir: Path, *overrides: str, ranks: int = 2) -> list[str]:
    """The command that trains on a folder of images; the recipe is beside it."""
    recipe = str(images.parent / "recipe.yaml")
    target = ["-m", "lrd.train", recipe, f"data.root={images}", f"run_dir={run_dir}", *overrides]
    return command(ranks, target)


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a run on two ranks that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    done = launch(train_command(images, run_dir))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "waited for data" in done.stdout
    assert living(children_with(run_dir)) == []
    return run_dir


def assert_same_end(run_dir: Path, expected: Path) -> None:
    """Weights, the optimizer's state, and all records but the speed."""
    assert_same_final_state(run_dir, expected)
    assert metrics_without_speed(run_dir) == metrics_without_speed(expected)


def newest_step(run_dir: Path) -> int:
    return max(store.list_steps(run_dir), default=0)


def lrd_lines(output: str) -> list[str]:
    """What lrd itself reports, among the lines of the launcher."""
    return [line for line in output.splitlines() if line.startswith("lrd: ")]


def assert_no_traceback_of_lrd(output: str) -> None:
    assert "lrd/train.py" not in output
    assert "lrd/data" not in output


# Processes


def living(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended. A zombie has; its parent has only not looked yet."""
    alive = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
        except psutil.NoSuchProcess:
            continue
    return alive


def children_with(run_dir: Path) -> list[psutil.Process]:
    """All processes whose command line names a folder of runs: ranks, and what they forked."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(f"run_dir={run_dir}" in part for part in process.info["cmdline"] or []):
            found.append(process)
    return found


def assert_gone(processes: list[psutil.Process], seconds: float) -> None:
    """All of the processes end within a time."""
    deadline = time.monotonic() + seconds
    while alive := living(processes):
        assert time.monotonic() < deadline, alive
        time.sleep(0.02)


def first_worker(rank: psutil.Process) -> psutil.Process:
    """The worker that reads training images; those of an evaluation come later."""
    return min(rank.children(), key=lambda process: process.create_time())


def start_until(arguments: list[str], run_dir: Path, step: int) -> subprocess.Popen[str]:
    """Start a run, and wait until it has saved a step."""
    process = start(arguments)
    wait_for(lambda: newest_step(run_dir) >= step, process)
    return process


# Kills


def test_a_killed_worker_is_named_and_ends_all_ranks(images: Path, tmp_path: Path) -> None:
    kill_a_worker_of_rank_1(images, tmp_path / "run")


@pytest.mark.slow
def test_after_a_killed_worker_the_run_goes_on_with_other_workers(
    images: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    kill_a_worker_of_rank_1(images, run_dir)
    step = newest_step(run_dir)
    assert step % STEPS_PER_EPOCH != 0
    done = launch(train_command(images, run_dir, "data.workers=2"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"going on after step {step}" in done.stdout
    assert_same_end(run_dir, undisturbed)


def kill_a_worker_of_rank_1(images: Path, run_dir: Path) -> None:
    """Start a run, kill a worker that reads images, and check how the run ends."""
    process = start_until(train_command(images, run_dir), run_dir, EVERY_STEPS)
    worker = first_worker(rank_processes(process, 2)[1])
    worker.kill()
    began = time.monotonic()
    output = process.communicate(timeout=TIMEOUT)[0]
    assert time.monotonic() - began < 30

    (line,) = lrd_lines(output)
    assert line.startswith(f"lrd: rank 1 on {HOST}: ")
    assert " step " in line
    assert "a worker process that loads images was killed by signal 9 (Killed)" in line
    assert "exitcode  : 1 " in output
    assert_no_traceback_of_lrd(output)
    assert_gone(children_with(run_dir), seconds=1)

    # Rank 0 knows it too.
    status = read_status(run_dir)
    assert status is not None
    assert status["state"] == "failed"
    assert line.removeprefix("lrd: ") in status["message"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "workers"), [("all", 0), ("rank 0", 2), ("rank 1", 0), ("launcher", 2)]
)
def test_a_killed_run_goes_on_with_other_workers_to_the_same_end(
    images: Path, undisturbed: Path, tmp_path: Path, victim: str, workers: int
) -> None:
    run_dir = tmp_path / "run"
    process = start_until(train_command(images, run_dir), run_dir, EVERY_STEPS)
    ranks = rank_processes(process, 2)
    kill(victim, process, ranks)
    output = process.communicate(timeout=TIMEOUT)[0]
    assert_gone(children_with(run_dir), seconds=30)
    if victim.startswith("rank"):
        (line,) = lrd_lines(output)
        assert f"{victim} did not answer" in line

    assert newest_step(run_dir) < NUM_STEPS
    done = launch(train_command(images, run_dir, f"data.workers={workers}"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_end(run_dir, undisturbed)


def kill(victim: str, process: subprocess.Popen[str], ranks: list[psutil.Process]) -> None:
    """Send SIGKILL to the victims; the workers of a rank that is killed end with it."""
    workers = {rank.pid: rank.children() for rank in ranks}
    if victim == "all":
        signal_all(process, signal.SIGKILL)
        killed = ranks
    elif victim == "launcher":
        process.kill()
        killed = []
    elif victim.startswith("worker"):
        rank = ranks[int(victim[-1])]
        if workers[rank.pid]:
            workers[rank.pid][0].kill()
        killed = []
    else:
        killed = [ranks[int(victim[-1])]]
        killed[0].kill()

    for rank in killed:
        assert_gone(workers[rank.pid], seconds=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_at_random_change_nothing(images: Path, tmp_path: Path) -> None:
    rng = random.Random(16)
    epochs = "trainer.epochs=12"
    expected = tmp_path / "expected"
    assert launch(train_command(images, expected, epochs)).returncode == 0

    victims = ["launcher", "rank 0", "worker 1", "all", "rank 1", "worker 0"]
    num_steps = 12 * STEPS_PER_EPOCH
    num_kills = 0
    num_runs = 0
    num_reports = 0  # of killed workers
    while num_kills < 20:
        run_dir = tmp_path / f"run{num_runs}"
        num_runs += 1
        while newest_step(run_dir) < num_steps and num_kills < 20:
            victim = victims[num_kills % len(victims)]
            is_worker = victim.startswith("worker")
            workers = rng.choice([1, 2] if is_worker else [0, 1, 2])
            process = start(train_command(images, run_dir, epochs, f"data.workers={workers}"))
            step = newest_step(run_dir)
            # A third of the other kills come while the ranks start.
            if is_worker or rng.random() < 0.67:
                wait_for_end_or(lambda at=step, of=run_dir: newest_step(of) > at, process)
            time.sleep(rng.uniform(0.0, 1.0 if is_worker else 3.0))
            if process.poll() is None:
                try:
                    kill(victim, process, rank_processes(process, 2))
                except (AssertionError, psutil.NoSuchProcess):
                    if process.poll() is None and len(children_with(run_dir)) > 1:
                        raise
                    process.kill()  # the launcher has no ranks yet
                num_kills += 1
            output = process.communicate(timeout=TIMEOUT)[0]
            assert_gone(children_with(run_dir), seconds=30)
            num_reports += "that loads images was killed by signal 9" in output

        done = launch(train_command(images, run_dir, epochs))
        assert done.returncode == 0, done.stdout + done.stderr
        assert_same_end(run_dir, expected)
    assert num_reports > 0


def wait_for_end_or(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until a condition holds, or the process has ended."""
    deadline = time.monotonic() + TIMEOUT
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Slow, because tests/cli/test_launch.py has the signal and the tests above have the workers.
@pytest.mark.slow
def test_ctrl_c_reaches_the_workers_too_and_the_step_is_saved(images: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = train_command(images, run_dir, "data.workers=2", "trainer.epochs=50", ranks=1)
    process = start_until(arguments, run_dir, EVERY_STEPS)
    workers = psutil.Process(process.pid).children()
    assert len(workers) >= 2
    for target in [*workers, psutil.Process(process.pid)]:
        target.send_signal(signal.SIGINT)
    output = process.communicate(timeout=TIMEOUT)[0]
    assert process.returncode == EXIT_STOPPED, output
    assert f"stopped by signal 2 after step {newest_step(run_dir)}, saved" in output
    assert lrd_lines(output) == []
    assert "worker" not in output
    assert_gone(workers, seconds=1)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_saves_the_step(
    images: Path, undisturbed: Path, tmp_path: Path, number: int
) -> None:
    run_dir = tmp_path / "run"
    process = start_until(train_command(images, run_dir), run_dir, EVERY_STEPS)
    processes = psutil.Process(process.pid).children(recursive=True)
    began = time.monotonic()
    process.send_signal(number)
    output = process.communicate(timeout=TIMEOUT)[0]
    assert time.monotonic() - began < 25  # the launcher would kill them after 30 s
    assert f"stopped by signal {int(number)} after step {newest_step(run_dir)}, saved" in output
    assert lrd_lines(output) == []
    assert "worker process" not in output
    assert "forcefully exiting" not in output
    assert_gone(processes, seconds=1)

    assert launch(train_command(images, run_dir, "data.workers=0")).returncode == 0
    assert_same_end(run_dir, undisturbed)


# Positions


def test_batches_are_the_same_on_any_number_of_ranks_and_workers(images: Path) -> None:
    section = f"data.root={images}"
    digests = []
    for world_size, workers in ((1, 2), (2, 0), (4, 1)):
        overrides = [section, f"data.workers={workers}"]
        recipe = recipes.load(str(images.parent / "recipe.yaml"), overrides)
        dataset = load_dataset(recipe.data, recipe.seed)
        ranks = [
            build_batches(dataset.train, recipe, NUM_CLASSES, rank, world_size)
            for rank in range(world_size)
        ]
        input_digest = hashlib.sha256()
        label_digest = hashlib.sha256()
        # From the middle of an epoch to the next one.
        for step in range(STEPS_PER_EPOCH - 2, STEPS_PER_EPOCH + 2):
            for batches in ranks:
                inputs, labels = batches.micro_batch(step)
                input_digest.update(inputs.numpy().tobytes())
                label_digest.update(labels.numpy().tobytes())
        for batches in ranks:
            batches.close()
        digests.append((input_digest.hexdigest(), label_digest.hexdigest()))
    assert len(set(digests)) == 1
    assert living(psutil.Process().children()) == []


# Files that go bad


def files_of_rank_1(images: Path) -> list[Path]:
    """The training images that rank 1 of 2 reads in each epoch but the first."""
    order = BatchOrder(NUM_TRAIN, BATCH_SIZE, SEED, rank=1, world_size=2)
    epochs = range(1, EPOCHS)
    seen = [
        {
            index
            for step in range(epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH)
            for index in order.indices(step).tolist()
        }
        for epoch in epochs
    ]
    files = sorted(images.glob("train/*/*"))
    return [files[index] for index in sorted(set.intersection(*seen))]


def damage(file: Path, how: str) -> None:
    if how == "vanished":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:200])


@pytest.mark.parametrize("how", ["truncated", pytest.param("vanished", marks=pytest.mark.slow)])
def test_a_file_that_goes_bad_is_named_in_one_line_and_ends_all_ranks(
    changing_images: Path, tmp_path: Path, how: str
) -> None:
    run_dir = tmp_path / "run"
    file = files_of_rank_1(changing_images)[0]
    process = start_until(train_command(changing_images, run_dir), run_dir, EVERY_STEPS)
    damage(file, how)
    output = process.communicate(timeout=TIMEOUT)[0]

    (line,) = lrd_lines(output)
    assert line.startswith(f"lrd: rank 1 on {HOST}: step ")
    assert f": {file}: not a readable image (" in line
    assert "data.skip_corrupt=true" in line
    assert line.endswith("(worker 0 of 1)")
    assert "exitcode  : 1 " in output
    assert_no_traceback_of_lrd(output)
    assert_gone(children_with(run_dir), seconds=1)


@pytest.mark.slow
def test_a_file_that_goes_bad_is_replaced_and_counted_if_the_recipe_says_so(
    changing_images: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    truncated, vanished, *_ = files_of_rank_1(changing_images)
    arguments = train_command(changing_images, run_dir, "data.skip_corrupt=true")
    process = start_until(arguments, run_dir, EVERY_STEPS)
    damage(truncated, "truncated")
    damage(vanished, "vanished")
    output = process.communicate(timeout=TIMEOUT)[0]
    assert process.returncode == 0, output

    for file in (truncated, vanished):
        (line,) = [line for line in lrd_lines(output) if str(file) in line]
        assert "the next readable image takes its place" in line
    counts = [row["train/replaced"] for row in read_metrics(run_dir).values()]
    assert counts == sorted(counts)
    assert counts[0] == 0
    # Each of the two in each epoch that was left when they were damaged.
    assert counts[-1] in (2 * (EPOCHS - 1), 2 * EPOCHS - 1, 2 * EPOCHS)
    assert f"replaced {counts[-1]:.0f} times" in output


@pytest.mark.slow
def test_the_count_of_replaced_images_survives_a_kill(
    changing_images: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    for file in sorted(changing_images.glob("train/class1/*"))[3:5]:
        damage(file, "truncated")
    arguments = train_command(changing_images, run_dir, "data.skip_corrupt=true")
    process = start_until(arguments, run_dir, 2 * STEPS_PER_EPOCH)
    signal_all(process, signal.SIGKILL)
    process.communicate(timeout=TIMEOUT)

    done = launch(arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"replaced {2 * EPOCHS} times" in done.stdout
    assert read_metrics(run_dir)[NUM_STEPS]["train/replaced"] == 2 * EPOCHS


# Data sets of the user's own


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's folder: a module with a map-style data set, and a recipe that names it."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "noise.py").write_text(OWN_DATA)
    recipe = RECIPE.replace("imagefolder", "noise:Noise").replace("augment: resized_crop,", "")
    (folder / "recipe.yaml").write_text(recipe.replace("image_size: 16,", ""))
    return folder


def own_command(run_dir: Path, *overrides: str, ranks: int) -> list[str]:
    target = ["-m", "lrd.train", "recipe.yaml", f"run_dir={run_dir}", *overrides]
    return command(ranks, target)


FAULTS = {
    "raise": "failed: ValueError: no such sample (noise.py, line ",
    "shape": "has an image of uint8 (3, 8, 16), the first sample has (3, 16, 16)",
    "exit": "a worker process that loads images ended itself with status 7",
}


# Slow, because a file that goes bad ends a run in the same way, see above.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "ranks"),
    [("raise", 1), ("raise", 2), ("shape", 1), ("exit", 1)],
)
def test_a_data_set_that_fails_in_a_later_epoch_is_one_line(
    project: Path, tmp_path: Path, fault: str, ranks: int
) -> None:
    run_dir = tmp_path / "run"
    # More than the one worker reads that finds out mean and standard deviation.
    settings = [f"data.fault={fault}", f"data.faulty_from={NUM_TRAIN + 32}"]
    done = launch(own_command(run_dir, *settings, ranks=ranks), project)

    assert done.returncode == 1
    lines = lrd_lines(done.stderr)
    assert 1 <= len(lines) <= ranks, done.stderr  # both may fail before they hear of each other
    for line in lines:
        assert f" on {HOST}: step " in line
        assert FAULTS[fault] in line
        if fault != "exit":
            assert "data.dataset: noise:Noise: sample " in line
            assert line.endswith("(worker 0 of 1)")
    assert_no_traceback_of_lrd(done.stderr)
    assert json.loads((run_dir / "status.json").read_text())["step"] >= STEPS_PER_EPOCH
    assert_gone(children_with(run_dir), seconds=1)


@pytest.mark.slow
def test_a_signal_in_an_evaluation_ends_it_and_the_next_start_makes_it_up(
    project: Path, tmp_path: Path
) -> None:
    expected = tmp_path / "expected"
    done = launch(own_command(expected, "data.slow_test=true", ranks=2), project)
    assert done.returncode == 0, done.stdout + done.stderr

    (project / "evaluating").unlink()
    run_dir = tmp_path / "run"
    arguments = own_command(run_dir, "data.slow_test=true", ranks=2)
    process = start(arguments, project)
    wait_for((project / "evaluating").exists, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=TIMEOUT)[0]
    assert f"stopped by signal 15 after step {STEPS_PER_EPOCH}, saved" in output
    assert lrd_lines(output) == []
    assert "test/accuracy" not in read_metrics(run_dir)[STEPS_PER_EPOCH]
    assert_gone(children_with(run_dir), seconds=1)

    assert launch(arguments, project).returncode == 0
    assert_same_end(run_dir, expected)


# The commands


def invoke(*arguments: object) -> Result:
    """Run the `lrd` command in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    AcceleratorState._reset_state(reset_partial_state=True)
    return result


# Slow, because tests/inference has the same of a folder of images in memory.
@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_eval_and_predict_find_the_accuracy_that_the_run_recorded(
    images: Path, undisturbed: Path
) -> None:
    evaluated = invoke("eval", undisturbed, "--json")
    assert evaluated.exit_code == 0, evaluated.stderr
    found = json.loads(evaluated.stdout)
    assert found["num_images"] == NUM_TEST
    assert found["recorded"] == {"accuracy": found["accuracy"], "loss": found["loss"]}
    assert psutil.Process().children() == []

    predicted = invoke("predict", undisturbed, images / "test", "--json")
    assert predicted.exit_code == 0, predicted.stderr
    results = json.loads(predicted.stdout)
    assert len(results) == NUM_TEST
    is_correct = [
        Path(result["image"]).parent.name == result["predictions"][0]["class"] for result in results
    ]
    assert sum(is_correct) == found["num_correct"]


@pytest.mark.usefixtures("one_thread")
def test_check_leaves_no_process_and_writes_no_run(images: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    recipe = images.parent / "recipe.yaml"
    checked = invoke("check", recipe, f"data.root={images}", f"run_dir={run_dir}")
    assert checked.exit_code == 0, checked.stderr
    assert f"{BATCH_SIZE}x3x16x16" in checked.stdout
    assert "nothing is wrong with it here" in checked.stdout
    assert psutil.Process().children() == []
    assert not run_dir.exists()
