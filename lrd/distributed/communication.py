"""What the ranks tell each other: values, bytes, errors, and the statistics of a step.

Values travel as JSON, and nothing as a pickle: reading one runs what its sender wants. torch's own
collectives of objects pickle.

All ranks must call these functions, except for the first three, which ask no other rank. A process
that is alone gets its own values back.
"""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from lrd.distributed.meeting import describe_differences
from lrd.errors import RunError, UserError, describe_os_error

T = TypeVar("T")

# What no rank exceeds: all ranks set aside as much memory as one of them announces.
_MAX_VALUE_BYTES = 1 << 28
_MAX_DATA_BYTES = 1 << 40


def process_index() -> int:
    """The rank of this process; 0 where it is alone."""
    return int(dist.get_rank()) if dist.is_initialized() else 0


def describe_rank() -> str:
    """This rank and its host, for messages."""
    return f"rank {process_index()} on {socket.gethostname()}"


def should_report_errors() -> bool:
    """Whether this process prints an error that all ranks have.

    Rank 0 does; before the ranks have met, one process of each host.
    """
    if dist.is_initialized():
        return process_index() == 0
    return os.environ.get("LOCAL_RANK", "0") == "0"


def all_gather_values(value: T) -> list[T]:
    """The values of all ranks, in the order of ranks, on every rank.

    Args:
        value: None, a bool, a number, a text, or a list of such or a dict of such by text. It
            travels as JSON, so that reading it runs no code; each float arrives bit for bit.

    Raises:
        RunError: a rank sent something else.
    """
    if not dist.is_initialized():
        return [value]

    message = _to_message(value)
    ranks = range(dist.get_world_size())
    sizes = [torch.empty_like(message.size) for _ in ranks]
    dist.all_gather(sizes, message.size)
    checked_sizes = [_check_size(size, rank, _MAX_VALUE_BYTES) for rank, size in enumerate(sizes)]

    # All ranks send as many bytes as the longest message has.
    padded = torch.zeros(max(checked_sizes), dtype=torch.uint8, device=message.data.device)
    padded[: message.data.numel()] = message.data
    rows = [torch.empty_like(padded) for _ in ranks]
    dist.all_gather(rows, padded)
    return [
        _parse(row[:size], rank)
        for rank, (row, size) in enumerate(zip(rows, checked_sizes, strict=True))
    ]


def broadcast_value(value: T, source: int) -> T:
    """The value of rank `source`, on every rank; what a value is, `all_gather_values` says.

    Raises:
        RunError: that rank sent something else.
    """
    if not dist.is_initialized():
        return value

    is_source = process_index() == source
    data = _broadcast(_to_message(value if is_source else None), source, _MAX_VALUE_BYTES)
    result: T = value if is_source else _parse(data, source)
    return result


def broadcast_from_main(value: T) -> T:
    """The value of rank 0, on every rank."""
    return broadcast_value(value, source=0)


def broadcast_bytes(data: bytes, source: int) -> bytes:
    """The bytes of rank `source`, on every rank.

    Raises:
        RunError: that rank announced more bytes than any rank sends.
    """
    if not dist.is_initialized():
        return data

    is_source = process_index() == source
    received = _broadcast(_Message.of(data if is_source else b""), source, _MAX_DATA_BYTES)
    return data if is_source else received.cpu().numpy().tobytes()


@dataclass(frozen=True)
class _Message:
    """Bytes for other ranks, where the process group takes them from: on a GPU with NCCL.

    Attributes:
        size: their number, int64 (1,).
        data: the bytes, uint8 (size,).
    """

    size: Tensor
    data: Tensor

    @classmethod
    def of(cls, raw: bytes) -> _Message:
        device = torch.device("cpu")
        if "nccl" in dist.get_backend():
            device = torch.device("cuda", torch.cuda.current_device())

        data = torch.empty(0, dtype=torch.uint8)
        if raw:
            data = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        return cls(torch.tensor([len(raw)], device=device), data.to(device))


def _to_message(value: object) -> _Message:
    _require_json(value)
    return _Message.of(json.dumps(value).encode())


def _require_json(value: object) -> None:
    """Refuse what would come out of JSON as something else: a tuple, for example, as a list.

    Raises:
        TypeError: a fault of the program.
    """
    if value is None or type(value) in (bool, int, float, str):
        return
    if type(value) is list:
        for entry in value:
            _require_json(entry)
    elif type(value) is dict and all(type(key) is str for key in value):
        for entry in value.values():
            _require_json(entry)
    else:
        raise TypeError(f"{type(value).__name__} is nothing that ranks tell each other: {value!r}")


def _broadcast(message: _Message, source: int, limit: int) -> Tensor:
    """The data of rank `source`'s message, uint8 (size,), on every rank."""
    dist.broadcast(message.size, src=source)
    size = _check_size(message.size, source, limit)
    data = message.data
    if process_index() != source:
        data = torch.empty(size, dtype=torch.uint8, device=message.size.device)
    if size:
        dist.broadcast(data, src=source)
    return data


def _check_size(size: Tensor, source: int, limit: int) -> int:
    """The number of bytes that a rank has announced.

    Raises:
        RunError: no rank sends as many.
    """
    number = int(size.item())
    if not 0 <= number <= limit:
        raise RunError(f"rank {source} announced {number} bytes, which no rank of lrd does")
    return number


def _parse(data: Tensor, source: int) -> Any:
    """Read a value that a rank has sent; data: uint8 (size,).

    Raises:
        RunError: it is no JSON.
    """
    try:
        return json.loads(data.cpu().numpy().tobytes())
    except (ValueError, RecursionError):
        raise RunError(
            f"rank {source} sent something that is not JSON; it was not read any further"
        ) from None


def run_on_all_ranks(action: Callable[[], T]) -> T:
    """Call `action` on every rank, and raise on all of them if it fails on one.

    Otherwise a rank that fails alone would leave the others waiting for it until the process
    group's timeout. A UserError and an OSError count as failures; others are faults of the program.

    Raises:
        UserError: its lines name the ranks, unless all ranks have the same error.
    """
    result = None
    message = None
    try:
        result = action()
    except UserError as error:
        message = str(error)
    except OSError as error:
        message = describe_os_error(error)

    reports = all_gather_values([message, describe_rank()])
    messages = {rank_message for rank_message, _ in reports}
    if messages == {None}:
        return result  # type: ignore[return-value]

    # The same fault on all ranks, such as a wrong recipe, is one line and not one for each rank.
    if len(messages) == 1:
        raise UserError(str(reports[0][0]))

    lines = [
        f"{rank_name}: {line}"
        for rank_message, rank_name in reports
        if rank_message
        for line in rank_message.splitlines()
    ]
    raise UserError("\n".join(lines))


def run_on_main_process(action: Callable[[], T]) -> T:
    """Call `action` on rank 0 alone.

    Args:
        action: its result is a value as `all_gather_values` has them.

    Returns:
        The result, on every rank.

    Raises:
        UserError: `action` raised it, or an OSError; on every rank.
    """
    # An error is broadcast like a result: if rank 0 raised at once, the others would wait for it.
    result = None
    message = None
    if process_index() == 0:
        try:
            result = action()
        except UserError as error:
            message = str(error)
        except OSError as error:  # a full disk, for example
            message = describe_os_error(error)

    report: list[Any] = broadcast_from_main([result, message])
    main_result: T = report[0]
    main_message: str | None = report[1]
    if main_message is not None:
        raise UserError(main_message)
    return main_result


def local_main_process_first(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Call `action` on every rank, but on one rank of each host before the others.

    The first one downloads or decodes; the others find it done.
    """
    # Two collectives, each a barrier: the later ranks begin when the first ones are done.
    is_first = accelerator.is_local_main_process
    first_result = run_on_all_ranks(lambda: action() if is_first else None)
    later_result = run_on_all_ranks(lambda: None if is_first else action())
    return first_result if is_first else later_result  # type: ignore[return-value]


def require_equal_on_all_ranks(facts: dict[str, Any]) -> None:
    """Refuse to go on where the ranks do not have the same facts.

    Raises:
        UserError: a line for each fact that differs, with the ranks that have it otherwise than
            rank 0.
    """
    reports: list[Any] = all_gather_values([describe_rank(), facts])
    names = [name for name, _ in reports]
    lines = describe_differences(names, [rank_facts for _, rank_facts in reports])
    if lines:
        raise UserError(lines)


def broadcast_buffers(model: nn.Module) -> None:
    """Copy rank 0's buffers to all ranks.

    BatchNorm's running statistics differ between ranks until DDP's next forward pass.
    """
    if not dist.is_initialized():
        return

    # One broadcast for each dtype: a ResNet has a hundred buffers.
    for buffers in buffers_by_dtype(model).values():
        flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
        dist.broadcast(flat, src=0)
        parts = torch.split(flat, [buffer.numel() for buffer in buffers])
        for buffer, part in zip(buffers, parts, strict=True):
            buffer.copy_(part.view_as(buffer))


def buffers_by_dtype(model: nn.Module) -> dict[torch.dtype, list[Tensor]]:
    """The buffers of a network, those of each dtype together."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for buffer in model.buffers():
        by_dtype.setdefault(buffer.dtype, []).append(buffer.detach())
    return by_dtype


@dataclass(frozen=True)
class StepStatistics:
    """What the ranks told each other in one step; the same on every rank.

    Attributes:
        losses: the loss of each rank.
        grad_norms: the gradient norm of each rank. It is the norm of the reduced gradient, so the
            same on all ranks if all is well; with `trainer.gradient_exchange: kept`, that of the
            rank's own gradient.
        accuracies: the accuracy of each rank on its part of the batch.
        stop_signal: a signal that any rank has received; 0: none.
        has_checkpoint_error: whether the main process could not write a checkpoint.
        num_replaced: images of all ranks that took the place of one that could not be decoded.
        compute_seconds: for how long each rank computed in a step, without waiting for the others;
            nan: it has not measured it.
    """

    losses: list[float]
    grad_norms: list[float]
    accuracies: list[float]
    stop_signal: int
    has_checkpoint_error: bool
    num_replaced: int
    compute_seconds: list[float]

    @property
    def mean_loss(self) -> float:
        """The mean loss over the global batch."""
        return sum(self.losses) / len(self.losses)

    @property
    def mean_accuracy(self) -> float:
        """The accuracy over the global batch."""
        return sum(self.accuracies) / len(self.accuracies)

    @property
    def has_finite_losses(self) -> bool:
        """Whether the losses of all ranks are finite."""
        return all(map(math.isfinite, self.losses))

    @property
    def is_finite(self) -> bool:
        """Whether the losses and gradient norms of all ranks are finite."""
        return self.has_finite_losses and all(map(math.isfinite, self.grad_norms))


def gather_step_statistics(
    loss: Tensor,
    grad_norm: Tensor,
    accuracy: Tensor,
    stop_signal: int,
    has_checkpoint_error: bool = False,
    num_replaced: int = 0,
    compute_seconds: float = math.nan,
) -> StepStatistics:
    """Exchange the statistics of a step between the ranks. The CPU waits for the GPU.

    Args:
        loss: this rank's loss, float32 ().
        grad_norm: this rank's gradient norm, float32 ().
        accuracy: this rank's accuracy on its part of the batch, float32 ().
        stop_signal: the signal that this rank has received; 0: none.
        has_checkpoint_error: whether this rank could not write a checkpoint.
        num_replaced: images of this rank that took the place of one that could not be decoded.
        compute_seconds: for how long this rank computed in a step.
    """
    # One tensor, and so one collective, for all that the ranks exchange. float64 represents a
    # float32 and a signal's number exactly.
    numbers = torch.tensor(
        [stop_signal, has_checkpoint_error, num_replaced, compute_seconds],
        dtype=torch.float64,
        device=loss.device,
    )
    figures = torch.stack([loss, grad_norm, accuracy]).detach().double()
    local_row = torch.cat([figures, numbers])  # float64 (7,)

    rows = [local_row]
    if dist.is_initialized():
        rows = [torch.empty_like(local_row) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, local_row)

    table = torch.stack(rows).cpu()  # (world_size, 7)
    return StepStatistics(
        losses=table[:, 0].tolist(),
        grad_norms=table[:, 1].tolist(),
        accuracies=table[:, 2].tolist(),
        stop_signal=int(table[:, 3].max()),
        has_checkpoint_error=bool(table[:, 4].max()),
        num_replaced=int(table[:, 5].sum()),
        compute_seconds=table[:, 6].tolist(),
    )


def gather_stop_signal(accelerator: Accelerator, stop_signal: int) -> int:
    """A signal that any rank has received; 0: none. The CPU waits for the GPU.

    Args:
        accelerator: the Accelerator of this rank.
        stop_signal: the signal that this rank has received; 0: none.
    """
    zero = torch.zeros((), device=accelerator.device)
    return gather_step_statistics(zero, zero, zero, stop_signal).stop_signal
