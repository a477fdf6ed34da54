"""What each rank of a test runs under `accelerate launch`: a few steps of a job, and what this rank saw and ended with.

replicas.py OUT_DIR MASK_SEED_OF_RANK_1 RECIPE [section.key=value ...]
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from torch import Tensor

from lrd import data, distributed, job, recipe, signals, train
from lrd.errors import UserError

out, other_seed, recipe_path, *overrides = sys.argv[1:]
this = job.set_up(recipe.load(recipe_path, overrides))
rank = this.accelerator.process_index
if rank == 1 and other_seed != "same":
    for group in this.optimizer.param_groups:
        group["mask_seed"] = int(other_seed)
seen: list[int] = []
batches = type(this.batches)
batch = batches.__call__


def recorded(self: data.Batches, step: int, micro_step: int = 0) -> tuple[Tensor, Tensor]:
    seen.extend(self.indices(step, micro_step).tolist())
    return batch(self, step, micro_step)


batches.__call__ = recorded
message = ""
try:
    with signals.StopSignals() as received:
        train.train(this, received)
except UserError as error:
    message = str(error)
digest = hashlib.sha256()
for parameter in this.network.parameters():
    digest.update(parameter.detach().numpy().tobytes())
facts = {"seen": seen, "weights": digest.hexdigest(), "message": message, "step": this.step, "latest": this.latest}
Path(out, f"rank{rank}.json").write_text(json.dumps(facts))
distributed.leave(0)
