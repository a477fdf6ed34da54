"""How long from the command to the end of the first optimizer step? New and resumed runs, one rank and two; imports.

    python benchmarks/start_up.py [--rounds 5] [--out benchmarks/results/start_up.json]

The recipe of the demonstration under `accelerate launch`. The first step ends with the first record of `train/loss` in
TensorBoard's file, which has a time of its own: nothing is added to what is measured. Two things to compare it with:

- the limit: the launcher and after it each rank import torch and accelerate, each in a fresh process;
- a bare script on Accelerate that takes one step of the same network and does nothing else.

What is measured takes turns, in each second round backwards. Files are read from the system's cache.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import RECIPE, RESULTS, ROOT, circumstances, spread, summary, write
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
    "python -c 'import lrd.train, torch._dynamo'": [*PYTHON, "import lrd.train, torch._dynamo"],  # as optimizers do
    "lrd --help": [str(Path(sys.executable).with_name("lrd")), "--help"],
}
LAUNCHER = [str(Path(sys.executable).with_name("accelerate")), "launch"]
BARE = """
import time, torch
from accelerate import Accelerator
from lrd.models import ResNet
accelerator, network = Accelerator(cpu=True), ResNet()
network, optimizer = accelerator.prepare(network, torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9))
images = torch.rand(64 // accelerator.num_processes, 3, 8, 8)
accelerator.backward(torch.nn.functional.cross_entropy(network(images), torch.zeros(len(images), dtype=torch.long)))
optimizer.step()
if accelerator.is_main_process:
    print(time.time())
accelerator.end_training()
"""


def first_steps(ranks: int) -> tuple[str, str, str]:
    """The names of what is measured under the launcher, in the order in which it has to run."""
    of = f"first step, {ranks} rank{'s' * (ranks > 1)}: "
    return f"{of}bare script", f"{of}new run", f"{of}resumed run"


def run(arguments: list[str]) -> tuple[float, str]:
    """When a command was started, and what it wrote to standard output."""
    began = time.time()
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return began, done.stdout


def launch(ranks: int, *target: str) -> tuple[float, str]:
    config = ["--config_file", "launch/accelerate/cpu.yaml", "--num_processes", str(ranks)]
    return run([*LAUNCHER, *config, *target])


def bare(ranks: int, script: Path) -> float:
    began, output = launch(ranks, str(script))
    return float(output.split()[-1]) - began


def train(ranks: int, run_dir: Path, steps: int) -> float:
    """Seconds to the first step of this start; `steps` in all are done then."""
    began, _ = launch(ranks, "-m", "lrd.train", RECIPE, f"run_dir={run_dir}", f"trainer.max_steps={steps}")
    events = EventFileLoader(str(max(run_dir.glob("events.out.tfevents.*")))).Load()
    ((step, ended),) = [
        (event.step, event.wall_time) for event in events for value in event.summary.value if value.tag == "train/loss"
    ]
    assert step == steps
    return float(ended) - began


def measure(what: str, folder: Path) -> dict[str, float]:
    """Seconds, by name. `what` is a command's name or a number of ranks."""
    if what in COMMANDS:
        began, _ = run(COMMANDS[what])
        return {what: time.time() - began}
    ranks, run_dir, script = int(what), folder / what, folder / "bare.py"
    script.write_text(BARE, encoding="utf-8")
    seconds = (bare(ranks, script), train(ranks, run_dir, steps=1), train(ranks, run_dir, steps=2))
    return dict(zip(first_steps(ranks), seconds, strict=True))


def one_round(number: int) -> dict[str, float]:
    order = [*COMMANDS, "1", "2"]
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for what in track(order[:: -1 if number % 2 else 1], f"round {number + 1}", transient=True):
            seconds |= measure(what, Path(folder))
    return seconds


def report(rounds: list[dict[str, float]], out: Path) -> None:
    names = [*COMMANDS, *first_steps(1), *first_steps(2)]
    seconds = {name: summary([one[name] for one in rounds]) for name in names}
    shares, ratios = {}, {}
    for ranks in (1, 2):
        script, *runs = first_steps(ranks)
        shares |= {name: summary([2 * one[LIMIT] / one[name] for one in rounds]) for name in (script, *runs)}
        ratios |= {name: summary([one[name] / one[script] for one in rounds]) for name in runs}
    facts = {
        **circumstances("cpu"),
        "what": "seconds; of first steps: from the command to the end of the first optimizer step",
        "limit": f"2 x {LIMIT}: the launcher's and a rank's",
        "rounds": rounds,
        "seconds": seconds,
        "share_of_limit": shares,
        "ratio_to_bare_script": ratios,
    }
    rows = [
        [name, spread(seconds[name])] + [spread(of[name]) if name in of else "" for of in (shares, ratios)]
        for name in names
    ]
    title = f"seconds, median of {len(rounds)} (min to max), {facts['device']}, {facts['cores']} cores"
    console.table(title, ["", "seconds", "the limit's share", "in bare scripts"], rows)
    write(out, facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "start_up.json")
    arguments = parser.parse_args()
    report([one_round(number) for number in range(arguments.rounds)], arguments.out)


if __name__ == "__main__":
    main()
