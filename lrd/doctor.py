"""What each rank sees of the cluster, and what looks wrong.

lrd doctor                                            this host
accelerate launch ... -m lrd.doctor [run_dir]         on all hosts
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist

from lrd import console
from lrd.distributed import communication, network, roll_call
from lrd.distributed.accelerator import check_launch_variables, exit_process, start_rank
from lrd.errors import EXIT_OK, RunError, UserError, describe_os_error
from lrd.host import available_cores
from lrd.recipe import Trainer

_NUM_TRIES = 20
_RESNET34_GRADIENT_BYTES = 85_128_488  # ten classes, float32
_MESSAGE_BYTES = 16 << 20  # of the all-reduce whose bandwidth is measured

_MAX_CLOCK_SKEW = 1.0  # seconds
_MIN_FREE_DISK = 2e9  # bytes
_MAX_LATENCY = 5e-3  # seconds


@dataclass(frozen=True)
class RankFacts:
    """What one rank sees.

    Attributes:
        rank: the rank of the process.
        host: the name of its host.
        device: the type of its device, with the GPU's name if it is one.
        python: the version of Python.
        torch: the version of torch.
        accelerate: the version of accelerate.
        lrd: the version of this package.
        backend: the process group's backend; `none` for a single process.
        interface: the interface on which the ranks talk to each other.
        threads: the number of threads of the rank.
        cores: the number of cores that the rank may use.
        load: the load of the host, over the last minute.
        has_unused_gpu: whether it trains on the CPU although there is a GPU.
        free_disk: free bytes where the run would write.
        clock_skew: seconds by which its clock is ahead of rank 0's.
        clock_skew_error: seconds by which that may be wrong.
    """

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
    clock_skew: float = 0.0
    clock_skew_error: float = 0.0

    @property
    def name(self) -> str:
        """The rank and its host, for messages."""
        return f"rank {self.rank} on {self.host}"


def examine(run_dir: Path) -> list[str]:
    """Measure, and print a table on rank 0.

    Args:
        run_dir: where a run would write; its disk is looked at.

    Returns:
        What looks wrong as rank 0 sees it, a line each. Another rank measures another latency.

    Raises:
        UserError: the ranks do not come together, or one of them cannot look at its disk.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"{run_dir}: is not a folder")
    accelerator = start_rank(Trainer(timeout_minutes=1.0), {}, roll_call.RollCall())
    device = accelerator.device

    clock_skew, clock_skew_error = _measure_clock_skew(device)
    facts = communication.run_on_all_ranks(
        lambda: _collect_facts(device, run_dir, clock_skew, clock_skew_error)
    )
    ranks = [RankFacts(**values) for values in communication.all_gather_values(asdict(facts))]
    latency, bandwidth = _measure_all_reduce(device)

    _print_ranks(ranks)
    if len(ranks) > 1:
        seconds = _RESNET34_GRADIENT_BYTES / bandwidth
        console.info(
            f"all-reduce over {len(ranks)} ranks: {latency * 1e3:.2f} ms for one number, "
            f"{bandwidth / 1e6:.0f} MB/s for {_MESSAGE_BYTES >> 20} MB; ResNet-34's gradients "
            f"({_RESNET34_GRADIENT_BYTES / 1e6:.0f} MB) take about {seconds:.2f} s a step"
        )
    return find_problems(ranks, latency)


def _collect_facts(
    device: torch.device, run_dir: Path, clock_skew: float, clock_skew_error: float
) -> RankFacts:
    device_name = str(device.type)
    if device.type == "cuda":
        device_name = f"{device} {torch.cuda.get_device_name(device)}"

    backend = dist.get_backend() if dist.is_initialized() else "none"
    variable = "NCCL_SOCKET_IFNAME" if "nccl" in backend else "GLOO_SOCKET_IFNAME"
    default_interface = "its own choice" if dist.is_initialized() else ""

    # The run directory may not be there yet.
    path = run_dir.absolute()
    existing_folder = next(folder for folder in (path, *path.parents) if folder.exists())

    return RankFacts(
        rank=communication.process_index(),
        host=socket.gethostname(),
        device=device_name,
        python=platform.python_version(),
        torch=str(torch.__version__),
        accelerate=version("accelerate"),
        lrd=version("lrd"),
        backend=backend,
        interface=os.environ.get(variable, default_interface),
        threads=torch.get_num_threads(),
        cores=max(1, int(available_cores())),
        load=os.getloadavg()[0],
        has_unused_gpu=device.type == "cpu" and torch.cuda.is_available(),
        free_disk=shutil.disk_usage(existing_folder).free,
        clock_skew=clock_skew,
        clock_skew_error=clock_skew_error,
    )


def _measure_clock_skew(device: torch.device) -> tuple[float, float]:
    """Measure by how many seconds this rank's clock is ahead of rank 0's.

    Rank 0 asks each other rank for the time, some times over; the answer that came soonest counts.

    Returns:
        That number of seconds, and by how many it may be wrong.
    """
    rank = communication.process_index()
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    clock = torch.zeros(1, dtype=torch.float64, device=device)

    result = (0.0, 0.0)
    for other in range(1, world_size):
        answers = []  # (seconds until it came, seconds ahead)
        for _ in range(_NUM_TRIES):
            # NCCL's recv only queues on the GPU's stream; `item` waits until the number is here.
            if rank == other:
                dist.recv(clock, src=0)
                clock.item()
                dist.send(clock.fill_(time.time()), dst=0)
            elif rank == 0:
                asked = time.time()
                dist.send(clock, dst=other)
                dist.recv(clock, src=other)
                other_time = clock.item()
                answered = time.time()

                # The other rank is taken to have read its clock halfway.
                ahead = other_time - (asked + answered) / 2
                answers.append((answered - asked, ahead))

        soonest = communication.broadcast_from_main(list(min(answers, default=(0.0, 0.0))))
        if rank == other:
            duration, ahead = soonest
            result = (ahead, duration / 2)
    return result


def _measure_all_reduce(device: torch.device) -> tuple[float, float]:
    """Measure the all-reduce.

    Returns:
        Seconds for one number, and bytes a second for a large message; medians.
    """
    if not dist.is_initialized():
        return 0.0, float("inf")

    # Medians, because a first all-reduce also opens connections.
    small = torch.zeros(1, device=device)
    large = torch.zeros(_MESSAGE_BYTES // 4, device=device)
    latency = statistics.median(_time_all_reduce(small) for _ in range(_NUM_TRIES))
    seconds = statistics.median(_time_all_reduce(large) for _ in range(3))
    return latency, _MESSAGE_BYTES / seconds


def _time_all_reduce(message: torch.Tensor) -> float:
    dist.barrier()
    start = time.perf_counter()
    dist.all_reduce(message)
    message[:1].cpu()  # waits for the device
    return time.perf_counter() - start


def _print_ranks(ranks: list[RankFacts]) -> None:
    first = ranks[0]
    console.info(
        f"{len(ranks)} rank(s), backend {first.backend}; on rank 0 Python {first.python}, "
        f"torch {first.torch}, accelerate {first.accelerate}, lrd {first.lrd}"
    )

    rows = []
    for facts in ranks:
        skew = f"{facts.clock_skew * 1e3:+.1f} ± {facts.clock_skew_error * 1e3:.1f}"
        threads = f"{facts.threads} of {facts.cores}"
        free = f"{facts.free_disk / 1e9:.0f}"
        load = f"{facts.load:.1f}"
        rows.append(
            [facts.rank, facts.host, facts.device, threads, load, facts.interface, skew, free]
        )
    columns = ["rank", "host", "device", "threads", "load", "interface", "clock, ms", "free, GB"]
    console.table("", columns, rows)


def find_problems(ranks: list[RankFacts], latency: float) -> list[str]:
    """Find what looks wrong, a line each; empty: nothing does.

    Args:
        ranks: what each rank sees.
        latency: seconds that one number takes through an all-reduce; 0 where there is one rank.
    """
    problems = [*_find_differences(ranks), *_find_rank_problems(ranks)]

    main_rank = ranks[0]
    if main_rank.free_disk < _MIN_FREE_DISK:
        problems.append(
            f"free disk: {main_rank.free_disk / 1e9:.1f} GB on {main_rank.name}, "
            "which writes checkpoints"
        )

    ranks_by_host: dict[str, list[RankFacts]] = defaultdict(list)
    for facts in ranks:
        ranks_by_host[facts.host].append(facts)
    for host, host_ranks in ranks_by_host.items():
        problems += _find_host_problems(host, host_ranks)

    loopback = network.interface_of("127.0.0.1")
    if len(ranks_by_host) > 1 and any(facts.interface == loopback for facts in ranks):
        problems.append(
            "interface: gloo listens on the loopback interface, where other hosts cannot reach it"
        )
    if latency > _MAX_LATENCY:
        problems.append(
            f"network: one number takes {latency * 1e3:.1f} ms through an all-reduce; "
            "below 1 ms is usual"
        )
    return problems


def _find_differences(ranks: list[RankFacts]) -> list[str]:
    """Find where a rank has another version or backend than rank 0."""
    lines = []
    first = asdict(ranks[0])
    for key in ("python", "torch", "accelerate", "lrd", "backend", "cores"):
        for facts in ranks:
            value = asdict(facts)[key]
            if value != first[key]:
                lines.append(f"{key}: {facts.name} has {value}, {ranks[0].name} has {first[key]}")
    return lines


def _find_rank_problems(ranks: list[RankFacts]) -> list[str]:
    lines = []
    for facts in ranks:
        if abs(facts.clock_skew) - facts.clock_skew_error > _MAX_CLOCK_SKEW:
            lines.append(
                f"clock: {facts.name} is {facts.clock_skew:+.1f} s off; "
                "TensorBoard's times and logs will mislead"
            )
        if facts.has_unused_gpu:
            lines.append(
                f"device: {facts.name} has a GPU and trains on the CPU; take a launch file for GPUs"
            )
    return lines


def _find_host_problems(host: str, ranks: list[RankFacts]) -> list[str]:
    lines = []
    cores = ranks[0].cores
    threads = sum(facts.threads for facts in ranks)
    if ranks[0].device.startswith("cpu") and threads > cores:
        lines.append(
            f"threads: {host} has {threads} in {len(ranks)} ranks and {cores} cores; "
            "set OMP_NUM_THREADS"
        )

    load = ranks[0].load
    if load > cores + len(ranks):
        lines.append(
            f"load: {load:.1f} on {host}, which has {cores} cores: something else is at work"
        )
    return lines


def run(run_dir: Path) -> None:
    """Examine, and print what looks wrong. That is no error.

    Raises:
        UserError: see `examine`.
    """
    problems = examine(run_dir)
    for problem in problems:
        console.info(f"looks wrong: {problem}")
    if not problems:
        console.info("nothing looks wrong")


def main(arguments: list[str] | None = None) -> None:
    """What each rank runs."""
    arguments = sys.argv[1:] if arguments is None else arguments
    status = EXIT_OK
    try:
        check_launch_variables()
    except UserError as error:
        console.error(str(error))
        sys.exit(error.status)

    try:
        run(Path(arguments[0] if arguments else "runs"))
    except UserError as error:
        status = error.status
        if communication.should_report_errors():
            console.error(str(error))
    except OSError as error:
        # A UserError is on all ranks; this one is on this rank alone.
        status = UserError.status
        console.error(f"{communication.describe_rank()}: {describe_os_error(error)}")
    except RuntimeError as error:
        if not roll_call.is_lost_rank(error):
            raise
        status = RunError.status
        reason = roll_call.failure_reason(error)
        console.error(f"{communication.describe_rank()}: a rank was lost: {reason}")
    exit_process(status)


if __name__ == "__main__":
    main()
