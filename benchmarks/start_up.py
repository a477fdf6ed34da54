"""How long is it from the command to the end of the first optimizer step?

    python benchmarks/start_up.py [--rounds 5] [--out benchmarks/results/start_up.json]

New and resumed runs of the demonstration's recipe start under `accelerate launch`, on one rank and
on two. The first step ends with the first record of `train/loss` in TensorBoard's file, which has
the time when it was made; so measuring adds nothing. Imports alone are measured too, and two things
to compare with:

- the limit: the launcher and after it each rank import torch and accelerate, each in a fresh
  process;
- a bare script on Accelerate that takes one step of the same network and does nothing else.

What is measured takes turns, in each second round backwards. Files are read from the system's
cache.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

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
from rich.progress import track
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from lrd import console

PYTHON = [sys.executable, "-c"]
LIMIT = "python -c 'import torch, accelerate'"
COMMANDS = {
    "python -c pass": [*PYTHON, "pass"],
    "python -c 'import torch'": [*PYTHON, "import torch"],
    LIMIT: [*PYTHON, "import torch, accelerate"],
    "python -c 'import lrd'": [*PYTHON, "import lrd"],
    "python -c 'import lrd; lrd.LRDropout'": [*PYTHON, "import lrd; lrd.LRDropout"],
    "python -c 'import lrd.train'": [*PYTHON, "import lrd.train"],
    # Optimizers import torch._dynamo.
    "python -c 'import lrd.train, torch._dynamo'": [*PYTHON, "import lrd.train, torch._dynamo"],
    "lrd --help": [str(Path(sys.executable).with_name("lrd")), "--help"],
}
BARE_SCRIPT = f"""{BARE_TRAINING}
import time
accelerator.backward(torch.nn.functional.cross_entropy(network(images), labels))
optimizer.step()
if accelerator.is_main_process:
    print(time.time())
accelerator.end_training()
"""


class Names(NamedTuple):
    """The names of what is measured under the launcher, in the order in which it has to run."""

    bare_script: str
    new_run: str
    resumed_run: str


def names_of_first_steps(ranks: int) -> Names:
    plural = "s" if ranks > 1 else ""
    prefix = f"first step, {ranks} rank{plural}: "
    return Names(f"{prefix}bare script", f"{prefix}new run", f"{prefix}resumed run")


def run(arguments: list[str]) -> tuple[float, str]:
    """Run a command. Returns when it was started, and what it wrote to standard output."""
    began = time.time()
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return began, done.stdout


def launch(ranks: int, *target: str) -> tuple[float, str]:
    config = ["--config_file", "launch/accelerate/cpu.yaml", "--num_processes", str(ranks)]
    return run([*ACCELERATE, *config, *target])


def measure_bare_script(ranks: int, script: Path) -> float:
    """Return the seconds to the end of the bare script's step."""
    began, output = launch(ranks, str(script))
    return float(output.split()[-1]) - began


def measure_run(ranks: int, run_dir: Path, steps: int) -> float:
    """Return the seconds to the end of the first step of this start.

    Args:
        steps: that the run has done then, in all starts.
    """
    overrides = [f"run_dir={run_dir}", f"trainer.max_steps={steps}"]
    began, _ = launch(ranks, "-m", "lrd.train", RECIPE, *overrides)

    event_file = max(run_dir.glob("events.out.tfevents.*"))
    records = [
        (event.step, event.wall_time)
        for event in EventFileLoader(str(event_file)).Load()
        for value in event.summary.value
        if value.tag == "train/loss"
    ]
    ((step, ended),) = records
    assert step == steps
    return float(ended) - began


def measure(what: str, folder: Path) -> dict[str, float]:
    """Measure the seconds, by name.

    Args:
        what: a command's name or a number of ranks.
    """
    if what in COMMANDS:
        began, _ = run(COMMANDS[what])
        return {what: time.time() - began}

    ranks = int(what)
    run_dir = folder / what
    script = folder / "bare.py"
    script.write_text(BARE_SCRIPT, encoding="utf-8")
    names = names_of_first_steps(ranks)
    return {
        names.bare_script: measure_bare_script(ranks, script),
        names.new_run: measure_run(ranks, run_dir, steps=1),
        names.resumed_run: measure_run(ranks, run_dir, steps=2),
    }


def measure_round(number: int) -> dict[str, float]:
    order = [*COMMANDS, "1", "2"]
    if number % 2:
        order.reverse()

    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for what in track(order, f"round {number + 1}", transient=True):
            seconds |= measure(what, Path(folder))
    return seconds


def report(rounds: list[dict[str, float]], out: Path) -> None:
    names = [*COMMANDS, *names_of_first_steps(1), *names_of_first_steps(2)]
    seconds = {name: summary([times[name] for times in rounds]) for name in names}

    shares = {}
    ratios = {}
    for ranks in (1, 2):
        names_with_ranks = names_of_first_steps(ranks)
        script = names_with_ranks.bare_script
        for name in names_with_ranks:
            shares[name] = summary([2 * times[LIMIT] / times[name] for times in rounds])
            if name != script:
                ratios[name] = summary([times[name] / times[script] for times in rounds])

    facts = {
        **circumstances("cpu"),
        "what": "seconds; of first steps: from the command to the end of the first optimizer step",
        "limit": f"2 x {LIMIT}: the launcher's and a rank's",
        "rounds": rounds,
        "seconds": seconds,
        "share_of_limit": shares,
        "ratio_to_bare_script": ratios,
    }

    rows = []
    for name in names:
        share = spread(shares[name]) if name in shares else ""
        ratio = spread(ratios[name]) if name in ratios else ""
        rows.append([name, spread(seconds[name]), share, ratio])
    title = (
        f"seconds, median of {len(rounds)} (min to max), {facts['device']}, {facts['cores']} cores"
    )
    console.table(title, ["", "seconds", "the limit's share", "in bare scripts"], rows)
    write(out, facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "start_up.json")
    arguments = parser.parse_args()
    report([measure_round(number) for number in range(arguments.rounds)], arguments.out)


if __name__ == "__main__":
    main()
