"""URLs in records: nothing is fetched that the rules do not cover, wherever servers, names and spellings try to lead."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniprep.config import parse_config
from omniprep.errors import ConfigError, Reason, RejectSample
from omniprep.sources import web
from omniprep.sources.media_store import MediaConfig, MediaStore

PICTURE = b"picture"


class Server(ThreadingHTTPServer):
    """Serves /ok; other paths do what a hostile server would. `asked` are the paths that came."""

    daemon_threads = True

    def __init__(self, host: str = "127.0.0.1") -> None:
        super().__init__((host, 0), _Handler)
        self.asked: list[str] = []
        self.redirect = ""
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]}:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        match self.path.split("?")[0]:
            case "/redirect" | "/loop":
                self.send_response(302)
                self.send_header("Location", self.server.redirect if self.path == "/redirect" else "/loop")
                self.end_headers()
            case "/endless":
                self.send_response(200)
                self.end_headers()
                while True:
                    self._send(bytes(1 << 16))
            case "/drip":
                self.send_response(200)
                self.end_headers()
                while True:
                    self._send(b"x")
                    time.sleep(0.05)
            case "/headers":
                self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                for _ in range(100_000):
                    self._send(b"X-A: " + b"a" * 1000 + b"\r\n")
            case "/short":
                self.send_response(200)
                self.send_header("Content-Length", "100")
                self.end_headers()
                self._send(PICTURE)
            case "/nonsense":
                self._send(b"\xff\xfe\x00 not http\r\n\r\n")
            case "/lying":
                self.send_response(200)
                self.send_header("Content-Length", str(10**15))
                self.end_headers()
                while True:
                    self._send(bytes(1 << 16))
            case "/busy":
                self.send_response(503)
                self.end_headers()
            case "/none":
                self.send_response(404)
                self.end_headers()
            case _:
                self.send_response(200)
                self.send_header("ETag", '"v1"')
                self.send_header("Content-Length", str(len(PICTURE)))
                self.end_headers()
                self._send(PICTURE)

    def _send(self, data: bytes) -> None:
        try:
            self.wfile.write(data)
            self.wfile.flush()
        except OSError:
            self.close_connection = True
            raise ConnectionAbortedError from None

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            super().handle()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running
        running.shutdown()


@pytest.fixture
def inner() -> Iterator[Server]:
    """A second server: what must not be reached."""
    with Server() as running:
        yield running
        running.shutdown()


def store(*allowed: str, **settings: Any) -> MediaStore:
    return MediaStore(MediaConfig(**{"allow_urls": allowed, "timeout_s": 3, "max_fetch_s": 20, **settings}))


def outcome(url: str, media: MediaStore) -> tuple[Reason, str]:
    with pytest.raises(RejectSample) as caught:
        media.resolve(url, base="/nowhere")
    return caught.value.reason, caught.value.detail


def test_what_a_rule_covers_is_fetched_with_its_stamp(server: Server) -> None:
    media = store(server.url).resolve(f"{server.url}/ok", base="/nowhere")
    assert (media.data, media.stamp) == (PICTURE, '"v1"')
    spelled = f"HTTP://127.0.0.1:{server.server_port}/ok?size=large#top"
    assert store(server.url).resolve(spelled, base="/nowhere").data == PICTURE
    assert server.asked == ["/ok", "/ok?size=large"]


def test_a_redirection_to_another_host_or_port_is_refused(server: Server, inner: Server) -> None:
    for target in (
        f"{inner.url}/secret",
        f"http://localhost:{server.server_port}/ok",
        f"//localhost:{inner.server_port}/secret",
        "https://127.0.0.1/ok",
        "file:///etc/passwd",
        "s3://bucket/key",
        f"http://127.0.0.1:{server.server_port}@localhost:{inner.server_port}/secret",
        "http://169.254.169.254/latest/meta-data/",
    ):
        server.redirect = target
        reason, _ = outcome(f"{server.url}/redirect", store(server.url))
        assert reason is Reason.MEDIA_FORBIDDEN, target
    assert inner.asked == []


def test_a_redirection_within_the_rules_is_followed(server: Server, inner: Server) -> None:
    server.redirect = f"{inner.url}/ok"
    assert store(server.url, inner.url).resolve(f"{server.url}/redirect", base="/nowhere").data == PICTURE
    server.redirect = "/public/ok"
    assert store(server.url).resolve(f"{server.url}/redirect", base="/nowhere").data == PICTURE
    server.redirect = "/secret/ok"
    media = store(f"{server.url}/redirect", f"{server.url}/public")
    assert outcome(f"{server.url}/redirect", media)[0] is Reason.MEDIA_FORBIDDEN
    assert not [path for path in server.asked if "secret" in path]


def test_redirections_in_a_circle_end(server: Server) -> None:
    reason, detail = outcome(f"{server.url}/loop", store(server.url))
    assert (reason, "5 redirections" in detail) == (Reason.MEDIA_UNREADABLE, True)
    assert len(server.asked) == 6


def test_a_scheme_alone_opens_no_private_address(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    port = server.server_port
    by_scheme = store("http", "https")
    for host in ("127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]", "[::]"):
        reason, detail = outcome(f"http://{host}:{port}/ok", by_scheme)
        assert reason in (Reason.MEDIA_FORBIDDEN, Reason.MEDIA_UNREADABLE), host
        assert reason is Reason.MEDIA_FORBIDDEN or "Name or service" in detail, detail
    for host in ("169.254.169.254", "10.0.0.1", "192.168.1.1", "172.16.0.1", "100.64.0.1", "[fe80::1]", "[fd00::1]"):
        assert outcome(f"http://{host}/latest/meta-data/", by_scheme)[0] is Reason.MEDIA_FORBIDDEN, host

    def rebinding(host: str, port: int, **_: object) -> list[tuple[Any, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    reason, detail = outcome(f"http://harmless.example.org:{port}/ok", by_scheme)
    assert reason is Reason.MEDIA_FORBIDDEN
    assert "127.0.0.1, not a public address" in detail
    assert server.asked == []
    # A rule that names the host says that its owner is trusted, wherever the host is.
    named = store(f"http://harmless.example.org:{port}")
    monkeypatch.setattr(web.socket, "create_connection", _connect_directly)
    assert named.resolve(f"http://harmless.example.org:{port}/ok", base="/nowhere").data == PICTURE


def _connect_directly(place: tuple[str, int], timeout: float) -> socket.socket:
    sock = socket.socket()
    sock.settimeout(timeout)
    sock.connect(place)
    return sock


def test_the_connection_goes_to_the_address_that_was_judged(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that gives a public address first and a private one after is asked once."""
    asked: list[str] = []
    reached: list[tuple[str, int]] = []

    def turncoat(host: str, port: int, **_: object) -> list[tuple[Any, ...]]:
        asked.append(host)
        address = "93.184.215.14" if len(asked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    def connect(place: tuple[str, int], timeout: float) -> socket.socket:
        reached.append(place)
        return _connect_directly(("127.0.0.1", server.server_port), timeout)

    monkeypatch.setattr(socket, "getaddrinfo", turncoat)
    monkeypatch.setattr(web.socket, "create_connection", connect)
    assert store("http").resolve("http://turncoat.example.org/ok", base="/nowhere").data == PICTURE
    assert (len(asked), reached) == (1, [("93.184.215.14", 80)])


REFUSED = (
    "http://user@a.org/x.png",
    "http://a.org@evil.org/x.png",
    "http://a.org:80@evil.org/x.png",
    "http://a.org\\@evil.org/x.png",
    "http://a.org\\.evil.org/x.png",
    "http://a.org.evil.org/x.png",
    "http://a.org%2eevil.org/x.png",
    "http://a.org%00.evil.org/x.png",
    "http://a.org:81/x.png",
    "http://a.org:x/x.png",
    "http://a.org:99999/x.png",
    "http://a.org /x.png",
    "http://a.org/\r\nHost: evil.org",
    "http://a.org/x.png\r\nX: y",
    "http://evil.org/http://a.org/x.png",
    "http://evil.org#a.org/",
    "http://[",
    "http://[::1",
    "http://]",
    "http://",
    "http:///x.png",
    "http://.../x.png",
    "http://" + "a" * 70 + ".org/x.png",
    "http://a.org/" + "x" * 10_000,
    "https://a.org/x.png",
    "HTTPS://A.ORG/x.png",
    "ftp://a.org/x.png",
    "http://a.org/pub/../secret.png",
    "http://a.org/pub/%2e%2e/secret.png",
    "http://a.org/pub/%252e%252e/secret.png",
    "http://a.org/pub/..;/secret.png",
    "http://a.org/pub/%2e%2e%5csecret.png",
    "http://a.org/public",
    "http://a.org/",
    "http://a.org",
    "s3://bucket-of-others/x.png",
    "s3://bucket/pub/../secret",
    "s3://bucket@evil/pub/x",
    "filecache::s3://bucket/pub/x",
    "s3://bucket/pub/x::file:///etc/passwd",
    "zip://x::http://a.org/pub/x.zip",
    "local:///etc/passwd",
    "reference://?fo=http://a.org/pub/x",
)


@pytest.mark.parametrize("url", REFUSED)
def test_what_only_looks_like_an_allowed_address_is_refused_unasked(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", reached)
    monkeypatch.setattr("omniprep.storage.remote.read_url", reached)
    reason, detail = outcome(url, store("http://a.org/pub", "s3://bucket/pub"))
    assert reason is Reason.MEDIA_FORBIDDEN
    assert len(detail) < 500


@pytest.mark.parametrize(
    ("rule", "url"),
    [
        ("http://bücher.example/x", "http://xn--bcher-kva.example/x/a.png"),
        ("http://xn--bcher-kva.example/x", "http://BÜCHER.example./x/a.png"),
        ("https://a.org", "https://ａ.org/x"),
        ("http://a.org:80/", "http://A.ORG/x"),
        ("https://a.org:443", "https://a.org/"),
        ("http://[0:0::1]:8000", "http://[::1]:8000/x"),
        ("HTTP://A.org", "http://a.org/x"),
        ("S3://bucket", "s3://bucket/x"),
    ],
)
def test_two_spellings_of_one_place_are_the_same(rule: str, url: str) -> None:
    assert web.Rules([rule]).names(web.parse(url))


@given(st.text(max_size=60), st.sampled_from(["http://", "https://", "HTTP://a.org", "http://a.org/pub/", "s3://", ""]))
def test_any_text_is_an_address_or_forbidden(text: str, start: str) -> None:
    rules = web.Rules(["http://a.org/pub/"])
    try:
        address = web.parse(start + text)
    except web.ForbiddenError:
        return
    assert web.parse(str(address)) == address or address.scheme not in ("http", "https")
    if rules.names(address):
        assert (address.host, address.port) == ("a.org", 80)
        assert address.path.startswith("/pub")


@pytest.mark.parametrize(
    ("path", "limit_bytes", "told"),
    [
        ("/endless", 1 << 20, "larger than max_bytes"),
        ("/lying", 1 << 20, "larger than max_bytes"),
        ("/drip", 1 << 20, "max_fetch_s=1"),
        ("/headers", 1 << 20, "not an HTTP answer"),
        ("/short", 1 << 20, "ends after 7 of 100 bytes"),
        ("/nonsense", 1 << 20, "not an HTTP answer"),
        ("/busy", 1 << 20, "503"),
    ],
)
def test_a_hostile_server_costs_a_bounded_time_and_memory(server: Server, path: str, limit_bytes: int, told: str) -> None:
    media = store(server.url, max_bytes=limit_bytes, max_fetch_s=1)
    started_s = time.monotonic()
    reason, detail = outcome(f"{server.url}{path}", media)
    assert reason is Reason.MEDIA_UNREADABLE
    assert told in detail
    assert time.monotonic() - started_s < 10


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        media = store(address, timeout_s=0.3)
        started_s = time.monotonic()
        assert outcome(f"{address}/x.png", media)[0] is Reason.MEDIA_UNREADABLE
        assert time.monotonic() - started_s < 8
        # A TLS handshake that never comes is cut by the whole fetch's limit too.
        media = store(address.replace("http:", "https:"), timeout_s=30, max_fetch_s=0.5)
        reason, detail = outcome(address.replace("http:", "https:") + "/x", media)
        assert (reason, "max_fetch_s" in detail) == (Reason.MEDIA_UNREADABLE, True)


@pytest.mark.parametrize("rule", ["http://user@a.org", "http://[", "http://a.org/../x", "https://a.org:x"])
def test_a_rule_that_is_no_address_is_told_before_the_run(rule: str) -> None:
    for key in ("allow_urls", "roots"):
        with pytest.raises(ConfigError, match=key):
            parse_config(MediaConfig, {key: [rule]}, place="recipe.yaml")


def test_a_path_of_a_million_steps_is_refused_at_once(tmp_path: Path) -> None:
    started_s = time.monotonic()
    with pytest.raises(RejectSample) as caught:
        MediaStore(MediaConfig()).resolve("a/../" * 1_000_000 + "x", base=str(tmp_path))
    assert caught.value.reason is Reason.MEDIA_UNREADABLE
    assert time.monotonic() - started_s < 1


@pytest.mark.parametrize("name", ["\ud800.png", "a\udcff", "file:///\ud800", "file://[", "file://%00", "\x1b[2J.png", "a\nb.png"])
def test_odd_names_are_told_in_one_printable_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(RejectSample) as caught:
        MediaStore(MediaConfig()).resolve(name, base=str(tmp_path))
    assert caught.value.detail.isprintable()
    caught.value.detail.encode("utf-8")


def test_a_name_in_any_script_is_found(tmp_path: Path) -> None:
    for name in ("图片 音频.png", "e\u0301.png", "\u202etest.png", "a\tb.png", "a\\b.png", "100%.png", "-rf.png"):
        (tmp_path / name).write_bytes(PICTURE)
        media = MediaStore(MediaConfig()).resolve(name, base=str(tmp_path))
        assert (media.num_bytes, media.stamp) == (len(PICTURE), str((tmp_path / name).stat().st_mtime_ns))


def test_a_link_put_in_a_files_way_while_it_is_judged_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the path was resolved and found to be inside, its folder becomes a link to another one."""
    (tmp_path / "root" / "sub").mkdir(parents=True)
    (tmp_path / "root" / "sub" / "a.png").write_bytes(PICTURE)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a.png").write_bytes(b"secret")
    real_open = os.open

    def swap_then_open(path: str, flags: int, *args: Any) -> int:
        if str(path).endswith("sub/a.png") and not (tmp_path / "root" / "sub").is_symlink():
            (tmp_path / "root" / "sub").rename(tmp_path / "old")
            (tmp_path / "root" / "sub").symlink_to(tmp_path / "outside")
        return real_open(path, flags, *args)

    monkeypatch.setattr(os, "open", swap_then_open)
    with pytest.raises(RejectSample) as caught:
        MediaStore(MediaConfig()).resolve("sub/a.png", base=str(tmp_path / "root"))
    assert caught.value.reason is Reason.MEDIA_FORBIDDEN


def test_a_pipe_put_in_a_files_place_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PICTURE)
    real_open = os.open

    def swap_then_open(name: str, flags: int, *args: Any) -> int:
        if str(name).endswith("a.png") and path.is_file():
            path.unlink()
            os.mkfifo(path)
        return real_open(name, flags, *args)

    monkeypatch.setattr(os, "open", swap_then_open)
    with pytest.raises(RejectSample) as caught:
        MediaStore(MediaConfig()).resolve("a.png", base=str(tmp_path))
    assert caught.value.reason is Reason.MEDIA_UNREADABLE
