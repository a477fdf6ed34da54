"""Checkpoints that are damaged, mixed up, or beside strange files; wrong clocks and file times."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from lrd.checkpoint import store

from .jobs import Failure, Job
from .lab import NO_LIMIT, Lab, Outcome, Trial

FILES = ("model.safetensors", "optimizer.pt", "trainer.json", "config.json", "manifest.json")
DAMAGES = {  # name -> what the row of the table says
    "truncated": "truncated",
    "emptied": "emptied",
    "deleted": "deleted",
    "one bit": "with one bit flipped",
    "another step's": "replaced by another step's",
}
_lock = threading.Lock()


def interrupted(lab: Lab, folder: Path, ranks: int = 1) -> Job:
    """Return a job that was killed in the save of step 40: a copy of one that is made once."""
    with _lock:
        if ranks not in lab.interrupted:
            job = Job(lab.folder / f"interrupted-{ranks}", ranks)
            job.start("kill_at", f"3:.{store.checkpoint_name(40)}.").wait()
            lab.interrupted[ranks] = job
    return copy_of(lab.interrupted[ranks], folder)


def copy_of(job: Job, folder: Path) -> Job:
    """Copy a job with its run directory and its past starts."""
    copy = Job(folder, job.ranks, *job.overrides)
    copy.starts = job.starts[:]
    shutil.copytree(job.run_dir, copy.run_dir)
    return copy


def newest_two(job: Job) -> tuple[Path, Path]:
    """Return the last but one and the last checkpoint."""
    older, newest = store.list_steps(job.run_dir)[-2:]
    return store.checkpoint_path(job.run_dir, older), store.checkpoint_path(job.run_dir, newest)


def damages(lab: Lab) -> Iterator[Trial]:
    for damage, description in DAMAGES.items():
        for file in FILES:
            row = f"F a file of the newest checkpoint {description}"
            yield Trial(row, partial(damaged, lab, file, damage))
    for name, add_strangers in STRANGERS.items():
        yield Trial(f"F {name}", partial(with_strangers, lab, add_strangers))

    yield Trial("F the newest checkpoint renamed to a later step", partial(renamed, lab))
    yield Trial("F all checkpoints damaged", partial(all_damaged, lab))
    yield Trial("I the clock a day back at the restart", partial(clock_back, lab))
    yield Trial("I the times of all files shuffled", partial(with_strangers, lab, shuffle_times))


def damage_file(path: Path, damage: str, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[: draw.randrange(1, len(content))]
    elif damage == "emptied":
        content.clear()
    elif damage == "one bit":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)

    if damage == "deleted":
        path.unlink()


def damaged(lab: Lab, file: str, damage: str, folder: Path) -> Outcome:
    """The damaged checkpoint is passed over, in one line that names the file."""
    job = interrupted(lab, folder)
    older, newest = newest_two(job)
    if damage == "another step's":
        shutil.copyfile(older / file, newest / file)
    else:
        damage_file(newest / file, damage, lab.draw("damage", file, damage))
    return passed_over(lab, job, older, f"{newest}: damaged: {file}")


def passed_over(lab: Lab, job: Job, older: Path, message: str) -> Outcome:
    """The run goes on from the older checkpoint, and prints why."""
    num_starts = job.finish(max_starts=1)
    output = job.starts[-1].output
    step = int(older.name.removeprefix("step-"))
    if message not in output or f"{older}: going on after step {step}" not in output:
        raise Failure(
            f"does not print '{message}' and go on from {older.name}: {job.starts[-1].tail()}"
        )
    return lab.compare(job, Outcome(starts=num_starts))


def renamed(lab: Lab, folder: Path) -> Outcome:
    job = interrupted(lab, folder)
    older, newest = newest_two(job)
    later = newest.rename(store.checkpoint_path(job.run_dir, 90))
    return passed_over(lab, job, older, f"{later}: damaged: manifest.json: is of step")


def all_damaged(lab: Lab, folder: Path) -> Outcome:
    """The run starts from the beginning."""
    job = interrupted(lab, folder)
    steps = store.list_steps(job.run_dir)
    for step in steps:
        path = store.checkpoint_path(job.run_dir, step) / "optimizer.pt"
        damage_file(path, "one bit", lab.draw("all damaged"))

    num_starts = job.finish(max_starts=1)
    output = job.starts[-1].output
    if output.count("damaged: optimizer.pt") != len(steps) or "beginning" not in output:
        raise Failure(
            f"does not print that it starts from the beginning: {job.starts[-1].output_file}"
        )
    return lab.compare(job, Outcome(starts=num_starts), max_lost=NO_LIMIT)


def add_folders_of_junk(checkpoints: Path) -> None:
    for name in ("step-junk", "step-99999999", "step-1", ".step-00000045.1.tmp"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "model.safetensors").write_bytes(b"junk")


def add_empty_folder(checkpoints: Path) -> None:
    (checkpoints / "step-99999999").mkdir()


def add_file_named_like_a_checkpoint(checkpoints: Path) -> None:
    (checkpoints / "step-00000999").write_bytes(b"junk")


def add_temporary_file(checkpoints: Path) -> None:
    (checkpoints / ".step-00000045.1.tmp").write_bytes(b"junk")


def shuffle_times(checkpoints: Path) -> None:
    draw = random.Random(0)
    for path in checkpoints.parent.rglob("*"):
        seconds = draw.uniform(0, 2e9)
        os.utime(path, (seconds, seconds))


STRANGERS: dict[str, Callable[[Path], None]] = {
    "folders of junk beside the checkpoints": add_folders_of_junk,
    "an empty folder named like a later checkpoint": add_empty_folder,
    "a file named like a later checkpoint": add_file_named_like_a_checkpoint,
    "a file named like an unfinished checkpoint": add_temporary_file,
}


def with_strangers(lab: Lab, change: Callable[[Path], None], folder: Path) -> Outcome:
    """The run goes on from the newest checkpoint all the same.

    Args:
        change: gets the folder of checkpoints.
    """
    job = interrupted(lab, folder)
    _, newest = newest_two(job)
    change(store.checkpoints_dir(job.run_dir))

    num_starts = job.finish(max_starts=1)
    if f"{newest}: going on" not in job.starts[-1].output:
        raise Failure(f"does not go on from {newest}: {job.starts[-1].tail()}")
    return lab.compare(job, Outcome(starts=num_starts))


def clock_back(lab: Lab, folder: Path) -> Outcome:
    job = interrupted(lab, folder)
    job.start("clock", "1").wait_for_success()
    return lab.compare(job, Outcome())


def mutations(lab: Lab) -> Iterator[Trial]:
    if lab.mutations:
        row = "G random mutations of checkpoint files, in process"
        yield Trial(row, partial(mutate, lab), lab.mutations)


def mutate(lab: Lab, folder: Path) -> Outcome:
    """No checkpoint with a mutated file may be chosen, unless the mutation changed no byte."""
    job = interrupted(lab, folder)
    older, newest = newest_two(job)
    contents = {file: (newest / file).read_bytes() for file in FILES}
    older_contents = {file: (older / file).read_bytes() for file in FILES}

    draw = lab.draw("mutations")
    problems = []
    num_unchanged = 0
    for number in range(lab.mutations):
        file = draw.choice(FILES)
        other_file = draw.choice(FILES)
        mutation, content = mutated(contents[file], older_contents[other_file], draw)
        (newest / file).write_bytes(content)
        chosen, damaged = store.find_newest_valid(job.run_dir)

        if content == contents[file]:
            num_unchanged += 1
        elif chosen != older or [path for path, _ in damaged] != [newest]:
            problems.append(f"{number}: {file}: {mutation}")
        (newest / file).write_bytes(contents[file])

    note = f"{num_unchanged} mutations changed no byte" if num_unchanged else ""
    return Outcome(lab.mutations, "refused", problem="; ".join(problems), note=note)


def mutated(content: bytes, other: bytes, draw: random.Random) -> tuple[str, bytes]:
    """Mutate a file's content.

    Args:
        other: another file's content.

    Returns:
        What was done, and the mutated content.
    """
    start = draw.randrange(len(content))
    size = draw.randrange(1, 64)
    end = start + size
    before = content[:start]

    # All are made and one is chosen, so the draws do not depend on the choice.
    mutations = {
        "a bit": before + bytes([content[start] ^ 1 << draw.randrange(8)]) + content[start + 1 :],
        "a byte": before + draw.randbytes(1) + content[start + 1 :],
        "noise": before + draw.randbytes(size) + content[end:],
        "zeros": before + bytes(len(content[start:end])) + content[end:],
        "cut out": before + content[end:],
        "put in": before + draw.randbytes(size) + content[start:],
        "twice": content[:end] + content[start:],
        "truncated": before,
        "longer": content + draw.choice([b"\n", b" ", b"\0", draw.randbytes(size)]),
        "another file": other,
        "the first half of another": other[: len(other) // 2] + content[len(content) // 2 :],
        "a digit": digit_changed(content, draw),
        "spaces": content.replace(b" ", b"  ", 1),
    }
    name = draw.choice(list(mutations))
    return f"{name} at {start}, {size}", mutations[name]


def digit_changed(content: bytes, draw: random.Random) -> bytes:
    places = [place for place, byte in enumerate(content[:4000]) if chr(byte).isdigit()]
    if not places:
        return content

    place = draw.choice(places)
    digit = str(draw.randrange(10)).encode()
    return content[:place] + digit + content[place + 1 :]
