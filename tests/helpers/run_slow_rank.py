"""What each rank of a test runs under `accelerate launch`: training, with one rank that is slow.

    run_slow_rank.py FIRST LAST RECIPE [section.key=value ...]

In the steps from FIRST to LAST rank 1 sleeps before it reads its batch.
"""

from __future__ import annotations

import os
import sys
import time

import torch

from lrd import train
from lrd.job import rank_speed
from lrd.job.state import Job

SECONDS = 0.15  # several times what the ranks compute

if __name__ == "__main__":
    first, last = int(sys.argv[1]), int(sys.argv[2])
    rank_speed.LEAST_STEPS = 8
    rank_speed.LEAST_SECONDS = 0.5
    load_micro_batch = Job.load_micro_batch

    def load_slowly(job: Job, step: int, micro_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        if os.environ["RANK"] == "1" and first <= step + 1 <= last:
            time.sleep(SECONDS)
        return load_micro_batch(job, step, micro_step)

    Job.load_micro_batch = load_slowly  # type: ignore[method-assign]
    train.main(sys.argv[3:])
