"""Launchers on several hosts (network namespaces), with what they print."""

from __future__ import annotations

import subprocess
import threading
import time
from pathlib import Path

from tests.helpers.launching import RECIPE, SMALL, STEPS
from tests.helpers.namespaces import Host, launcher

TRAIN = ["-m", "lrd.train", RECIPE, "run_dir=run", *SMALL, *STEPS]


class LaunchedHost:
    """A launcher on a host, and what it and its ranks have printed so far.

    Args:
        all_hosts: of the job.
        host: where this launcher runs.
        ranks: how many it starts.
        overrides: of the recipe.
        options: further ones of `accelerate launch`.
        environment: further environment variables.
    """

    def __init__(
        self,
        all_hosts: list[Host],
        host: Host,
        ranks: int,
        *overrides: str,
        options: tuple[str, ...] = (),
        **environment: str,
    ) -> None:
        self.host = host
        self.output = ""
        self.began = time.monotonic()

        target = [*TRAIN, *overrides]
        rendezvous = ("--rdzv_backend", "lrd", "--rdzv_conf", "timeout=60")
        command = launcher(all_hosts, host, ranks, target, *rendezvous, *options)
        self.process = host.start(command, **environment)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line

    def end(self, timeout: float = 120) -> int:
        """Wait for the end. Returns the status; `seconds` is how long it took in all."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.host.name} hangs; it printed:\n{self.output}") from None
        self.seconds = time.monotonic() - self.began
        self._reader.join()
        return status

    @property
    def lrd_lines(self) -> list[str]:
        """The lines in which lrd reports what is wrong."""
        return [line for line in self.output.splitlines() if line.startswith("lrd: ")]


def run_dir(host: Host) -> Path:
    return host.folder / "run"


def assert_all_succeed(launched_hosts: list[LaunchedHost]) -> None:
    for launched in launched_hosts:
        assert launched.end() == 0, launched.output
