"""torchvision, importable beside any build of torch.

torchvision as published on PyPI is built for CUDA. Beside a CPU-only torch its compiled operators do not load, and
`import torchvision` fails with "operator torchvision::nms does not exist". Nothing in lrd calls those operators, so
declaring the two names that the import looks for is enough; where they load by themselves nothing is done.
"""

from __future__ import annotations

import sys

import torch

try:
    import torchvision
except RuntimeError as error:
    if "torchvision::" not in str(error):
        raise
    for _name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[_name]
    _OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]  # kept: with it go the names
    for _name in ("nms", "qnms"):
        _OPERATORS.define(  # type: ignore[no-untyped-call]
            f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
    import torchvision

__all__ = ["torchvision"]
