"""The Accelerator, and agreement between ranks."""

from __future__ import annotations

import math
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from lrd import hardware, rendezvous
from lrd import recipe as recipes
from lrd.errors import UserError, describe

T = TypeVar("T")


def start(trainer: recipes.Trainer, facts: dict[str, Any]) -> Accelerator:
    """The Accelerator for this process, on the device that the launch file and `trainer.device` ask for.

    Args:
        facts: what must be equal on all ranks, by the key that a user knows it by; JSON.

    Raises:
        UserError: CUDA is asked for, by `trainer.device=cuda` or by a launch file for GPUs, and there is none; the
            ranks do not agree on `facts`.
    """
    use_cpu = hardware.uses_cpu(trainer.device)
    rendezvous.facts = {"device": "cpu" if use_cpu else "cuda", **facts}
    if trainer.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if not use_cpu:
        torch.backends.cudnn.benchmark = not trainer.deterministic
    hardware.share_cores()
    timeout = timedelta(minutes=trainer.timeout_minutes)
    return Accelerator(
        cpu=use_cpu,
        mixed_precision="bf16" if trainer.precision == "bf16" else "no",
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[
            InitProcessGroupKwargs(init_method=rendezvous.INIT_METHOD, timeout=timeout),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )


def leave(status: int) -> NoReturn:
    """End this process.

    A rank does not wait for Python's and torch's clean-up: DDP's destructor joins gloo's threads while it holds the
    interpreter's lock, which such a thread may be waiting for to free a tensor (seen once in a few stops: the rank
    hung until the launcher killed it 30 s later). All that matters is on disk by then.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_initialized():
        os._exit(status)
    sys.exit(status)


def speaks() -> bool:
    """Whether this rank is to say what went wrong: rank 0, for all have the same error; before they met, one a host."""
    if dist.is_initialized():
        return process_index() == 0
    return os.environ.get("LOCAL_RANK", "0") == "0"


def describe_rank() -> str:
    return f"rank {process_index()} on {socket.gethostname()}"


def gather(value: T) -> list[T]:
    """Each rank's value, in the order of ranks, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def process_index() -> int:
    """This rank; 0 where it is alone."""
    return int(dist.get_rank()) if dist.is_initialized() else 0


def from_rank(source: int, value: T) -> T:
    """One rank's value, on every rank."""
    if not dist.is_initialized():
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values, src=source)
    result: T = values[0]
    return result


def from_main(value: T) -> T:
    """Rank 0's value, on every rank."""
    return from_rank(0, value)


def together(action: Callable[[], T]) -> T:
    """Do something on every rank; where one of them meets a UserError, all raise it, and it says which ranks.

    Without this a rank that fails alone leaves the others waiting for it until the process group's timeout.
    """
    result, fault = None, None
    try:
        result = action()
    except UserError as error:
        fault = str(error)
    faults = gather((fault, describe_rank()))
    if any(fault for fault, _ in faults):
        if len({fault for fault, _ in faults}) == 1:
            raise UserError(str(faults[0][0]))
        raise UserError("\n".join(f"{who}: {line}" for fault, who in faults if fault for line in fault.splitlines()))
    return result  # type: ignore[return-value]


def on_main(action: Callable[[], T]) -> T:
    """Do something on rank 0 alone; every rank gets its result, or its UserError or OSError as a UserError."""

    def act() -> tuple[T | None, str | None]:
        try:
            return action(), None
        except UserError as error:
            return None, str(error)
        except OSError as error:  # a full disk, say: the others would wait for a rank that is gone
            return None, describe(error)

    result, fault = from_main(act() if process_index() == 0 else (None, None))
    if fault is not None:
        raise UserError(fault)
    return result  # type: ignore[return-value]


def once_per_host(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Do something on every rank, on one rank of each host first: it downloads or decodes, the others find it done."""
    first = together(lambda: action() if accelerator.is_local_main_process else None)
    later = together(lambda: None if accelerator.is_local_main_process else action())
    return first if accelerator.is_local_main_process else later  # type: ignore[return-value]


def handshake(facts: dict[str, Any]) -> None:
    """Refuse to go on where the ranks do not have the same facts.

    Raises:
        UserError: a line for each fact that differs, with the ranks that have it otherwise than rank 0.
    """
    everyone = gather((describe_rank(), facts))
    lines = rendezvous.differences([who for who, _ in everyone], [theirs for _, theirs in everyone])
    if lines:
        raise UserError(lines)


def make_buffers_equal(model: nn.Module) -> None:
    """Rank 0's buffers everywhere: BatchNorm's running statistics differ between ranks until the next forward."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


@dataclass(frozen=True)
class Boundary:
    """What the ranks told each other at a step's boundary; the same on every rank.

    Attributes:
        losses, grad_norms: of each rank; the norm of the reduced gradient is the same on all, if all is well.
        stop_signal: a signal that any of them got; 0: none.
        has_fault: whether the main process has a fault to report.
    """

    losses: list[float]
    grad_norms: list[float]
    stop_signal: int
    has_fault: bool

    @property
    def has_finite_losses(self) -> bool:
        return all(map(math.isfinite, self.losses))

    @property
    def is_finite(self) -> bool:
        return self.has_finite_losses and all(map(math.isfinite, self.grad_norms))


def exchange(loss: Tensor, grad_norm: Tensor, stop_signal: int, has_fault: bool = False) -> Boundary:
    """Tell the other ranks one's loss, norm, signal and fault, and hear theirs. A CPU-GPU sync point."""
    flags = torch.tensor([stop_signal, has_fault], dtype=torch.float64, device=loss.device)
    mine = torch.cat([loss.detach().double().reshape(1), grad_norm.detach().double().reshape(1), flags])
    everyone = [mine]
    if dist.is_initialized():
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
    values = torch.stack(everyone).cpu()
    losses, grad_norms = values[:, 0].tolist(), values[:, 1].tolist()
    return Boundary(losses, grad_norms, int(values[:, 2].max()), bool(values[:, 3].max()))


def any_signal(accelerator: Accelerator, stop_signal: int) -> int:
    """A signal that any rank got; 0: none. A CPU-GPU sync point."""
    zero = torch.zeros((), device=accelerator.device)
    return exchange(zero, zero, stop_signal).stop_signal
