"""An S3 server in this process (moto), behind a proxy that counts what passes and injects faults.

    requests of OmniPrep ──> FaultyProxy ──> moto

Import the fixture `s3` where it is needed; it gives a fresh bucket, and an environment in which `s3://` leads to the proxy.
"""

import atexit
import functools
import http.client
import itertools
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest


@dataclass
class Request:
    """One request as it passed the proxy."""

    method: str
    key: str
    """Bucket and key, or the bucket alone."""
    query: str
    range: str
    num_bytes_in: int
    headers: dict[str, str]
    status: int = 0
    num_bytes_out: int = 0
    """Of the body that was sent back."""


@dataclass
class Fault:
    """What happens to the requests that it concerns, `times` of them, after the first `skip`."""

    concerns: Callable[[Request], bool]
    kind: str
    """`status` (with an S3 error code), `hang` (no answer), `lost` (done, not answered), `reset` (in the body), `slow`.

    `dribble`: a byte at a time. `deaf`: not even the request is read, whichever it is."""
    status: int = 500
    code: str = "InternalError"
    times: float = 1
    skip: int = 0
    seconds: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    """Of the answer, for `status`."""

    def strikes(self, request: Request) -> bool:
        if self.times <= 0 or not self.concerns(request):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.times -= 1
        return True


@dataclass
class S3:
    """A bucket, and what may be done to the way there."""

    bucket: str
    endpoint: str
    client: Any
    """boto3's, straight to the server."""
    requests: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    unlisted: set[str] = field(default_factory=set)
    """Keys that a listing does not show yet."""
    quiet: threading.Event = field(default_factory=threading.Event)
    """Set at the end: requests that hang are let go."""

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}"

    def fail(self, concerns: Callable[[Request], bool], kind: str = "status", **options: Any) -> Fault:
        fault = Fault(concerns, kind, **options)
        self.faults.append(fault)
        return fault

    def seen(self, method: str, key: str = "") -> list[Request]:
        return [request for request in self.requests if request.method == method and request.key.endswith(key)]

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=key, Body=data, ACL="public-read")  # plain HTTP reads it too

    def get(self, key: str) -> bytes:
        return bytes(self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read())

    def keys(self) -> list[str]:
        return [item["Key"] for item in self.client.list_objects_v2(Bucket=self.bucket).get("Contents", [])]

    def num_unfinished_uploads(self) -> int:
        return len(self.client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", []))


class FaultyProxy(ThreadingHTTPServer):
    daemon_threads = True
    state: S3
    upstream: tuple[str, int]
    one_at_a_time: threading.Lock
    """S3 looks at a condition and writes in one step; moto does so only if no other request comes in between."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, or was sent away, is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def log_message(self, *arguments: Any) -> None:
        pass

    def handle_any(self) -> None:
        state = self.server.state
        if any(fault.kind == "deaf" for fault in state.faults):
            state.quiet.wait(60)
            self.close_connection = True
            return
        body = self._body()
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, unquote(url.path).strip("/"), url.query, headers.get("range", ""), len(body), headers)
        state.requests.append(request)
        fault = next((fault for fault in state.faults if fault.strikes(request)), None)
        match fault.kind if fault else "":
            case "hang":
                state.quiet.wait(60)
                self.close_connection = True
            case "status":
                assert fault is not None
                text = f"<Error><Code>{fault.code}</Code><Message>injected</Message></Error>".encode()
                self._send(request, fault.status, {"Content-Type": "application/xml", **fault.headers}, text)
            case "dribble":
                _, _, data = self._forward(body)
                self._send(request, 200, {}, data, cut=0)
                while not state.quiet.wait(0.1):
                    self.wfile.write(b"x")
                self.close_connection = True
            case "lost":
                self._forward(body)
                self._reset()
            case "reset":
                status, answered, data = self._forward(body)
                self._send(request, status, answered, data, cut=len(data) // 2)
                self._reset()
            case kind:
                if kind == "slow":
                    assert fault is not None
                    state.quiet.wait(fault.seconds)
                status, answered, data = self._forward(body)
                if request.method == "GET" and "list-type" in request.query:
                    data = self._without(data, state.unlisted)
                self._send(request, status, answered, data)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while num_bytes := int(self.rfile.readline(), 16):
            body += self.rfile.read(num_bytes)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("transfer-encoding", "expect")}
        with self.server.one_at_a_time, closing(http.client.HTTPConnection(*self.server.upstream)) as connection:
            connection.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
            response = connection.getresponse()
            data = response.read()
        hop = ("transfer-encoding", "connection", "date", "server")
        return response.status, {name: value for name, value in response.getheaders() if name.lower() not in hop}, data

    def _send(self, request: Request, status: int, headers: dict[str, str], data: bytes, cut: int | None = None) -> None:
        request.status = status
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            request.num_bytes_out = len(data[:cut])
            self.wfile.write(data[:cut])
        self.wfile.flush()

    def _reset(self) -> None:
        """Close with a RST, as a machine does that goes down."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    @staticmethod
    def _without(listing: bytes, keys: set[str]) -> bytes:
        def kept(match: re.Match[bytes]) -> bytes:
            return b"" if any(f"<Key>{key}</Key>".encode() in match[0] for key in keys) else match[0]

        return re.sub(rb"<Contents>.*?</Contents>", kept, listing, flags=re.DOTALL)


@functools.cache
def _proxy() -> FaultyProxy:
    """Start both servers, once for all test modules: s3fs keeps its connections, and so its endpoint, for the whole process."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    proxy = FaultyProxy(("127.0.0.1", 0), _Handler)
    proxy.upstream = (str(host), int(port))
    proxy.one_at_a_time = threading.Lock()
    threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    atexit.register(server.stop)
    atexit.register(proxy.shutdown)
    return proxy


_numbers = itertools.count()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    import boto3

    proxy = _proxy()
    endpoint = f"http://127.0.0.1:{proxy.server_port}"
    for name, value in {
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url="http://{}:{}".format(*proxy.upstream))
    proxy.state = S3(f"tests-{next(_numbers)}", endpoint, client)
    client.create_bucket(Bucket=proxy.state.bucket)
    yield proxy.state
    proxy.state.quiet.set()
