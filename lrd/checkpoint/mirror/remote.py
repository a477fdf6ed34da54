"""The object store that a mirror is in, by way of obstore.

obstore's threads are its own, outside of Python: a call waits for them without holding the
interpreter's lock, and needs no event loop. It tries a request again by itself, and each request
has a limit of time here, so no call waits forever for a server that does not answer.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic_core import PydanticCustomError

from lrd.errors import UserError, first_line
from lrd.files import sync
from lrd.recipe.schema import check_mirror

KEY = "checkpoint.mirror"  # of the recipe, for messages

_CHUNK_BYTES = 1 << 23  # of a request; larger objects travel in several
_NUM_REQUESTS = 4  # at a time, of one upload

# What an error of obstore says, in its debugging part too -> what it means.
_MEANINGS = {
    "NoSuchBucket": "there is no such bucket",
    "InvalidAccessKeyId": "the server does not know these credentials",
    "SignatureDoesNotMatch": "the server does not accept these credentials",
    "AccessDenied": "no permission",
    "kind: PermissionDenied": "no permission",
    "UnableToCanonicalize": "there is no such folder",
    "SlowDown": "the server asks to slow down",
    "MissingAccount": "no credentials in the environment",
    # Without any, a cloud's own machine is asked for them.
    "/latest/api/token": "no credentials in the environment",
    "/latest/meta-data": "no credentials in the environment",
    "/computeMetadata/": "no credentials in the environment",
    "/metadata/identity": "no credentials in the environment",
    "ConnectionRefused": "the server is not there: connection refused",
    "Connection refused": "the server is not there: connection refused",
    "dns error": "the server is not there: its name is not known",
    "TimedOut": "the server does not answer",
    "operation timed out": "the server does not answer",
    "IncompleteMessage": "the server ended the connection",
    "ConnectionReset": "the server ended the connection",
    "BrokenPipe": "the server ended the connection",
}
_SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|CREDENTIAL|KEY|SAS")
_MIN_SECRET_LENGTH = 6
_PREFIXES = ("AWS_", "AZURE_", "GOOGLE_")  # of the variables that obstore reads

# Not AWS_USE_FIPS_ENDPOINT and others that switch something on or off.
_ENDPOINT_NAME = re.compile(r"(AWS|AZURE|GOOGLE)_(?!(\w+_)?USE_)(\w+_)?ENDPOINT(_URL(_\w+)?)?")
# obstore panics at other characters in the host's name.
_SERVER_ADDRESS = re.compile(
    r"https?://([!-.0-~]*@)?([\w.-]+|\[[\da-f:.]+\])(:\d*)?([/?#][!-~]*)?",
    re.ASCII | re.IGNORECASE,
)


class RemoteError(Exception):
    """A request that failed; the text is one line with the cause, and has no credentials in it."""


@dataclass(frozen=True)
class Limits:
    """How long a request may take.

    Attributes:
        seconds: of one try.
        retries: how often it is tried again.
        retry_seconds: after these it is not tried again.
    """

    seconds: float
    retries: int
    retry_seconds: float


# Small requests, for which somebody waits, and those that carry up to _CHUNK_BYTES.
SMALL = Limits(seconds=10.0, retries=3, retry_seconds=10.0)
LARGE = Limits(seconds=60.0, retries=3, retry_seconds=60.0)
_CONNECT_SECONDS = 5.0


class Remote:
    """One prefix of an object store. Nothing is connected to before the first request.

    Args:
        url: its address, as `checkpoint.mirror` has it. Credentials come from the environment.
        creates_folder: whether the folder of a `file://` address is made if it does not exist.

    Attributes:
        url: the same.

    Raises:
        UserError: the extra is not installed, the address has another form, or the environment does
            not say what the library needs to begin.
    """

    def __init__(self, url: str, creates_folder: bool = False) -> None:
        try:
            import obstore
        except ImportError:
            raise UserError(
                f"{KEY}: needs the package obstore; install it with: pip install 'lrd[mirror]'"
            ) from None

        try:
            self.url = check_mirror(url)
        except PydanticCustomError as error:
            raise UserError(f"{KEY}: {error.message()}") from None
        except ValueError as error:
            raise UserError(f"{url}: {error}") from None

        self._obstore = obstore
        _require_environment()
        try:
            with _described_failures():
                self._small = _connect(self.url, SMALL, creates_folder)
                self._large = _connect(self.url, LARGE, creates_folder)
        except RemoteError as error:
            raise UserError(f"{KEY}: {self.url}: {error}") from None

    def list_objects(self, prefix: str = "") -> dict[str, int]:
        """All objects whose names begin with a prefix of whole parts: name -> size in bytes.

        Raises:
            RemoteError: it failed.
        """
        with _described_failures():
            found = self._obstore.list(self._small, prefix or None).collect()
        return {str(entry["path"]): int(entry["size"]) for entry in found}

    def read(self, name: str) -> bytes | None:
        """A small object, or None if there is none of this name.

        Raises:
            RemoteError: it failed.
        """
        with _described_failures():
            try:
                return bytes(self._obstore.get(self._small, name).bytes())
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise
                return None

    def write(self, name: str, content: bytes, is_new: bool = False) -> bool:
        """Write a small object. Readers see either the old one or the new one.

        Args:
            is_new: write it only if there is none of this name.

        Returns:
            False if `is_new` and there is one.

        Raises:
            RemoteError: it failed.
        """
        mode: Any = "create" if is_new else "overwrite"
        with _described_failures():
            try:
                self._obstore.put(self._small, name, content, mode=mode)
            except self._obstore.exceptions.AlreadyExistsError:
                return False
            return True

    def upload(self, path: Path, name: str) -> None:
        """Copy a file to an object, which appears when it is whole.

        Raises:
            RemoteError: it failed.
        """
        with _described_failures():
            self._obstore.put(
                self._large,
                name,
                path,
                chunk_size=_CHUNK_BYTES,
                max_concurrency=_NUM_REQUESTS,
            )

    def download(self, name: str, path: Path, size: int) -> None:
        """Copy the first `size` bytes of an object to a new file, and flush it to the disk.

        Raises:
            RemoteError: the object could not be read.
            OSError: the file could not be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            for start in range(0, size, _CHUNK_BYTES):
                length = min(_CHUNK_BYTES, size - start)
                with _described_failures():
                    chunk = self._obstore.get_range(self._large, name, start=start, length=length)
                stream.write(memoryview(chunk))
        sync(path)

    def rename(self, name: str, new_name: str) -> None:
        """Give an object another name.

        Raises:
            RemoteError: it failed.
        """
        with _described_failures():
            self._obstore.rename(self._small, name, new_name)

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects. One that is gone already is no error.

        Raises:
            RemoteError: it failed.
        """
        for name in names:
            with _described_failures(), suppress(FileNotFoundError):
                self._obstore.delete(self._small, name)

    def require_access(self) -> None:
        """Write, list and delete an object of a name that no other has.

        Raises:
            UserError: this may not be done, or the server is not there.
        """
        name = f"write-test-{uuid.uuid4().hex}"
        try:
            self.write(name, b"lrd tries out whether it may write here, and deletes this\n")
            if name not in self.list_objects():
                raise RemoteError("an object that was just written is not listed")
            self.delete([name])
        except RemoteError as error:
            raise UserError(f"{KEY}: {self.url}: {error}") from None


@contextmanager
def _described_failures() -> Iterator[None]:
    """A context for calls of obstore, in which each failure becomes a RemoteError.

    What obstore does not expect ends in a Rust panic, which is no Exception.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise RemoteError(describe(error)) from None


def _connect(url: str, limits: Limits, creates_folder: bool) -> Any:
    """The store of an address; `Any` because the extra need not be installed."""
    from obstore.store import from_url

    retries: Any = {
        "max_retries": limits.retries,
        "retry_timeout": timedelta(seconds=limits.retry_seconds),
        "backoff": {
            "init_backoff": timedelta(milliseconds=200),
            "max_backoff": timedelta(seconds=5),
            "base": 2,
        },
    }
    if url.startswith("file://"):
        return from_url(url, mkdir=creates_folder)

    options: Any = {
        "timeout": timedelta(seconds=limits.seconds),
        "connect_timeout": timedelta(seconds=_CONNECT_SECONDS),
        "allow_http": _may_use_http(),
    }
    config: Any = {}
    if url.startswith("s3://") and "AWS_CHECKSUM_ALGORITHM" not in os.environ:
        # The server compares what it got with this digest, and refuses what was damaged on its way.
        config["checksum_algorithm"] = "SHA256"
    return from_url(url, config=config, client_options=options, retry_config=retries)


def _require_environment() -> None:
    """Refuse variables of the environment that would make obstore panic.

    Raises:
        UserError: names one of them, not its value.
    """
    for name, value in os.environ.items():
        has_control_character = any(character < " " or character == "\x7f" for character in value)
        if name.startswith(_PREFIXES) and has_control_character:
            raise UserError(
                f"{KEY}: {name} in the environment has a line break or another control character"
            )

    for name, value in _endpoints().items():
        if not _is_server_address(value):
            raise UserError(
                f"{KEY}: {name} in the environment should be the address of a server, "
                "as http://host:9000 or https://host"
            )


def _is_server_address(value: str) -> bool:
    try:
        urlsplit(value).port  # noqa: B018 - raises a ValueError if it is none
    except ValueError:
        return False
    return _SERVER_ADDRESS.fullmatch(value) is not None


def _endpoints() -> dict[str, str]:
    """Variables of the environment with the address of a server: name -> address."""
    return {
        name: value
        for name, value in os.environ.items()
        if value and _ENDPOINT_NAME.fullmatch(name)
    }


def _may_use_http() -> bool:
    """Whether the environment names a server that is reached without TLS, or allows that."""
    allows = any(
        os.environ.get(name, "").lower() in ("1", "true", "yes")
        for name in ("AWS_ALLOW_HTTP", "AZURE_ALLOW_HTTP", "ALLOW_HTTP")
    )
    return allows or any(value.startswith("http://") for value in _endpoints().values())


def describe(error: BaseException) -> str:
    """An error of obstore in one line, without credentials."""
    if isinstance(error, OSError) and error.strerror:
        return first_line(error)

    text = str(error)
    shown = text.split("\n\nDebug source", 1)[0]
    status = re.search(r"status code: (\d{3} [A-Za-z ]+)", shown)
    code = re.search(r"<Code>(\w+)</Code>", shown)

    answer = ""
    if status is not None:
        answer = f"the server answers {status[1].strip()}"
        if code is not None:
            answer += f", {code[1]}"
    for words, meaning in _MEANINGS.items():
        if words in text:
            is_of_store = answer and not words.startswith("/")
            return f"{meaning} ({answer})" if is_of_store else meaning
    if answer:
        return answer

    line = " ".join((shown.strip().splitlines() or [type(error).__name__])[0].split())
    line = re.sub(r"//[^/@\s]+@", "//", line)
    line = re.sub(r"\?\S+", "", line)
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name.upper()) and len(value) >= _MIN_SECRET_LENGTH:
            line = line.replace(value, f"<{name}>")
    return line
