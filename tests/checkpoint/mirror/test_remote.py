"""What is wrong with a mirror is one line, before anything is written."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import obstore
import pytest

from lrd import recipe as recipes
from lrd.checkpoint.mirror.remote import Remote, describe
from lrd.errors import UserError
from tests.helpers.mirrored_run import prefix_of

RECIPE = Path(__file__).parents[3] / "recipes" / "digits_resnet34_sgd_lrd.yaml"


def try_out(url: str) -> str:
    with pytest.raises(UserError) as caught:
        Remote(url).require_access()
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    assert "secret" not in line
    return line


def test_access_leaves_nothing_behind(proxy, server, url):
    Remote(url).require_access()
    assert server.keys(prefix_of(url)) == []


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("403", "no permission (the server answers 403 Forbidden, AccessDenied)"),
        ("500", "the server answers 500 Internal Server Error"),
        ("503", "asks to slow down"),
        ("hang", "the server does not answer"),
    ],
)
def test_a_server_that_refuses(proxy, url, fault, words):
    proxy.fault = lambda method, path: fault
    assert words in try_out(url)


def test_a_bucket_that_may_only_be_read(proxy, url):
    proxy.fault = lambda method, path: "403" if method == "PUT" else None
    assert "no permission" in try_out(url)


def test_no_server(proxy, url):
    proxy.stop()
    assert "the server is not there: connection refused" in try_out(url)


def test_no_such_bucket(proxy):
    assert "there is no such bucket" in try_out("s3://nothing-here/run")


def test_no_such_host(proxy, url, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://nothing.invalid:1")
    assert "the server is not there" in try_out(url)


def test_no_extra(monkeypatch, url):
    monkeypatch.setitem(sys.modules, "obstore", None)
    assert "pip install 'lrd[mirror]'" in try_out(url)


def test_no_credentials(proxy, url, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    assert try_out(url).endswith(": no credentials in the environment")


def test_azure_without_an_account():
    assert "no credentials in the environment" in try_out("az://container/run")


def test_a_folder(tmp_path):
    remote = Remote(f"file://{tmp_path}/mirror", creates_folder=True)
    remote.require_access()
    assert remote.write("a/b", b"12", is_new=True)
    assert not remote.write("a/b", b"34", is_new=True)
    assert remote.read("a/b") == b"12"
    assert remote.read("nothing") is None
    assert remote.list_objects() == {"a/b": 2}
    remote.delete(["a/b", "nothing"])
    assert remote.list_objects() == {}


@pytest.mark.parametrize(
    "url",
    [
        "s3://user:pass-word@bucket/run",
        "s3://bucket/run?X-Amz-Signature=pass-word",
        "u:pass-word@h",
    ],
)
def test_credentials_in_a_recipe_are_refused_and_not_repeated(url):
    with pytest.raises(UserError, match=r"checkpoint\.mirror: must not contain a user") as caught:
        recipes.load(str(RECIPE), [f"checkpoint.mirror={url}"])
    assert "pass-word" not in str(caught.value)
    with pytest.raises(UserError, match="must not contain a user") as caught:
        Remote(url)
    assert "pass-word" not in str(caught.value)


def test_secrets_of_the_environment_are_cut_out_of_messages(monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a-long-token")
    line = describe(ValueError("at http://me:you@host/x?sig=1 with a-long-token\nmore"))
    assert line == "at http://host/x with <AWS_SESSION_TOKEN>"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_ACCESS_KEY_ID", "first\nsecret"),
        ("AWS_SESSION_TOKEN", "secret\n"),
        ("AWS_ENDPOINT_URL", "http://a:99999"),
        ("AWS_ENDPOINT_URL_S3", "http://a:b"),
        ("AWS_ENDPOINT_URL", "http://[::1"),
    ],
)
def test_a_variable_that_the_library_cannot_take_is_named(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert try_out("s3://bucket/run").startswith(f"checkpoint.mirror: {name} in the environment")


def test_what_makes_the_library_panic_is_one_line(url, monkeypatch):
    class PanicException(BaseException):
        """As pyo3's, which is no Exception."""

    def panic(*_, **__):
        raise PanicException("index out of bounds\nat line 3")

    mirror = Remote(url)
    monkeypatch.setattr(
        mirror, "_obstore", SimpleNamespace(put=panic, exceptions=obstore.exceptions)
    )
    with pytest.raises(UserError, match=r"index out of bounds$"):
        mirror.require_access()


def test_looking_makes_no_folder(tmp_path):
    line = try_out(f"file://{tmp_path}/nothing")
    assert "nothing" in line
    assert not (tmp_path / "nothing").exists()
