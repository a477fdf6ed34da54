"""Warns of steps that draw masks which nobody would want, or none.

- Two optimizers that step in turn draw equal masks, because they have one seed and count their
  parameters alike.
- An optimizer's parameters moved, but no step was counted: its ``first_step`` and ``second_step``,
  for one, go around ``step``, whose hooks draw the masks.

Each is warned of once in a process. Nothing is changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple
from weakref import ref

from torch import Tensor
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from lrd.errors import stacklevel_of_user
from lrd.optim.last_update import GroupUpdate

# Steps in turn with equal masks after which it is no coincidence.
_STEPS_IN_TURN = 2

# Changes of a parameter in place, without a counted step, that are no mere loading of weights.
_CHANGES_WITHOUT_A_STEP = 3


class _Masks(NamedTuple):
    """The masks that the latest step of any optimizer has drawn."""

    watch: Any  # a weak reference to that of the optimizer
    seed: int
    step: int


_latest: _Masks | None = None
_warnings_given: set[str] = set()


class StepWatch:
    """Watches the steps of one optimizer.

    Args:
        optimizer: with the mask settings in its groups.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._reference = ref(self)
        self._update: GroupUpdate | None = None  # of the first group that the latest step moved
        self._times_in_turn = 0
        self._has_stepped = False
        self._version_at_start = _version_of_first_parameter(optimizer)

    def note_step(self, updates: Sequence[GroupUpdate]) -> None:
        """Note the masks of a step, and warn if another optimizer has just drawn the same.

        Args:
            updates: what the step has moved.
        """
        global _latest
        self._has_stepped = self._has_stepped or bool(updates)

        update = next((update for update in updates if update.params), None)
        if update is None or update.draw_arguments["keep_prob"] == 1.0:
            return

        step = update.draw_arguments["step"]
        if isinstance(step, Tensor):  # to look at its value would be a sync point
            return

        self._update = update
        before = _latest
        _latest = _Masks(self._reference, update.draw_arguments["seed"], step)
        if before is None or (before.seed, before.step) != (_latest.seed, _latest.step):
            return

        other: StepWatch | None = before.watch()
        if other is None or other is self or other._update is None:
            return
        if any(index in other._update.shapes for index in update.shapes):
            self._times_in_turn += 1
            if self._times_in_turn == _STEPS_IN_TURN:
                _warn_once(
                    "two optimizers step in turn and draw the same masks: both have seed "
                    f"{before.seed} and a parameter of the same index. Give them other seeds, or "
                    "first_index, or index_by='name'"
                )

    def check_for_unseen_steps(self) -> None:
        """Warn if parameters have moved though this optimizer has never counted a step."""
        if self._has_stepped:
            return

        version = _version_of_first_parameter(self._optimizer)
        has_gradient = any(param.grad is not None for param in _parameters(self._optimizer))
        if has_gradient and version - self._version_at_start >= _CHANGES_WITHOUT_A_STEP:
            warn_of_unseen_steps(self._optimizer)


def warn_of_unseen_steps(optimizer: Optimizer) -> None:
    """Warn that the parameters of an optimizer move without its masks."""
    name = type(optimizer).__name__
    _warn_once(
        f"the parameters of {name} were moved, but not by its step(): no mask was drawn. "
        f"LRDropout masks what {name}.step() does; call step(closure) instead of first_step() and "
        "second_step(), or attach LRDropout to the optimizer inside, such as .base_optimizer"
    )


def _warn_once(message: str) -> None:
    if message not in _warnings_given:
        _warnings_given.add(message)
        warnings.warn(message, stacklevel=stacklevel_of_user())


def _parameters(optimizer: Optimizer) -> Iterable[Tensor]:
    return (param for group in optimizer.param_groups for param in group["params"])


def _version_of_first_parameter(optimizer: Optimizer) -> int:
    """How often the first parameter has been changed in place."""
    param = next(iter(_parameters(optimizer)), None)
    if param is None or isinstance(param, UninitializedParameter) or param.is_inference():
        return 0
    return param._version
