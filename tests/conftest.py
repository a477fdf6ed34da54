"""Fixtures that several files of tests use."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

import lrd.train  # noqa: F401  (exempt from garbage collection, see `pytest_sessionstart`)
from lrd import startup
from tests.helpers import object_server
from tests.helpers.launching import STEPS, launch, train_command
from tests.helpers.object_server import FaultyProxy, S3Server

_mirror_numbers = count()


def pytest_sessionstart() -> None:
    """Tests collect garbage, so that a run lets go of its lock; each time took half a second."""
    startup.exempt_what_was_imported()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the tests that start launchers: they are the longest.

    Two processes that run the tests then end at about the same time (`make test`).
    """
    items.sort(key=lambda item: "launchers" not in item.path.parts)


class _UndisturbedRuns(dict[int, Path]):
    """Trains when a number of ranks is first asked for.

    If several processes run the tests, one of them trains and the others wait.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def __missing__(self, ranks: int) -> Path:
        run_dir = self._folder / f"{ranks}" / "run"
        with (self._folder / f"lock-{ranks}").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (run_dir.parent / "done").exists():
                done = launch(train_command(ranks, run_dir, *STEPS))
                assert done.returncode == 0, done.stdout + done.stderr
                (run_dir.parent / "done").touch()
        self[ranks] = run_dir
        return run_dir


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Run directories of undisturbed runs of the job with STEPS, by the number of ranks."""
    base = tmp_path_factory.getbasetemp()
    return _UndisturbedRuns(
        (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "undisturbed"
    )


@pytest.fixture(scope="session")
def server() -> Iterator[S3Server]:
    """A real S3 server."""
    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def proxy(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """In front of the server; the environment's variables lead there."""
    proxy = FaultyProxy(server)
    for name, value in object_server.environment(proxy.port).items():
        monkeypatch.setenv(name, value)
    yield proxy
    proxy.stop()


@pytest.fixture
def url() -> str:
    """The address of a mirror on the server that no other test has."""
    return f"s3://{object_server.BUCKET}/test-{next(_mirror_numbers)}"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Gives a run in this process one thread, and resets what the run sets after the test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    AcceleratorState._reset_state(reset_partial_state=True)
