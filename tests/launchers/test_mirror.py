"""Runs with a mirror: a machine that is lost costs no more than the steps since the last upload.

The slow ones: pytest -m slow tests/launchers/test_mirror.py
"""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import pytest

from lrd.checkpoint import store
from lrd.errors import EXIT_STOPPED, UserError
from tests.helpers.equality import NUM_STEPS, assert_same_end
from tests.helpers.launching import STEPS, launch, signal_all, start, train_command, wait_for
from tests.helpers.mirrored_run import steps_in
from tests.helpers.object_server import FaultyProxy, S3Server


def mirrored(ranks: int, run_dir: Path, url: str, *overrides: str) -> list[str]:
    return train_command(ranks, run_dir, *STEPS, f"checkpoint.mirror={url}", *overrides)


@pytest.mark.slow
@pytest.mark.usefixtures("proxy")
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_goes_on_from_the_mirror_alone_and_ends_like_an_undisturbed_one(
    tmp_path: Path, server: S3Server, url: str, undisturbed: dict[int, Path], ranks: int
) -> None:
    lost = tmp_path / "lost"
    process = start(mirrored(ranks, lost, url))
    wait_for(lambda: 10 in store.list_steps(lost), process)
    signal_all(process, signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert "stopped by signal 15" in output
    last_step = max(store.list_steps(lost))
    assert steps_in(server, url)[-1] == last_step
    shutil.rmtree(lost)

    # Another recipe is refused by key, and leaves nothing.
    other = launch(mirrored(1, tmp_path / "other", url, "seed=7"))
    assert other.returncode == UserError.status
    assert f"seed: the run in {url} had 0, the recipe now says 7" in other.stderr
    assert "name another checkpoint.mirror to start a new run" in other.stderr
    assert not (tmp_path / "other").exists()

    done = launch(mirrored(ranks, tmp_path / "run", url))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{url}: has a checkpoint of step {last_step}" in done.stdout
    assert f"going on after step {last_step}" in done.stdout
    assert_same_end(tmp_path / "run", undisturbed[ranks])
    assert steps_in(server, url)[-1] == NUM_STEPS


@pytest.mark.slow
def test_a_kill_in_the_middle_of_an_upload_costs_the_steps_since_the_last_whole_one(
    tmp_path: Path, server: S3Server, proxy: FaultyProxy, url: str, undisturbed: dict[int, Path]
) -> None:
    lost = tmp_path / "lost"

    def hang_at_step_10(method: str, path: str) -> str | None:
        is_upload = method in ("PUT", "POST") and "step-00000010/optimizer.pt" in path
        return "hang" if is_upload else None

    proxy.fault = hang_at_step_10
    process = start(mirrored(2, lost, url))
    wait_for(lambda: any("step-00000010/optimizer" in path for _, path in proxy.requests), process)
    signal_all(process, signal.SIGKILL)
    process.communicate()
    shutil.rmtree(lost)
    proxy.fault = lambda method, path: None
    whole = steps_in(server, url)
    assert 10 not in whole

    done = launch(mirrored(2, tmp_path / "run", url))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "waiting up to 20 s to see whether it still is" in done.stdout
    assert f"going on after step {whole[-1]}" in done.stdout
    assert_same_end(tmp_path / "run", undisturbed[2])


@pytest.mark.slow
def test_a_second_run_with_the_prefix_of_one_that_lives_is_refused(
    tmp_path: Path, proxy: FaultyProxy, url: str
) -> None:
    process = start(mirrored(1, tmp_path / "first", url, "trainer.epochs=1000"))
    wait_for(lambda: 5 in store.list_steps(tmp_path / "first"), process)
    second = launch(mirrored(1, tmp_path / "second", url, "trainer.epochs=1000"))
    assert second.returncode == UserError.status
    assert f"is using {url}; give this one another prefix" in second.stderr
    assert not (tmp_path / "second").exists()
    signal_all(process, signal.SIGTERM)
    assert process.wait(60) == EXIT_STOPPED


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["500", "503", "403"])
def test_a_mirror_that_fails_does_not_disturb_the_run(
    tmp_path: Path, server: S3Server, proxy: FaultyProxy, url: str, undisturbed, fault: str
) -> None:
    """It fails up to the upload of the last checkpoint."""

    def fail(method: str, path: str) -> str | None:
        is_upload = method in ("PUT", "POST") and "/checkpoints/step-" in path
        return fault if is_upload and NUM_STEPS not in store.list_steps(tmp_path / "run") else None

    proxy.fault = fail
    done = launch(mirrored(1, tmp_path / "run", url))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("could not be uploaded") == 1
    # The upload that failed may be that of an earlier step: some errors are tried again at once.
    assert done.stdout.count("works again, has the checkpoint of step ") == 1
    assert_same_end(tmp_path / "run", undisturbed[1])
    assert steps_in(server, url)[-1] == NUM_STEPS


@pytest.mark.slow
def test_at_a_stop_a_mirror_that_hangs_is_waited_for_less_than_launchers_do(
    tmp_path: Path, proxy: FaultyProxy, url: str
) -> None:
    process = start(mirrored(1, tmp_path / "run", url))
    wait_for(lambda: 5 in store.list_steps(tmp_path / "run"), process)
    proxy.fault = lambda method, path: "hang"
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == EXIT_STOPPED, output
    assert time.monotonic() - began < 30.0
    assert f"is not in {url}" in output
    assert "next start uploads it" in output
    assert "stopped by signal 15" in output


@pytest.mark.slow
def test_with_on_error_stop_a_mirror_that_fails_ends_the_run(
    tmp_path: Path, proxy: FaultyProxy, url: str
) -> None:
    proxy.fault = lambda method, path: "403" if "/step-" in path and method != "GET" else None
    done = launch(mirrored(2, tmp_path / "run", url, "checkpoint.on_error=stop"))
    assert done.returncode != 0
    line = f"could not be uploaded to {url}: no permission"
    assert (done.stdout + done.stderr).count(line) == 1
