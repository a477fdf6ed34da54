"""Gradient exchange in which only the elements that the mask keeps travel.

All ranks draw the same mask, so they know which elements will move before they have sent anything.
SGD's momentum is linear in the gradients: the mean over the ranks of each rank's own momentum is
the momentum of the mean gradient. So each rank keeps the momentum of its own gradients, and the
ranks average the update where the mask keeps it. What is dropped is not lost: it stays in the local
momentum and travels when the element is next kept. The derivation is in docs/exchange.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
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
# What an update and its mask are made with.
_PACKED_SETTINGS = (
    *_SETTINGS_OF_STEP,
    "keep_prob",
    "mask_seed",
    "mask_step",
    "mask_granularity",
    "masks",
)
_ELEMENTS_AVERAGED_TOGETHER = 1 << 23


@dataclass
class _Sent:
    """What was sent for a bucket of DDP.

    Attributes:
        parts: the parameters, with their settings and gradients when they were packed.
        packed: this rank's kept elements.
        means: the mean over the ranks, once the all-reduce is done. It may be the same memory.
        gradients: of each parameter, where its gradient was at the end of the backward pass, and
            its version; None: it has none.
    """

    parts: list[Part]
    packed: Packed
    means: Tensor
    gradients: list[tuple[int, int] | None] = field(default_factory=list)


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
      The step raises a RuntimeError where they have changed.

    Call it on all ranks, once, before the first backward pass. DDP then takes no other
    communication hook.

    Args:
        ddp_model: has exactly the parameters that the optimizer has.
        optimizer: a ``torch.optim.SGD`` with `LRDropout`; a wrapper may be around it.
        wire_dtype: the dtype in which updates are sent and summed, such as ``torch.bfloat16``;
            None: their own.

    Raises:
        ValueError: the optimizer or the model cannot be used, or the ranks draw other masks; says
            why.
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
        self._process_group = ddp_model.process_group
        self._wire_dtype = wire_dtype
        _require_same_parameters(ddp_model, self._optimizer)
        self._require_same_masks()

        self._sent: list[_Sent] = []
        self._sent_params: set[int] = set()  # by id
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

    # Called by DDP in the backward pass

    @torch.no_grad()
    def send(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """Send what is kept of a bucket's updates: the communication hook of DDP.

        Returns:
            The bucket's gradients as they were, once the means are here.

        Raises:
            RuntimeError: LRDropout was removed from the optimizer.
            ValueError: the optimizer's settings are no longer such that kept elements can be
                exchanged.
        """
        if get_lr_dropout(self._optimizer) is not self._dropout:
            raise RuntimeError("exchange_kept: its LRDropout was removed from the optimizer")
        self.restore_settings()  # after a step that failed
        require_support(self._optimizer)

        params = bucket.parameters()
        if any(id(param) in self._sent_params for param in params):
            self._forget_sent()  # a new backward pass has begun, and no step followed the last one
        self._sent_params.update(id(param) for param in params)

        parts = self._find_parts(params, bucket.gradients())
        packed = pack(parts, self._tables.setdefault(bucket.index(), {}))
        means = packed.values if self._wire_dtype is None else packed.values.to(self._wire_dtype)
        means.div_(dist.get_world_size(self._process_group))
        work = dist.all_reduce(means, group=self._process_group, async_op=True)

        sent = _Sent(parts, packed, means)
        self._sent.append(sent)
        _after_backward(lambda: self._note_gradients(sent))
        reduced: torch.futures.Future[list[Tensor]] = work.get_future()
        return reduced.then(lambda _: bucket.buffer())

    def _find_parts(self, params: list[Tensor], gradients: list[Tensor]) -> list[Part]:
        items = {id(item.param): item for item in self._dropout.list_params()}
        settings: dict[int, dict[str, Any]] = {}  # by the group's number
        parts = []
        for param, gradient in zip(params, gradients, strict=True):
            item = items.get(id(param))
            if item is None:  # it has no elements
                continue
            number = item.group_number
            if number not in settings:
                settings[number] = _packed_settings(self._optimizer.param_groups[number])
            buffer = self._momentum_buffer(param)
            parts.append(Part(item.mask_index, param, gradient, buffer, settings[number]))
        return parts

    def _note_gradients(self, sent: _Sent) -> None:
        """Note the gradients of a bucket after DDP has written them."""
        sent.gradients = [_identify(part.param.grad) for part in sent.parts]

    # Called by `LRDropout` around the optimizer's step

    def before_step(self, has_closure: bool) -> None:
        """Update the momentum and put the mean updates in the place of the gradients.

        Args:
            has_closure: whether the step may compute other gradients.

        Raises:
            RuntimeError: the gradients or the settings are not those of the last backward pass
                through the DDP model.
        """
        if has_closure:
            raise RuntimeError("exchange_kept does not work with a step that calls a closure")
        self._require_sent_gradients()
        self._require_sent_settings()

        self._is_averaged = False
        for sent in self._sent:
            gradients = [part.param.grad for part in sent.parts]
            buffers = sent.packed.unpack(sent.means, gradients)
            for part, buffer in zip(sent.parts, buffers, strict=True):
                if buffer is not None and buffer is not part.momentum_buffer:
                    self._optimizer.state[part.param]["momentum_buffer"] = buffer
        self._forget_sent()

        groups = self._optimizer.param_groups
        self._saved_settings = [{key: group[key] for key in _SETTINGS_OF_STEP} for group in groups]
        for group in groups:
            group.update(_SETTINGS_OF_STEP)

    def restore_settings(self) -> None:
        """Give the groups their settings back after a step, also after one that failed."""
        groups = self._optimizer.param_groups
        for group, settings in zip(groups, self._saved_settings, strict=False):
            group.update(settings)
        self._saved_settings = []

    def before_state_dict(self) -> None:
        """Refuse to hand out one rank's momentum as the optimizer's.

        Raises:
            RuntimeError: `average_momentum` was not called since the last step.
        """
        self.restore_settings()
        if not self.is_averaged:
            raise RuntimeError(
                "the momentum buffers are those of this rank alone: "
                "call average_momentum() of what exchange_kept has returned first, on all ranks"
            )

    def _require_sent_gradients(self) -> None:
        """Raise if a gradient is not the one that was sent."""
        sent_gradients = {
            id(part.param): gradient
            for sent in self._sent
            for part, gradient in zip(sent.parts, sent.gradients, strict=True)
        }
        for item in self._dropout.list_params():
            gradient = _identify(item.param.grad)
            if gradient is not None and gradient != sent_gradients.get(id(item.param)):
                raise RuntimeError(
                    "exchange_kept: a gradient is not that of the last backward pass through the "
                    "DDP model outside of no_sync(): it was computed otherwise, or changed since"
                )

    def _require_sent_settings(self) -> None:
        """Raise if updates were packed with other settings or momentum than the optimizer has."""
        groups = self._optimizer.param_groups
        numbers = {id(item.param): item.group_number for item in self._dropout.list_params()}
        for sent in self._sent:
            for part in sent.parts:
                is_same = _packed_settings(groups[numbers[id(part.param)]]) == part.settings
                if not is_same or self._momentum_buffer(part.param) is not part.momentum_buffer:
                    raise RuntimeError(
                        "exchange_kept: settings or state of the optimizer have changed between "
                        "the backward pass and the step; change them after a step"
                    )

    def _forget_sent(self) -> None:
        self._sent = []
        self._sent_params = set()

    def _require_same_masks(self) -> None:
        """Raise on all ranks if they would keep other elements: the messages would not fit."""
        facts = repr(
            [
                (item.mask_index, tuple(item.param.shape), _packed_settings(group))
                for item in self._dropout.list_params()
                for group in [self._optimizer.param_groups[item.group_number]]
            ]
        )
        digest = int.from_bytes(hashlib.sha256(facts.encode()).digest()[:7], "big")
        device = next(self._parameters()).device
        digests = torch.tensor([digest, -digest], device=device)
        dist.all_reduce(digests, op=dist.ReduceOp.MAX, group=self._process_group)
        if int(digests[0]) != -int(digests[1]):
            raise ValueError(
                "exchange_kept needs the same parameters, groups and LRDropout settings "
                "on all ranks, and they differ"
            )

    def _parameters(self) -> Iterator[Tensor]:
        for group in self._optimizer.param_groups:
            yield from group["params"]

    def _momentum_buffer(self, param: Tensor) -> Tensor | None:
        buffer: Tensor | None = self._optimizer.state.get(param, {}).get("momentum_buffer")
        return buffer

    def _momentum_buffers(self) -> Iterator[Tensor]:
        for param in self._parameters():
            buffer = self._momentum_buffer(param)
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


def _packed_settings(group: dict[str, Any]) -> dict[str, Any]:
    """A copy of what an update is packed with; numbers where the group has tensors."""
    settings = {key: group[key] for key in _PACKED_SETTINGS}
    return {
        key: value.item() if isinstance(value, Tensor) else value for key, value in settings.items()
    }


def _identify(gradient: Tensor | None) -> tuple[int, int] | None:
    """Where a gradient is and how often it was written; None: there is none."""
    return None if gradient is None else (gradient.data_ptr(), gradient._version)


def _after_backward(action: Callable[[], None]) -> None:
    """Call something at the end of the backward pass, after DDP has written the gradients.

    Callbacks run in the order in which they were queued. DDP queues its own after its hooks have
    returned, so this one queues another.
    """
    engine = Variable._execution_engine
    engine.queue_callback(lambda: engine.queue_callback(action))


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
