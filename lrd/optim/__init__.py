"""Learning rate dropout: the mask, ``LRDropout``, ``Magma``, and torch's optimizers with it.

::

    optimizer = lrd.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, keep_prob=0.5, seed=0)

This package needs torch and NumPy alone and knows nothing of recipes. Its modules:

- ``mask``: the mask, a pure function of (seed, update count, parameter, element)
- ``dropout``: ``LRDropout``, which attaches to any ``torch.optim.Optimizer``
- ``magma``: ``Magma``, the sibling that also scales updates
- ``classes``: torch's optimizers with ``LRDropout`` attached, as drop-in classes
- ``attachment``: which optimizers ``LRDropout`` attaches to, and which it refuses
- ``placement``: where the elements of a shard lie in the whole parameter
- ``step_watch``: warnings of equal masks, and of steps that no mask sees
- ``group_settings``: the mask settings of a parameter group
- ``mask_targets``: what can be masked: the update, or a control to compare it with
- ``last_update``: which elements the latest update kept
- ``tensor_bits``: tensor operations that work on bits
- ``fused``: the same step in one pass over the memory, with the same bits
"""

from lrd.optim.classes import (
    ASGD,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Muon,
    NAdam,
    RAdam,
    RMSprop,
    Rprop,
    SparseAdam,
)
from lrd.optim.dropout import LRDropout
from lrd.optim.magma import Magma

__all__ = [
    "ASGD",
    "SGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "LRDropout",
    "Magma",
    "Muon",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SparseAdam",
]
