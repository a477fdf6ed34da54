"""Learning rate dropout (Lin et al., arXiv 1912.00144) for any ``torch.optim.Optimizer``.

::

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    lrd.LRDropout(optimizer, keep_prob=0.5, seed=0)

In each update, each parameter element keeps its learning rate with probability ``keep_prob`` and
has learning rate zero otherwise: the optimizer takes its ordinary step, then dropped elements get
their old values back, bit for bit. Gradients, momentum and moments are never masked. Weight decay,
coupled or decoupled, moves nothing that is dropped. The mask needs no communication: ranks with the
same seed and update count draw the same bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lrd.optim import group_settings, last_update, mask, mask_targets, tensor_bits
from lrd.optim.fused import dispatch


class _ReplacedGradient(NamedTuple):
    """A gradient that was swapped for another (or None) while the optimizer steps."""

    param: Tensor
    original: Tensor
    replacement: Tensor | None  # None: the optimizer finds no gradient


class LRDropout:
    """Mask the updates of an optimizer through its public hooks.

    The optimizer stays the same object. The settings of the masks live in its ``param_groups``, so
    ``state_dict`` contains them and each group can have its own:

    - ``keep_prob``; it may be changed at any time, for example by a schedule
    - ``mask_seed``, ``mask_granularity``, ``mask_rescale`` and ``masks``
    - ``mask_step``, the number of updates done. To capture steps in a CUDA graph, make it an int64
      tensor of shape () on the device, and take one step before.

    Groups added later get the values given here.

    A step counts in all groups if any parameter of the optimizer has a gradient: also in a group
    that has none. It does not count in a group whose lr is 0 if it moved nothing there, and in no
    group if a GradScaler skips it.

    Float32 steps of SGD, Adam and AdamW, on a CPU only large ones, are taken by compiled kernels.
    These update and mask in one pass, without a copy of the parameters, see ``lrd.optim.fused``. In
    all other steps the optimizer updates by itself, and dropped elements are restored from a copy
    of the parameters that are masked.

    Args:
        optimizer: any ``torch.optim.Optimizer``; its groups may already have a ``keep_prob``.
        keep_prob: probability in (0, 1] that an element moves; 1 leaves the optimizer as it is, bit
            for bit.
        seed: seed of the masks, an integer in [0, 2**64), the same on every rank.
        granularity: which elements share one draw: ``element`` (the paper), ``row``, ``column`` or
            ``tensor``, see :func:`lrd.optim.mask.keep_mask`.
        rescale: divide a kept element's update by ``keep_prob`` (as the mask rounds it, to 2**-16),
            so that the expected update is the optimizer's own (SkipUpdate, Joo et al.,
            arXiv 2602.15322; not in the paper).
        masks: what is masked. ``update`` is learning rate dropout. The others are controls to
            compare it with: ``gradient`` masks the gradient, so that momentum and moments see zeros
            too; ``momentum_buffer`` masks SGD's momentum buffer, the fault of the first public
            implementation (see docs/learning-rate-dropout.md).

    Attributes:
        optimizer: the optimizer.
        is_fused: whether the latest step was taken in one pass.

    Raises:
        ValueError: an argument is out of its range, or the optimizer has LRDropout attached already
            or cannot take it.
    """

    _can_fuse = True

    def __init__(
        self,
        optimizer: Optimizer,
        keep_prob: float = 0.5,
        seed: int = 0,
        granularity: str = "element",
        rescale: bool = False,
        masks: str = "update",
    ) -> None:
        if get_lr_dropout(optimizer) is not None:
            raise ValueError("optimizer has LRDropout attached already; remove() the first one")
        mask_targets.check_optimizer(optimizer, masks)

        self.optimizer = optimizer
        self._defaults: dict[str, Any] = {
            "keep_prob": mask.check_keep_prob(keep_prob),
            "mask_seed": mask.check_seed(seed),
            "mask_step": 0,
            "mask_granularity": mask.check_granularity(granularity),
            "mask_rescale": bool(rescale),
            "masks": masks,
        }
        for group in optimizer.param_groups:
            mask.check_keep_prob(group.get("keep_prob", keep_prob))

        # add_param_group completes a later group from `defaults`.
        optimizer.defaults.update(self._defaults)
        self._fill_groups()

        # Values before the update, by the parameter's index; the tensors are reused.
        self._old_values: dict[int, Tensor] = {}
        self._saved_indices: set[int] = set()  # those that this step has saved

        self._replaced_gradients: list[_ReplacedGradient] = []
        self._last_updates: list[last_update.GroupUpdate] = []
        self._settings_before_load: list[dict[str, Any]] = []
        self.is_fused = False

        optimizer._lr_dropout = self  # type: ignore[attr-defined]

        # torch leaves hooks out of copies and pickles, so a copy has to attach LRDropout again.
        optimizer.__reduce_ex__ = self._reduce_optimizer  # type: ignore[method-assign]

        # A compiled step calls the hooks uncompiled: masks are drawn outside of its graph.
        # Called here and not as a decorator, so that only attaching, and not `import lrd`, pays for
        # importing torch's compiler.
        disable: Callable[..., Any] = torch.compiler.disable
        self._handles = [
            optimizer.register_step_pre_hook(disable(self._before_step)),
            optimizer.register_step_post_hook(disable(self._after_step)),
            optimizer.register_load_state_dict_pre_hook(self._before_load),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]

    def remove(self) -> None:
        """Detach from the optimizer, which is then the stock optimizer again.

        All settings of masks leave its groups and defaults, also a ``keep_prob`` that a group had
        before LRDropout was attached.
        """
        if get_lr_dropout(self.optimizer) is not self:
            return

        for handle in self._handles:
            handle.remove()

        for key in self._defaults:
            self.optimizer.defaults.pop(key, None)
            for group in self.optimizer.param_groups:
                group.pop(key, None)

        self._old_values.clear()
        self._last_updates.clear()
        del self.optimizer._lr_dropout  # type: ignore[attr-defined]
        del self.optimizer.__reduce_ex__

    # What the latest update kept

    def kept_fractions(self) -> list[float]:
        """Return the fraction of its elements that the latest update kept, for each group.

        The fraction is 0 where the update moved no element. Nothing is counted during training: the
        masks are drawn again from their position, on the host.
        """
        return last_update.kept_fractions(self._last_updates, len(self.optimizer.param_groups))

    def keeps(self, index: int, element: int) -> bool:
        """Return whether the latest update kept one element.

        Args:
            index: the parameter's index in the optimizer, counted through its groups.
            element: the element's index in the flattened parameter.
        """
        return last_update.is_kept(self._last_updates, index, element)

    # The step: `_before_step` and `_after_step` are hooks around the optimizer's own step.

    @torch.no_grad()
    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Take the step in one pass if possible; otherwise save what is to be restored after it."""
        # A closure may compute the gradients during the step. args[0] is the optimizer.
        has_closure = any(arg is not None for arg in (*args[1:], *kwargs.values()))

        self._saved_indices = set()
        self._restore_gradients()  # of an earlier step that failed, if any
        for group in optimizer.param_groups:
            group_settings.check_settings(optimizer, group)

        self._try_step_in_one_pass(has_closure)
        if not self.is_fused:
            self._prepare_generic_step(has_closure)

    @torch.no_grad()
    def _after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Restore dropped elements, unless the step was taken in one pass, and count the update."""
        self._restore_gradients()
        self._last_updates = []
        if _is_skipped_by_scaler(optimizer):
            return

        params_by_group = self._params_with_gradient()
        if not any(params_by_group):
            return

        for number, group in enumerate(optimizer.param_groups):
            params = params_by_group[number]
            if group_settings.is_zero_lr(group.get("lr")) and self._moved_nothing(params):
                continue

            # Read before the count goes up: it is part of the masks' position.
            self._last_updates.append(last_update.GroupUpdate.from_group(number, group, params))

            if not self.is_fused and self._changes_update(group):
                for index, param in params:
                    self._mask_update(index, param, group)

            group["mask_step"] += 1

    def _try_step_in_one_pass(self, has_closure: bool) -> None:
        """Update and mask now, in one pass, if the fused kernels support every update of the step.

        The gradients are hidden afterwards, so the optimizer's own step then moves nothing.
        """
        may_fuse = self._can_fuse and not has_closure and self._is_next_to_the_step()
        updates = dispatch.find_updates(self.optimizer) if may_fuse else []

        self.is_fused = bool(updates)
        if not self.is_fused:
            return

        dispatch.step_in_one_pass(self.optimizer, updates)
        for update in updates:
            self._replace_gradient(update.param, None)

    def _prepare_generic_step(self, has_closure: bool) -> None:
        """Mask the gradients that are to be masked, and save the values that may be restored."""
        for number, index, param in self._parameters():
            group = self.optimizer.param_groups[number]
            if param.grad is None and not has_closure:
                continue

            if group["keep_prob"] < 1.0 and group["masks"] == "gradient":
                self._mask_gradient(index, param, group)

            # At lr 0 the old values also show whether the step has moved anything.
            if self._changes_update(group) or group_settings.is_zero_lr(group.get("lr")):
                self._save_value(index, param)

    def _changes_update(self, group: dict[str, Any]) -> bool:
        """Whether the group's generic step is followed by `_mask_update`."""
        return bool(group["keep_prob"] < 1.0 and group["masks"] != "gradient")

    def _mask_update(self, index: int, param: Tensor, group: dict[str, Any]) -> None:
        """Give the dropped elements of a parameter their old bits back after the generic step."""
        new = tensor_bits.as_real(param)
        old = tensor_bits.as_real(self._old_value(index))
        keep = group_settings.draw_mask(index, new, group)

        if group["mask_rescale"]:
            new.sub_(old).div_(mask.effective_keep_prob(group["keep_prob"])).add_(old)

        tensor_bits.select(new, old, keep)

        if group["masks"] == "momentum_buffer":
            momentum_buffer = self.optimizer.state[param]["momentum_buffer"]
            tensor_bits.as_real(momentum_buffer).masked_fill_(~keep, 0.0)

    def _mask_gradient(self, index: int, param: Tensor, group: dict[str, Any]) -> None:
        """Replace a parameter's gradient by a masked copy for the time of the step."""
        if param.grad is None:
            raise RuntimeError(
                "masks='gradient' needs the gradient before the step: "
                "it does not work with a closure"
            )
        if param.grad.is_sparse:
            raise RuntimeError("masks='gradient' does not work with sparse gradients")

        masked = param.grad.clone()
        masked_real = tensor_bits.as_real(masked)
        keep = group_settings.draw_mask(index, masked_real, group)
        masked_real.masked_fill_(~keep, 0.0)

        if group["mask_rescale"]:
            masked.div_(mask.effective_keep_prob(group["keep_prob"]))

        self._replace_gradient(param, masked)

    def _replace_gradient(self, param: Tensor, replacement: Tensor | None) -> None:
        assert param.grad is not None
        self._replaced_gradients.append(_ReplacedGradient(param, param.grad, replacement))
        param.grad = replacement

    def _restore_gradients(self) -> None:
        for param, original, replacement in self._replaced_gradients:
            # A gradient that somebody else has set since stays.
            if param.grad is replacement:
                param.grad = original

        self._replaced_gradients = []

    def _save_value(self, index: int, param: Tensor) -> None:
        saved = self._old_values.get(index)
        if saved is None or not _is_same_kind(saved, param):
            saved = torch.empty_like(param)
            self._old_values[index] = saved

        saved.copy_(param)
        self._saved_indices.add(index)

    def _old_value(self, index: int) -> Tensor:
        """A parameter's value before the step."""
        if index not in self._saved_indices:
            raise RuntimeError(
                f"parameter {index} got its gradient in a step hook that ran after LRDropout's; "
                "register that hook before LRDropout is attached"
            )

        return self._old_values[index]

    def _moved_nothing(self, params: list[tuple[int, Tensor]]) -> bool:
        """Whether a step at lr 0 moved nothing. Rprop and ASGD have step sizes that are not lr."""
        return all(
            torch.equal(
                tensor_bits.as_integers(param), tensor_bits.as_integers(self._old_value(index))
            )
            for index, param in params
        )

    def _is_next_to_the_step(self) -> bool:
        """Whether no other hook runs between LRDropout's hooks and the optimizer's own step.

        A pre hook that runs after ours might change the gradients. A post hook that runs before
        ours would find no gradients.
        """
        last_before = next(reversed(self.optimizer._optimizer_step_pre_hooks))
        first_after = next(iter(self.optimizer._optimizer_step_post_hooks))
        return [last_before, first_after] == [handle.id for handle in self._handles[:2]]

    def _parameters(self) -> Iterator[tuple[int, int, Tensor]]:
        """(group's number, parameter's index, parameter) of every parameter that has elements."""
        index = 0
        for number, group in enumerate(self.optimizer.param_groups):
            for param in group["params"]:
                if param.numel() > 0:
                    yield number, index, param
                index += 1

    def _params_with_gradient(self) -> list[list[tuple[int, Tensor]]]:
        """For each group, (index, parameter) of those that have elements and a gradient."""
        by_group: list[list[tuple[int, Tensor]]] = [[] for _ in self.optimizer.param_groups]
        for number, index, param in self._parameters():
            if param.grad is not None:
                by_group[number].append((index, param))

        return by_group

    # Settings of groups, and state_dicts

    def _fill_groups(self) -> None:
        """Give each group the settings that it lacks."""
        for group in self.optimizer.param_groups:
            for key, value in self._defaults.items():
                group.setdefault(key, value)

    def _before_load(self, optimizer: Optimizer, _: dict[str, Any]) -> None:
        keys = [key for key in self._defaults if key != "mask_step"]
        self._settings_before_load = [
            {key: group[key] for key in keys} for group in optimizer.param_groups
        ]

    def _after_load(self, optimizer: Optimizer) -> None:
        """Give the groups the settings that the loaded state_dict lacks. Runs after every load.

        A stock optimizer's state_dict lacks all of them: each group then keeps the settings that it
        had before, and counts from zero.
        """
        settings_by_group = zip(optimizer.param_groups, self._settings_before_load, strict=True)
        for group, settings in settings_by_group:
            for key, value in settings.items():
                group.setdefault(key, value)

        self._fill_groups()

    # Copies and pickles

    def _reduce_optimizer(self, _protocol: object) -> tuple[Any, ...]:
        """The optimizer's ``__reduce_ex__``: how a copy or a pickle of it is made again."""
        arguments = (
            type(self),
            self._arguments(),
            type(self.optimizer),
            self.optimizer.__getstate__(),
        )
        return _rebuild_optimizer, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        """LRDropout is copied and pickled with its optimizer."""
        return get_lr_dropout, (self.optimizer,)

    def _arguments(self) -> tuple[Any, ...]:
        """The arguments of ``__init__``, without the optimizer."""
        return tuple(value for key, value in self._defaults.items() if key != "mask_step")


def get_lr_dropout(optimizer: Optimizer) -> LRDropout | None:
    """Return the LRDropout attached to an optimizer, if any."""
    dropout: LRDropout | None = getattr(optimizer, "_lr_dropout", None)
    return dropout


def _rebuild_optimizer(
    dropout_class: type[LRDropout],
    arguments: tuple[Any, ...],
    optimizer_class: type[Optimizer],
    state: dict[str, Any],
) -> Optimizer:
    """Make an optimizer from its state, and attach LRDropout."""
    optimizer = optimizer_class.__new__(optimizer_class)
    optimizer.__setstate__(state)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the user was warned when the original was attached
        dropout_class(optimizer, *arguments)

    return optimizer


def _is_same_kind(saved: Tensor, param: Tensor) -> bool:
    return (
        saved.shape == param.shape and saved.dtype == param.dtype and saved.device == param.device
    )


def _is_skipped_by_scaler(optimizer: Optimizer) -> bool:
    """Whether a GradScaler makes the kernel of a fused optimizer skip this step.

    The step of any other optimizer it does not even call.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)
