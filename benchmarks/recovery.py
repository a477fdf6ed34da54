"""How long is it from the death of a rank to the end of the next step, and where does it go?

    python benchmarks/recovery.py [--rounds 10] [--hosts] [--out benchmarks/results/recovery.json]

The demonstration's recipe trains on two ranks under `accelerate launch --max_restarts`. Rank 1 is
killed (SIGKILL) in the middle of a step, the launcher starts both ranks again, and the run goes on.
To compare with, a bare script on Accelerate trains the same network under the same launcher and
saves its state after each step; the two take turns. Where it was killed in the middle of a save, it
cannot go on; such rounds are counted. Each moment is written to a file by the process
that comes to it, and the phases are the differences between the latest of the ranks' moments.

With `--hosts` the ranks are on two hosts, network namespaces of this machine that share no files,
with a launcher on each (needs root). They take turns with two ranks on one host.

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
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

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

sys.path.insert(0, str(ROOT))

from tests.helpers.namespaces import hosts
from tests.helpers.namespaces import launcher as host_launcher

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


class Launch(NamedTuple):
    """A command that starts ranks, and the folder to start it in."""

    command: list[str]
    folder: Path = ROOT


def end(launchers: list[subprocess.Popen[bytes]]) -> None:
    """End launchers and their ranks; those that hang are killed."""
    processes = [process for launcher in launchers for process in ranks_of(launcher)]
    for launcher in launchers:
        with suppress(ProcessLookupError):
            launcher.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + SECONDS_TO_END
    while time.monotonic() < deadline and any(launcher.poll() is None for launcher in launchers):
        time.sleep(0.05)
    for process in [*processes, *launchers]:
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            process.kill()
    for launcher in launchers:
        launcher.wait()


def ranks_of(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The ranks that a launcher has started; none if it has ended."""
    ranks = []
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(launcher.pid).children():
            with suppress(psutil.NoSuchProcess):
                if "RANK" in child.environ():
                    ranks.append(child)
    return ranks


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


def kill_and_wait(
    launches: list[Launch], path: Path, kill_after: int, is_bare: bool = False
) -> float:
    """Start a job, kill rank 1 in the step after `kill_after`, and end the job when it goes on.

    Args:
        launches: the command on each host.
        path: the file of marks.

    Returns:
        When it was killed.
    """
    # Without the last variable most restarts of the bare script fail: ranks find the addresses of
    # dead ones in the launcher's store (pytorch 135712). lrd needs no such help.
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    if is_bare:
        variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with tempfile.TemporaryFile("w+") as output:
        launchers = [
            subprocess.Popen(
                launch.command,
                cwd=launch.folder,
                env=variables,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            for launch in launches
        ]
        deadline = time.monotonic() + SECONDS
        while last_step(path) < kill_after and launchers[0].poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(random.uniform(0.0, 0.03))
        ranks = [rank for launcher in launchers for rank in ranks_of(launcher)]
        (victim,) = (rank for rank in ranks if rank.environ()["RANK"] == "1")
        killed = time.time()
        victim.send_signal(signal.SIGKILL)
        while not next_steps(read_marks(path), killed) and launchers[0].poll() is None:
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        went_on = bool(next_steps(read_marks(path), killed))
        end(launchers)
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


def rank_command(path: Path, run_dir: Path | str) -> list[str]:
    """What each rank runs, for a launcher."""
    overrides = [f"run_dir={run_dir}", f"trainer.max_steps={STEPS}", "checkpoint.every_steps=0"]
    return [RANK, str(path), RECIPE, *overrides]


def measure_one_host(folder: Path, kill_after: int) -> dict[str, Any]:
    path = folder / "marks"
    command = [*LAUNCHER, *rank_command(path, folder / "run")]
    return read_recovery(path, kill_and_wait([Launch(command)], path, kill_after))


def measure_two_hosts(folder: Path, kill_after: int) -> dict[str, Any]:
    path = folder / "marks"
    options = ["--rdzv_backend", "lrd", "--max_restarts", "3"]
    with hosts(2, folder) as both:
        target = rank_command(path, "run")
        launches = [
            Launch(host.command(host_launcher(both, host, 1, target, *options)), host.folder)
            for host in both
        ]
        return read_recovery(path, kill_and_wait(launches, path, kill_after))


def read_recovery(path: Path, killed: float) -> dict[str, Any]:
    """The phases from the kill to the next step, by the marks of the ranks."""
    marks = read_marks(path)
    step, end_of_step = min(next_steps(marks, killed).items())
    done = max(
        int(what[5:]) for _, moment, what in marks if what[:5] == "step " and moment < killed
    )
    phases = {}
    before = killed
    for phase in PHASES:
        moments = [moment for _, moment, what in marks if what == phase and moment > killed]
        moment = end_of_step if phase == STEPPED else max(m for m in moments if m < end_of_step)
        phases[phase] = moment - before
        before = moment
    return {"seconds": end_of_step - killed, "phases": phases, "steps_lost": done + 1 - step}


def measure_bare(folder: Path, kill_after: int) -> float | None:
    """The seconds until the bare script went on; None if it did not."""
    script = folder / "bare.py"
    script.write_text(BARE_SCRIPT, encoding="utf-8")
    path = folder / "marks"
    command = [*LAUNCHER, str(script), str(path), str(folder / "state"), str(STEPS)]
    try:
        killed = kill_and_wait([Launch(command)], path, kill_after, is_bare=True)
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
    parser.add_argument("--hosts", action="store_true", help="one host and two, in turn")
    parser.add_argument("--cost", action="store_true", help="measure the cost of every step")
    parser.add_argument("--out", type=Path, help="the file of results")
    arguments = parser.parse_args()
    if arguments.cost:
        measure_cost(arguments.out or RESULTS / "recovery_cost.json")
        return

    if arguments.hosts:
        compare_hosts(arguments.rounds, arguments.out or RESULTS / "recovery_hosts.json")
    else:
        compare_with_bare(arguments.rounds, arguments.out or RESULTS / "recovery.json")


def take_turns(rounds: int, measures: Mapping[str, Callable[[Path, int], Any]]) -> dict[str, Any]:
    """Measure in several ways, in turn, in each second round backwards.

    Returns:
        For each way what came of its rounds.
    """
    random.seed(0)
    found: dict[str, list[Any]] = {way: [] for way in measures}
    for number in track(range(rounds), "rounds", transient=True):
        kill_after = random.randint(*KILL_AFTER)
        for way in list(measures)[:: -1 if number % 2 else 1]:
            with tempfile.TemporaryDirectory() as name:
                found[way].append(measures[way](Path(name), kill_after))
    return found


def summarize_runs(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "seconds": summary([run["seconds"] for run in runs]),
        "phases": {phase: summary([run["phases"][phase] for run in runs]) for phase in PHASES},
        "steps_lost": max(run["steps_lost"] for run in runs),
    }


def compare_hosts(rounds: int, out: Path) -> None:
    ways = {"one host": measure_one_host, "two hosts": measure_two_hosts}
    found = take_turns(rounds, ways)
    facts = {
        **circumstances("cpu"),
        "what": "seconds from the SIGKILL of one of two ranks to the end of the next step",
        "rounds": rounds,
        **{way: summarize_runs(runs) for way, runs in found.items()},
    }
    rows = [[phase, *(spread(facts[way]["phases"][phase]) for way in ways)] for phase in PHASES]
    rows += [["all of it", *(spread(facts[way]["seconds"]) for way in ways)]]
    rows += [["steps lost, at most", *(str(facts[way]["steps_lost"]) for way in ways)]]
    title = (
        f"seconds from the death of one of two ranks to the end of the next step, "
        f"{facts['device']}, {facts['cores']} cores, median of {rounds} (min to max)"
    )
    console.table(title, ["until", *ways], rows)
    write(out, facts)


def compare_with_bare(rounds: int, out: Path) -> None:
    found = take_turns(rounds, {"lrd": measure_one_host, "bare": measure_bare})
    runs, bare = found["lrd"], found["bare"]
    facts = {
        **circumstances("cpu"),
        "what": "seconds from the SIGKILL of one of two ranks to the end of the next step",
        "rounds": rounds,
        **summarize_runs(runs),
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
    write(out, facts)


if __name__ == "__main__":
    main()
