"""All that takes long is scaled down in the tests of mirrors."""

from __future__ import annotations

import pytest

from lrd.checkpoint.mirror import claim, remote, uploader


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = remote.Limits(seconds=1.0, retries=1, retry_seconds=1.0)
    monkeypatch.setattr(remote, "SMALL", limits)
    monkeypatch.setattr(remote, "LARGE", limits)
    monkeypatch.setattr(uploader, "_FIRST_DELAY", 0.1)
    monkeypatch.setattr(uploader, "_MAX_DELAY", 0.2)
    monkeypatch.setattr(claim, "_BEAT_SECONDS", 0.2)
    monkeypatch.setattr(claim, "_PATIENCE", 1.5)
    monkeypatch.setattr(claim, "_SECONDS_BETWEEN_LOOKS", 0.1)
