"""Checkpoints reach the mirror whole, whatever the server does, and nothing waits for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lrd.checkpoint import store
from lrd.checkpoint.mirror import remote, uploader
from lrd.checkpoint.mirror.fetching import fetch_newest
from lrd.checkpoint.mirror.remote import Remote
from tests.helpers.checkpoints import make_state
from tests.helpers.mirrored_run import (
    MirroredRun,
    assert_same_checkpoint,
    prefix_of,
    steps_in,
    wait_until,
)
from tests.helpers.object_server import TIMEOUT, FaultyProxy


@pytest.fixture
def runs(proxy: FaultyProxy) -> Iterator[list[MirroredRun]]:
    """Runs to close at the end of a test."""
    started: list[MirroredRun] = []
    yield started
    proxy.fault = lambda method, path: None
    for run in started:
        run.uploader.close()


@pytest.fixture
def start(tmp_path: Path, url: str, runs: list[MirroredRun]) -> Callable[..., MirroredRun]:
    def start(name: str = "run", **section: object) -> MirroredRun:
        runs.append(MirroredRun(tmp_path / name, url, **section))
        return runs[-1]

    return start


def fail_uploads(fault: str) -> Callable[[str, str], str | None]:
    """A fault of all requests that write to the folder of a checkpoint."""

    def choose(method: str, path: str) -> str | None:
        return fault if method in ("PUT", "POST") and "/checkpoints/step-" in path else None

    return choose


def test_an_empty_run_directory_gets_the_newest_checkpoint_and_the_records(start, url, tmp_path):
    run = start()
    run.save(1, 2, 3, best_step=1)
    assert run.finish() is None
    run.uploader.close()

    fetch_newest(Remote(url), tmp_path / "other")
    assert_same_checkpoint(run.run_dir, tmp_path / "other", 3)
    assert_same_checkpoint(run.run_dir, tmp_path / "other", 1)
    for path in (run.records.path, run.run_dir / "metrics.csv"):
        assert (tmp_path / "other" / path.name).read_bytes() == path.read_bytes()
    assert not list((tmp_path / "other").glob(".mirror*"))


def test_a_later_checkpoint_in_the_run_directory_is_kept(start, url, tmp_path):
    run = start()
    run.save(3)
    assert run.finish() is None

    store.save(tmp_path / "other", make_state(4))
    fetch_newest(Remote(url), tmp_path / "other")
    assert store.list_steps(tmp_path / "other") == [4]


def test_the_manifest_is_written_last(start, proxy):
    run = start()
    run.save(1)
    assert run.finish() is None
    written = [path for method, path in proxy.requests if method == "PUT" and "/step-" in path]
    assert written[-1].split("?")[0].endswith("/manifest.json")
    assert sum("manifest.json" in path for path in written) == 1


@pytest.mark.parametrize(("best_step", "kept"), [(None, [4, 5]), (2, [2, 4, 5])])
def test_the_newest_and_the_best_checkpoints_stay_in_the_mirror(
    start, server, url, best_step, kept
):
    run = start()
    for step in range(1, 6):
        run.save(step, best_step=best_step if step >= 2 else None)
        run.wait_for_upload(step)
    assert run.finish() is None
    assert steps_in(server, url) == kept
    folders = {key.split("/")[-2] for key in server.keys(f"{prefix_of(url)}/checkpoints/")}
    assert folders == {store.checkpoint_name(step) for step in kept}


def test_the_manifest_is_deleted_first(start, proxy):
    run = start()
    for step in (1, 2, 3):
        run.save(step)
        run.wait_for_upload(step)
    assert run.finish() is None
    deleted = [path for method, path in proxy.requests if method == "DELETE"]
    assert len(deleted) == 7
    assert deleted[0].endswith("step-00000001/manifest.json")


def test_nobody_waits_for_a_server_that_hangs_and_the_newest_is_uploaded(start, server, proxy, url):
    run = start(keep_last=2)
    proxy.fault = fail_uploads("hang")
    began = time.monotonic()
    run.save(*range(1, 7), best_step=2)
    assert time.monotonic() - began < 5.0
    assert store.list_steps(run.run_dir) == [2, 5, 6]
    assert steps_in(server, url) == []

    proxy.fault = lambda method, path: None
    run.wait_for_upload(6)
    assert run.finish() is None
    uploaded = steps_in(server, url)
    assert uploaded[-2:] == [2, 6]  # the best one was made up for
    assert set(uploaded) <= {1, 2, 6}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("500", "500 Internal Server Error"),
        ("503", "slow down"),
        ("403", "no permission"),
        pytest.param("hang", "does not answer", marks=pytest.mark.slow),
        ("cut", "ended the connection"),
    ],
)
def test_an_upload_that_fails_is_one_line_and_so_is_one_that_works_again(
    start, server, proxy, url, capsys, fault, reason
):
    run = start()
    proxy.fault = fail_uploads(fault)
    run.save(1)
    wait_until(lambda: sum("/step-" in path for _, path in proxy.requests) > 5)
    assert steps_in(server, url) == []

    proxy.fault = lambda method, path: None
    run.wait_for_upload(1)
    assert run.finish() is None
    printed = capsys.readouterr()
    (error,) = printed.err.splitlines()
    assert error.startswith("lrd: checkpoint.mirror: the checkpoint of step 1 could not be uploade")
    assert reason in error
    assert "trying again" in error
    (works,) = [line for line in printed.out.splitlines() if "works again" in line]
    assert "step 1" in works


def test_a_server_that_is_gone_for_a_while(start, server, proxy, url, capsys):
    run = start()
    run.save(1)
    run.wait_for_upload(1)
    proxy.stop()
    run.save(2, 3)
    wait_until(lambda: "server is not there" in capsys.readouterr().err)
    proxy.start()
    run.wait_for_upload(3)
    assert run.finish() is None
    assert steps_in(server, url)[-1] == 3


def test_at_the_end_the_wait_has_a_limit_and_a_line_says_what_is_missing(start, proxy, capsys):
    run = start()
    proxy.fault = fail_uploads("hang")
    run.save(1)
    began = time.monotonic()
    line = run.finish(seconds=1.5)
    assert 1.0 < time.monotonic() - began < 4.0
    assert line is not None
    assert "step 1 is not in s3://" in line
    assert "next start uploads it" in line
    assert "waiting up to 2 s for the upload of step 1" in capsys.readouterr().out


def test_a_stop_signal_shortens_the_wait(start, proxy, monkeypatch):
    monkeypatch.setattr(uploader, "UPLOAD_SECONDS_AT_STOP", 0.5)
    run = start()
    proxy.fault = fail_uploads("hang")
    run.save(1)
    signal = threading.Event()
    threading.Timer(0.5, signal.set).start()
    began = time.monotonic()
    assert run.uploader.finish(TIMEOUT, signal.is_set) is not None
    assert time.monotonic() - began < 5.0


def test_with_on_error_stop_a_failed_upload_is_an_error_of_the_run(start, proxy, capsys):
    run = start(on_error="stop")
    proxy.fault = fail_uploads("403")
    run.save(1)
    wait_until(lambda: bool(run.writer.errors))
    (line,) = run.writer.take_errors()
    assert "no permission" in line
    assert "trying again" not in line
    assert capsys.readouterr().err == ""


def test_the_next_start_uploads_what_the_last_one_could_not(start, server, proxy, url):
    run = start()
    proxy.fault = fail_uploads("500")
    run.save(1)
    assert run.finish(seconds=0.5) is not None
    run.uploader.close()

    proxy.fault = lambda method, path: None
    again = start()
    again.uploader.offer(1, None)
    assert again.finish() is None
    assert steps_in(server, url) == [1]


def test_records_that_did_not_change_are_not_uploaded_again(start, proxy):
    run = start()
    old = run.run_dir / "events.out.tfevents.0000000001.host.1.0"
    old.write_bytes(b"of an earlier start")
    for step in (1, 2):
        run.save(step)
        run.wait_for_upload(step)
    assert run.finish() is None
    assert sum(method == "PUT" and old.name in path for method, path in proxy.requests) == 1


def test_no_credentials_are_in_what_is_written(start, server, url, tmp_path):
    run = start()
    run.save(1)
    assert run.finish() is None
    run.uploader.close()
    secrets = (b"not-a-real-secret", b"tester")
    written = [path.read_bytes() for path in run.run_dir.rglob("*") if path.is_file()]
    written += [server.get(key) for key in server.keys(prefix_of(url))]
    assert len(written) > 10
    assert not any(secret in text for secret in secrets for text in written)


def test_a_checkpoint_that_cannot_be_deleted_is_no_failed_upload(start, server, proxy, url, capsys):
    proxy.fault = lambda method, path: "403" if "?delete" in path else None
    run = start(on_error="stop")
    for step in (1, 2, 3, 4):
        run.save(step)
        run.wait_for_upload(step)
    wait_until(lambda: sum("?delete" in path for _, path in proxy.requests) >= 2)
    assert steps_in(server, url) == [1, 2, 3, 4]

    proxy.fault = lambda method, path: None
    run.save(5)
    run.wait_for_upload(5)
    assert run.finish() is None
    assert steps_in(server, url) == [4, 5]
    assert run.writer.take_errors() == []
    assert capsys.readouterr().err.count("old checkpoints in") == 1


def test_the_server_gets_a_digest_of_what_it_is_sent(start, proxy):
    run = start()
    run.save(1)
    assert run.finish() is None
    uploads = [
        headers
        for (method, _), headers in zip(proxy.requests, proxy.headers, strict=True)
        if method == "PUT"
    ]
    assert uploads
    assert all("x-amz-checksum-sha256" in headers for headers in uploads)


def test_a_large_file_travels_in_parts(proxy, url, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_CHUNK_BYTES", 5 << 20)  # the least that S3 allows
    path = tmp_path / "large"
    path.write_bytes(bytes(range(256)) * (11 << 12))  # 11 MiB
    mirror = Remote(url)
    mirror.upload(path, "large")
    assert sum("partNumber" in request for _, request in proxy.requests) == 3
    mirror.download("large", tmp_path / "back", path.stat().st_size)
    assert (tmp_path / "back").read_bytes() == path.read_bytes()
