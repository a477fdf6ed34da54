"""What each rank of the campaign runs: `lrd.train`, with one fault in it.

rank.py FAULT ARGUMENT RECIPE [section.key=value ...]

Rank 0 appends to the file $FAULTS_MARKS `from` and the step that it goes on from, and then each step that it has done,
with the time: what a start did is known after any kill. `none -` is no fault; most others take `STEP:RANK`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

OWN_RANK = int(os.environ.get("RANK", "0"))
MARKS = Path(os.environ["FAULTS_MARKS"])


def mark(what: object) -> None:
    if OWN_RANK == 0:
        with MARKS.open("a") as file:
            file.write(f"{what} {time.monotonic()}\n")


def mark_steps() -> None:
    from lrd.progress import Progress

    enter, step = Progress.__enter__, Progress.step

    def marked_enter(progress: Any) -> Any:
        mark(f"from {progress.job.step}")
        return enter(progress)

    def marked_step(progress: Any, *arguments: Any) -> None:
        step(progress, *arguments)
        mark(progress.job.step)

    Progress.__enter__, Progress.step = marked_enter, marked_step


def on_job(act: Callable[[Any], None]) -> None:
    """Have something done to the job once it is set up."""
    import lrd.train

    train = lrd.train.train

    def disturbed(job: Any, *rest: Any) -> int:
        act(job)
        return train(job, *rest)

    lrd.train.train = disturbed


def own_step(argument: str) -> int:
    """STEP of `STEP:RANK` on that rank, a step that never comes on the others."""
    step, rank = map(int, argument.split(":"))
    return step if rank == OWN_RANK else -1


def flip_a_weight(argument: str) -> None:
    """One bit of one weight, after a step."""
    import torch

    from lrd.progress import Progress

    at, marked = own_step(argument), Progress.step

    def step(progress: Any, *arguments: Any) -> None:
        marked(progress, *arguments)
        if progress.job.step == at:
            weight = list(progress.job.network.parameters())[3].detach()
            weight.view(torch.int32).view(-1)[7] ^= 1 << 3

    Progress.step = step


def spoil_a_gradient(argument: str) -> None:
    """NaN in one element of one gradient, before the ranks' sums are taken."""
    at = own_step(argument)

    def act(job: Any) -> None:
        def hook(gradient: Any) -> Any:
            if job.step + 1 == at:
                gradient = gradient.clone()
                gradient.view(-1)[0] = float("nan")
            return gradient

        list(job.network.parameters())[3].register_hook(hook)

    on_job(act)


def spoil_a_loss(argument: str) -> None:
    """NaN as the loss of one rank in one step."""
    from torch.nn import functional

    at, cross_entropy = own_step(argument), functional.cross_entropy

    def act(job: Any) -> None:
        def spoiled(*arguments: Any, **options: Any) -> Any:
            loss = cross_entropy(*arguments, **options)
            return loss * float("nan") if job.step + 1 == at and job.network.training else loss

        functional.cross_entropy = spoiled

    on_job(act)


def change_mask_seed(argument: str) -> None:
    """Other masks on one rank, from the first step on."""

    def act(job: Any) -> None:
        if int(argument) == OWN_RANK:
            for group in job.optimizer.param_groups:
                group["mask_seed"] += 1

    on_job(act)


def slow_evaluation(argument: str) -> None:
    """Each batch of an evaluation takes so many seconds."""
    import lrd.train

    evaluate = lrd.train.evaluate

    def slow(accelerator: Any, network: Any, images: Any, normalized: Any, *rest: Any, **options: Any) -> Any:
        def slowly(pixels: Any) -> Any:
            time.sleep(float(argument))
            return normalized(pixels)

        mark("evaluation")
        return evaluate(accelerator, network, images, slowly, *rest, **options)

    lrd.train.evaluate = slow


def relabel(_: str) -> None:
    """Another data set under the same name: one label is another."""
    import lrd.data

    load = lrd.data.load

    def other(*arguments: Any) -> Any:
        dataset = load(*arguments)
        dataset.train.labels[0] = (dataset.train.labels[0] + 1) % 10
        return dataset

    lrd.data.load = other


def set_clock_back(argument: str) -> None:
    """So many days."""
    now = time.time
    time.time = lambda: now() - 86400 * float(argument)


def kill_at_event(argument: str) -> None:
    """`NUMBER:BEGIN`: SIGKILL right before the so-manieth thing done to files under checkpoints/, on rank 0.

    They are counted from the first whose path has BEGIN in it. Number 0: none, each is only marked.
    """
    number, _, begin = argument.partition(":")
    seen = [0]

    def event(what: str, path: object, torn: bool = False) -> None:
        place = str(path)
        if "/checkpoints" not in place or not (seen[0] or begin in place):
            return
        seen[0] += 1
        if number == "0":
            mark(f"event {what} {place.partition('/checkpoints')[2] or '/'}")
        elif seen[0] == int(number):
            if torn:  # what is there of a file whose writer dies in the middle
                os.truncate(place, os.path.getsize(place) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    if OWN_RANK == 0:
        watch_files(event)


def path_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


def watch_files(event: Callable[..., None]) -> None:
    """Call `event` before each operation on a file that Python announces, and after those that it does not."""
    import safetensors.torch
    import torch

    fsync, save_file, save = os.fsync, safetensors.torch.save_file, torch.save

    def audited(what: str, arguments: tuple[Any, ...]) -> None:
        if what in ("os.listdir", "os.scandir") or (what == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return  # looking changes nothing: a kill before it is a kill after the event before
        if what.startswith(("os.", "open", "shutil.")) and arguments and isinstance(arguments[0], str | os.PathLike):
            folder = arguments[1] if what in ("os.remove", "os.rmdir") else -1
            event(what, arguments[0] if folder == -1 else f"{path_of(folder)}/{arguments[0]}")

    def watched_fsync(descriptor: int) -> None:
        event("fsync", path_of(descriptor))
        fsync(descriptor)

    def torn_save_file(tensors: Any, path: Any) -> None:
        save_file(tensors, path)
        event("half of save_file", path, torn=True)

    def torn_save(state: Any, file: Any, **options: Any) -> None:
        save(state, file, **options)
        event("half of torch.save", getattr(file, "name", file), torn=True)

    sys.addaudithook(audited)
    os.fsync, safetensors.torch.save_file, torch.save = watched_fsync, torn_save_file, torn_save


FAULTS: dict[str, Callable[[str], None]] = {
    "none": lambda _: None,
    "bit": flip_a_weight,
    "nan_gradient": spoil_a_gradient,
    "nan_loss": spoil_a_loss,
    "mask_seed": change_mask_seed,
    "slow_evaluation": slow_evaluation,
    "relabel": relabel,
    "clock": set_clock_back,
    "kill_at": kill_at_event,
}

if __name__ == "__main__":
    fault, argument, *arguments = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).parents[2]))
    if fault != "clock":
        mark_steps()
    FAULTS[fault](argument)
    if fault == "clock":  # lrd must not have seen the time before
        mark_steps()
    import lrd.train

    lrd.train.main(arguments)
