"""What each rank sees of the cluster: `lrd doctor`, or `accelerate launch ... -m lrd.doctor [run_dir]` on all hosts."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import statistics
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist

from lrd import console, distributed, hardware, network, peers
from lrd.errors import EXIT_OK, RunError, UserError
from lrd.recipe import Trainer

_TRIES = 20
_GRADIENTS = 85_128_488  # bytes: ResNet-34's with ten classes, float32
_MESSAGE = 16 << 20  # bytes of the all-reduce whose bandwidth is measured
_MUCH_SKEW, _LITTLE_DISK, _MUCH_LATENCY = 1.0, 2e9, 5e-3  # seconds, bytes, seconds


@dataclass(frozen=True)
class Facts:
    """Of one rank. `skew`: seconds by which its clock is ahead of rank 0's, give or take `skew_error`."""

    rank: int
    host: str
    device: str
    python: str
    torch: str
    accelerate: str
    lrd: str
    backend: str
    interface: str
    threads: int
    cores: int
    load: float
    has_unused_gpu: bool
    free_disk: int
    skew: float = 0.0
    skew_error: float = 0.0


def examine(run_dir: Path) -> list[str]:
    """Measure, show the table on rank 0. Returns what looks wrong, in words; the same on all ranks.

    Raises:
        UserError: the ranks do not come together.
    """
    accelerator = distributed.start(Trainer(timeout_minutes=1.0), {})
    skew, error = _skew(accelerator.device)
    everyone = distributed.gather(_look(accelerator.device, run_dir, skew, error))
    latency, bandwidth = _all_reduce(accelerator.device)
    _show(everyone)
    several = len(everyone) > 1
    if several:
        console.say(
            f"all-reduce over {len(everyone)} ranks: {latency * 1e3:.2f} ms for one number, "
            f"{bandwidth / 1e6:.0f} MB/s for {_MESSAGE >> 20} MB; "
            f"ResNet-34's gradients ({_GRADIENTS / 1e6:.0f} MB) take about {_GRADIENTS / bandwidth:.2f} s a step"
        )
    return complaints(everyone, latency if several else 0.0)


def _look(device: torch.device, run_dir: Path, skew: float, error: float) -> Facts:
    below = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    name = f"{device} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type
    backend = dist.get_backend() if dist.is_initialized() else "none"
    variable = "NCCL_SOCKET_IFNAME" if "nccl" in backend else "GLOO_SOCKET_IFNAME"
    return Facts(
        rank=distributed.process_index(),
        host=socket.gethostname(),
        device=name,
        python=platform.python_version(),
        torch=torch.__version__,
        accelerate=version("accelerate"),
        lrd=version("lrd"),
        backend=backend,
        interface=os.environ.get(variable, "its own choice" if dist.is_initialized() else ""),
        threads=torch.get_num_threads(),
        cores=max(1, int(hardware.cores())),
        load=os.getloadavg()[0],
        has_unused_gpu=device.type == "cpu" and torch.cuda.is_available(),
        free_disk=shutil.disk_usage(below).free,
        skew=skew,
        skew_error=error,
    )


def _skew(device: torch.device) -> tuple[float, float]:
    """By how many seconds this rank's clock is ahead of rank 0's: of several questions the one answered soonest."""
    rank, clock = distributed.process_index(), torch.zeros(1, dtype=torch.float64, device=device)
    result = (0.0, 0.0)
    for other in range(1, dist.get_world_size() if dist.is_initialized() else 1):
        tries = []
        for _ in range(_TRIES if rank in (0, other) else 0):
            if rank == other:
                dist.recv(clock, src=0)
                dist.send(clock.fill_(time.time()), dst=0)
                continue
            asked = time.time()
            dist.send(clock, dst=other)
            dist.recv(clock, src=other)
            answered = time.time()
            tries.append((answered - asked, clock.item() - (asked + answered) / 2))
        told = distributed.from_main(min(tries, default=(0.0, 0.0)))
        if rank == other:
            result = (told[1], told[0] / 2)
    return result


def _all_reduce(device: torch.device) -> tuple[float, float]:
    """Seconds for one number, and bytes a second for a large message: its size by the time. Medians."""
    if not dist.is_initialized():
        return 0.0, float("inf")
    small, large = torch.zeros(1, device=device), torch.zeros(_MESSAGE // 4, device=device)
    latency = statistics.median(_seconds(small) for _ in range(_TRIES))
    return latency, _MESSAGE / statistics.median(_seconds(large) for _ in range(3))


def _seconds(message: torch.Tensor) -> float:
    dist.barrier()
    began = time.perf_counter()
    dist.all_reduce(message)
    message[:1].cpu()  # waits for the device
    return time.perf_counter() - began


def _show(everyone: list[Facts]) -> None:
    first = everyone[0]
    console.say(
        f"{len(everyone)} rank(s), backend {first.backend}; on rank 0 Python {first.python}, torch {first.torch}, "
        f"accelerate {first.accelerate}, lrd {first.lrd}"
    )
    rows = [
        [
            one.rank, one.host, one.device, f"{one.threads} of {one.cores}", f"{one.load:.1f}", one.interface,
            f"{one.skew * 1e3:+.1f} ± {one.skew_error * 1e3:.1f}", f"{one.free_disk / 1e9:.0f}",
        ]
        for one in everyone
    ]  # fmt: skip
    columns = ["rank", "host", "device", "threads", "load", "interface", "clock, ms", "free, GB"]
    console.table("", columns, rows)


def complaints(everyone: list[Facts], latency: float) -> list[str]:
    """What looks wrong, a line each; empty: nothing does."""
    lines = []
    first = asdict(everyone[0])
    for key in ("python", "torch", "accelerate", "lrd", "backend", "cores"):
        for one in everyone:
            if asdict(one)[key] != first[key]:
                lines.append(f"{key}: {_who(one)} has {asdict(one)[key]}, {_who(everyone[0])} has {first[key]}")
    for one in everyone:
        if abs(one.skew) - one.skew_error > _MUCH_SKEW:
            lines.append(f"clock: {_who(one)} is {one.skew:+.1f} s off; TensorBoard's times and logs will mislead")
        if one.has_unused_gpu:
            lines.append(f"device: {_who(one)} has a GPU and trains on the CPU; take a launch file for GPUs")
    if everyone[0].free_disk < _LITTLE_DISK:
        lines.append(
            f"free disk: {everyone[0].free_disk / 1e9:.1f} GB on {_who(everyone[0])}, which writes checkpoints"
        )
    on_host = Counter(one.host for one in everyone)
    for host, ranks in on_host.items():
        own = [one for one in everyone if one.host == host]
        if own[0].device.startswith("cpu") and sum(one.threads for one in own) > own[0].cores:
            threads = sum(one.threads for one in own)
            lines.append(
                f"threads: {host} has {threads} in {ranks} ranks and {own[0].cores} cores; set OMP_NUM_THREADS"
            )
        if own[0].load > own[0].cores + ranks:
            lines.append(
                f"load: {own[0].load:.1f} on {host}, which has {own[0].cores} cores: something else is at work"
            )
    loopback = network.interface_of("127.0.0.1")
    if len(on_host) > 1 and any(one.interface == loopback for one in everyone):
        lines.append("interface: gloo listens on the loopback interface, where other hosts cannot reach it")
    if latency > _MUCH_LATENCY:
        lines.append(f"network: one number takes {latency * 1e3:.1f} ms through an all-reduce; below 1 ms is usual")
    return lines


def _who(one: Facts) -> str:
    return f"rank {one.rank} on {one.host}"


def run(run_dir: Path) -> int:
    """Returns the exit status."""
    lines = examine(run_dir)
    for line in lines or ["nothing looks wrong"]:
        console.say(f"looks wrong: {line}" if lines else line)
    return EXIT_OK


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        status = run(Path(arguments[0] if arguments else "runs"))
    except UserError as error:
        status = error.status
        for line in str(error).splitlines() if distributed.speaks() else []:
            console.complain(f"lrd: {line}")
    except RuntimeError as error:
        if not peers.is_lost_peer(error):
            raise
        status = RunError.status
        console.complain(f"lrd: {distributed.describe_rank()}: a rank was lost: {peers.reason(error)}")
    distributed.leave(status)


if __name__ == "__main__":
    main()
