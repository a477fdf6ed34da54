"""Gradient exchange in which only the elements that the mask keeps travel.

All ranks draw the same mask, so they know which elements will move before they have sent anything.
SGD's momentum is linear in the gradients: the mean over the ranks of each rank's own momentum is
the momentum of the mean gradient. So each rank keeps the momentum of its own gradients, and the
ranks average the update where the mask keeps it. What is dropped is not lost: it stays in the local
momentum and travels when the element is next kept. The derivation is in docs/exchange.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lrd.exchange.packing import Packed, Part, pack
from lrd.optim import attachment, placement
from lrd.optim.dropout import LRDropout, get_lr_dropout
from lrd.optim.fused import dispatch

# What the optimizer finds while it steps: momentum and weight decay are in the update already.
_SETTINGS_OF_STEP = {
    "momentum": 0.0,
    "dampening": 0.0,
    "weight_decay": 0.0,
    "nesterov": False,
    "maximize": False,
}
_MASK_SETTINGS = ("keep_prob", "mask_seed", "mask_step", "mask_granularity")
_ELEMENTS_AVERAGED_TOGETHER = 1 << 23


class _Sent(NamedTuple):
    """What was sent for a bucket of DDP."""

    parts: list[Part]
    mask_settings: list[tuple[Any, ...]]  # with which each part was packed
    packed: Packed
    means: Tensor  # the mean over the ranks, once the all-reduce is done


def exchange_kept(
    ddp_model: nn.parallel.DistributedDataParallel,
    optimizer: Optimizer,
    wire_dtype: torch.dtype | None = None,
) -> KeptExchange:
    """Let the ranks send each other only the elements that `LRDropout` keeps in the next step.

    ::

        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        lrd.LRDropout(optimizer, keep_prob=0.5, seed=0)
        ddp_model = DistributedDataParallel(model)
        exchange = lrd.exchange_kept(ddp_model, optimizer)

    The bytes are ``keep_prob`` times those of DDP's all-reduce, and the training is the same but
    for rounding. Between steps, gradients and momentum buffers are each rank's own. So

    - call ``exchange.average_momentum()`` on all ranks before ``optimizer.state_dict()``;
    - do not clip or change gradients between the backward pass and the step: what is sent was
      computed from them in the backward pass. A ``GradScaler`` does not work for the same reason.

    Call it before the first backward pass; it takes the place of another communication hook.

    Args:
        ddp_model: has exactly the parameters that the optimizer has.
        optimizer: a ``torch.optim.SGD`` with `LRDropout`; a wrapper may be around it.
        wire_dtype: the dtype in which updates are sent and summed, such as ``torch.bfloat16``;
            None: their own.

    Raises:
        ValueError: the optimizer or the model cannot be used; says why.
    """
    return KeptExchange(ddp_model, optimizer, wire_dtype)


class KeptExchange:
    """See `exchange_kept`, which makes it."""

    def __init__(
        self,
        ddp_model: nn.parallel.DistributedDataParallel,
        optimizer: Optimizer,
        wire_dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(ddp_model, nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"exchange_kept needs a DistributedDataParallel, not a {type(ddp_model).__name__}"
            )
        self._optimizer: Optimizer = attachment.inside_of_wrapper(optimizer)
        self._dropout = require_support(self._optimizer)
        _require_same_parameters(ddp_model, self._optimizer)

        self._process_group = ddp_model.process_group
        self._wire_dtype = wire_dtype
        self._sent: list[_Sent] = []
        self._tables: dict[int, dict[Any, Any]] = {}  # by bucket
        self._saved_settings: list[dict[str, Any]] = []
        self._is_averaged = True

        ddp_model.register_comm_hook(None, _make_hook(self))
        self._dropout.exchange = self

    @property
    def is_averaged(self) -> bool:
        """Whether the momentum buffers are the mean over the ranks, and not this rank's own."""
        return self._is_averaged or not any(True for _ in self._momentum_buffers())

    @torch.no_grad()
    def average_momentum(self) -> None:
        """Replace each momentum buffer by its mean over the ranks. All ranks must call this.

        Training goes on from the mean, which changes nothing but rounding.
        """
        if self.is_averaged:
            return

        world_size = dist.get_world_size(self._process_group)
        for buffers in _batches(list(self._momentum_buffers())):
            flat = torch.cat([buffer.reshape(-1) for buffer in buffers]).div_(world_size)
            dist.all_reduce(flat, group=self._process_group)
            means = torch.split(flat, [buffer.numel() for buffer in buffers])
            for buffer, mean in zip(buffers, means, strict=True):
                buffer.copy_(mean.view(buffer.shape))
        self._is_averaged = True

    # Called by DDP and by `LRDropout`

    @torch.no_grad()
    def send(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """Send what is kept of a bucket's updates: the communication hook of DDP.

        Returns:
            The bucket's gradients as they were, once the means are here.
        """
        if bucket.index() == 0:
            self._sent = []  # of a backward pass that no step followed

        parts = self._find_parts(bucket)
        packed = pack(parts, self._tables.setdefault(bucket.index(), {}))
        means = packed.values if self._wire_dtype is None else packed.values.to(self._wire_dtype)
        means.div_(dist.get_world_size(self._process_group))
        work = dist.all_reduce(means, group=self._process_group, async_op=True)

        self._sent.append(_Sent(parts, [_mask_settings(part) for part in parts], packed, means))
        reduced: torch.futures.Future[list[Tensor]] = work.get_future()
        return reduced.then(lambda _: bucket.buffer())

    def before_step(self) -> None:
        """Update the momentum and put the mean updates in the place of the gradients.

        Raises:
            RuntimeError: the gradients do not come from a backward pass through the DDP model, or
                the settings of masks have changed since.
        """
        if not self._sent:
            if any(param.grad is not None for param in self._parameters()):
                raise RuntimeError(
                    "exchange_kept: there was no backward pass through the DDP model outside of "
                    "no_sync() since the last step"
                )
            return
        for sent in self._sent:
            if [_mask_settings(part) for part in sent.parts] != sent.mask_settings:
                raise RuntimeError(
                    "exchange_kept: settings of masks have changed between the backward pass and "
                    "the step; change them after a step"
                )

        for sent in self._sent:
            gradients = [part.param.grad for part in sent.parts]
            buffers = sent.packed.unpack(sent.means, gradients)
            for part, buffer in zip(sent.parts, buffers, strict=True):
                if buffer is not None and buffer is not part.momentum_buffer:
                    self._optimizer.state[part.param]["momentum_buffer"] = buffer
        self._sent = []
        self._is_averaged = False

        self._saved_settings = [
            {key: group[key] for key in _SETTINGS_OF_STEP} for group in self._optimizer.param_groups
        ]
        for group in self._optimizer.param_groups:
            group.update(_SETTINGS_OF_STEP)

    def after_step(self) -> None:
        """Give the groups their settings back, also after a step that failed."""
        for group, settings in zip(
            self._optimizer.param_groups, self._saved_settings, strict=False
        ):
            group.update(settings)
        self._saved_settings = []

    def before_state_dict(self) -> None:
        """Refuse to hand out one rank's momentum as the optimizer's.

        Raises:
            RuntimeError: `average_momentum` was not called since the last step.
        """
        self.after_step()
        if not self.is_averaged:
            raise RuntimeError(
                "the momentum buffers are those of this rank alone: "
                "call average_momentum() of what exchange_kept has returned first, on all ranks"
            )

    def _find_parts(self, bucket: Any) -> list[Part]:
        items = {
            id(item.param): item for item in self._dropout.list_params() if item.param.requires_grad
        }
        parts = []
        for param, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            item = items.get(id(param))
            if item is None:  # it has no elements
                continue
            group = self._optimizer.param_groups[item.group_number]
            buffer = self._optimizer.state.get(param, {}).get("momentum_buffer")
            parts.append(Part(item.mask_index, param, gradient, buffer, group))
        return parts

    def _parameters(self) -> Iterator[Tensor]:
        for group in self._optimizer.param_groups:
            yield from group["params"]

    def _momentum_buffers(self) -> Iterator[Tensor]:
        for param in self._parameters():
            buffer = self._optimizer.state.get(param, {}).get("momentum_buffer")
            if buffer is not None:
                yield buffer


def require_support(optimizer: Optimizer) -> LRDropout:
    """The `LRDropout` of an optimizer whose kept elements can be exchanged.

    Raises:
        ValueError: they cannot be.
    """
    name = type(optimizer).__name__
    dropout = get_lr_dropout(optimizer)
    if dropout is None:
        raise ValueError(
            f"exchange_kept needs an optimizer with LRDropout, and this {name} has none"
        )
    if type(dropout) is not LRDropout:
        raise ValueError(
            f"exchange_kept does not work with {type(dropout).__name__}, "
            "which looks at the mean gradient also where it is dropped"
        )
    if dispatch.stock_class(optimizer) is not torch.optim.SGD:
        raise ValueError(
            f"exchange_kept needs torch.optim.SGD, not {name}: the mean of the ranks' own momentum "
            "is the momentum of the mean gradient there; second moments, for example, are not "
            "linear in the gradient"
        )
    for group in optimizer.param_groups:
        if group["masks"] != "update":
            raise ValueError(
                f"exchange_kept needs masks='update', not {group['masks']!r}: "
                "other masks change what a dropped element's momentum is"
            )
        for param in group["params"]:
            if placement.is_dtensor(param) or not param.is_floating_point():
                raise ValueError("exchange_kept needs parameters that are whole and real")
    return dropout


def _require_same_parameters(ddp_model: nn.Module, optimizer: Optimizer) -> None:
    """Raise if the optimizer has other parameters than those whose gradients DDP reduces."""
    reduced = {id(param) for param in ddp_model.parameters() if param.requires_grad}
    stepping = {
        id(param)
        for group in optimizer.param_groups
        for param in group["params"]
        if param.requires_grad
    }
    if reduced != stepping:
        raise ValueError(
            "exchange_kept needs one optimizer for all parameters of the DDP model: "
            f"{len(reduced - stepping)} are not in the optimizer, "
            f"{len(stepping - reduced)} of the optimizer are not in the model"
        )


def _mask_settings(part: Part) -> tuple[Any, ...]:
    settings = [part.group[key] for key in _MASK_SETTINGS]
    return tuple(int(value) if isinstance(value, Tensor) else value for value in settings)


def _batches(buffers: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and device together, but not too many elements."""
    batch: list[Tensor] = []
    for buffer in buffers:
        is_same_kind = not batch or (buffer.dtype, buffer.device) == (
            batch[0].dtype,
            batch[0].device,
        )
        num_elements = sum(other.numel() for other in batch) + buffer.numel()
        if batch and (not is_same_kind or num_elements > _ELEMENTS_AVERAGED_TOGETHER):
            yield batch
            batch = []
        batch.append(buffer)
    if batch:
        yield batch


def _make_hook(exchange: KeptExchange) -> Any:
    """`KeptExchange.send` as DDP takes it: it compares annotations with its own types."""

    def send_kept_elements(_, bucket):  # type: ignore[no-untyped-def]
        return exchange.send(bucket)

    return send_kept_elements
