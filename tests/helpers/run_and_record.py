"""What each rank of a test runs under `accelerate launch`: a job, and what this rank saw of it.

    run_and_record.py OUT_DIR MASK_SEED_OF_RANK_1 RECIPE [section.key=value ...]

Writes OUT_DIR/rank<i>.json: the samples that the rank saw, a digest of its weights at the end, the
error that ended it, the steps done and the metrics of the last evaluation.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from torch import Tensor

from lrd import recipe, train
from lrd.data.batches import Batches
from lrd.distributed.accelerator import exit_process
from lrd.distributed.roll_call import RollCall
from lrd.distributed.signals import StopSignals
from lrd.errors import UserError
from lrd.job.setup import set_up

out_dir, mask_seed_of_rank_1, recipe_path, *overrides = sys.argv[1:]
job = set_up(recipe.load(recipe_path, overrides), RollCall())
rank = job.accelerator.process_index

if rank == 1 and mask_seed_of_rank_1 != "same":
    for group in job.raw_optimizer.param_groups:
        group["mask_seed"] = int(mask_seed_of_rank_1)

samples: list[int] = []
original = Batches.micro_batch


def recording_micro_batch(self: Batches, step: int, micro_step: int = 0) -> tuple[Tensor, Tensor]:
    samples.extend(self.indices(step, micro_step).tolist())
    return original(self, step, micro_step)


Batches.micro_batch = recording_micro_batch

message = ""
try:
    with StopSignals() as signals:
        train.train(job, signals)
except UserError as error:
    message = str(error)

digest = hashlib.sha256()
for parameter in job.raw_model.parameters():
    digest.update(parameter.detach().numpy().tobytes())

facts = {
    "seen": samples,
    "weights": digest.hexdigest(),
    "message": message,
    "step": job.step,
    "latest": job.last_eval_metrics,
}
Path(out_dir, f"rank{rank}.json").write_text(json.dumps(facts))
exit_process(0)
