"""How long is it from the death of a rank to the end of the next step, and where does it go?

    python benchmarks/recovery.py [--rounds 10] [--out benchmarks/results/recovery.json]

The demonstration's recipe trains on two ranks under `accelerate launch --max_restarts`. Rank 1 is
killed (SIGKILL) in the middle of a step, the launcher starts both ranks again, and the run goes on.
To compare with, a bare script on Accelerate trains the same network under the same launcher and
saves its state after each step; the two take turns. Where it was killed in the middle of a save, it
cannot go on; such rounds are counted. Each moment is written to a file by the process
that comes to it, and the phases are the differences between the latest of the ranks' moments.

With `--cost`: what it costs in an undisturbed run that ranks can save when another one is lost. In
every second step they do not copy the network's buffers; the ratio is of neighbouring steps.

recovery_rank.py is what the ranks run.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from common import (
    ACCELERATE,
    BARE_TRAINING,
    RECIPE,
    RESULTS,
    ROOT,
    circumstances,
    spread,
    summary,
    write,
)
from recovery_rank import (
    COST_VARIABLE,
    IMPORTED,
    LEFT,
    MET,
    SAVED,
    SAW,
    SET_UP,
    START,
    STEPPED,
)
from rich.progress import track

from lrd import console

RANK = str(Path(__file__).with_name("recovery_rank.py"))
LAUNCHER = [*ACCELERATE, "--config_file", str(ROOT / "launch" / "accelerate" / "cpu.yaml")]
LAUNCHER += ["--max_restarts", "3"]

# What ends at each moment, in this order.
PHASES = (SAW, SAVED, LEFT, START, IMPORTED, MET, SET_UP, STEPPED)
KILL_AFTER = (3, 8)  # steps
STEPS = 1000  # more than are taken
SECONDS = 60.0  # at most, to come to a step
SECONDS_TO_END = 40.0  # a launcher gives its ranks 30
COST_STEPS = 120
COST_WARM_UP = 9

BARE_SCRIPT = (
    """
import os, sys, time
from pathlib import Path

marks = Path(sys.argv[1])
folder = Path(sys.argv[2])

def mark(what):
    with marks.open("a") as stream:
        stream.write(f"{os.environ['RANK']} {time.time()} {what}\\n")

mark("process starts")
"""
    + BARE_TRAINING
    + """
first = 0
if folder.exists():
    accelerator.load_state(str(folder))
    first = int((folder / "step").read_text())
for step in range(first, int(sys.argv[3])):
    optimizer.zero_grad()
    accelerator.backward(torch.nn.functional.cross_entropy(network(images), labels))
    optimizer.step()
    mark(f"step {step + 1}")
    accelerator.save_state(str(folder), safe_serialization=True)
    if accelerator.is_main_process:
        (folder / "step").write_text(str(step + 1))
    accelerator.wait_for_everyone()
"""
)


class NotGoneOnError(Exception):
    """A job ended after the kill, or made no step in time; the message is what it printed."""


def end(launcher: subprocess.Popen[bytes]) -> None:
    """End a launcher and its ranks; one that hangs is killed."""
    with suppress(psutil.NoSuchProcess):
        processes = psutil.Process(launcher.pid).children(recursive=True)
        launcher.send_signal(signal.SIGTERM)
        try:
            launcher.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            launcher.kill()
    launcher.wait()


def read_marks(path: Path) -> list[tuple[int, float, str]]:
    """The rank, the time in seconds, and the moment of each mark."""
    marks = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        rank, moment, what = line.split(" ", 2)
        marks.append((int(rank), float(moment), what))
    return marks


def last_step(path: Path) -> int:
    steps = [int(what[5:]) for _, _, what in read_marks(path) if what.startswith("step ")]
    return max(steps, default=0)


def kill_and_wait(command: list[str], path: Path, kill_after: int, is_bare: bool = False) -> float:
    """Start a job, kill rank 1 in the step after `kill_after`, and end the job when it goes on.

    Returns:
        When it was killed.
    """
    # Without the last variable most restarts of the bare script fail: ranks find the addresses of
    # dead ones in the launcher's store (pytorch 135712). lrd needs no such help.
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    if is_bare:
        variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with tempfile.TemporaryFile("w+") as output:
        launcher = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + SECONDS
        while last_step(path) < kill_after and launcher.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(random.uniform(0.0, 0.03))
        victims = [
            child
            for child in psutil.Process(launcher.pid).children()
            if child.environ().get("RANK") == "1"
        ]
        killed = time.time()
        for victim in victims:
            victim.send_signal(signal.SIGKILL)
        while not next_steps(read_marks(path), killed) and launcher.poll() is None:
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        went_on = bool(next_steps(read_marks(path), killed))
        end(launcher)
        output.seek(0)
        if not went_on:
            raise NotGoneOnError(output.read())
    return killed


def next_steps(marks: list[tuple[int, float, str]], killed: float) -> dict[int, float]:
    """The steps that both ranks have done since the restart, and when the later one had."""
    restarted = [moment for _, moment, what in marks if what == START and moment > killed]
    ends: dict[int, dict[int, float]] = {}
    for rank, moment, what in marks:
        if what.startswith("step ") and restarted and moment > min(restarted):
            ends.setdefault(int(what[5:]), {})[rank] = moment
    return {step: max(ranks.values()) for step, ranks in ends.items() if len(ranks) == 2}


def measure_lrd(folder: Path, kill_after: int) -> dict[str, Any]:
    path = folder / "marks"
    command = [*LAUNCHER, RANK, str(path), RECIPE, f"run_dir={folder / 'run'}"]
    command += [f"trainer.max_steps={STEPS}", "checkpoint.every_steps=0"]
    killed = kill_and_wait(command, path, kill_after)

    marks = read_marks(path)
    step, end = min(next_steps(marks, killed).items())
    done = max(
        int(what[5:]) for _, moment, what in marks if what[:5] == "step " and moment < killed
    )
    phases = {}
    before = killed
    for phase in PHASES:
        moments = [moment for _, moment, what in marks if what == phase and moment > killed]
        moment = end if phase == STEPPED else max(m for m in moments if m < end)
        phases[phase] = moment - before
        before = moment
    return {"seconds": end - killed, "phases": phases, "steps_lost": done + 1 - step}


def measure_bare(folder: Path, kill_after: int) -> float | None:
    """The seconds until the bare script went on; None if it did not."""
    script = folder / "bare.py"
    script.write_text(BARE_SCRIPT, encoding="utf-8")
    path = folder / "marks"
    command = [*LAUNCHER, str(script), str(path), str(folder / "state"), str(STEPS)]
    try:
        killed = kill_and_wait(command, path, kill_after, is_bare=True)
    except NotGoneOnError:
        return None
    return min(next_steps(read_marks(path), killed).values()) - killed


def measure_cost(out: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "marks"
        command = [*LAUNCHER, RANK, str(path), RECIPE, f"run_dir={name}/run"]
        command += [f"trainer.max_steps={COST_STEPS}", "checkpoint.every_steps=0"]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", COST_VARIABLE: "1"}
        subprocess.run(command, cwd=ROOT, env=variables, check=True, capture_output=True)
        ends = {
            int(what[5:]): moment
            for rank, moment, what in read_marks(path)
            if rank == 0 and what.startswith("step ")
        }

    # `BufferSnapshot.take` gets the number of steps that are done: it acts in the even ones.
    seconds = {step: ends[step] - ends[step - 1] for step in ends if step > COST_WARM_UP}
    pairs = [
        (seconds[step], seconds[step + 1])
        for step in seconds
        if step % 2 == 0 and step + 1 in seconds
    ]
    facts = {
        **circumstances("cpu"),
        "what": "ResNet-34 on two ranks: a step with a copy of the buffers over the step after it",
        "pairs": len(pairs),
        "step_seconds": summary([without for _, without in pairs]),
        "ratio": summary([with_copy / without for with_copy, without in pairs]),
    }
    console.info(
        f"a step with the copy over one without: {spread(facts['ratio'], '.3f')}, n = {len(pairs)} "
        f"pairs; a step without takes {spread(facts['step_seconds'], '.3f')} s"
    )
    write(out, facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--cost", action="store_true", help="measure the cost of every step")
    parser.add_argument("--out", type=Path, help="the file of results")
    arguments = parser.parse_args()
    if arguments.cost:
        measure_cost(arguments.out or RESULTS / "recovery_cost.json")
        return

    random.seed(0)
    runs = []
    bare: list[float | None] = []
    for number in track(range(arguments.rounds), "rounds", transient=True):
        with tempfile.TemporaryDirectory() as name:
            kill_after = random.randint(*KILL_AFTER)
            folders = [Path(name) / way for way in ("lrd", "bare")]
            for folder in folders[:: -1 if number % 2 else 1]:
                folder.mkdir()
                if folder.name == "lrd":
                    runs.append(measure_lrd(folder, kill_after))
                else:
                    bare.append(measure_bare(folder, kill_after))

    facts = {
        **circumstances("cpu"),
        "what": "seconds from the SIGKILL of one of two ranks to the end of the next step",
        "rounds": arguments.rounds,
        "seconds": summary([run["seconds"] for run in runs]),
        "phases": {phase: summary([run["phases"][phase] for run in runs]) for phase in PHASES},
        "steps_lost": max(run["steps_lost"] for run in runs),
        "bare_accelerate_seconds": summary([seconds for seconds in bare if seconds is not None]),
        "bare_accelerate_did_not_go_on": bare.count(None),
    }
    rows = [[phase, spread(facts["phases"][phase])] for phase in PHASES]
    rows += [["all of it", spread(facts["seconds"])]]
    rows += [["bare script, saves each step", spread(facts["bare_accelerate_seconds"])]]
    title = (
        f"seconds from the death of one of two ranks to the end of the next step, "
        f"{facts['device']}, {facts['cores']} cores, median of {facts['rounds']} (min to max); "
        f"steps lost: {facts['steps_lost']}; "
        f"the bare script did not go on {facts['bare_accelerate_did_not_go_on']} times"
    )
    console.table(title, ["until", "seconds"], rows)
    write(arguments.out or RESULTS / "recovery.json", facts)


if __name__ == "__main__":
    main()
