"""Magma: masked updates scaled by the agreement of gradient and momentum.

The source is Joo et al., arXiv 2602.15322.

For each block b, here a parameter tensor, with momentum m and gradient g after the optimizer's
ordinary step::

    score  = 0.9 * score + 0.1 * sigmoid(cos(m, g) / tau)
    theta <- theta + keep * score * (update of the optimizer)

where keep ~ Bernoulli(keep_prob) is one draw a block. Magma is a sibling of learning rate dropout
on the same masks: ``granularity="tensor"``, no rescale, and the score.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lrd.optim import mask, tensor_bits
from lrd.optim.dropout import LRDropout

# The names that torch's optimizers give their first moment.
_MOMENTUM_KEYS = ("exp_avg", "momentum_buffer")
_SCORE_KEY = "magma_score"


class Magma(LRDropout):
    """Attach Magma to an optimizer that keeps a momentum.

    Such are Adam and its kin, and SGD and RMSprop with momentum. The score of a parameter lives in
    the optimizer's state as ``magma_score``, a scalar of the parameter's dtype, and so in
    ``state_dict``. It begins at its first sigmoid(cos(m, g) / tau); we could not find where the
    paper begins it.

    Args:
        optimizer: any ``torch.optim.Optimizer`` with a momentum.
        keep_prob: probability in (0, 1) that a block moves (the paper's 0.5). Where a group or a
            schedule sets it to 1 later, every block moves, still scaled by its score.
        seed: seed of the masks, an integer in [0, 2**64), the same on every rank.
        tau: temperature, > 0 (the paper's 2).

    Raises:
        ValueError: an argument is out of its range, or the optimizer is masked already or cannot
            be.
        RuntimeError: at the first step, if the optimizer keeps no momentum.
    """

    _can_fuse = False  # the score needs the optimizer's update

    def __init__(
        self, optimizer: Optimizer, keep_prob: float = 0.5, seed: int = 0, tau: float = 2.0
    ) -> None:
        if mask.check_keep_prob(keep_prob) == 1.0:
            raise ValueError(f"keep_prob must be in (0, 1), not {keep_prob}")
        _check_tau(tau)

        super().__init__(optimizer, keep_prob, seed, granularity="tensor")
        self.tau = tau

    def _arguments(self) -> tuple[Any, ...]:
        return self._defaults["keep_prob"], self._defaults["mask_seed"], self.tau

    def _changes_update(self, group: dict[str, Any]) -> bool:
        """Whether the group's generic step is followed by `_mask_update`.

        The score scales updates at keep_prob 1 too.
        """
        return bool(group["masks"] != "gradient")

    def _mask_update(self, index: int, param: Tensor, group: dict[str, Any]) -> None:
        """Scale one parameter's update by its score, then restore it if its block is dropped."""
        state = self.optimizer.state[param]
        momenta = [state[key] for key in _MOMENTUM_KEYS if state.get(key) is not None]
        if not momenta or param.grad is None:
            raise RuntimeError(
                f"Magma needs a momentum, and {type(self.optimizer).__name__} keeps none"
            )

        new = tensor_bits.as_real(param)
        old = tensor_bits.as_real(self._old_value(index))

        # The cosine is computed in float32 at least, whatever the parameter's dtype.
        precise = torch.promote_types(new.dtype, torch.float32)
        momentum = tensor_bits.as_real(momenta[0]).flatten().to(precise)
        gradient = tensor_bits.as_real(param.grad).flatten().to(precise)

        cosine = torch.cosine_similarity(momentum, gradient, dim=0, eps=1e-30)
        score = torch.sigmoid(cosine / self.tau)
        if _SCORE_KEY in state:
            score = 0.9 * state[_SCORE_KEY] + 0.1 * score

        # load_state_dict casts state to the parameter's dtype, so it is stored in that dtype.
        state[_SCORE_KEY] = score.to(new.dtype)
        new.sub_(old).mul_(state[_SCORE_KEY]).add_(old)

        super()._mask_update(index, param, group)


def _check_tau(tau: Any) -> None:
    if not isinstance(tau, Real) or not 0.0 < float(tau) < math.inf:
        raise ValueError(f"tau must be a number greater than 0, not {tau!r}")
