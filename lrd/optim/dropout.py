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

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from lrd.errors import stacklevel_of_user
from lrd.optim import (
    attachment,
    group_settings,
    last_update,
    mask,
    placement,
    tensor_bits,
)
from lrd.optim.fused import dispatch, loading, restore
from lrd.optim.placement import Placement
from lrd.optim.step_watch import StepWatch, warn_of_unseen_steps


class _Param(NamedTuple):
    """A parameter of the optimizer."""

    group_number: int
    mask_index: int  # in the position of its masks
    param: Tensor  # may be a DTensor
    placement: Placement | None  # where its local elements lie; None: it is whole


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
    - ``mask_first_index`` and ``mask_index_by``, where they were given

    Groups added later get the values given here.

    Two optimizers with one seed draw equal masks for parameters of equal index. Where a model has
    several optimizers, give them other seeds, or ``first_index``, or ``index_by="name"``; the same
    holds for one optimizer for each parameter.

    Parameters may be DTensors (FSDP2, tensor parallelism): each rank draws the masks of its own
    elements, and they are the bits that one process would draw. A wrapper such as Accelerate's
    ``AcceleratedOptimizer`` may be given: LRDropout attaches to the optimizer inside.

    A step counts in all groups if any parameter of the optimizer has a gradient: also in a group
    that has none. It does not count in a group whose lr is 0 if it moved nothing there, and in no
    group if a GradScaler skips it.

    Float32 steps of SGD, Adam and AdamW are taken by compiled kernels where that is faster. These
    update and mask in one pass, without a copy of the parameters, see ``lrd.optim.fused``. In all
    other steps the optimizer updates by itself, and dropped elements are restored from a copy of
    the parameters that are masked.

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
        first_index: the index of the optimizer's first parameter in the position of its masks, an
            integer in [0, 2**63). The others are counted from it, in their order.
        index_by: ``order`` counts the parameters; ``name`` takes a hash of the parameter's name,
            which does not depend on what other parameters the optimizer has, see
            :func:`lrd.optim.group_settings.index_of_name`. It needs an optimizer made from
            ``model.named_parameters()``.

    Attributes:
        optimizer: the optimizer; where a wrapper was given, the one inside.
        is_fused: whether the latest step was taken in one pass.
        exchange: the ``lrd.exchange.kept.KeptExchange`` that provides the updates; None: there is
            none.

    Raises:
        TypeError: ``optimizer`` is no ``torch.optim.Optimizer``.
        ValueError: an argument is out of its range, or the optimizer has LRDropout attached already
            or cannot take it. The optimizer is then as it was.
    """

    _can_fuse = True
    _supports_shards = True

    def __init__(
        self,
        optimizer: Optimizer,
        keep_prob: float = 0.5,
        seed: int = 0,
        granularity: str = "element",
        rescale: bool = False,
        masks: str = "update",
        first_index: int = 0,
        index_by: str = "order",
    ) -> None:
        # Check everything before anything of the optimizer is changed.
        loading.check_user_choice()
        given = optimizer
        optimizer = attachment.find_stepping_optimizer(given)
        if get_lr_dropout(optimizer) is not None:
            raise ValueError("optimizer has LRDropout attached already; remove() the first one")

        self._defaults: dict[str, Any] = {
            "keep_prob": mask.check_keep_prob(keep_prob),
            "mask_seed": mask.check_seed(seed),
            "mask_step": 0,
            "mask_granularity": mask.check_granularity(granularity),
            "mask_rescale": bool(rescale),
            "masks": masks,
        }
        # Only where they are given: state_dicts from before they existed have neither.
        if group_settings.check_first_index(first_index) != 0:
            self._defaults["mask_first_index"] = first_index
        if group_settings.check_index_by(index_by) != "order":
            self._defaults["mask_index_by"] = index_by

        completed_groups = [{**self._defaults, **group} for group in optimizer.param_groups]
        for group in completed_groups:
            mask.check_keep_prob(group["keep_prob"])
        group_settings.mask_indices(completed_groups)
        attachment.check_optimizer(optimizer, masks)

        self.optimizer = optimizer
        self.is_fused = False
        self.exchange: Any = None

        self._params: list[_Param] = []
        self._params_found_for: list[Any] = []  # what `_params` was made from
        self._find_params(completed_groups)

        # Values before the update, by (parameter's index, state's name; "": the parameter). The
        # tensors are reused.
        self._old_values: dict[tuple[int, str], Tensor] = {}
        self._saved: set[tuple[int, str]] = set()  # those that this step has saved
        self._states_that_follow = attachment.states_that_follow(optimizer)

        self._replaced_gradients: list[_ReplacedGradient] = []
        self._last_updates: list[last_update.GroupUpdate] = []
        self._settings_before_load: list[dict[str, Any]] = []
        self._watch = StepWatch(optimizer)
        self._is_in_step = False  # stays True after a step that failed
        self._inner_steps = 0  # calls of the step by itself that are not over

        # From here on the optimizer is changed. add_param_group completes a later group from
        # `defaults`.
        optimizer.defaults.update(self._defaults)
        self._fill_groups()
        optimizer._lr_dropout = self  # type: ignore[attr-defined]

        # torch leaves hooks out of copies and pickles, so a copy has to attach LRDropout again.
        optimizer.__reduce_ex__ = self._reduce_optimizer  # type: ignore[method-assign]

        # A compiled step calls the hooks uncompiled: masks are drawn outside of its graph.
        # Called here and not as a decorator, so that only attaching, and not `import lrd`, pays for
        # importing torch's compiler.
        disable: Callable[..., Any] = functools.partial(
            torch.compiler.disable,
            reason="masks are drawn outside of the graph; compile the step without fullgraph",
        )
        self._handles = [
            optimizer.register_step_pre_hook(disable(self._before_step)),
            optimizer.register_step_post_hook(disable(self._after_step)),
            optimizer.register_load_state_dict_pre_hook(self._before_load),
            optimizer.register_load_state_dict_post_hook(self._after_load),
            optimizer.register_state_dict_pre_hook(self._before_state_dict),
        ]
        for inner in attachment.inner_optimizers_of_same_parameters(optimizer):
            self._handles.append(inner.register_step_post_hook(disable(self._after_inner_step)))

        if given is not optimizer:
            warnings.warn(
                f"LRDropout is attached to the {type(optimizer).__name__} inside the "
                f"{type(given).__name__}",
                stacklevel=stacklevel_of_user(),
            )

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
            index: the parameter's index, as its masks have it: its place among all parameters of
                the optimizer, counted through the groups, if nothing else was asked for.
            element: the element's index in the flattened (whole) parameter.
        """
        return last_update.is_kept(self._last_updates, index, element)

    # The step: `_before_step` and `_after_step` are hooks around the optimizer's own step.

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Take the step in one pass if possible; otherwise save what is to be restored after it.

        Returns:
            The step's arguments, if they have changed.
        """
        if self._is_in_step and attachment.is_inside_outer_step(optimizer):
            self._inner_steps += 1
            return None

        self._inner_steps = 0
        self._saved = set()
        self._restore_gradients()  # of an earlier step that failed, if any
        if self.exchange is not None:
            self.exchange.restore_settings()

        # All that can be refused is refused here, before anything moves.
        self._check_before_step()

        self._is_in_step = True
        new_arguments = self._evaluate_closure(args, kwargs)
        if new_arguments is not None:
            args, kwargs = new_arguments
            self._check_before_step()  # a closure may change settings, and fill lazy parameters

        # A closure that is left may compute the gradients during the step. args[0] is the
        # optimizer.
        has_closure = new_arguments is None and any(
            argument is not None for argument in (*args[1:], *kwargs.values())
        )
        with torch.no_grad():
            if self.exchange is not None:
                self.exchange.before_step(has_closure)
            self._try_step_in_one_pass(has_closure)
            if not self.is_fused:
                self._prepare_generic_step(has_closure)

        return new_arguments

    def _check_before_step(self) -> None:
        """Check all settings and list the parameters, which may have changed since the last step.

        Raises:
            ValueError: a setting is out of its range, or a parameter's positions are not known.
        """
        for group in self.optimizer.param_groups:
            group_settings.check_settings(self.optimizer, group)
        self._find_params(self.optimizer.param_groups)

    @torch.no_grad()
    def _after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Restore dropped elements, unless the step was taken in one pass, and count the update."""
        if self._inner_steps > 0:
            self._inner_steps -= 1
            return

        self._is_in_step = False
        self._restore_gradients()
        if self.exchange is not None:
            self.exchange.restore_settings()
        self._last_updates = []
        if _is_skipped_by_scaler(optimizer):
            return

        params_by_group = self._params_with_gradient()
        if not any(params_by_group):
            return

        # What the step has moved: (number of the group, its parameters).
        moved = []
        for number, group in enumerate(optimizer.param_groups):
            params = params_by_group[number]
            if not group_settings.is_zero_lr(group.get("lr")) or not self._moved_nothing(params):
                moved.append((number, params))

        # Before the counts go up: they are part of the masks' position.
        self._last_updates = [
            last_update.GroupUpdate.from_group(
                number,
                optimizer.param_groups[number],
                [(item.mask_index, item.param) for item in params],
            )
            for number, params in moved
        ]
        self._watch.note_step(self._last_updates)

        if not self.is_fused:
            self._mask_updates([item for _, params in moved for item in params])
        for number, _ in moved:
            optimizer.param_groups[number]["mask_step"] += 1

    def _after_inner_step(
        self, inner: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Warn if the optimizer inside this one steps by itself: no mask is drawn then."""
        if not self._is_in_step and get_lr_dropout(inner) is None:
            warn_of_unseen_steps(self.optimizer)

    def list_params(self) -> list[_Param]:
        """The parameters that have elements, with the positions of their masks.

        Raises:
            ValueError: the position of a parameter's elements is not known.
        """
        self._find_params(self.optimizer.param_groups)
        return self._params

    def _find_params(self, groups: list[dict[str, Any]]) -> None:
        """List the parameters that have elements.

        Args:
            groups: the optimizer's groups, or copies of them.

        Raises:
            ValueError: the position of a parameter's elements is not known.
        """
        facts: list[Any] = []
        for group in groups:
            facts += [group.get("mask_first_index"), group.get("mask_index_by")]
            facts += [(id(param), type(param), _numel(param)) for param in group["params"]]
        if facts == self._params_found_for:
            return

        found = []
        indices_by_group = group_settings.mask_indices(groups)
        for number, group in enumerate(groups):
            for index, param in zip(indices_by_group[number], group["params"], strict=True):
                attachment.check_param(param)
                if _numel(param) == 0:
                    continue

                box = placement.of_parameter(param)
                if box is not None and not self._supports_shards:
                    raise ValueError(
                        f"{type(self).__name__} needs whole parameters, and parameter {index} is "
                        "sharded"
                    )
                found.append(_Param(number, index, param, box))

        self._params = found
        # Not when LRDropout is attached: FSDP1 may still wrap the parameters before the first step.
        if groups is self.optimizer.param_groups:
            self._params_found_for = facts

    def _evaluate_closure(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Call the step's closure now, so that the gradients are known before the step.

        Only for optimizers that would call it once, before anything else.

        Returns:
            The step's arguments with a closure in its place that returns its loss; None if there is
            no closure, or if it is left to the step.
        """
        closures = [argument for argument in (*args[1:], *kwargs.values()) if argument is not None]
        if len(closures) != 1 or not dispatch.calls_closure_first(self.optimizer):
            return None
        if not self._is_next_to_the_step():
            return None

        closure = closures[0]
        with torch.enable_grad():
            loss = closure()

        def evaluated() -> Any:
            return loss

        new_args = tuple(evaluated if argument is closure else argument for argument in args)
        new_kwargs = {
            key: evaluated if argument is closure else argument for key, argument in kwargs.items()
        }
        return new_args, new_kwargs

    def _try_step_in_one_pass(self, has_closure: bool) -> None:
        """Update and mask now, in one pass, if the fused kernels support every update of the step.

        The gradients are hidden afterwards, so the optimizer's own step then moves nothing.
        """
        may_fuse = self._can_fuse and not has_closure and self._is_next_to_the_step()
        updates = dispatch.find_updates(self.optimizer, self._params) if may_fuse else []

        self.is_fused = bool(updates)
        if not self.is_fused:
            return

        dispatch.step_in_one_pass(self.optimizer, updates)
        for update in updates:
            self._replace_gradient(update.param, None)

    def _prepare_generic_step(self, has_closure: bool) -> None:
        """Mask the gradients that are to be masked, and save the values that may be restored."""
        with_masked_gradient = []
        to_save = []
        for item in self._params:
            group = self.optimizer.param_groups[item.group_number]
            if item.param.grad is None and not has_closure:
                continue

            if group["keep_prob"] < 1.0 and group["masks"] == "gradient":
                self._check_gradient_can_be_masked(item)
                with_masked_gradient.append(item)

            # At lr 0 the old values also show whether the step has moved anything.
            if self._changes_update(group) or group_settings.is_zero_lr(group.get("lr")):
                to_save.append(item)

        if with_masked_gradient:
            self._mask_gradients(with_masked_gradient)
        if to_save:
            self._save_values(to_save)

    def _changes_update(self, group: dict[str, Any]) -> bool:
        """Whether the updates of a group's generic steps are masked or scaled after them."""
        return bool(group["keep_prob"] < 1.0 and group["masks"] != "gradient")

    def _mask_updates(self, items: list[_Param]) -> None:
        """Give the dropped elements of parameters their old bits back after a generic step."""
        to_restore = []
        momentum_buffers = []

        for item in items:
            group = self.optimizer.param_groups[item.group_number]
            if not self._changes_update(group):
                continue
            self._scale_update(item)

            state = self.optimizer.state.get(item.param, {})
            new_values = {"": item.param}
            new_values |= {key: state[key] for key in self._states_that_follow if key in state}
            for key, value in new_values.items():
                old = tensor_bits.as_real(self._old_value(item.mask_index, key))
                to_restore.append(self._masked_tensor(item, value, old))

            if group["keep_prob"] < 1.0 and group["masks"] == "momentum_buffer":
                momentum_buffers.append(self._masked_tensor(item, state["momentum_buffer"]))

        if to_restore:
            restore.restore_dropped(to_restore)
        if momentum_buffers:
            _zero_dropped(momentum_buffers)

    def _scale_update(self, item: _Param) -> None:
        """Change a parameter's update before it is masked. Learning rate dropout does not."""

    def _masked_tensor(
        self, item: _Param, tensor: Tensor, old: Tensor | None = None
    ) -> restore.MaskedTensor:
        """A tensor of a parameter's shape, with the position of the parameter's mask."""
        return restore.MaskedTensor(
            index=item.mask_index,
            group=self.optimizer.param_groups[item.group_number],
            new=tensor_bits.as_real(placement.local(tensor)),
            old=old,
            placement=item.placement,
        )

    def _check_gradient_can_be_masked(self, item: _Param) -> None:
        gradient = item.param.grad
        if gradient is None:
            raise RuntimeError(
                "masks='gradient' needs the gradient before the step: "
                "it does not work with a closure"
            )
        if gradient.is_sparse:
            raise RuntimeError("masks='gradient' does not work with sparse gradients")
        if item.placement is not None and not placement.is_placed_alike(item.param, gradient):
            raise RuntimeError(
                "masks='gradient' needs gradients that are sharded as their parameters are"
            )

    def _mask_gradients(self, items: list[_Param]) -> None:
        """Replace gradients by masked copies for the time of the step."""
        masked_gradients = []
        for item in items:
            assert item.param.grad is not None
            masked_gradients.append(item.param.grad.clone())

        _zero_dropped(
            [
                self._masked_tensor(item, masked)
                for item, masked in zip(items, masked_gradients, strict=True)
            ]
        )
        for item, masked in zip(items, masked_gradients, strict=True):
            group = self.optimizer.param_groups[item.group_number]
            if group["mask_rescale"]:
                masked.div_(mask.effective_keep_prob(group["keep_prob"]))
            self._replace_gradient(item.param, masked)

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

    def _save_values(self, items: list[_Param]) -> None:
        """Copy parameters, and the states that follow them, before the step."""
        values: list[Tensor] = []
        copies: list[Tensor] = []

        for item in items:
            state = self.optimizer.state.get(item.param, {}) if self._states_that_follow else {}
            for key in ("", *self._states_that_follow):
                # A state that does not exist yet begins as a copy of the parameter.
                value = placement.local(state.get(key, item.param))
                values.append(value)
                copies.append(self._buffer_for(item.mask_index, key, value))

        restore.save_values(values, copies)

    def _buffer_for(self, mask_index: int, state_key: str, value: Tensor) -> Tensor:
        """Memory for a copy of a value, kept from step to step."""
        key = (mask_index, state_key)
        self._saved.add(key)

        buffer = self._old_values.get(key)
        if buffer is None or not _is_same_kind(buffer, value):
            buffer = torch.empty_like(value)
            self._old_values[key] = buffer
        return buffer

    def _old_value(self, index: int, state_key: str = "") -> Tensor:
        """The local value of a parameter, or of a state that follows it, before the step."""
        if (index, state_key) not in self._saved:
            raise RuntimeError(
                f"parameter {index} got its gradient in a step hook that ran after LRDropout's; "
                "register that hook before LRDropout is attached"
            )

        return self._old_values[index, state_key]

    def _moved_nothing(self, params: list[_Param]) -> bool:
        """Whether a step at lr 0 moved nothing. Rprop and ASGD have step sizes that are not lr."""
        # Other ranks have other shards, and all must come to the same answer.
        if any(placement.is_dtensor(item.param) for item in params):
            return not isinstance(self.optimizer, torch.optim.Rprop | torch.optim.ASGD)

        return all(
            torch.equal(
                tensor_bits.as_integers(item.param),
                tensor_bits.as_integers(self._old_value(item.mask_index)),
            )
            for item in params
        )

    def _is_next_to_the_step(self) -> bool:
        """Whether no other hook runs between LRDropout's hooks and the optimizer's own step.

        A pre hook that runs after ours might change the gradients. A post hook that runs before
        ours would find no gradients.
        """
        last_before = next(reversed(self.optimizer._optimizer_step_pre_hooks))
        first_after = next(iter(self.optimizer._optimizer_step_post_hooks))
        return [last_before, first_after] == [handle.id for handle in self._handles[:2]]

    def _params_with_gradient(self) -> list[list[_Param]]:
        """For each group, the parameters that have elements and a gradient."""
        by_group: list[list[_Param]] = [[] for _ in self.optimizer.param_groups]
        for item in self._params:
            if item.param.grad is not None:
                by_group[item.group_number].append(item)

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

    def _before_state_dict(self, optimizer: Optimizer) -> None:
        if self.exchange is not None:
            self.exchange.before_state_dict()
        self._watch.check_for_unseen_steps()

    # Copies and pickles

    def _reduce_optimizer(self, _protocol: object) -> tuple[Any, ...]:
        """The optimizer's ``__reduce_ex__``: how a copy or a pickle of it is made again."""
        if self.exchange is not None:
            self.exchange.before_state_dict()
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
        defaults = self._defaults
        return (
            defaults["keep_prob"],
            defaults["mask_seed"],
            defaults["mask_granularity"],
            defaults["mask_rescale"],
            defaults["masks"],
            defaults.get("mask_first_index", 0),
            defaults.get("mask_index_by", "order"),
        )


def get_lr_dropout(optimizer: Optimizer) -> LRDropout | None:
    """Return the LRDropout attached to an optimizer, if any."""
    stepping = attachment.inside_of_wrapper(optimizer)
    dropout: LRDropout | None = getattr(stepping, "_lr_dropout", None)
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


def _numel(param: Tensor) -> int:
    """The elements of a whole parameter; none as long as it is a lazy module's, without a shape."""
    return 0 if isinstance(param, UninitializedParameter) else param.numel()


def _zero_dropped(items: list[restore.MaskedTensor]) -> None:
    """Set the dropped elements of tensors to zero."""
    for item, keep in zip(items, restore.draw_masks(items), strict=True):
        item.new.masked_fill_(~keep, 0.0)


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
