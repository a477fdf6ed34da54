"""Checkpoints that are damaged, mixed up, or have strangers beside them; clocks and file times that are wrong."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from lrd import checkpoint

from .jobs import Failure, Job
from .lab import Lab, Outcome, Trial

FILES = ("model.safetensors", "optimizer.pt", "trainer.json", "manifest.json")
WAYS = ("truncated", "emptied", "deleted", "one bit", "another step's")
_lock = threading.Lock()


def interrupted(lab: Lab, folder: Path, ranks: int = 1) -> Job:
    """A job that was killed in the save of step 40: a copy of one that is made once."""
    with _lock:
        if ranks not in lab.interrupted:
            origin = lab.interrupted[ranks] = Job(lab.folder / f"interrupted-{ranks}", ranks)
            origin.start("kill_at", f"3:.{checkpoint.name(40)}.").wait()
    return copy_of(lab.interrupted[ranks], folder)


def copy_of(job: Job, folder: Path) -> Job:
    """A job whose run directory and past are as those of `job` are now."""
    copy = Job(folder, job.ranks, *job.overrides)
    copy.starts = job.starts[:]
    shutil.copytree(job.run_dir, copy.run_dir)
    return copy


def newest_two(job: Job) -> tuple[Path, Path]:
    older, newest = checkpoint.steps(job.run_dir)[-2:]
    return checkpoint.path_of(job.run_dir, older), checkpoint.path_of(job.run_dir, newest)


def damages(lab: Lab) -> Iterator[Trial]:
    for how in WAYS:
        for name in FILES:
            yield Trial(f"F a file of the newest checkpoint {how}", partial(damaged, lab, name, how))
    for how, act in STRANGERS.items():
        yield Trial(f"F {how}", partial(with_strangers, lab, act))
    yield Trial("F the newest checkpoint renamed to a later step", partial(renamed, lab))
    yield Trial("F all checkpoints damaged", partial(all_damaged, lab))
    yield Trial("I the clock a day back at the restart", partial(clock_back, lab))
    yield Trial("I the times of all files shuffled", partial(with_strangers, lab, shuffle_times))


def damage_one_file(path: Path, how: str, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: draw.randrange(1, len(content))]
    elif how == "emptied":
        content.clear()
    elif how == "one bit":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    if how == "deleted":
        path.unlink()


def damaged(lab: Lab, name: str, how: str, folder: Path) -> Outcome:
    """It is passed over, in one line that names the file, and the one before is taken."""
    job = interrupted(lab, folder)
    older, newest = newest_two(job)
    if how == "another step's":
        shutil.copyfile(older / name, newest / name)
    else:
        damage_one_file(newest / name, how, lab.draw("damage", name, how))
    return passed_over(lab, job, older, f"{newest}: damaged: {name}")


def passed_over(lab: Lab, job: Job, older: Path, message: str) -> Outcome:
    starts = job.finish(most_starts=1)
    output = job.starts[-1].output
    if message not in output or f"{older}: going on after step {int(older.name[5:])}" not in output:
        raise Failure(f"does not say '{message}' and go on from {older.name}: {job.starts[-1].tail()}")
    return lab.compared(job, Outcome(starts=starts))


def renamed(lab: Lab, folder: Path) -> Outcome:
    job = interrupted(lab, folder)
    older, newest = newest_two(job)
    later = newest.rename(checkpoint.path_of(job.run_dir, 90))
    return passed_over(lab, job, older, f"{later}: damaged: manifest.json: is of step")


def all_damaged(lab: Lab, folder: Path) -> Outcome:
    job = interrupted(lab, folder)
    steps = checkpoint.steps(job.run_dir)
    for step in steps:
        damage_one_file(checkpoint.path_of(job.run_dir, step) / "optimizer.pt", "one bit", lab.draw("all damaged"))
    starts = job.finish(most_starts=1)
    output = job.starts[-1].output
    if output.count("damaged: optimizer.pt") != len(steps) or "beginning" not in output:
        raise Failure(f"does not say that it starts from the beginning: {job.starts[-1].output_file}")
    return lab.compared(job, Outcome(starts=starts), most_lost=10**6)


def junk(checkpoints: Path) -> None:
    for name in ("step-junk", "step-99999999", "step-1", ".step-00000045.1.tmp"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "model.safetensors").write_bytes(b"junk")


def empty_folder(checkpoints: Path) -> None:
    (checkpoints / "step-99999999").mkdir()


def file_like_a_checkpoint(checkpoints: Path) -> None:
    (checkpoints / "step-00000999").write_bytes(b"junk")


def temporary_file(checkpoints: Path) -> None:
    (checkpoints / ".step-00000045.1.tmp").write_bytes(b"junk")


def shuffle_times(checkpoints: Path) -> None:

    draw = random.Random(0)
    for path in checkpoints.parent.rglob("*"):
        os.utime(path, (draw.uniform(0, 2e9),) * 2)


STRANGERS: dict[str, Callable[[Path], None]] = {
    "folders of junk beside the checkpoints": junk,
    "an empty folder named like a later checkpoint": empty_folder,
    "a file named like a later checkpoint": file_like_a_checkpoint,
    "a file named like an unfinished checkpoint": temporary_file,
}


def with_strangers(lab: Lab, act: Callable[[Path], None], folder: Path) -> Outcome:
    """The newest checkpoint is taken all the same."""
    job = interrupted(lab, folder)
    _, newest = newest_two(job)
    act(checkpoint.folder(job.run_dir))
    starts = job.finish(most_starts=1)
    if f"{newest}: going on" not in job.starts[-1].output:
        raise Failure(f"does not go on from {newest}: {job.starts[-1].tail()}")
    return lab.compared(job, Outcome(starts=starts))


def clock_back(lab: Lab, folder: Path) -> Outcome:
    job = interrupted(lab, folder)
    if job.start("clock", "1").wait():
        raise Failure(job.starts[-1].tail())
    return lab.compared(job, Outcome())


def mutations(lab: Lab) -> Iterator[Trial]:
    if lab.mutations:
        row = "G random mutations of checkpoint files, in process"
        yield Trial(row, partial(mutate, lab), lab.mutations)


def mutate(lab: Lab, folder: Path) -> Outcome:
    """None may be chosen, but where no byte is another."""
    job = interrupted(lab, folder)
    older, newest = newest_two(job)
    whole = {name: (newest / name).read_bytes() for name in FILES}
    others = {name: (older / name).read_bytes() for name in FILES}
    draw, chosen, same = lab.draw("mutations"), [], 0
    for number in range(lab.mutations):
        name = draw.choice(FILES)
        what, content = mutated(whole[name], others[draw.choice(FILES)], draw)
        (newest / name).write_bytes(content)
        path, passed = checkpoint.survey(job.run_dir)
        same += content == whole[name]
        if content != whole[name] and (path != older or [bad for bad, _ in passed] != [newest]):
            chosen.append(f"{number}: {name}: {what}")
        (newest / name).write_bytes(whole[name])
    note = f"{same} mutations changed no byte"
    return Outcome(lab.mutations, "refused", problem="; ".join(chosen), note=note if same else "")


def mutated(content: bytes, other: bytes, draw: random.Random) -> tuple[str, bytes]:
    """What was done, and the file then."""
    at, size = draw.randrange(len(content)), draw.randrange(1, 64)
    end = at + size
    ways = {
        "a bit": content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :],
        "a byte": content[:at] + draw.randbytes(1) + content[at + 1 :],
        "noise": content[:at] + draw.randbytes(size) + content[end:],
        "zeros": content[:at] + bytes(len(content[at:end])) + content[end:],
        "cut out": content[:at] + content[end:],
        "put in": content[:at] + draw.randbytes(size) + content[at:],
        "twice": content[:end] + content[at:],
        "truncated": content[:at],
        "longer": content + draw.choice([b"\n", b" ", b"\0", draw.randbytes(size)]),
        "another file": other,
        "the first half of another": other[: len(other) // 2] + content[len(content) // 2 :],
        "a digit": digit_changed(content, draw),
        "spaces": content.replace(b" ", b"  ", 1),
    }
    what = draw.choice(list(ways))
    return f"{what} at {at}, {size}", ways[what]


def digit_changed(content: bytes, draw: random.Random) -> bytes:
    places = [at for at, byte in enumerate(content[:4000]) if chr(byte).isdigit()]
    if not places:
        return content
    at = draw.choice(places)
    return content[:at] + str(draw.randrange(10)).encode() + content[at + 1 :]
