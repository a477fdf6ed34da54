"""An S3 server in a process of its own, and a proxy in front of it that fails on demand."""

from __future__ import annotations

import http.client
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psutil

BUCKET = "checkpoints"
TIMEOUT = 60.0  # seconds, for what takes no time unless it never happens
_SECRET = "not-a-real-secret"


def environment(port: int) -> dict[str, str]:
    """The variables with which a client finds the server, and may use it."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": _SECRET,
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class S3Server:
    """moto's S3 server, which keeps objects in its memory, with one bucket.

    Attributes:
        port: that it listens on, at 127.0.0.1.
    """

    def __init__(self) -> None:
        self.port = free_port()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                self.request("PUT", f"/{BUCKET}")
                return
            except OSError:
                assert self._process.poll() is None, "moto's server has ended"
                assert time.monotonic() < deadline, "moto's server does not answer"
                time.sleep(0.05)

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """Send a request as it is; moto checks no signature. Returns the body of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        try:
            connection.request(method, path, body, {"Authorization": _AUTHORIZATION})
            answer = connection.getresponse()
            content = answer.read()
            assert answer.status < 300, (method, path, answer.status, content)
            return content
        finally:
            connection.close()

    def keys(self, prefix: str = "") -> list[str]:
        """The names of all objects whose names begin so."""
        answer = self.request("GET", f"/{BUCKET}?list-type=2&prefix={prefix}").decode()
        return re.findall(r"<Key>(.*?)</Key>", answer)

    def get(self, key: str) -> bytes:
        return self.request("GET", f"/{BUCKET}/{key}")

    def put(self, key: str, content: bytes) -> None:
        self.request("PUT", f"/{BUCKET}/{key}", content)

    def delete(self, key: str) -> None:
        self.request("DELETE", f"/{BUCKET}/{key}")

    def close(self) -> None:
        process = psutil.Process(self._process.pid)
        for child in process.children(recursive=True):
            child.kill()
        self._process.kill()
        self._process.wait()


# moto reads from it for which service a request is.
_AUTHORIZATION = "AWS4-HMAC-SHA256 Credential=tester/20200101/us-east-1/s3/aws4_request"

# What the proxy does with a request: method and path -> the name of a fault, or None.
#   "500", "503", "403", ...   answers so
#   "hang"                     never answers
#   "cut"                      closes the connection after half of the request's body
Fault = Callable[[str, str], str | None]

_CODES = {"403": "AccessDenied", "500": "InternalError", "503": "SlowDown"}


class FaultyProxy:
    """Passes requests on to a server, unless `fault` says otherwise.

    Attributes:
        port: that it listens on, at 127.0.0.1.
        fault: what becomes of a request; it may be set at any time.
        requests: method and path of each request so far, and `DELETE` with the name of each object
            that was to be deleted.
        headers: of each of these requests, their names in small letters.
    """

    def __init__(self, server: S3Server) -> None:
        self.server = server
        self.port = free_port()
        self.fault: Fault = lambda method, path: None
        self.requests: list[tuple[str, str]] = []
        self.headers: list[set[str]] = []
        self._closed = threading.Event()
        self._listener: ThreadingHTTPServer | None = None
        self.start()

    def start(self) -> None:
        """Listen, also again after `stop`."""
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except OSError:  # the client is gone
                    self.close_connection = True

            def __getattr__(self, name: str) -> Any:
                if name.startswith("do_"):
                    return lambda: proxy._handle(self)
                raise AttributeError(name)

            def log_message(self, *_: object) -> None:
                pass

        self._closed.clear()
        self._listener = _Listener(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._listener.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Close the port and all connections: the server is gone."""
        if self._listener is not None:
            self._closed.set()
            self._listener.shutdown()
            self._listener.close_all()
            self._listener = None

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        method = handler.command
        path = handler.path
        self.requests.append((method, path))
        self.headers.append({name.lower() for name in handler.headers})
        size = int(handler.headers.get("Content-Length") or 0)

        fault = self.fault(method, path)
        if fault == "cut":
            handler.rfile.read(size // 2)
            handler.close_connection = True
            return
        body = handler.rfile.read(size)
        if "?delete" in path:
            deleted = re.findall(rb"<Key>(.*?)</Key>", body)
            self.requests += [("DELETE", key.decode()) for key in deleted]
            self.headers += [set() for _ in deleted]
        if fault == "hang":
            self._closed.wait(TIMEOUT)
            handler.close_connection = True
            return
        if fault is not None:
            code = _CODES.get(fault, "Error")
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>"
            _answer(handler, int(fault), [], text.encode())
            return

        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=TIMEOUT)
        try:
            connection.request(method, path, body, dict(handler.headers))
            answer = connection.getresponse()
            _answer(handler, answer.status, answer.getheaders(), answer.read())
        finally:
            connection.close()


class _Listener(ThreadingHTTPServer):
    """Remembers the connections, so that all can be closed at once."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, *arguments: Any) -> None:
        self._connections: list[socket.socket] = []
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.append(request)
        super().process_request(request, client_address)

    def close_all(self) -> None:
        self.server_close()
        for connection in self._connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def handle_error(self, *_: object) -> None:
        pass


def _answer(
    handler: BaseHTTPRequestHandler, status: int, headers: list[tuple[str, str]], body: bytes
) -> None:
    handler.send_response_only(status)
    has_length = False
    for name, value in headers:
        if name.lower() in ("connection", "transfer-encoding"):
            continue
        has_length = has_length or name.lower() == "content-length"
        handler.send_header(name, value)
    if not has_length:
        handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)
