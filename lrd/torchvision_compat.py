"""torchvision, importable beside any build of torch.

torchvision as published on PyPI is built for CUDA. Beside a CPU-only torch its compiled operators
do not load, and `import torchvision` fails with "operator torchvision::nms does not exist". Nothing
in lrd calls those operators, so it is enough to declare the two names that the import looks for.
Where the operators load, nothing is declared.
"""

from __future__ import annotations

import sys

import torch

try:
    import torchvision
except RuntimeError as error:
    if "torchvision::" not in str(error):
        raise

    # Forget the modules that were imported before the error.
    for _name in list(sys.modules):
        if _name.partition(".")[0] == "torchvision":
            del sys.modules[_name]

    # The library is kept in a global name: its operators disappear when it is deleted.
    _OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for _name in ("nms", "qnms"):
        _OPERATORS.define(  # type: ignore[no-untyped-call]
            f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
    import torchvision

__all__ = ["torchvision"]
