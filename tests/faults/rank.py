"""What each rank of the campaign runs: `lrd.train`, with one fault in it.

    rank.py FAULT ARGUMENT RECIPE [section.key=value ...]

Rank 0 appends marks to the file $FAULTS_MARKS, so that it is known after any kill what a start did:
`from` and the step from which it goes on, and then each step that it has done, each with the time.
`none -` is no fault; most faults take `STEP:RANK`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Modules that a fault changes are imported by the fault, because some must come before the imports.

THIS_RANK = int(os.environ.get("RANK", "0"))
MARKS = Path(os.environ["FAULTS_MARKS"])


def mark(what: object) -> None:
    if THIS_RANK == 0:
        with MARKS.open("a") as file:
            file.write(f"{what} {time.monotonic()}\n")


def mark_steps() -> None:
    from lrd.job.progress import Progress

    enter = Progress.__enter__
    after_step = Progress.after_step

    def marking_enter(progress: Any) -> Any:
        mark(f"from {progress.job.step}")
        return enter(progress)

    def marking_after_step(progress: Any, *arguments: Any) -> None:
        after_step(progress, *arguments)
        mark(progress.job.step)

    Progress.__enter__ = marking_enter
    Progress.after_step = marking_after_step


def on_job(change: Callable[[Any], None]) -> None:
    """Call `change` with the job once it is set up."""
    import lrd.train

    train = lrd.train.train

    def changed_train(job: Any, *arguments: Any) -> int:
        change(job)
        return train(job, *arguments)

    lrd.train.train = changed_train


def step_on_this_rank(argument: str) -> int:
    """Return STEP of `STEP:RANK` on that rank, and on the others a step that never comes."""
    step, rank = map(int, argument.split(":"))
    return step if rank == THIS_RANK else -1


def flip_a_weight(argument: str) -> None:
    """Flip one bit of one weight after a step."""
    import torch

    from lrd.job.progress import Progress

    fault_step = step_on_this_rank(argument)
    after_step = Progress.after_step

    def flipping_after_step(progress: Any, *arguments: Any) -> None:
        after_step(progress, *arguments)
        if progress.job.step == fault_step:
            weight = list(progress.job.raw_model.parameters())[3].detach()
            weight.view(torch.int32).view(-1)[7] ^= 1 << 3

    Progress.after_step = flipping_after_step


def spoil_a_gradient(argument: str) -> None:
    """Put NaN into one element of one gradient, before the gradients of the ranks are summed."""
    fault_step = step_on_this_rank(argument)

    def change(job: Any) -> None:
        def spoil(gradient: Any) -> Any:
            if job.step + 1 == fault_step:
                gradient = gradient.clone()
                gradient.view(-1)[0] = float("nan")
            return gradient

        list(job.raw_model.parameters())[3].register_hook(spoil)

    on_job(change)


def spoil_a_loss(argument: str) -> None:
    """Make the loss of one rank NaN in one step."""
    from torch.nn import functional

    fault_step = step_on_this_rank(argument)
    cross_entropy = functional.cross_entropy

    def change(job: Any) -> None:
        def spoiled_cross_entropy(*arguments: Any, **options: Any) -> Any:
            loss = cross_entropy(*arguments, **options)
            if job.step + 1 == fault_step and job.raw_model.training:
                loss = loss * float("nan")
            return loss

        functional.cross_entropy = spoiled_cross_entropy

    on_job(change)


def change_mask_seed(argument: str) -> None:
    """Draw other masks on one rank, from the first step on."""

    def change(job: Any) -> None:
        if int(argument) == THIS_RANK:
            for group in job.raw_optimizer.param_groups:
                group["mask_seed"] += 1

    on_job(change)


def slow_evaluation(argument: str) -> None:
    """Make each batch of an evaluation take some seconds longer."""
    import lrd.job.evaluation

    evaluate = lrd.job.evaluation.evaluate

    def slow_evaluate(*, normalize: Any, **arguments: Any) -> Any:
        def slow_normalize(pixels: Any) -> Any:
            time.sleep(float(argument))
            return normalize(pixels)

        mark("evaluation")
        return evaluate(normalize=slow_normalize, **arguments)

    lrd.job.evaluation.evaluate = slow_evaluate


def relabel(_: str) -> None:
    """Change one label: another data set under the same name."""
    import lrd.data.datasets

    load_dataset = lrd.data.datasets.load_dataset

    def load_relabelled(*arguments: Any) -> Any:
        dataset = load_dataset(*arguments)
        dataset.train.labels[0] = (dataset.train.labels[0] + 1) % 10
        return dataset

    lrd.data.datasets.load_dataset = load_relabelled


def set_clock_back(argument: str) -> None:
    """Set the clock back by some days."""
    now = time.time
    time.time = lambda: now() - 86400 * float(argument)


def kill_at_event(argument: str) -> None:
    """Kill rank 0 before an operation on a file under checkpoints/.

    Args:
        argument: `NUMBER:FIRST`. The operations are counted from the first on a path that contains
            FIRST. With number 0 they are marked, and nothing is killed.
    """
    number, _, first = argument.partition(":")
    count = 0

    def on_event(operation: str, path: object, leaves_half: bool = False) -> None:
        nonlocal count
        text = str(path)
        if "/checkpoints" not in text or not (count or first in text):
            return

        count += 1
        if number == "0":
            mark(f"event {operation} {text.partition('/checkpoints')[2] or '/'}")
        elif count == int(number):
            if leaves_half:  # as if the writer had died in the middle of the file
                os.truncate(text, os.path.getsize(text) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    if THIS_RANK == 0:
        watch_files(on_event)


def path_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


def watch_files(on_event: Callable[..., None]) -> None:
    """Call `on_event` before each operation that changes a file.

    Python announces most of them by its audit hooks. What torch and safetensors write is not
    announced, so for these it is called after they have written a file.
    """
    import safetensors.torch
    import torch

    fsync = os.fsync
    save_file = safetensors.torch.save_file
    save = torch.save

    def audit_hook(operation: str, arguments: tuple[Any, ...]) -> None:
        # To read changes nothing: a kill before it is a kill after the operation before.
        if operation in ("os.listdir", "os.scandir"):
            return
        if operation == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return

        is_on_files = operation.startswith(("os.", "open", "shutil."))
        if is_on_files and arguments and isinstance(arguments[0], str | os.PathLike):
            # The path may be relative to an open folder.
            folder = arguments[1] if operation in ("os.remove", "os.rmdir") else -1
            path = arguments[0] if folder == -1 else f"{path_of(folder)}/{arguments[0]}"
            on_event(operation, path)

    def watched_fsync(descriptor: int) -> None:
        on_event("fsync", path_of(descriptor))
        fsync(descriptor)

    def watched_save_file(tensors: Any, path: Any, metadata: Any = None) -> None:
        save_file(tensors, path, metadata)
        on_event("half of save_file", path, leaves_half=True)

    def watched_save(state: Any, file: Any, **options: Any) -> None:
        save(state, file, **options)
        on_event("half of torch.save", getattr(file, "name", file), leaves_half=True)

    sys.addaudithook(audit_hook)
    os.fsync = watched_fsync
    safetensors.torch.save_file = watched_save_file
    torch.save = watched_save


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
    fault, argument, *train_arguments = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).parents[2]))

    # lrd must not be imported before the clock is set back.
    if fault == "clock":
        FAULTS[fault](argument)
        mark_steps()
    else:
        mark_steps()
        FAULTS[fault](argument)

    import lrd.train

    lrd.train.main(train_arguments)
