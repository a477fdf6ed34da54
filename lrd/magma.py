"""Magma: masked updates scaled by how well gradient and momentum agree (Joo et al., arXiv 2602.15322).

For each block b, here a parameter tensor, with momentum m and gradient g after the optimizer's ordinary step:

    score  = 0.9 * score + 0.1 * sigmoid(cos(m, g) / tau)
    theta <- theta + keep * score * (update of the optimizer)        keep ~ Bernoulli(keep_prob), one draw a block

It is a sibling of learning rate dropout on the same masks: `granularity="tensor"`, no rescale, and the score.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lrd import kernels
from lrd.dropout import LRDropout

_MOMENTA = ("exp_avg", "momentum_buffer")  # what torch's optimizers call their first moment
_SCORE = "magma_score"


class Magma(LRDropout):
    """Attach Magma to an optimizer that keeps a momentum (Adam and its kin, SGD and RMSprop with momentum).

    The score of a parameter lives in the optimizer's state as `magma_score`, a scalar of the parameter's dtype, and so
    in `state_dict`. It begins at its first sigmoid(cos / tau): where the paper begins it we could not see.

    Args:
        optimizer: any `torch.optim.Optimizer` with a momentum.
        keep_prob: probability in (0, 1) that a block moves (the paper's 0.5).
        seed: seed of the masks, the same on every rank.
        tau: temperature, > 0 (the paper's 2).

    Raises:
        ValueError: an argument out of its range, or an optimizer that is masked already or cannot be.
        RuntimeError: at the first step, where the optimizer keeps no momentum.
    """

    _can_fuse = False  # the score needs the update

    def __init__(self, optimizer: Optimizer, keep_prob: float = 0.5, seed: int = 0, tau: float = 2.0) -> None:
        if not 0.0 < keep_prob < 1.0:
            raise ValueError(f"keep_prob must be in (0, 1), not {keep_prob}")
        if not (math.isfinite(tau) and tau > 0):
            raise ValueError(f"tau must be greater than 0, not {tau}")
        super().__init__(optimizer, keep_prob, seed, granularity="tensor")
        self.tau = tau

    def _arguments(self) -> tuple[Any, ...]:
        return self._defaults["keep_prob"], self._defaults["mask_seed"], self.tau

    def _mask_update(self, index: int, param: Tensor, group: dict[str, Any]) -> None:
        state = self.optimizer.state[param]
        momentum = next((state[name] for name in _MOMENTA if state.get(name) is not None), None)
        if momentum is None or param.grad is None:
            raise RuntimeError(f"Magma needs a momentum, and {type(self.optimizer).__name__} keeps none")
        new, old = kernels.real(param), kernels.real(self._before[index])
        precise = torch.promote_types(new.dtype, torch.float32)
        m, g = (kernels.real(tensor).flatten().to(precise) for tensor in (momentum, param.grad))
        score = torch.sigmoid(torch.cosine_similarity(m, g, dim=0, eps=1e-30) / self.tau)
        if _SCORE in state:
            score = 0.9 * state[_SCORE] + 0.1 * score
        state[_SCORE] = score.to(new.dtype)  # the dtype that load_state_dict would give it
        new.sub_(old).mul_(state[_SCORE]).add_(old)
        super()._mask_update(index, param, group)
