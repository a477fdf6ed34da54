"""What each rank of a test runs under `accelerate launch`: training that may load no pickle.

    run_without_pickles.py RECIPE [section.key=value ...]

It trains to step 3, and again, from that checkpoint, to step 6. Ends with status 0 only if neither
torch's collectives of objects nor `pickle.loads` was called.
"""

from __future__ import annotations

import pickle
import sys
from typing import Any, NoReturn

from torch.distributed import distributed_c10d

from lrd import train
from lrd.distributed import accelerator


def refuse(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("a pickle was loaded")


if __name__ == "__main__":
    distributed_c10d._tensor_to_object = refuse
    distributed_c10d._object_to_tensor = refuse
    pickle.loads = refuse
    pickle.load = refuse

    recipe, *overrides = sys.argv[1:]
    for steps in (3, 6):
        status = train.run(recipe, [*overrides, f"trainer.max_steps={steps}"])
        if status:
            break
    accelerator.exit_process(status)
