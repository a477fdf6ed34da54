"""Nothing damaged is ever taken from a mirror."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from lrd.checkpoint import manifest, store
from lrd.checkpoint.mirror.fetching import fetch_newest
from lrd.checkpoint.mirror.remote import Remote
from lrd.errors import UserError
from tests.helpers.checkpoints import content, make_state
from tests.helpers.mirrored_run import MirroredRun, assert_same_checkpoint, prefix_of, steps_in
from tests.helpers.object_server import BUCKET, FaultyProxy, S3Server, environment

FILES = ["model.safetensors", "ema.safetensors", "optimizer.pt", "trainer.json", "config.json"]


@pytest.fixture(scope="module")
def uploaded(
    tmp_path_factory: pytest.TempPathFactory, server: S3Server
) -> tuple[Path, dict[str, bytes]]:
    """A run that ended with the checkpoints of steps 1 and 2.

    Returns:
        Its run directory, and what it has uploaded: the objects by their names.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(server.port).items():
            patch.setenv(name, value)
        run = MirroredRun(tmp_path_factory.mktemp("saved") / "run", f"s3://{BUCKET}/saved")
        for step in (1, 2):
            run.save(step)
            run.wait_for_upload(step)
        assert run.finish() is None
        run.uploader.close()
    return run.run_dir, {key: server.get(key) for key in server.keys("saved/")}


@pytest.fixture
def saved(
    uploaded: tuple[Path, dict[str, bytes]], url: str, server: S3Server, proxy: FaultyProxy
) -> Path:
    """The run directory of that run, of which a test gets a mirror of its own, at `url`."""
    run_dir, objects = uploaded
    for key, body in objects.items():
        server.put(key.replace("saved", prefix_of(url), 1), body)
    return run_dir


def key_of(url: str, step: int, file: str) -> str:
    return f"{prefix_of(url)}/checkpoints/{store.checkpoint_name(step)}/{file}"


def flip(raw: bytes, position: int) -> bytes:
    changed = bytearray(raw)
    changed[position] ^= 1
    return bytes(changed)


# All combinations are slow; these have each damage and each file.
DAMAGES = ["flipped", "truncated", "missing", "empty"]
QUICK_DAMAGES = [("manifest.json", damage) for damage in DAMAGES]
QUICK_DAMAGES += [(file, DAMAGES[number % 4]) for number, file in enumerate(FILES)]


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *QUICK_DAMAGES,
        *(
            pytest.param(file, damage, marks=pytest.mark.slow)
            for file in FILES
            for damage in DAMAGES
            if (file, damage) not in QUICK_DAMAGES
        ),
    ],
)
def test_an_older_checkpoint_takes_the_place_of_a_damaged_one(
    saved, server: S3Server, url, tmp_path, capsys, file, damage
):
    key = key_of(url, 2, file)
    raw = server.get(key)
    damaged = {"flipped": flip(raw, len(raw) // 2), "truncated": raw[:-1], "empty": b""}
    if damage == "missing":
        server.delete(key)
    else:
        server.put(key, damaged[damage])

    fetch_newest(Remote(url), tmp_path / "other")

    assert store.list_steps(tmp_path / "other") == [1]
    assert_same_checkpoint(saved, tmp_path / "other", 1)
    is_whole = (file, damage) != ("manifest.json", "missing")
    assert ("passed over" in capsys.readouterr().out) == is_whole
    assert steps_in(server, url) == [1]  # the damaged one does not count any more


# Slow, because the test above has a flipped bit in most of the files.
@pytest.mark.slow
def test_no_flipped_bit_is_ever_loaded(saved, server: S3Server, url, tmp_path):
    """A bit at each of 24 places or more."""
    server.delete(key_of(url, 1, "manifest.json"))
    originals = {file: server.get(key_of(url, 2, file)) for file in [*FILES, "manifest.json"]}
    num_flips = 0
    for file, raw in originals.items():
        for position in range(0, len(raw), max(1, len(raw) // 4)):
            server.put(key_of(url, 2, "manifest.json"), originals["manifest.json"])
            server.put(key_of(url, 2, file), flip(raw, position))
            fetch_newest(Remote(url), tmp_path / "other")
            assert store.list_steps(tmp_path / "other") == []
            num_flips += 1
        server.put(key_of(url, 2, file), raw)
    assert num_flips >= 24

    fetch_newest(Remote(url), tmp_path / "other")
    assert store.list_steps(tmp_path / "other") == [2]


def test_a_damaged_event_file_is_left_out_with_a_line(saved, server, url, tmp_path, capsys):
    (path,) = saved.glob("events.*")
    key = f"{prefix_of(url)}/{path.name}"
    server.put(key, flip(server.get(key), 20))
    fetch_newest(Remote(url), tmp_path / "other")
    assert store.list_steps(tmp_path / "other") == [1, 2]
    assert f"{path.name}: damaged; not copied" in capsys.readouterr().out
    assert not list((tmp_path / "other").glob("events.*"))


def test_records_that_grew_meanwhile_are_cut_to_those_of_the_checkpoint(
    saved, server, url, tmp_path
):
    (path,) = saved.glob("events.*")
    key = f"{prefix_of(url)}/{path.name}"
    server.put(key, server.get(key) + b"half of a rec")
    fetch_newest(Remote(url), tmp_path / "other")
    assert (tmp_path / "other" / path.name).read_bytes() == path.read_bytes()


def test_a_name_in_the_mirror_cannot_lead_out_of_the_run_directory(
    saved, server, url, tmp_path, monkeypatch
):
    digest = hashlib.sha256(b"abc").hexdigest()
    entry = {"bytes": 3, "sha256": digest}
    name = "events.out.tfevents./../../escaped"
    server.put(key_of(url, 2, "records.json"), manifest.render(2, {name: entry}).encode())
    monkeypatch.setattr(Remote, "list_objects", _with_object(Remote.list_objects, name))
    fetch_newest(Remote(url), tmp_path / "other" / "run")
    assert not list(tmp_path.rglob("escaped"))


def _with_object(list_objects, name):
    return lambda remote, prefix="": {**list_objects(remote, prefix), name: 3}


@pytest.mark.parametrize("fault", ["500", "hang", "cut", "403"])
def test_if_the_mirror_fails_nothing_is_published(saved, proxy, url, tmp_path, fault):
    other = tmp_path / "other"
    store.save(other, make_state(1))
    before = content(other)
    proxy.fault = lambda method, path: fault if "optimizer.pt" in path else None
    with pytest.raises(UserError, match=f"checkpoint.mirror: {url}: .*"):
        fetch_newest(Remote(url), other)
    assert content(other) == before


def test_an_older_run_directory_gets_the_newest(saved, url, tmp_path):
    other = tmp_path / "other"
    store.save(other, make_state(1))
    fetch_newest(Remote(url), other)
    assert store.list_steps(other) == [1, 2]
    assert_same_checkpoint(saved, other, 2)


def test_a_checkpoint_of_another_layout_is_refused_and_stays_as_it_is(
    saved, server, url, tmp_path, monkeypatch
):
    """An older lrd must not take an older checkpoint in its place, nor retire it."""
    before = sorted(server.keys(prefix_of(url)))
    monkeypatch.setattr(manifest, "READABLE_VERSIONS", (2,))
    with pytest.raises(UserError, match=r"step-00000002: manifest\.json: layout version 3"):
        fetch_newest(Remote(url), tmp_path / "other")
    assert sorted(server.keys(prefix_of(url))) == before
    assert store.list_steps(tmp_path / "other") == []


@pytest.mark.parametrize("text", [None, b"", b"[]", "flipped"])
def test_without_a_list_of_the_records_none_are_copied(saved, server, url, tmp_path, capsys, text):
    key = key_of(url, 2, "records.json")
    if text is None:
        server.delete(key)
    else:
        server.put(key, flip(server.get(key), 20) if text == "flipped" else text)
    fetch_newest(Remote(url), tmp_path / "other")

    assert store.list_steps(tmp_path / "other")[-1] == 2
    assert not list((tmp_path / "other").glob("events.*"))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "no records" in line]
    assert line.startswith(f"{url}/checkpoints/step-00000002/records.json: ")
    assert "manifest.json" not in line
    assert ("is missing" in line) == (text is None)
