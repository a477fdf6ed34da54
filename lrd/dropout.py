"""Learning rate dropout (Lin et al., arXiv 1912.00144) attached to any `torch.optim.Optimizer`.

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    lrd.LRDropout(optimizer, keep_prob=0.5, seed=0)

Each update, each parameter element keeps its learning rate with probability `keep_prob` and has learning rate zero
otherwise: the optimizer takes its ordinary step, then dropped elements are put back, bit for bit. Gradients, momentum
and moments are the optimizer's own and never masked; weight decay, with the gradient or decoupled, moves nothing that
is dropped. The mask needs no communication: ranks with the same seed and update count draw the same bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lrd import controls, fused, kept, kernels, mask, settings


class LRDropout:
    """Masks the updates of an optimizer through its public hooks; the optimizer stays the same object.

    What defines the masks lives in `optimizer.param_groups`, so that `state_dict` carries it and each group can have
    its own: `keep_prob` (may be changed at any time, e.g. by a schedule), `mask_seed`, `mask_granularity`,
    `mask_rescale`, `masks`, and `mask_step`, the number of updates done. Groups added later get the values given here.
    To capture steps in a CUDA graph, make `mask_step` an int64 tensor () on the device, and take one step before.
    An update at lr 0 that moves nothing does not count, nor does one without gradients or that a GradScaler skips.

    Args:
        optimizer: any `torch.optim.Optimizer`; groups may already have a `keep_prob` of their own.
        keep_prob: probability in (0, 1] that an element moves; 1 leaves the optimizer as it is, bit for bit.
        seed: seed of the masks, an integer in [0, 2**64), the same on every rank.
        granularity: `element` (the paper), `row`, `column` or `tensor`: what shares one draw, see `lrd.mask.keep_mask`.
        rescale: divide a kept element's update by `keep_prob` (as the mask rounds it, to 2**-16), so that the expected
            update is the optimizer's own (SkipUpdate, Joo et al., arXiv 2602.15322; not in the paper).
        masks: what the mask is laid on. `update` is learning rate dropout; the others are controls to compare it with:
            `gradient` masks the gradient, so that momentum and moments see zeros too; `momentum_buffer` masks SGD's
            momentum buffer, the fault of the first public implementation (see docs/learning-rate-dropout.md).

    Raises:
        ValueError: an argument out of its range, or an optimizer that has LRDropout attached already or cannot take it.

    Speed and memory: steps of SGD, Adam and AdamW are taken over by compiled kernels that update and mask in one pass,
    in no memory of their own, see `lrd.fused`; `is_fused` says whether the latest step was. Otherwise the optimizer
    steps and dropped elements are put back, from one copy of the parameters that are masked.
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
        if attached(optimizer) is not None:
            raise ValueError("optimizer has LRDropout attached already; remove() the first one")
        controls.check(optimizer, masks)
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
        optimizer.defaults.update(self._defaults)  # what add_param_group fills a later group with
        self._fill_groups()
        self._before: dict[int, Tensor] = {}  # by the parameter's index: its values before the update; reused
        self._remembered: set[int] = set()
        self._latest: list[kept.Moved] = []
        self.is_fused = False
        self._own: list[dict[str, Any]] = []
        self._gradients: list[tuple[Tensor, Tensor, Tensor | None]] = []  # parameter, its own, what it has in the step
        optimizer._lr_dropout = self  # type: ignore[attr-defined]
        # torch leaves hooks out of copies and pickles; this attaches LRDropout to the copy.
        optimizer.__reduce_ex__ = self._copies  # type: ignore[method-assign]
        # A compiled step calls the hooks as they are: masks are drawn outside of its graph. Said here and not where
        # they are defined, for it imports torch's compiler, which takes longer than all the rest of torch.
        disable: Callable[..., Any] = torch.compiler.disable
        self._handles = [
            optimizer.register_step_pre_hook(disable(self._remember)),
            optimizer.register_step_post_hook(disable(self._put_back)),
            optimizer.register_load_state_dict_pre_hook(self._before_load),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]

    def remove(self) -> None:
        """Detach: the optimizer and its groups are as if LRDropout had never been there."""
        if attached(self.optimizer) is not self:
            return
        for handle in self._handles:
            handle.remove()
        for key in self._defaults:
            self.optimizer.defaults.pop(key, None)
            for group in self.optimizer.param_groups:
                group.pop(key, None)
        self._before.clear()
        self._latest.clear()
        del self.optimizer._lr_dropout, self.optimizer.__reduce_ex__  # type: ignore[attr-defined]

    def _copies(self, _protocol: object) -> tuple[Any, ...]:
        return _rebuild, (type(self), self._arguments(), type(self.optimizer), self.optimizer.__getstate__())

    def _arguments(self) -> tuple[Any, ...]:
        """What `__init__` was given, after the optimizer."""
        return tuple(value for key, value in self._defaults.items() if key != "mask_step")

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled with its optimizer."""
        return attached, (self.optimizer,)

    def kept_fractions(self) -> list[float]:
        """For each group, the fraction of its elements that the latest update kept; 0 where it moved none.

        Drawn anew from the position, on the host: nothing is counted during training.
        """
        return kept.fractions(self._latest, len(self.optimizer.param_groups))

    def keeps(self, index: int, element: int) -> bool:
        """Whether the latest update kept one element.

        Args:
            index: the parameter's index in the optimizer, counted through its groups.
            element: the element's index in the flattened parameter.
        """
        return kept.keeps(self._latest, index, element)

    def _fill_groups(self) -> None:
        for group in self.optimizer.param_groups:
            for key, value in self._defaults.items():
                group.setdefault(key, value)

    def _before_load(self, optimizer: Optimizer, _: dict[str, Any]) -> None:
        keys = [key for key in self._defaults if key != "mask_step"]
        self._own = [{key: group[key] for key in keys} for group in optimizer.param_groups]

    def _after_load(self, optimizer: Optimizer) -> None:
        """What a stock optimizer's state_dict lacks: each group keeps its own settings and counts from zero."""
        for group, own in zip(optimizer.param_groups, self._own, strict=True):
            for key, value in own.items():
                group.setdefault(key, value)
        self._fill_groups()

    def _parameters(self) -> Iterator[tuple[int, int, Tensor]]:
        """(group's number, parameter's index, parameter) of every parameter that has elements."""
        index = 0
        for number, group in enumerate(self.optimizer.param_groups):
            for param in group["params"]:
                if param.numel() > 0:
                    yield number, index, param
                index += 1

    @torch.no_grad()
    def _remember(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the step: copy what may have to be put back."""
        has_closure = any(arg is not None for arg in (*args[1:], *kwargs.values()))  # gradients may come in the step
        self._remembered = set()
        self._restore_gradients()  # of a step that failed, if any
        for group in optimizer.param_groups:
            settings.check(optimizer, group)
        updates = [] if has_closure or not self._sees_all() else fused.updates(optimizer)
        self.is_fused = bool(updates)
        if updates:
            fused.take(optimizer, updates)
            for _, param, _ in updates:
                self._replace_gradient(param, None)
            return
        for number, index, param in self._parameters():
            group = optimizer.param_groups[number]
            if not has_closure and param.grad is None:
                continue
            if group["masks"] == "gradient" and group["keep_prob"] < 1.0:
                self._mask_gradient(index, param, group)
            if (group["masks"] != "gradient" and group["keep_prob"] < 1.0) or settings.is_zero(group.get("lr")):
                before = self._before.get(index)
                if before is None or not _alike(before, param):
                    before = self._before[index] = torch.empty_like(param)
                before.copy_(param)
                self._remembered.add(index)

    @torch.no_grad()
    def _put_back(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """After the step: dropped elements get their old bits back, and the update counts."""
        self._latest = []
        self._restore_gradients()
        if _is_skipped(optimizer):
            return
        by_group: list[list[tuple[int, Tensor]]] = [[] for _ in optimizer.param_groups]
        for number, index, param in self._parameters():
            if param.grad is not None:
                by_group[number].append((index, param))
        if not any(by_group):
            return
        for number, (group, moved) in enumerate(zip(optimizer.param_groups, by_group, strict=True)):
            if settings.is_zero(group.get("lr")) and self._is_at_rest(moved):
                continue
            self._latest.append(kept.Moved.by(number, group, moved))
            if group["keep_prob"] < 1.0 and group["masks"] != "gradient" and not self.is_fused:
                for index, param in moved:
                    self._mask_update(index, param, group)
            group["mask_step"] += 1

    def _mask_update(self, index: int, param: Tensor, group: dict[str, Any]) -> None:
        if index not in self._remembered:
            raise RuntimeError(
                f"parameter {index} got its gradient in a step hook that ran after LRDropout's; "
                "register that hook before LRDropout is attached"
            )
        new, old = kernels.real(param), kernels.real(self._before[index])
        keep = settings.draw(index, new, group)
        if group["mask_rescale"]:
            new.sub_(old).div_(mask.effective_keep_prob(group["keep_prob"])).add_(old)
        kernels.select(new, old, keep)
        if group["masks"] == "momentum_buffer":
            kernels.real(self.optimizer.state[param]["momentum_buffer"]).masked_fill_(~keep, 0.0)

    def _mask_gradient(self, index: int, param: Tensor, group: dict[str, Any]) -> None:
        if param.grad is None:
            raise RuntimeError("masks='gradient' needs the gradient before the step: it does not work with a closure")
        if param.grad.is_sparse:
            raise RuntimeError("masks='gradient' does not work with sparse gradients")
        masked = param.grad.clone()
        kernels.real(masked).masked_fill_(~settings.draw(index, kernels.real(masked), group), 0.0)
        if group["mask_rescale"]:
            masked.div_(mask.effective_keep_prob(group["keep_prob"]))
        self._replace_gradient(param, masked)

    def _replace_gradient(self, param: Tensor, other: Tensor | None) -> None:
        assert param.grad is not None
        self._gradients.append((param, param.grad, other))
        param.grad = other

    def _restore_gradients(self) -> None:
        for param, own, other in self._gradients:
            if param.grad is other:
                param.grad = own
        self._gradients = []

    def _sees_all(self) -> bool:
        """Whether no other hook stands between: one after ours might change gradients, one before would miss them."""
        before, after = self.optimizer._optimizer_step_pre_hooks, self.optimizer._optimizer_step_post_hooks
        return self._can_fuse and [*before][-1] == self._handles[0].id and next(iter(after)) == self._handles[1].id

    def _is_at_rest(self, params: list[tuple[int, Tensor]]) -> bool:
        """Whether a step at lr 0 moved nothing. Rprop and ASGD do move then: they have step sizes of their own."""
        return all(torch.equal(kernels.bits(param), kernels.bits(self._before[index])) for index, param in params)


def _rebuild(
    kind: type[LRDropout], arguments: tuple[Any, ...], cls: type[Optimizer], state: dict[str, Any]
) -> Optimizer:
    optimizer = cls.__new__(cls)
    optimizer.__setstate__(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when the first one was attached
        kind(optimizer, *arguments)
    return optimizer


def attached(optimizer: Optimizer) -> LRDropout | None:
    """The LRDropout attached to an optimizer, if any."""
    dropout: LRDropout | None = getattr(optimizer, "_lr_dropout", None)
    return dropout


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def _is_skipped(optimizer: Optimizer) -> bool:
    """Whether GradScaler has a fused optimizer's kernel skip this step: other optimizers it does not even call."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)
