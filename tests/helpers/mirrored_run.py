"""A run that writes checkpoints and has a mirror, without training."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from lrd import recipe as recipes
from lrd.checkpoint import store
from lrd.checkpoint.async_writer import AsyncWriter
from lrd.checkpoint.mirror.claim import Claim
from lrd.checkpoint.mirror.remote import Remote
from lrd.checkpoint.mirror.uploader import Uploader
from lrd.tracking.event_file import EventFile
from tests.helpers.checkpoints import content, make_state
from tests.helpers.object_server import TIMEOUT, S3Server

SETTINGS = {"seed": 0, "optimizer.lr": 0.1}


class MirroredRun:
    """A run's writer with its uploader, in a run directory."""

    def __init__(self, run_dir: Path, url: str, **section: object) -> None:
        self.run_dir = run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        self.remote = Remote(url)
        self.claim = Claim(self.remote, run_dir)
        self.claim.find_settings()
        self.claim.take(SETTINGS)
        self.records = EventFile(run_dir, 0)
        (run_dir / "metrics.csv").write_text("step,epoch\n")
        section_values = recipes.Checkpoint(**section)
        self.writer = AsyncWriter(run_dir, section_values, self.records, self.claim)

    @property
    def uploader(self) -> Uploader:
        assert self.writer.uploader is not None
        return self.writer.uploader

    def save(self, *steps: int, best_step: int | None = None) -> None:
        """Write checkpoints, and wait until they are published."""
        for step in steps:
            with (self.run_dir / "metrics.csv").open("a") as stream:
                stream.write(f"{step},1\n")
            self.writer.save(make_state(step), best_step)
            self.writer.wait()

    def finish(self, seconds: float = TIMEOUT) -> str | None:
        return self.uploader.finish(seconds, is_stopping=lambda: False)

    def wait_for_upload(self, step: int) -> None:
        wait_until(lambda: self.uploader.uploaded_step == step)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def prefix_of(url: str) -> str:
    return url.split("/", 3)[3]


def steps_in(server: S3Server, url: str) -> list[int]:
    """The steps of the checkpoints that have their manifest."""
    keys = server.keys(f"{prefix_of(url)}/checkpoints/")
    return sorted(int(key.split("/")[-2][5:]) for key in keys if key.endswith("/manifest.json"))


def assert_same_checkpoint(run_dir: Path, other_dir: Path, step: int) -> None:
    expected = content(store.checkpoint_path(run_dir, step))
    assert content(store.checkpoint_path(other_dir, step)) == expected
