"""A mirror belongs to one run, and one start of it at a time."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from lrd.checkpoint import store
from lrd.checkpoint.mirror.claim import Claim, LostClaimError
from lrd.checkpoint.mirror.remote import Remote
from lrd.errors import UserError
from tests.helpers.checkpoints import make_state
from tests.helpers.mirrored_run import SETTINGS, prefix_of

pytestmark = pytest.mark.usefixtures("proxy")


def make_claim(url: str, run_dir: Path) -> Claim:
    run_dir.mkdir(parents=True, exist_ok=True)
    return Claim(Remote(url), run_dir)


def take(url: str, run_dir: Path) -> Claim:
    claim = make_claim(url, run_dir)
    claim.find_settings()
    claim.take(SETTINGS)
    return claim


def test_the_settings_of_the_run_are_in_the_mirror(url, tmp_path):
    claim = make_claim(url, tmp_path / "a")
    assert claim.find_settings() is None
    claim.take(SETTINGS)
    claim.release()
    assert make_claim(url, tmp_path / "b").find_settings() == SETTINGS


def test_a_run_that_lives_is_not_disturbed(url, tmp_path):
    first = take(url, tmp_path / "a")
    with pytest.raises(UserError, match=f"another run on .* is using {url}; give this one another"):
        take(url, tmp_path / "b")
    assert not (tmp_path / "b" / "mirror.json").exists()
    first.require_held()
    first.close()


def test_after_its_end_the_next_start_need_not_wait(url, tmp_path):
    take(url, tmp_path / "a").release()
    began = time.monotonic()
    take(url, tmp_path / "b").close()
    assert time.monotonic() - began < 1.0


def test_a_start_on_the_same_run_directory_need_not_wait_for_one_that_was_killed(url, tmp_path):
    take(url, tmp_path / "a").close()
    began = time.monotonic()
    take(url, tmp_path / "a").close()
    assert time.monotonic() - began < 1.0


def test_on_another_machine_a_run_that_was_killed_is_continued_after_a_while(url, tmp_path, capsys):
    first = take(url, tmp_path / "a")
    first.close()
    began = time.monotonic()
    take(url, tmp_path / "b").close()
    assert time.monotonic() - began > 1.0
    assert "waiting up to 2 s" in capsys.readouterr().out
    with pytest.raises(LostClaimError):
        first.require_held()


def test_two_starts_at_the_same_moment(url, tmp_path):
    claims = [make_claim(url, tmp_path / name) for name in "ab"]
    assert [claim.find_settings() for claim in claims] == [None, None]
    claims[0].take(SETTINGS)
    with pytest.raises(UserError, match="another run"):
        claims[1].take({**SETTINGS, "seed": 7})
    claims[0].require_held()
    claims[0].close()


def test_a_start_that_is_killed_while_it_takes_a_mirror_does_not_lose_it(
    url, tmp_path, monkeypatch
):
    """Its first checkpoint may have been written before the recipe named the mirror."""
    store.save(tmp_path / "a", make_state(1))
    claim = make_claim(url, tmp_path / "a")
    assert claim.find_settings() is None
    with monkeypatch.context() as patch:
        write = Remote.write
        patch.setattr(Remote, "write", _write_and_die(write))
        with pytest.raises(KeyboardInterrupt):
            claim.take(SETTINGS)
    take(url, tmp_path / "a").close()


def _write_and_die(write):
    def write_and_die(*arguments, **options):
        write(*arguments, **options)
        raise KeyboardInterrupt

    return write_and_die


@pytest.mark.parametrize("text", ["", "[]", '{"run": 1}', "half"])
def test_ids_in_the_run_directory_that_cannot_be_read_are_one_line(url, tmp_path, text):
    take(url, tmp_path / "a").release()
    path = tmp_path / "a" / "mirror.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"run_dir: {path} is damaged"):
        take(url, tmp_path / "a")


def test_another_run_is_refused(url, tmp_path):
    take(url, tmp_path / "a").release()
    take(f"{url}-other", tmp_path / "b").release()
    with pytest.raises(UserError, match=f"{url} has run .{{8}}, .*/b has run"):
        take(url, tmp_path / "b")


def test_a_run_directory_with_checkpoints_of_its_own_is_refused(url, tmp_path):
    take(url, tmp_path / "a").release()
    store.save(tmp_path / "b", make_state(1))
    with pytest.raises(UserError, match="has a run that is not the one in"):
        take(url, tmp_path / "b")


def test_a_run_may_move_to_a_new_mirror(url, tmp_path):
    take(url, tmp_path / "a").release()
    run = json.loads((tmp_path / "a" / "mirror.json").read_text())["run"]
    take(f"{url}-other", tmp_path / "a").release()
    assert json.loads((tmp_path / "a" / "mirror.json").read_text())["run"] == run


@pytest.mark.parametrize("text", [b"", b"{}", b"[1]", b'{"run": 1}', b"\xff", b"[" * 100_000])
def test_a_damaged_description_is_one_line(url, tmp_path, server, text):
    server.put(f"{prefix_of(url)}/run.json", text)
    with pytest.raises(UserError, match=f"checkpoint.mirror: {url}: run.json: is not what"):
        take(url, tmp_path / "a")
