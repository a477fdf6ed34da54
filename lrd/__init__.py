"""lrd: learning rate dropout on many ranks, synchronized by construction and exactly resumable.

    import lrd
    lrd.LRDropout(optimizer, keep_prob=0.5, seed=0)

The import is cheap: torch and NumPy, nothing else.
"""

import lrd.signals  # noqa: F401  before all: it notes the parent, and a launcher may die while torch is imported
from lrd.dropout import LRDropout
from lrd.magma import Magma

__all__ = ["LRDropout", "Magma", "__version__"]
__version__ = "0.1.0"
