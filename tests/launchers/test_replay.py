"""The time machine on several ranks, through the real commands."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lrd.replay.computing.launching import LAUNCHER_VARIABLE
from tests.helpers.equality import assert_same_final_state, metrics_without_speed
from tests.helpers.launching import environment, launch, train_command
from tests.helpers.namespaces import hosts, launcher, missing_requirement
from tests.helpers.replaying import tamper_with_checkpoint

STEPS = ["trainer.epochs=2", "trainer.max_steps=12", "checkpoint.every_steps=4"]


def lrd(*arguments: object, expected: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command of lrd and check its exit status."""
    done = subprocess.run(
        [sys.executable, "-m", "lrd", *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == expected, done.stdout + done.stderr
    return done


def train(ranks: int, run_dir: Path, *overrides: str) -> None:
    done = launch(train_command(ranks, run_dir, *STEPS, "checkpoint.keep_last=9", *overrides))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("two") / "run"
    train(2, run_dir)
    return run_dir


def assert_fork_equals_parent(parent: Path, run_dir: Path, ranks: int) -> None:
    """Fork in the middle of a window, train to the end, and compare with the parent."""
    told = json.loads(lrd("fork", parent, "--at", 6, f"run_dir={run_dir}", "--json").stdout)
    assert (told["ranks"], told["replayed"], told["changes"]) == (ranks, 2, {})
    if ranks == 1:
        lrd("train", run_dir / "recipe.yaml")
    else:
        lrd(*told["command"].split()[1:])
    assert_same_final_state(run_dir, parent)
    assert metrics_without_speed(run_dir) == metrics_without_speed(parent)
    lrd("diff", parent, run_dir, "--files-only")


def test_a_window_of_two_ranks_is_verified(undisturbed):
    told = json.loads(lrd("verify", undisturbed[2], "--windows", 1, "--json").stdout)
    assert (told["valid"], told["is_exact"], len(told["windows"])) == (True, True, 1)


@pytest.mark.slow
@pytest.mark.skipif(bool(missing_requirement()), reason=missing_requirement())
def test_a_replay_on_two_hosts_by_a_launcher_of_the_users_own(undisturbed, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed[2], run_dir)
    script = tmp_path / "start_on_hosts.py"
    with hosts(2, tmp_path) as all_hosts:
        commands = [host.command(launcher(all_hosts, host, 1, [])) for host in all_hosts]
        script.write_text(
            "import subprocess, sys\n"
            f"started = [subprocess.Popen([*command, *sys.argv[1:]]) for command in {commands}]\n"
            "sys.exit(max(process.wait() for process in started))\n"
        )
        monkeypatch.setenv(LAUNCHER_VARIABLE, f"{sys.executable} {script}")
        told = json.loads(lrd("verify", run_dir, "--windows", 1, "--json").stdout)
        assert (told["valid"], told["is_exact"], len(told["windows"])) == (True, True, 1)
        assert list((run_dir / "replays").iterdir()) == []

        refused = lrd("replay", run_dir, "--around", 12, "--ranks", 3, expected=2)
        line = "lrd: the launcher has started 2 rank(s); steps 1 to 17 are computed on 3"
        assert line in refused.stderr.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_fork_equals_its_parent(tmp_path, ranks):
    parent = tmp_path / "parent"
    # 66 images are split over 1, 2 and 3 ranks.
    train(ranks, parent, "data.batch_size=66")
    assert_fork_equals_parent(parent, tmp_path / "forked", ranks)


@pytest.mark.slow
def test_the_two_ranks_of_a_run_are_verified(two_ranks, tmp_path):
    told = json.loads(lrd("verify", two_ranks, "--json").stdout)
    assert (told["valid"], told["is_exact"], told["steps"]) == (True, True, 12)


@pytest.mark.slow
def test_a_run_that_went_on_on_other_ranks_is_verified_and_compared(tmp_path):
    """The checkpoint between its two starts is gone, so one window has two legs."""
    run_dir = tmp_path / "run"
    train(1, run_dir, "data.batch_size=66", "trainer.max_steps=6", "checkpoint.every_steps=4")
    train(3, run_dir, "data.batch_size=66")
    for file in (run_dir / "checkpoints" / "step-00000006").iterdir():
        file.unlink()
    (run_dir / "checkpoints" / "step-00000006").rmdir()

    told = json.loads(lrd("verify", run_dir, "--json").stdout)
    assert told["valid"], told
    assert [window["last"] for window in told["windows"]] == [4, 8, 12]

    tamper_with_checkpoint(run_dir, 8, "fc.weight", 3)
    told = json.loads(lrd("verify", run_dir, "--json", expected=1).stdout)
    assert told["windows"][1]["name"] == "fc.weight"
    assert told["windows"][1]["step"] == 8


@pytest.mark.slow
def test_kept_elements_momentum_is_averaged_where_it_was(tmp_path):
    run_dir = tmp_path / "run"
    train(2, run_dir, "trainer.gradient_exchange=kept")
    told = json.loads(lrd("verify", run_dir, "--json").stdout)
    assert told["valid"], told


@pytest.mark.slow
def test_the_images_of_both_ranks_are_drawn(two_ranks, tmp_path):
    out = tmp_path / "out"
    arguments = ["--from", 7, "--to", 8, "--samples", "--norms", "-o", out, "--json"]
    told = json.loads(lrd("replay", two_ranks, *arguments).stdout)
    assert told["difference"] is None
    assert list(told["norms"]) == ["7", "8"]
    assert (out / "samples.png").stat().st_size > 10_000


@pytest.mark.slow
def test_norms_of_shards_are_those_of_whole_parameters(tmp_path):
    run_dir = tmp_path / "run"
    train(2, run_dir, "trainer.sharding=full")
    told = json.loads(lrd("replay", run_dir, "--from", 7, "--to", 7, "--norms", "--json").stdout)
    assert told["difference"] is None
    squares = sum(norms["gradient"] ** 2 for norms in told["norms"]["7"].values())
    assert squares**0.5 == pytest.approx(told["rows"]["7"]["train/grad_norm"], rel=1e-4)
    assert all(norms["update"] > 0 for norms in told["norms"]["7"].values())
