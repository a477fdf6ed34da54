"""`lrd launch`: `accelerate launch ... -m lrd.train`, without the launcher's trace-backs.

It runs Accelerate's launcher in this process and adds three things: a launch file where none is
named, the ranks' exit status in place of the launcher's, and silence about what the ranks have
said already. The ranks are the same as under `accelerate launch`.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psutil

import lrd
from lrd import console
from lrd.errors import (
    EXIT_OK,
    EXIT_RUN_ERROR,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    UserError,
    first_line,
)

# Options that leave the choice of the launcher to the user.
_OWN_CHOICES = ("config_file", "multi_gpu", "tpu", "use_deepspeed", "use_fsdp", "use_megatron_lm")

# What each file in launch/accelerate says, as options: an installed lrd has no such folder.
# `gpu_ids` of -1 hides all GPUs, see launch/accelerate/cpu.yaml.
_ONE_PROCESS = ["--num_machines", "1", "--num_processes", "1"]
_SEVERAL_RANKS = ["--multi_gpu", "--num_machines", "1", "--main_process_port", "0"]
_SEVERAL_HOSTS = ["--multi_gpu", "--num_machines", "2", "--main_process_port", "29500"]
_NO_GPUS = ["--gpu_ids=-1,-1"]  # as two arguments, the second would be taken for an option
_COMMON = ["--mixed_precision", "no", "--dynamo_backend", "no"]
OPTIONS_OF_FILE = {
    "cpu-1.yaml": ["--cpu", *_ONE_PROCESS, *_COMMON],
    "cpu.yaml": [*_SEVERAL_RANKS, *_NO_GPUS, "--num_processes", "2", *_COMMON],
    "gpu.yaml": [*_ONE_PROCESS, *_COMMON],
    "gpus.yaml": [*_SEVERAL_RANKS, "--gpu_ids", "all", "--num_processes", "8", *_COMMON],
    "hosts-cpu.yaml": [*_SEVERAL_HOSTS, *_NO_GPUS, "--num_processes", "4", *_COMMON],
    "hosts-gpu.yaml": [*_SEVERAL_HOSTS, "--gpu_ids", "all", "--num_processes", "16", *_COMMON],
}

# Option -> its smallest and its largest value.
_RANGES = {
    "num_processes": (1, 1_000_000),
    "num_machines": (1, 1_000_000),
    "machine_rank": (0, 999_999),
    "main_process_port": (0, 65_535),
    "max_restarts": (0, 1_000_000),
}

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_LAUNCHER_LOGGERS = ("torch.distributed.elastic", "torch.distributed.run")
_SECONDS_TO_LEAVE = 30.0  # what torch's launcher gives its ranks too
_NUM_KEPT_LOG_LINES = 50


def launch(arguments: list[str]) -> int:
    """Start a recipe's ranks and wait for them.

    Args:
        arguments: options of `accelerate launch`, then a recipe and its overrides.

    Returns:
        The exit status: that of the ranks, or 128 + N if signal N ended them before there was
        anything to save.

    Raises:
        UserError: an option is refused, or there is no recipe among the arguments.
    """
    ranks = _Ranks()
    with ranks.pass_signals_on():
        from accelerate.commands import launch as accelerate_launch
        from accelerate.commands.config.config_args import default_config_file

        parser = accelerate_launch.launch_command_parser()
        has_default_config = os.path.isfile(default_config_file)
        command = build_command(parser, arguments, has_default_config)
        console.info(f"accelerate launch {shlex.join(command)}")

        options = _parse(parser, command)
        _check_options(options)
        if options.training_script == "lrd.train":
            options.training_script = "lrd.cli.rank"
        options.signals_to_handle = ",".join(_signals_to_pass_on())
        ranks.max_restarts = int(options.max_restarts or 0)
        with ranks.record(), _kept_log_lines() as log_lines:
            try:
                accelerate_launch.launch_command(options)
            except ValueError as error:  # options that contradict each other
                if ranks.processes:
                    raise
                file = f"{options.config_file}: " if options.config_file else ""
                raise UserError(f"launch: {file}{first_line(error)}") from None
            except BaseException as error:
                if not ranks.explain(error):
                    _show(log_lines)
                    raise
        return ranks.exit_status()


def build_command(
    parser: ArgumentParser, arguments: list[str], has_default_config: bool
) -> list[str]:
    """The arguments of `accelerate launch` that start a recipe here.

    Args:
        parser: Accelerate's.
        arguments: options of `accelerate launch`, then a recipe and its overrides.
        has_default_config: whether `accelerate config` has written a launch file for this user,
            which Accelerate takes where none is named.
    """
    if not arguments:
        raise UserError("launch: no recipe: lrd launch [options of accelerate launch] RECIPE")

    options = _parse(parser, arguments)
    num_options = len(arguments) - len(options.training_script_args) - 1
    user_options = arguments[:num_options]
    target = arguments[num_options:]
    for argument in target[1:]:
        if argument.startswith("-"):
            raise UserError(f"launch: {argument}: options go before the recipe")
    if not options.module:
        target = ["-m", "lrd.train", *target]

    is_chosen = any(getattr(options, name, None) for name in _OWN_CHOICES)
    if is_chosen or has_default_config:
        return [*user_options, *target]

    # Accelerate's --cpu starts a single process, whatever --num_processes says.
    user_options = [option for option in user_options if option not in ("--cpu", "--use_cpu")]
    return [*_choose_launch_file(options), *user_options, *target]


def _check_options(options: Namespace) -> None:
    """Refuse what Accelerate and torch would answer with a trace-back."""
    for name, (low, high) in _RANGES.items():
        value = getattr(options, name)
        if value is not None and not low <= int(value) <= high:
            raise UserError(f"launch: --{name}: is {value}, should be {low} or more, up to {high}")

    config_file = options.config_file
    if config_file is not None and not os.path.isfile(config_file):
        raise UserError(f"launch: --config_file: {config_file} is not a file")


def _choose_launch_file(options: Namespace) -> list[str]:
    """The launch file for this host and these options, as options of `accelerate launch`."""
    num_gpus = 0 if options.cpu else _count_gpus()
    num_hosts = options.num_machines or 1
    num_ranks = options.num_processes

    if num_hosts > 1:
        name = "hosts-gpu.yaml" if num_gpus else "hosts-cpu.yaml"
        if num_ranks is None:
            raise UserError("launch: --num_machines: --num_processes of all hosts is needed too")
        # Accelerate heeds it on the command line alone.
        return [*_name_launch_file(name, num_ranks // num_hosts), "--rdzv_backend", "lrd"]

    num_ranks = num_ranks or num_gpus or min(2, os.cpu_count() or 1)
    if num_gpus:
        name = "gpus.yaml" if num_ranks > 1 else "gpu.yaml"
    else:
        name = "cpu.yaml" if num_ranks > 1 else "cpu-1.yaml"

    file_options = _name_launch_file(name, num_ranks)
    if num_ranks > 1 and options.rdzv_backend == "static":
        # torch's own store listens on all interfaces, lrd's on the loopback one alone.
        file_options += ["--rdzv_backend", "lrd"]
    if options.num_processes is None:
        file_options += ["--num_processes", str(num_ranks)]
    return file_options


def _name_launch_file(name: str, ranks_on_host: int) -> list[str]:
    """`--config_file` if this folder or lrd's checkout has the file, else the same as options."""
    for root in (Path(), Path(lrd.__file__).parents[1]):
        path = root / "launch" / "accelerate" / name
        if path.is_file():
            return ["--config_file", str(path)]
    return options_of_launch_file(name, ranks_on_host)


def options_of_launch_file(name: str, ranks_on_host: int) -> list[str]:
    """What a file in launch/accelerate says, as options of `accelerate launch`."""
    options = list(OPTIONS_OF_FILE[name])
    if name in ("cpu.yaml", "hosts-cpu.yaml") and "OMP_NUM_THREADS" not in os.environ:
        # What Accelerate does for a file with `use_cpu`, for which it has no option.
        threads = max(1, (psutil.cpu_count(logical=False) or 1) // max(1, ranks_on_host))
        options += ["--num_cpu_threads_per_process", str(threads)]
    return options


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _parse(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """Parse with Accelerate's parser; what it refuses is one line, without its long usage."""

    def refuse(message: str) -> NoReturn:
        raise UserError(f"launch: {message.replace('training_script', 'RECIPE')}")

    parser.error = refuse  # type: ignore[method-assign]
    return parser.parse_args(arguments)


def _signals_to_pass_on() -> list[str]:
    """The names of the signals that end the ranks.

    nohup has a process ignore SIGHUP, and the ranks with it.
    """
    numbers = [number for number in _PASSED_ON if signal.getsignal(number) != signal.SIG_IGN]
    return [number.name for number in numbers] + ["SIGQUIT"]


@dataclass
class _Ranks:
    """The processes of this host's ranks, as the launcher starts them.

    Attributes:
        processes: the newest process of each local rank.
        received: the first signal that came before torch's launcher took signals over; 0: none.
        first_failure: local rank and exit status of the rank that failed first, where known.
        max_restarts: how often the launcher may start the ranks again.
    """

    processes: dict[int, subprocess.Popen[Any]] = field(default_factory=dict)
    received: int = 0
    first_failure: tuple[int, int] | None = None
    max_restarts: int = 0

    @contextmanager
    def pass_signals_on(self) -> Iterator[None]:
        """A context in which signals go to the ranks, or end this process if there are none."""
        previous: dict[signal.Signals, Any] = {}
        for number in _PASSED_ON:
            if signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.signal(number, self._handle)
        try:
            yield
        finally:
            for restored, handler in previous.items():
                signal.signal(restored, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or number
        running = self._running()
        for process in running:
            process.send_signal(number)
        if not running:
            sys.exit(128 + number)

    @contextmanager
    def record(self) -> Iterator[None]:
        """A context in which the ranks that are started are noted in `processes`.

        torch's launcher and Accelerate do not hand out the exit statuses of ranks that end after
        a signal. Both start ranks as `subprocess.Popen`.
        """
        start = subprocess.Popen.__init__

        def start_and_note(process: subprocess.Popen[Any], *args: Any, **kwargs: Any) -> None:
            environment: dict[str, str] = kwargs.get("env") or {}
            is_rank = "ACCELERATE_MIXED_PRECISION" in environment
            if not is_rank:
                start(process, *args, **kwargs)
                return

            local_rank = int(environment.get("LOCAL_RANK", 0))
            if local_rank in self.processes:
                self._before_restart(local_rank, environment)
            start(process, *args, **kwargs)
            self.processes[local_rank] = process

        subprocess.Popen.__init__ = start_and_note  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            subprocess.Popen.__init__ = start  # type: ignore[method-assign]

    def _before_restart(self, local_rank: int, environment: dict[str, str]) -> None:
        """Report a restart; refuse it where the ranks would only say the same again."""
        statuses = self._statuses()
        if any(status in (EXIT_USER_ERROR, EXIT_STOPPED) for status in statuses.values()):
            raise _NothingToRestart
        if local_rank == 0:
            ended = ", ".join(
                f"rank {rank} {_describe_status(status)}" for rank, status in statuses.items()
            )
            count = environment.get("TORCHELASTIC_RESTART_COUNT", "?")
            console.error(f"{ended}; restart {count} of {self.max_restarts}")

    def explain(self, error: BaseException) -> bool:
        """Whether an exception of the launcher only reports how the ranks ended."""
        from torch.distributed.elastic.multiprocessing import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        if isinstance(error, ChildFailedError):
            _, failure = error.get_first_failure()
            self.first_failure = (failure.local_rank, failure.exitcode)
            return bool(self.processes)
        if isinstance(error, SignalException):
            self.received = self.received or int(error.sigval)
        expected = (SignalException, subprocess.CalledProcessError, _NothingToRestart)
        return isinstance(error, expected) and (bool(self.processes) or bool(self.received))

    def exit_status(self) -> int:
        """The status that this process ends with; waits for ranks that are still running."""
        self._wait()
        statuses = list(self._statuses().values())
        if not any(statuses) and not (self.received and not statuses):
            return EXIT_OK

        # The rank that failed first ends the others, by SIGTERM: its status is the run's.
        if self.first_failure is not None and not self.received:
            local_rank, status = self.first_failure
            if status < 0:
                console.error(f"local rank {local_rank} {_describe_status(status)}")
            return status if status > 0 else EXIT_RUN_ERROR

        for status in (EXIT_RUN_ERROR, EXIT_USER_ERROR, EXIT_STOPPED):
            if status in statuses:
                return status
        if -signal.SIGKILL in statuses:
            console.error(f"a rank did not leave within {_SECONDS_TO_LEAVE:.0f} s and was killed")
            return EXIT_RUN_ERROR
        if self.received:
            name = signal.Signals(self.received).name
            console.error(f"stopped by {name} before the first step; nothing new is saved")
            return 128 + self.received

        for local_rank, status in self._statuses().items():
            if status < 0:
                console.error(f"local rank {local_rank} {_describe_status(status)}")
        return max(*statuses, EXIT_RUN_ERROR)

    def _wait(self) -> None:
        """Wait for ranks that outlived the launcher's own end: a second signal cuts it short."""
        deadline = time.monotonic() + _SECONDS_TO_LEAVE
        for process in self._running():
            process.send_signal(self.received or signal.SIGTERM)
        for process in self._running():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _running(self) -> list[subprocess.Popen[Any]]:
        return [process for process in self.processes.values() if process.poll() is None]

    def _statuses(self) -> dict[int, int]:
        """The exit status of each local rank that has ended."""
        polled = {rank: process.poll() for rank, process in self.processes.items()}
        return {rank: status for rank, status in polled.items() if status is not None}


class _NothingToRestart(Exception):
    """The ranks ended by an error of the user or by a signal; starting them again is no help."""


def _describe_status(status: int) -> str:
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"


@contextmanager
def _kept_log_lines() -> Iterator[list[str]]:
    """A context in which the launcher's log lines are kept, and not printed.

    They repeat what the ranks have said, in forty lines. They are shown where the launcher itself
    fails.
    """
    lines: list[str] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())
            del lines[:-_NUM_KEPT_LOG_LINES]

    undo: list[Callable[[], None]] = []
    for name in _LAUNCHER_LOGGERS:
        logger = logging.getLogger(name)
        undo.append(_redirect(logger, Keeper()))
    try:
        yield lines
    finally:
        for restore in undo:
            restore()


def _redirect(logger: logging.Logger, handler: logging.Handler) -> Callable[[], None]:
    """Send a logger's records to one handler alone. Returns a function that undoes it."""
    handlers = logger.handlers
    propagate = logger.propagate
    logger.handlers = [handler]
    logger.propagate = False

    def restore() -> None:
        logger.handlers = handlers
        logger.propagate = propagate

    return restore


def _show(log_lines: list[str]) -> None:
    for line in log_lines:
        console.error(f"launcher: {line}")
