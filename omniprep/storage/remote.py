"""A folder in an object store (or at any other fsspec URL), with the promises of `Folder`.

- A file is written to a local temporary one first, and sent when it is complete: the store shows it whole or not at all, and
  what failed on the way can be sent again.
- Files are read by ranges, a request for each piece, and nothing is remembered between two questions.
- Nothing depends on a listing.
"""

import hashlib
import io
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from glob import has_magic
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeVar

from omniprep.storage.folder import Conflict, FileWriter, RandomReader, StorageError
from omniprep.storage.fsspec_store import FsspecStore, Head, HttpStore, changed
from omniprep.storage.retry import ATTEMPTS, short, status_of, with_retries

T = TypeVar("T")

TIMEOUT_S = 30.0
"""For a connection, and for each moment in which nothing arrives."""
FIRST_AHEAD_BYTES = 1 << 18
MAX_AHEAD_BYTES = 1 << 23
"""Bytes fetched at once while a file is read from front to back: the first number after each jump, doubled up to the second."""
_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.\-]*://")


def is_url(path: str) -> bool:
    """Return whether `path` is an fsspec URL rather than a local path.

    >>> is_url("s3://bucket/a.jsonl"), is_url("/data/a:b.jsonl")
    (True, False)
    """
    return _URL.match(path) is not None


def read_url(
    url: str, *, max_bytes: int, timeout_s: float = TIMEOUT_S, allowed: Callable[[str], bool] | None = None
) -> tuple[bytes, str]:
    """Return a file's bytes, `max_bytes + 1` at most, and its stamp (an ETag or time; "" if there is none).

    `allowed` says to which addresses an HTTP server may redirect; None: to any. `timeout_s` is for a connection, and for each
    moment in which nothing arrives. Raises `FileNotFoundError`, `PermissionError`, `StorageError`.
    """
    with explained(url):
        store, path = store_of(url, timeout_s=timeout_s)
        if isinstance(store, HttpStore):
            return with_retries(lambda: store.fetch(path, 0, max_bytes + 1, allowed=allowed), what=url)
        return with_retries(lambda: store.get(path, 0, max_bytes + 1), what=url)


def size_of_url(url: str) -> int | None:
    """Return a file's size in bytes, or None if an HTTP server does not tell. Raises `FileNotFoundError`, `StorageError`."""
    return _head(url).num_bytes


def stamp_of_url(url: str) -> tuple[int | None, str]:
    """Return a file's size and what changes with its content ("": the store has nothing such), asked now.

    Raises `FileNotFoundError`, `StorageError`.
    """
    return _head(url)


def _head(url: str) -> Head:
    head = _do(url, lambda store, path: store.head(path))
    if head is None:
        raise FileNotFoundError(f"{url:.200}: no such file")
    return head


def find_url(url: str) -> dict[str, int]:
    """Return URL and size of the file, or of the files that a glob matches: 0 where an HTTP server does not tell.

    Raises `StorageError`.
    """
    first, chain, rest = url.partition("::")
    try:
        with explained(url):
            store, path = store_of(url, timeout_s=TIMEOUT_S)
        found = _do(url, lambda store, path: store.glob(path)) if has_magic(first) else {path: size_of_url(url)}
    except FileNotFoundError:
        return {}
    urls = {f"{store.filesystem.unstrip_protocol(path)}{chain}{rest}": size for path, size in found.items()}
    return {name: (size_of_url(name) or 0) if size is None else size for name, size in urls.items()}


@dataclass(frozen=True)
class RemoteFolder:
    """Files below an fsspec URL."""

    place: str
    timeout_s: float = TIMEOUT_S
    attempts: int = ATTEMPTS

    def exists(self) -> bool:
        """Return whether any file lies below the folder."""
        return self._do("", lambda store, path: store.is_folder(path))

    def is_empty(self) -> bool:
        """Return whether no file lies below it."""
        return not self.exists()

    def read(self, name: str) -> bytes:
        """Return a whole file."""
        data, _ = self._do(name, lambda store, path: store.get(path, 0, None))
        return data

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading; it is fetched by ranges as it is read."""
        return open_url(self._url(name), timeout_s=self.timeout_s, attempts=self.attempts)

    def open_random(self, name: str) -> RandomReader:
        """Open a file for reading anywhere: one request for each `pread`."""
        return RemoteReader(self._url(name), timeout_s=self.timeout_s, attempts=self.attempts)

    def size(self, name: str) -> int | None:
        """Return a file's size in bytes, or None if it is absent."""
        head = self._do(name, lambda store, path: store.head(path))
        return None if head is None else head.num_bytes

    def files(self, under: str = "") -> dict[str, int]:
        """Return the names and sizes of all files below `under`, sorted by name, as far as the store lists them already."""
        found = self._do(under, lambda store, path: store.find(path))
        _, root = store_of(self.place, timeout_s=self.timeout_s)
        start = root.rstrip("/") + "/"
        return {path.removeprefix(start): found[path] for path in sorted(found) if path.startswith(start)}

    def write(self, name: str, data: bytes, *, synced: bool = True) -> str:
        """Write a whole file, absent or complete, and return its sha256."""
        with self.create(name) as file:
            file.write(data)
            file.publish()
        return hashlib.sha256(data).hexdigest()

    def create(self, name: str) -> FileWriter:
        """Start a file that is written piece by piece, to a local temporary file, and sent by `publish`."""
        return RemoteWriter(self._url(name), timeout_s=self.timeout_s, attempts=self.attempts)

    def sync(self, names: Iterable[str]) -> None:
        """Do nothing: what a store has taken, it keeps."""

    def remove(self, name: str) -> None:
        """Remove a file; one that is not there is no error."""
        self._do(name, lambda store, path: store.remove(path))

    def version(self, name: str) -> str | None:
        """Return a file's ETag (or a digest of its content where the store has none), or None if it is absent."""
        return self._do(name, lambda store, path: store.version(path))

    def write_if(self, name: str, data: bytes, version: str | None) -> None:
        """Write a file if it is still of `version`. On S3 the store itself decides; see `FsspecStore.put_if` for others."""
        sent = False

        def attempt(store: FsspecStore, path: str) -> None:
            nonlocal sent
            try:
                if store.version(path) != version:
                    raise changed(path)
                sent = True
                store.put_if(path, data, version)
            except Conflict:
                # What was sent may have arrived although its answer was lost (HTTP clients, too, send a request again on a
                # connection that breaks): then what lies there is ours.
                if not sent or store.head(path) is None or store.get(path, 0, None)[0] != data:
                    raise Conflict(f"{self._url(name)}: was written by somebody else meanwhile") from None

        self._do(name, attempt)

    def partials(self) -> list[str]:
        """Return no names: a store shows no half-written files."""
        return []

    def remove_partials(self) -> None:
        """Do nothing. Parts of uploads whose process was killed are the store's to remove, by a rule of the bucket."""

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Hold nothing: object stores have no locks. `write_if` decides between two builds."""
        yield

    def _url(self, name: str) -> str:
        return f"{self.place.rstrip('/')}/{name}" if name else self.place

    def _do(self, name: str, call: Callable[[FsspecStore, str], T]) -> T:
        return _do(self._url(name), call, timeout_s=self.timeout_s, attempts=self.attempts)


class RemoteReader:
    """A remote file read by ranges: no shared position, so threads may use one."""

    def __init__(self, url: str, *, timeout_s: float = TIMEOUT_S, attempts: int = ATTEMPTS) -> None:
        self._url = url
        self._do = partial(_do, url, timeout_s=timeout_s, attempts=attempts)
        head = self._do(lambda store, path: store.head(path))
        if head is None:
            raise FileNotFoundError(f"{url:.200}: no such file")
        self._stamp = head.stamp
        self._whole: bytes | None = None
        if head.num_bytes is None:  # an HTTP server that makes its answer while it sends it
            self._whole, _ = self._do(lambda store, path: store.get(path, 0, None))
        self.num_bytes = len(self._whole or b"") if head.num_bytes is None else head.num_bytes

    def pread(self, num_bytes: int, offset: int) -> bytes:
        """Return up to `num_bytes` bytes from `offset` on, with one request."""
        end = min(offset + num_bytes, self.num_bytes)
        if offset >= end:
            return b""
        return self._whole[offset:end] if self._whole is not None else self._do(partial(self._range, start=offset, end=end))

    def _range(self, store: FsspecStore, path: str, *, start: int, end: int) -> bytes:
        data, _ = store.get(path, start, end, stamp=self._stamp)
        if len(data) != end - start:
            raise ConnectionError(f"got {len(data)} of {end - start} bytes from byte {start} on")
        return data

    def close(self) -> None:
        """Do nothing: connections belong to the process."""


def open_url(url: str, *, timeout_s: float = TIMEOUT_S, attempts: int = ATTEMPTS) -> BinaryIO:
    """Open a remote file for reading. Raises `FileNotFoundError`, `StorageError`."""
    return io.BufferedReader(_RangeFile(RemoteReader(url, timeout_s=timeout_s, attempts=attempts)), 1 << 16)


class _RangeFile(io.RawIOBase):
    """A file over ranges. Read from front to back it asks for more and more at once; after a jump it starts small."""

    def __init__(self, reader: RemoteReader) -> None:
        self._reader = reader
        self._position = 0
        self._start = 0  # of the bytes at hand
        self._data = memoryview(b"")
        self._ahead = FIRST_AHEAD_BYTES

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._reader.num_bytes}[whence]
        self._position = max(start + offset, 0)
        return self._position

    def readinto(self, buffer: Any) -> int:
        if not self._start <= self._position < self._start + len(self._data):
            self._fetch(len(buffer))
        at = self._position - self._start
        piece = self._data[at : at + len(buffer)]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def _fetch(self, num_bytes: int) -> None:
        goes_on = self._position == self._start + len(self._data) and len(self._data) > 0
        self._ahead = min(self._ahead * 2, MAX_AHEAD_BYTES) if goes_on else FIRST_AHEAD_BYTES
        self._data = memoryview(self._reader.pread(max(num_bytes, self._ahead), self._position))
        self._start = self._position


class RemoteWriter:
    """A local temporary file without a name, so that a killed process leaves none, sent by `publish`."""

    def __init__(self, url: str, *, timeout_s: float, attempts: int) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._attempts = attempts
        with _spooling():
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__

    def write(self, data: bytes | memoryview) -> object:
        """Append bytes."""
        with _spooling():
            return self._file.write(data)

    def publish(self, *, synced: bool = True) -> None:
        """Send the file; it is there, whole, when the store has answered."""
        from omniprep.storage.s3 import PART_BYTES, S3Store

        with _spooling():
            self._file.flush()
            num_bytes = self._file.tell()
        retry: Any = partial(with_retries, what=self._url, attempts=self._attempts)
        try:
            with explained(self._url):
                store, path = store_of(self._url, timeout_s=self._timeout_s)
                self._file.seek(0)
                if isinstance(store, S3Store) and num_bytes > PART_BYTES:
                    store.put_parts(path, self._file.read, num_bytes, retry)
                elif isinstance(store, S3Store):
                    data = self._file.read()
                    retry(lambda: store.put(path, data))
                else:
                    retry(lambda: store.put_file(path, f"/dev/fd/{self._file.fileno()}", num_bytes))
        except FileNotFoundError as error:
            raise StorageError(f"{error}; make the bucket first") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        with suppress(OSError):  # what is still in the buffer does not fit on a full disk, and nobody wants it
            self._file.close()


_kept: dict[int, Any] = {}
"""Every filesystem that was used, as fsspec's own cache holds them. A forked child empties that cache; were the parent's
filesystems closed there, their connections would vanish from the event loop's list in the kernel, which the two share, and
the parent would wait in vain for an answer that has arrived."""


def store_of(url: str, *, timeout_s: float) -> tuple[FsspecStore, str]:
    """Return the store of a URL and the path inside it. Raises `StorageError` if nothing here can read such URLs."""
    import fsspec

    # Of a chain (`zip://a.jsonl::s3://bucket/a.zip`) the first part is the file's own system, and takes no options of the others.
    protocol = "" if "::" in url else url.split("://", 1)[0].lower()
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **_options(protocol, timeout_s))
    except (ImportError, ValueError) as error:
        package = {"s3": "omniprep[s3]", "s3a": "omniprep[s3]", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
        advice = f"pip install '{package[protocol]}'" if protocol in package else "use one of fsspec's, such as s3://"
        raise StorageError(f"{url:.200}: {error}; {advice}") from None
    _kept[id(filesystem)] = filesystem
    if protocol in ("s3", "s3a"):
        from omniprep.storage.s3 import S3Store

        filesystem.retries = 1  # `with_retries` does it, and for more errors
        return S3Store(filesystem, timeout_s), path
    return (HttpStore if protocol in ("http", "https") else FsspecStore)(filesystem, timeout_s), path


def _options(protocol: str, timeout_s: float) -> dict[str, Any]:
    """Return time-outs and no listing cache, on top of what the user's fsspec configuration gives for the protocol."""
    import fsspec.config

    given = fsspec.config.conf.get(protocol, {})
    match protocol:
        case "s3" | "s3a":
            config = {"connect_timeout": timeout_s, "read_timeout": timeout_s, "retries": {"total_max_attempts": 1}}
            return {"use_listings_cache": False, "config_kwargs": {**config, **given.get("config_kwargs", {})}}
        case "http" | "https":
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, connect=timeout_s, sock_read=timeout_s)
            return {"use_listings_cache": False, "client_kwargs": {"timeout": timeout, **given.get("client_kwargs", {})}}
        case "gs" | "gcs" | "abfs" | "abfss" | "az":
            return {"use_listings_cache": False}
        case _:
            return {}


def _do(url: str, call: Callable[[FsspecStore, str], T], *, timeout_s: float = TIMEOUT_S, attempts: int = ATTEMPTS) -> T:
    """Call a store's method with retries. Raises `FileNotFoundError`, `Conflict`, `StorageError`."""
    with explained(url):
        store, path = store_of(url, timeout_s=timeout_s)
        return with_retries(lambda: call(store, path), what=url, attempts=attempts)


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn what each library raises into one line with advice; `FileNotFoundError` and permission keep their types."""
    try:
        yield
    except (Conflict, StorageError):
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{url:.200}: no such file ({short(error)})") from error
    except Exception as error:  # each fsspec backend has its own
        denied = isinstance(error, PermissionError) or status_of(error) in (401, 403)
        if denied or "Credentials" in type(error).__name__:
            raise DeniedError(f"{url:.200}: {short(error)}; check the credentials and what they may do there") from error
        raise StorageError(f"{url:.200}: {short(error)}") from error


class DeniedError(StorageError, PermissionError):
    """The store knows us not, or does not let us."""


@contextmanager
def _spooling() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{tempfile.gettempdir()}: {error.strerror or error}; files are kept there until they are sent: "
            "free some space, or set TMPDIR to another folder, and run the same command again: what is finished is kept"
        ) from None
