"""The Accelerator, agreement between ranks, replica fingerprints, stop signals."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.optim import Optimizer

from lrd import kernels
from lrd import recipe as recipes
from lrd.errors import RunError, UserError, describe

T = TypeVar("T")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def start(trainer: recipes.Trainer) -> Accelerator:
    """The Accelerator for this process, on the device that the launch file and `trainer.device` ask for.

    Raises:
        UserError: CUDA is asked for, by `trainer.device=cuda` or by a launch file for GPUs, and there is none.
    """
    use_cpu = _use_cpu(trainer.device)
    if trainer.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if not use_cpu:
        torch.backends.cudnn.benchmark = not trainer.deterministic
    return Accelerator(
        cpu=use_cpu,
        mixed_precision="bf16" if trainer.precision == "bf16" else "no",
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(minutes=trainer.timeout_minutes)),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )


def _use_cpu(device: str) -> bool:
    """`accelerate launch` does not tell its ranks of `use_cpu`; hidden GPUs (`gpu_ids: "-1,-1"`) do."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "unset").split(",")[0] in ("", "-1")
    asked_for_cpu = hidden or os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes")
    if device == "cpu" or (device == "auto" and asked_for_cpu):
        return True
    if torch.cuda.is_available():
        return False
    if device == "cuda":
        raise UserError("trainer.device: is 'cuda', but this host has no CUDA device that torch can use")
    if launched:
        raise UserError(
            "the launch file asks for GPUs, but this host has no CUDA device that torch can use; "
            "take launch/accelerate/cpu.yaml, or trainer.device=cpu"
        )
    return True


def follow_launcher() -> None:
    """Have the kernel send SIGTERM when the launcher dies: its ranks would train on as orphans. Linux only."""
    if "LOCAL_RANK" in os.environ and sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None, use_errno=True).prctl(set_death_signal, signal.SIGTERM)


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
        return bool(dist.get_rank() == 0)
    return os.environ.get("LOCAL_RANK", "0") == "0"


def describe_rank() -> str:
    return f"rank {dist.get_rank() if dist.is_initialized() else 0} on {socket.gethostname()}"


def gather(value: T) -> list[T]:
    """Each rank's value, in the order of ranks, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(value: T) -> T:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values, src=0)
    result: T = values[0]
    return result


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

    is_main = not dist.is_initialized() or dist.get_rank() == 0
    result, fault = from_main(act() if is_main else (None, None))
    if fault is not None:
        raise UserError(fault)
    return result  # type: ignore[return-value]


def once_per_host(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Do something on every rank, on one rank of each host first: it downloads or decodes, the others find it done."""
    first = together(lambda: action() if accelerator.is_local_main_process else None)
    later = together(lambda: None if accelerator.is_local_main_process else action())
    return first if accelerator.is_local_main_process else later  # type: ignore[return-value]


def handshake(facts: dict[str, Any]) -> None:
    """Refuse to start where the ranks do not agree on what they are about to do.

    Raises:
        UserError: a line for each fact that differs, with the ranks that have it otherwise than rank 0.
    """
    everyone = gather((describe_rank(), facts))
    _, expected = everyone[0]
    lines = []
    for who, theirs in everyone[1:]:
        for key in expected.keys() | theirs.keys():
            if expected.get(key) != theirs.get(key):
                lines.append(f"{key}: {who} has {theirs.get(key)!r}, rank 0 has {expected.get(key)!r}")
    if lines:
        raise UserError("\n".join(sorted(lines)))


def make_buffers_equal(model: nn.Module) -> None:
    """Rank 0's buffers everywhere: BatchNorm's running statistics differ between ranks until the next forward."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def fingerprint(model: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    """One integer for each parameter and each tensor of its optimizer state: the sum of its bits as integers.

    Any single changed bit changes it. BatchNorm's running statistics are no part: they differ by design.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    digests = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                digests[f"{names[id(parameter)]} ({key})"] = value
    sums = [int(kernels.bits(tensor).sum(dtype=torch.int64)) for tensor in digests.values()]
    return dict(zip(digests, sums, strict=True))


def compare_replicas(model: nn.Module, optimizer: Optimizer, step: int) -> None:
    """Stop where the replicas are no longer bit-identical.

    Raises:
        RunError: names the ranks in the minority and the first tensor that differs.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    everyone = gather((describe_rank(), fingerprint(model, optimizer)))
    for name in everyone[0][1]:
        values = [digests.get(name) for _, digests in everyone]
        if len(set(values)) > 1:
            majority = max(values, key=values.count)
            odd = ", ".join(who for (who, _), value in zip(everyone, values, strict=True) if value != majority)
            raise RunError(f"step {step}: the replicas differ, first in {name}: {odd} differs from the majority")


class StopSignals:
    """SIGTERM, SIGINT and SIGUSR1 ask for a save and a clean end; the handler only sets a flag.

    A second one ends the process at once, unless it comes right behind the first: Ctrl-C in a terminal reaches the
    ranks twice, from the terminal and from the launcher that passes it on.
    """

    ECHO_SECONDS = 2.0

    def __init__(self) -> None:
        self.received: int = 0
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if not self.received:
            self.received, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > self.ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def exchange(loss: Tensor, stop_signal: int) -> tuple[list[float], int]:
    """At a step boundary: each rank's loss, and the signal any of them got (0: none). A CPU-GPU sync point."""
    mine = torch.stack([loss.detach().double(), torch.tensor(float(stop_signal), device=loss.device).double()])
    if not dist.is_initialized():
        return [float(mine[0])], stop_signal
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    values = torch.stack(everyone).cpu()
    return values[:, 0].tolist(), int(values[:, 1].max())
