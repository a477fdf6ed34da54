"""How fast are steps computed again, compared with their training?

    python benchmarks/replay.py [--rounds 5] [--ranks 1] [--out benchmarks/results/replay.json]

In each round the demonstration's network is trained for some steps, with all that training does
(records, checkpoints, evaluations), and then `lrd verify` computes these steps again, from the
beginning and without extras. Both times are those of the steps, from before the first to after the
last; the imports do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, circumstances, spread, summary, write
from rich.progress import track

from lrd import console
from lrd.tracking.event_file import parse_record, record_offsets

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "digits_resnet34_sgd_lrd.yaml"


def train(run_dir: Path, ranks: int, steps: int) -> float:
    """Train, and return the seconds from before the first step to after the last."""
    command = [sys.executable, "-m", "lrd", "launch", "--num_processes", str(ranks), str(RECIPE)]
    overrides = [f"run_dir={run_dir}", f"trainer.max_steps={steps}", "checkpoint.keep_last=20"]
    subprocess.run([*command, *overrides], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)

    (path,) = run_dir.glob("events.out.tfevents.*")
    content = path.read_bytes()
    events = [parse_record(content, offset) for offset in record_offsets(content)]
    begin = next(
        event.wall_time
        for event in events
        if event is not None and any(value.tag.startswith("about") for value in event.summary.value)
    )
    end = max(event.wall_time for event in events if event is not None and event.step == steps)
    return float(end - begin)


def verify(run_dir: Path) -> tuple[float, bool]:
    """Compute all steps again. Returns the seconds that they took, and whether all follow."""
    command = [sys.executable, "-m", "lrd", "verify", str(run_dir), "--json"]
    done = subprocess.run(
        command, cwd=ROOT, check=False, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    told = json.loads(done.stdout)
    return float(told["seconds"]), bool(told["valid"])


def measure(rounds: int, ranks: int, steps: int) -> dict[str, Any]:
    trained = []
    replayed = []
    all_follow = True
    for number in track(range(rounds + 1), "rounds", transient=True):
        with tempfile.TemporaryDirectory() as folder:
            run_dir = Path(folder) / "run"
            train_seconds = train(run_dir, ranks, steps)
            replay_seconds, follows = verify(run_dir)
        all_follow = all_follow and follows
        if number:  # the first round warms up
            trained.append(train_seconds / steps)
            replayed.append(replay_seconds / steps)

    ratios = [train / replay for train, replay in zip(trained, replayed, strict=True)]
    return {
        "ranks": ranks,
        "threads_of_a_rank": os.environ.get("OMP_NUM_THREADS"),
        "steps": steps,
        "rounds": rounds,
        "all_follow": all_follow,
        "train_seconds": summary(trained),
        "replay_seconds": summary(replayed),
        "speed_ratio": summary(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=66)
    parser.add_argument("--out", type=Path, default=RESULTS / "replay.json")
    arguments = parser.parse_args()

    facts = measure(arguments.rounds, arguments.ranks, arguments.steps)
    console.info(
        f"a step of training {spread(facts['train_seconds'], '.4f')} s, computed again "
        f"{spread(facts['replay_seconds'], '.4f')} s; speed {spread(facts['speed_ratio'], '.3f')} "
        f"of the training's; all follow: {facts['all_follow']}"
    )
    write(arguments.out, circumstances("cpu") | facts)


if __name__ == "__main__":
    main()
