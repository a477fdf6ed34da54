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

from lrd.optim import group_settings, mask, tensor_bits
from lrd.optim.dropout import LRDropout, _Param

# The names that torch's optimizers give their first moment.
_MOMENTUM_KEYS = ("exp_avg", "momentum_buffer")
_SCORE_KEY = "magma_score"

# The score of a parameter that has not begun yet. Scores that have begun are in [0, 1].
_NOT_BEGUN = -1.0


class Magma(LRDropout):
    """Attach Magma to an optimizer that keeps a momentum.

    Such are Adam and its kin, Muon, and SGD and RMSprop with momentum. The score of a parameter
    lives in the optimizer's state as ``magma_score``, a scalar of the parameter's dtype, and so in
    ``state_dict``. It is created with the rest of the parameter's state, and is -1 until it begins.

    Args:
        optimizer: any ``torch.optim.Optimizer`` with a momentum. Its parameters must not be
            sharded, because the cosine is that of whole tensors.
        keep_prob: probability in (0, 1) that a block moves (the paper's 0.5). Where a group or a
            schedule sets it to 1 later, every block moves, still scaled by its score.
        seed: seed of the masks, an integer in [0, 2**64), the same on every rank.
        tau: temperature, > 0 (the paper's 2).
        score_start: score before the first update, in [0, 1]. With None, the first update uses its
            sigmoid(cos(m, g) / tau) as it is, without the average. We could not find the paper's
            value; public implementations begin at 1.0, 0.5 or 0.0.
        first_index: see :class:`lrd.LRDropout`.
        index_by: see :class:`lrd.LRDropout`.

    Raises:
        ValueError: an argument is out of its range, or the optimizer is masked already or cannot
            be.
        RuntimeError: at the first step, if the optimizer keeps no momentum. The parameters then
            have their values from before the step.
    """

    _can_fuse = False  # the score needs the optimizer's update
    _supports_shards = False  # the cosine needs whole tensors

    def __init__(
        self,
        optimizer: Optimizer,
        keep_prob: float = 0.5,
        seed: int = 0,
        tau: float = 2.0,
        score_start: float | None = None,
        first_index: int = 0,
        index_by: str = "order",
    ) -> None:
        if mask.check_keep_prob(keep_prob) == 1.0:
            raise ValueError(f"keep_prob must be in (0, 1), not {keep_prob}")
        _check_tau(tau)
        _check_score_start(score_start)

        super().__init__(
            optimizer,
            keep_prob,
            seed,
            granularity="tensor",
            first_index=first_index,
            index_by=index_by,
        )
        self.tau = tau
        self.score_start = score_start

    def _arguments(self) -> tuple[Any, ...]:
        defaults = self._defaults
        return (
            defaults["keep_prob"],
            defaults["mask_seed"],
            self.tau,
            self.score_start,
            defaults.get("mask_first_index", 0),
            defaults.get("mask_index_by", "order"),
        )

    @torch.no_grad()
    def _after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Scale and mask the updates, and give a score to all parameters that have a state.

        The steps that do not count may create an optimizer's state too. The step at lr 0 that
        ``torch.distributed.checkpoint`` takes before it saves or loads must create every tensor of
        it: what it lacks is not loaded.
        """
        self._require_momenta()
        super()._after_step(optimizer, args, kwargs)

        for item in self._params:
            state = optimizer.state.get(item.param)  # not [item.param], which would create it
            if state and _SCORE_KEY not in state:
                state[_SCORE_KEY] = self._initial_score(item.param)

    def _changes_update(self, group: dict[str, Any]) -> bool:
        """Whether the updates of a group's generic steps are masked or scaled after them.

        The score scales updates at keep_prob 1 too.
        """
        return bool(group["masks"] != "gradient")

    def _scale_update(self, item: _Param) -> None:
        """Scale a parameter's update by its score, before it is masked."""
        param = item.param
        state = self.optimizer.state[param]
        momentum = self._find_momentum(param)
        gradient = param.grad
        assert momentum is not None
        assert gradient is not None

        new = tensor_bits.as_real(param)
        old = tensor_bits.as_real(self._old_value(item.mask_index))

        # The cosine is computed in float32 at least, whatever the parameter's dtype.
        precise = torch.promote_types(new.dtype, torch.float32)
        cosine = torch.cosine_similarity(
            tensor_bits.as_real(momentum).flatten().to(precise),
            tensor_bits.as_real(gradient.to_dense()).flatten().to(precise),
            dim=0,
            eps=1e-30,
        )  # shape ()

        if _SCORE_KEY not in state:
            state[_SCORE_KEY] = self._initial_score(param)
        score = self._average(state[_SCORE_KEY], torch.sigmoid(cosine / self.tau))

        # load_state_dict casts state to the parameter's dtype, so it is stored in that dtype.
        state[_SCORE_KEY] = score.to(new.dtype)
        new.sub_(old).mul_(state[_SCORE_KEY]).add_(old)

    def _initial_score(self, param: Tensor) -> Tensor:
        """The score of a parameter before its first update, of shape ()."""
        start = _NOT_BEGUN if self.score_start is None else float(self.score_start)
        return torch.full((), start, dtype=tensor_bits.as_real(param).dtype, device=param.device)

    def _average(self, previous: Tensor, latest: Tensor) -> Tensor:
        """The moving average of the scores, which begins as `score_start` has it.

        A loaded score may not have begun although this Magma has a `score_start`. Whether it has is
        decided on the device, so that a GPU need not be waited for.
        """
        is_first = previous < 0.0
        if self.score_start is None:
            return torch.where(is_first, latest, 0.9 * previous + 0.1 * latest)

        start = torch.full_like(previous, self.score_start)
        return 0.9 * torch.where(is_first, start, previous) + 0.1 * latest

    def _find_momentum(self, param: Tensor) -> Tensor | None:
        """The first moment that the optimizer keeps of a parameter's gradients, if any."""
        state = self.optimizer.state.get(param, {})
        for key in _MOMENTUM_KEYS:
            if state.get(key) is not None:
                momentum: Tensor = state[key]
                return momentum

        return None

    def _require_momenta(self) -> None:
        """Take the step back and refuse the optimizer if there is no momentum to compare with.

        It cannot be known earlier: optimizers create their state in the first step.
        """
        for item in self._params:
            group = self.optimizer.param_groups[item.group_number]
            if item.param.grad is None or self._find_momentum(item.param) is not None:
                continue
            if group_settings.is_zero_lr(group.get("lr")) and self._moved_nothing([item]):
                continue

            self._restore_values()
            raise RuntimeError(
                f"Magma needs a momentum, and {type(self.optimizer).__name__} keeps none"
            )

    def _restore_values(self) -> None:
        """Give the parameters of this step their values from before it."""
        for item in self._params:
            state = self.optimizer.state.get(item.param, {})
            for key in ("", *self._states_that_follow):
                if (item.mask_index, key) in self._saved:
                    tensor = state[key] if key else item.param
                    tensor.copy_(self._old_value(item.mask_index, key))


def _check_tau(tau: Any) -> None:
    if not isinstance(tau, Real) or not 0.0 < float(tau) < math.inf:
        raise ValueError(f"tau must be a number greater than 0, not {tau!r}")


def _check_score_start(score_start: Any) -> None:
    if score_start is None:
        return

    # Tensors and booleans are no numbers here.
    is_number = isinstance(score_start, Real) and not isinstance(score_start, bool)
    if not is_number or not 0.0 <= float(score_start) <= 1.0:
        raise ValueError(f"score_start must be None or a number in [0, 1], not {score_start!r}")
