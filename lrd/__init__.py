"""lrd: learning rate dropout on many ranks, with exact resumes.

    import lrd
    lrd.LRDropout(optimizer, keep_prob=0.5, seed=0)

The folders, from the ground up:

| folder | what lives there |
| --- | --- |
| `optim/` | learning rate dropout itself: the mask, `LRDropout`, `Magma`, drop-in optimizers |
| `exchange/` | what the ranks send each other of their gradients |
| `recipe/` | the typed recipe |
| `parts/` | what a recipe names: network, optimizer, schedule, loss |
| `data/` | data sets, and batches as functions of a position |
| `distributed/` | how launchers and ranks meet, agree, stop and compare themselves |
| `tracking/` | TensorBoard |
| `checkpoint/` | the training state on disk |
| `job/` | one training job, set up from a recipe |
| `inference/` | trained networks in use: `load_model`, evaluation |
| `study/` | several arms and seeds, compared |
| `train.py` | the training loop: what `accelerate launch -m lrd.train` starts |
| `replay/` | steps of a run computed again: verify, diff, fork, probe |
| `cli/` | the `lrd` command |

Beside them stand `philox.py` (the random bits), `console.py`, `errors.py`, `files.py`,
`generators.py`, `host.py` (cores and memory), `startup.py`, `torchvision_compat.py` and `doctor.py`
(what each rank sees of the cluster).

`import lrd` is cheap: torch and NumPy are imported when one of the names below is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Before anything else: this notes the parent process, and a launcher may die while torch is
# imported.
import lrd.distributed.signals  # noqa: F401

if TYPE_CHECKING:
    from lrd import optim
    from lrd.exchange.kept import exchange_kept
    from lrd.inference.loading import load_model
    from lrd.optim import mask
    from lrd.optim.dropout import LRDropout
    from lrd.optim.magma import Magma

__all__ = ["LRDropout", "Magma", "__version__", "exchange_kept", "load_model", "mask", "optim"]
__version__ = "0.1.0"

# Public name -> its module, and its name in there; None: the module itself.
_PUBLIC_NAMES: dict[str, tuple[str, str | None]] = {
    "LRDropout": ("lrd.optim.dropout", "LRDropout"),
    "Magma": ("lrd.optim.magma", "Magma"),
    "exchange_kept": ("lrd.exchange.kept", "exchange_kept"),
    "load_model": ("lrd.inference.loading", "load_model"),
    "mask": ("lrd.optim.mask", None),
    "optim": ("lrd.optim", None),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used.

    torch takes two seconds to import, and `lrd --help` needs none of it.
    """
    if name not in _PUBLIC_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    module_name, attribute = _PUBLIC_NAMES[name]
    module = import_module(module_name)
    return module if attribute is None else getattr(module, attribute)


def __dir__() -> list[str]:
    return __all__
