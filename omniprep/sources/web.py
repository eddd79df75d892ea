"""Addresses that records may name, and how an http(s) one is fetched without being led elsewhere.

Whoever writes a record chooses its URLs, and whoever owns a host chooses what its name resolves to and where it redirects. So:

- a URL is taken apart once, and what is compared with the rules is what is connected to (no user names, no backslashes, hosts
  in lower case and IDNA form, ports spelled out);
- each redirection is judged as if the record had named it;
- the name is resolved here and the connection made to an address that was judged: a host that no rule names must have a public
  one, so that "https" in the rules does not open the machine itself, its network or its cloud's metadata service;
- the whole fetch has a limit in bytes and one in seconds, which a server that sends a byte a minute meets too.

No proxy is used, and no compressed answer is asked for.
"""

import http.client
import ipaddress
import re
import socket
import ssl
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from omniprep import __version__
from omniprep.sources.files import is_url, one_line
from omniprep.storage.retry import with_retries

MAX_URL_CHARACTERS = 8192
MAX_REDIRECTS = 5
_ATTEMPTS = 3
_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[a-z0-9_.\-]+|\[[0-9a-f:.]+\]")
_REDIRECTS = (301, 302, 303, 307, 308)
_URL_MARKS = "%/:=&~+!$,;'@()*[]?"
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class ForbiddenError(Exception):
    """The rules do not allow this address, or it is none."""


class MissingError(Exception):
    """The server says that there is no such file."""


class UnreadableError(Exception):
    """The server is too slow, or leads in circles: asking again would not help now."""


class StatusError(Exception):
    """The server answered with an error."""

    def __init__(self, status: int, what: str) -> None:
        super().__init__(f"the server answers {status} {what}".strip())
        self.status = status


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """A URL taken apart. Two spellings of one place are one `Address`."""

    scheme: str
    host: str
    """Of http(s): in lower case, IDNA, without a final dot; of other schemes what stands there: a bucket, a container."""
    port: int
    """0 where the scheme is not http(s)."""
    path: str
    query: str = ""

    def covers(self, other: "Address") -> bool:
        """Return whether this is the beginning of `other`, ending where a path component ends.

        >>> parse("https://a.org").covers(parse("https://A.org:443/x")), parse("https://a.org/x").covers(parse("https://a.org/xy"))
        (True, False)
        """
        ours = self.path.rstrip("/")
        same = (self.scheme, self.host, self.port) == (other.scheme, other.host, other.port)
        return same and (other.path == ours or other.path.startswith(ours + "/"))

    def __str__(self) -> str:
        port = "" if self.port in (0, _PORTS.get(self.scheme)) else f":{self.port}"
        return f"{self.scheme}://{self.host}{port}{self.path}" + (f"?{self.query}" if self.query else "")


def parse(url: str) -> Address:
    """Return a URL's parts. Raises `ForbiddenError` for what is no URL, or one that two programs may read differently."""
    if len(url) > MAX_URL_CHARACTERS:
        raise ForbiddenError(f"a URL of {len(url)} characters")
    scheme, _, place = url.partition("://")
    if any(char < " " or char == "\x7f" for char in url) or "::" in scheme:
        raise ForbiddenError("control characters and chained URLs (`::`) are not allowed")
    if " " in (url if scheme.lower() in _PORTS else scheme):  # the name of an object may have one
        raise ForbiddenError("a space in an address is not allowed; write %20")
    if scheme.lower() not in _PORTS:
        if "::" in place:
            raise ForbiddenError("chained URLs (`::`) are not allowed")
        _refuse_dots(place)  # all of it: a store takes `?` and `#` for characters of a name
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ForbiddenError(f"not a URL: {one_line(error)}") from None
    if not parts.scheme:
        raise ForbiddenError("not a URL: it has no scheme")
    _refuse_dots(parts.path)
    if parts.scheme not in _PORTS:
        return Address(scheme=parts.scheme, host=parts.netloc, port=0, path=parts.path, query=parts.query)
    host = _host_of(parts, url)
    return Address(
        scheme=parts.scheme, host=host, port=_PORTS[parts.scheme] if port is None else port, path=parts.path, query=parts.query
    )


def _refuse_dots(path: str) -> None:
    """Refuse `..`, however often it was percent-encoded, and with the parameters that some servers cut off (`..;x`)."""
    for _ in range(4):
        if any(step.partition(";")[0] == ".." for step in re.split(r"[/\\]", path)):
            raise ForbiddenError("`..` is not allowed")
        path = unquote(path)


def _host_of(parts: SplitResult, url: str) -> str:
    if "@" in parts.netloc:
        raise ForbiddenError("a user name in a URL is not allowed")
    if "\\" in url:
        raise ForbiddenError("a backslash in a URL is not allowed")
    host = (parts.hostname or "").rstrip(".")
    try:
        host = f"[{ipaddress.IPv6Address(host).compressed}]" if ":" in host else host.encode("idna").decode("ascii").lower()
    except ValueError as error:
        raise ForbiddenError(f"not a host name: {one_line(error):.100}") from None
    if not _HOST.fullmatch(host):
        raise ForbiddenError(f"not a host name: {host!a:.100}")
    return host


class Rules:
    """Which URLs may be read: schemes ("s3": any address of it) and beginnings of URLs."""

    def __init__(self, allowed: Iterable[str]) -> None:
        given = tuple(allowed)
        self._schemes = frozenset(rule.lower().removesuffix("://") for rule in given if not _has_place(rule))
        self._beginnings = tuple(parse(rule) for rule in given if _has_place(rule))

    def names(self, address: Address) -> bool:
        """Return whether a rule covers an address by more than its scheme."""
        return any(beginning.covers(address) for beginning in self._beginnings)

    def allow(self, address: Address) -> bool:
        """Return whether a rule covers an address."""
        return address.scheme in self._schemes or self.names(address)

    def judge(self, url: str) -> Address:
        """Return a URL's parts if a rule covers it. Raises `ForbiddenError`."""
        address = parse(url)
        if not self.allow(address):
            raise ForbiddenError("not under a media root; add its scheme or address to `media.allow_urls`")
        return address


def _has_place(rule: str) -> bool:
    return is_url(rule) and not rule.endswith("://")


def fetch(url: str, rules: Rules, *, max_bytes: int, timeout_s: float, max_fetch_s: float) -> tuple[bytes, str]:
    """Return an http(s) file's bytes, `max_bytes + 1` at most, and its stamp (ETag or time of change, "" if there is none).

    Raises `ForbiddenError`, `MissingError`, `UnreadableError`, `StatusError`, `OSError`, `StorageError` (tried several times).
    """
    return with_retries(
        lambda: _follow(parse(url), rules, max_bytes, timeout_s, max_fetch_s), what=f"{url:.200}", attempts=_ATTEMPTS
    )


def _follow(address: Address, rules: Rules, max_bytes: int, timeout_s: float, max_fetch_s: float) -> tuple[bytes, str]:
    for _ in range(MAX_REDIRECTS + 1):
        if address.scheme not in _PORTS or not rules.allow(address):
            raise ForbiddenError(f"redirected to {address!s:.200}, which no rule of `media.allow_urls` covers")
        with _connection(address, rules, timeout_s, max_fetch_s) as connection:
            answer = _get(connection, address, max_bytes)
        if isinstance(answer, tuple):
            return answer
        address = parse(answer)
    raise UnreadableError(f"more than {MAX_REDIRECTS} redirections")


@contextmanager
def _connection(address: Address, rules: Rules, timeout_s: float, max_fetch_s: float) -> Iterator[http.client.HTTPConnection]:
    """Open a connection that is cut after `max_fetch_s`, whatever the server does."""
    sock = _connect(address, rules, timeout_s)
    is_late = threading.Event()

    def cut() -> None:
        is_late.set()
        with suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)  # of the plain socket: a TLS farewell would wait for an answer

    timer = threading.Timer(max_fetch_s, cut)
    timer.daemon = True
    timer.start()
    try:
        if address.scheme == "https":
            context = ssl.create_default_context()
            sock = context.wrap_socket(sock, server_hostname=address.host.strip("[]"), do_handshake_on_connect=False)
            sock.do_handshake()
        connection = http.client.HTTPConnection(address.host.strip("[]"), address.port, timeout=timeout_s)
        connection.sock = sock
        yield connection
    except (OSError, http.client.HTTPException) as error:
        if is_late.is_set():
            raise UnreadableError(f"not there within max_fetch_s={max_fetch_s:g}") from None
        if isinstance(error, http.client.HTTPException):
            raise ConnectionError(f"not an HTTP answer: {type(error).__name__}: {one_line(error):.100}") from None
        raise
    finally:
        timer.cancel()
        sock.close()
    if is_late.is_set():  # cut while reading looks like the end of the file
        raise UnreadableError(f"not there within max_fetch_s={max_fetch_s:g}")


def _connect(address: Address, rules: Rules, timeout_s: float) -> socket.socket:
    """Connect to one of the host's addresses, of those that may be connected to."""
    host = address.host.strip("[]")
    try:
        found = socket.getaddrinfo(host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConnectionError(f"{host}: {one_line(error)}") from None
    places = [place[:2] for *_, place in found]
    if not rules.names(address):
        refused = [str(place[0]) for place in places if not is_public(str(place[0]))]
        places = [place for place in places if is_public(str(place[0]))]
        if not places:
            raise ForbiddenError(
                f"{host} is {', '.join(dict.fromkeys(refused)) or 'nowhere'}, not a public address; "
                f"name the host in `media.allow_urls` ({address.scheme}://{address.host}) if it may be read"
            )
    last: OSError = ConnectionError(f"{host} has no address")
    for place in places:
        try:
            return socket.create_connection((str(place[0]), int(place[1])), timeout_s)
        except OSError as error:
            last = error
    raise last


def is_public(address: str) -> bool:
    """Return whether an IP address is one of the public internet, by itself and by an IPv4 address that it wraps.

    >>> is_public("93.184.215.14"), is_public("169.254.169.254"), is_public("::ffff:127.0.0.1"), is_public("64:ff9b::7f00:1")
    (True, False, False, False)
    """
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(ip.packed[-4:])
        if inner is not None:
            ip = inner
    return ip.is_global and not ip.is_multicast


def _get(connection: http.client.HTTPConnection, address: Address, max_bytes: int) -> tuple[bytes, str] | str:
    """Return a file's (bytes, stamp), or the URL that the server redirects to."""
    query = f"?{quote(address.query, safe=_URL_MARKS)}" if address.query else ""
    target = quote(address.path or "/", safe=_URL_MARKS) + query
    connection.request("GET", target, headers={"User-Agent": f"omniprep/{__version__}", "Accept": "*/*", "Connection": "close"})
    with closing(connection.getresponse()) as answer:
        location = answer.getheader("Location")
        if answer.status in _REDIRECTS and location:
            return urljoin(str(address), location)
        if answer.status in (404, 410):
            raise MissingError
        if answer.status != 200:
            raise StatusError(answer.status, f"{answer.reason:.80}")
        stamp = answer.getheader("ETag") or answer.getheader("Last-Modified") or ""
        return _body(answer, max_bytes), stamp[:200]


def _body(answer: http.client.HTTPResponse, max_bytes: int) -> bytes:
    data = bytearray()
    while len(data) <= max_bytes and (block := answer.read(min(1 << 18, max_bytes + 1 - len(data)))):
        data += block
    if answer.length and len(data) <= max_bytes:
        raise ConnectionError(f"the answer ends after {len(data)} of {len(data) + answer.length} bytes")
    return bytes(data)
