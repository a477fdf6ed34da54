"""A real S3 server for the tests of mirrors, and a proxy in front of it that fails on demand."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest

from lrd.checkpoint.mirror import claim, remote, uploader
from tests.helpers.object_server import BUCKET, FaultyProxy, S3Server, environment

_numbers = count()


@pytest.fixture(scope="session")
def server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def proxy(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """In front of the server. All that takes long is scaled down, and the variables are set."""
    proxy = FaultyProxy(server)
    for name, value in environment(proxy.port).items():
        monkeypatch.setenv(name, value)
    limits = remote.Limits(seconds=1.0, retries=1, retry_seconds=1.0)
    monkeypatch.setattr(remote, "SMALL", limits)
    monkeypatch.setattr(remote, "LARGE", limits)
    monkeypatch.setattr(uploader, "_FIRST_DELAY", 0.1)
    monkeypatch.setattr(uploader, "_MAX_DELAY", 0.2)
    monkeypatch.setattr(claim, "_BEAT_SECONDS", 0.2)
    monkeypatch.setattr(claim, "_PATIENCE", 1.5)
    monkeypatch.setattr(claim, "_SECONDS_BETWEEN_LOOKS", 0.1)
    yield proxy
    proxy.stop()


@pytest.fixture
def url() -> str:
    """The address of a mirror that no other test has."""
    return f"s3://{BUCKET}/test-{next(_numbers)}"
