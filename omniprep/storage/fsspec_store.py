"""One attempt at each remote operation, over any fsspec filesystem. Retries and messages are the caller's (`remote.py`).

Nothing is kept between calls but settings: fsspec keeps one filesystem for each process, so that a forked worker gets its own
event loop and its own connections. Every call ends: by the library's time-outs for a connection that is silent, and by a
bound on the whole call that grows with what is to be moved.
"""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from omniprep.storage.folder import Conflict, StorageError
from omniprep.storage.retry import status_of

MIN_BYTES_PER_S = 100_000
"""A transfer slower than this for as long as it lasts counts as one that hangs."""


class Head(NamedTuple):
    """What is known of a remote file without its content."""

    num_bytes: int | None
    """None where an HTTP server does not tell."""
    stamp: str
    """What changes with the content: an ETag, a generation, a time; "" if there is none."""


@dataclass(frozen=True)
class FsspecStore:
    """Files of any fsspec filesystem, by path inside it."""

    filesystem: Any
    timeout_s: float

    def head(self, path: str) -> Head | None:
        """Return size and stamp of a file, or None if it is absent."""
        try:
            info = self._bounded(self.filesystem.info, path)
        except FileNotFoundError:
            return None
        if info["type"] != "file":
            return None
        return Head(None if info["size"] is None else int(info["size"]), stamp_of(info))

    def get(self, path: str, start: int, end: int | None, *, stamp: str = "") -> tuple[bytes, str]:
        """Return bytes [start, end) and the file's stamp. Raises `FileNotFoundError`.

        Where the store can do so, a file that is not of `stamp` any more is a `Conflict`.
        """
        if start == end:
            return b"", stamp
        whole = start == 0 and end is None
        limits = {} if whole else {"start": start, "end": end}
        return self._bounded(self.filesystem.cat_file, path, num_bytes=_length(start, end), **limits), stamp

    def put(self, path: str, data: bytes) -> None:
        """Write a whole file."""
        self._bounded(self.filesystem.pipe_file, path, data, num_bytes=len(data))

    def put_file(self, path: str, local_path: str, num_bytes: int) -> None:
        """Write a whole file from a local one."""
        self._bounded(self.filesystem.put_file, local_path, path, num_bytes=num_bytes)

    def version(self, path: str) -> str | None:
        """Return what changes when the content does, or None if the file is absent.

        A digest of the content: the stamps of stores that have no ETag (a time, a size) may stay the same.
        """
        try:
            data, _ = self.get(path, 0, None)
        except FileNotFoundError:
            return None
        return hashlib.sha256(data).hexdigest()

    def put_if(self, path: str, data: bytes, version: str | None) -> None:
        """Write a file if it is still of `version`. Raises `Conflict`.

        The caller has looked just before. That nothing lies there yet is checked by the store as well (Google, Azure and others
        know the mode "create"); that what lies there is still the same is not: two writers at that moment are not told apart.
        """
        try:
            mode = {"mode": "create"} if version is None else {}
            self._bounded(self.filesystem.pipe_file, path, data, num_bytes=len(data), **mode)
        except FileExistsError:
            raise changed(path) from None

    def remove(self, path: str) -> None:
        """Remove a file; one that is not there is no error."""
        with suppress(FileNotFoundError):
            self._bounded(self.filesystem.rm_file, path)

    def find(self, path: str) -> dict[str, int]:
        """Return path and size of every file below a folder. As new as the store's listing is."""
        try:
            found = self.filesystem.find(path, detail=True)
        except FileNotFoundError:
            return {}
        return {str(name): int(info["size"] or 0) for name, info in found.items() if info["type"] == "file"}

    def glob(self, pattern: str) -> dict[str, int | None]:
        """Return path and size of every file that a pattern matches. As new as the store's listing is."""
        found = self.filesystem.glob(pattern, detail=True)
        return {str(name): info["size"] for name, info in found.items() if info["type"] == "file"}

    def is_folder(self, path: str) -> bool:
        """Return whether any file lies below."""
        try:
            return str(self._bounded(self.filesystem.info, path)["type"]) == "directory"
        except FileNotFoundError:
            return False

    def _bounded(self, call: Callable[..., Any], *arguments: Any, num_bytes: int | None = 0, **options: Any) -> Any:
        """Call a method of the filesystem; a `timeout` is taken by fsspec itself where the filesystem is an asynchronous one."""
        from fsspec.asyn import AsyncFileSystem

        if isinstance(self.filesystem, AsyncFileSystem):
            options["timeout"] = self.bound_s(num_bytes)
        return call(*arguments, **options)

    def bound_s(self, num_bytes: int | None) -> float:
        """Return how long a call may take that moves so many bytes (None: unknown)."""
        return self.timeout_s * 10 if num_bytes is None else self.timeout_s + num_bytes / MIN_BYTES_PER_S


@dataclass(frozen=True)
class HttpStore(FsspecStore):
    """Files of an HTTP server: read only."""

    def head(self, path: str) -> Head | None:
        """Return size and stamp of a file, or None if it is absent."""
        try:
            info = self._bounded(self.filesystem.info, path)
        except FileNotFoundError as error:  # fsspec says so of every failure; the cause tells which one it was
            status = status_of(error)
            if status in (401, 403):
                raise PermissionError(f"status {status}") from None
            if error.__cause__ is None or status in (404, 410):
                return None
            raise error.__cause__ from None
        return Head(None if info["size"] is None else int(info["size"]), stamp_of(info))

    def get(self, path: str, start: int, end: int | None, *, stamp: str = "") -> tuple[bytes, str]:
        """Return bytes [start, end) and the file's stamp. A server that knows no ranges sends it all, and the rest is skipped."""
        return self.fetch(path, start, end, allowed=None)

    def put(self, path: str, data: bytes) -> None:
        """Refuse: fsspec would send a form to the server."""
        raise StorageError(f"{path:.200}: files are only read from http(s); choose a folder, or an object store, to write to")

    def put_file(self, path: str, local_path: str, num_bytes: int) -> None:
        """Refuse, too."""
        self.put(path, b"")

    def fetch(self, url: str, start: int, end: int | None, *, allowed: Callable[[str], bool] | None) -> tuple[bytes, str]:
        """Return bytes [start, end) and the stamp; `allowed` says to which addresses the server may redirect."""
        from fsspec.asyn import sync

        answer: tuple[bytes, str] = sync(
            self.filesystem.loop, self._fetch, url, start, end, allowed, timeout=self.bound_s(_length(start, end))
        )
        return answer

    async def _fetch(self, url: str, start: int, end: int | None, allowed: Callable[[str], bool] | None) -> tuple[bytes, str]:
        session = await self.filesystem.set_session()
        options = {**self.filesystem.kwargs, "allow_redirects": False}
        ranged = {} if start == 0 and end is None else {"Range": f"bytes={start}-{'' if end is None else end - 1}"}
        headers = {**options.pop("headers", {}), **ranged}
        for _ in range(_MAX_REDIRECTS):
            async with session.get(self.filesystem.encode_url(url), headers=headers, **options) as response:
                if response.status in (301, 302, 303, 307, 308) and "Location" in response.headers:
                    target = response.url.join(type(response.url)(response.headers["Location"]))
                    if allowed is not None and not allowed(str(target)):
                        raise PermissionError(f"redirected to {target!s:.200}, which is not allowed")
                    if target.origin() != response.url.origin():
                        headers = ranged  # what the user gave for this host is none of another's business
                    url = str(target)
                    continue
                return await _body(response, start, end)
        raise StorageError(f"{url:.200}: more than {_MAX_REDIRECTS} redirections")


_MAX_REDIRECTS = 10
_STAMPS = ("ETag", "etag", "generation", "md5Hash", "content_md5", "LastModified", "Last-Modified", "last_modified", "mtime")
"""Names under which fsspec's filesystems and HTTP give it, the best first."""


async def _body(response: Any, start: int, end: int | None) -> tuple[bytes, str]:
    """Read what is asked for, and no more, from a response."""
    if response.status in (404, 410):
        raise FileNotFoundError(str(response.url))
    if response.status in (401, 403):
        raise PermissionError(f"status {response.status} {response.reason}")
    stamp = stamp_of(response.headers)
    if response.status == 416:  # the range starts at the end of the file
        return b"", stamp
    response.raise_for_status()
    skip = 0 if response.status == 206 else start
    wanted = None if end is None else end - start
    pieces: list[bytes] = []
    num_bytes = 0
    async for piece in response.content.iter_chunked(1 << 18):
        kept = piece[skip:]
        skip = max(skip - len(piece), 0)
        pieces.append(kept)
        num_bytes += len(kept)
        if wanted is not None and num_bytes >= wanted:
            break
    return b"".join(pieces)[:wanted], stamp


def stamp_of(info: Any) -> str:
    """Return what changes with a file's content, from fsspec's information or HTTP headers.

    >>> stamp_of({"ETag": '"0a"', "size": 3}), stamp_of({"size": 3})
    ('"0a"', '')
    """
    return next((str(info[name]) for name in _STAMPS if info.get(name)), "")


def changed(path: str) -> Conflict:
    """Return the error of a file that is not the one that it was."""
    return Conflict(f"{path}: was written by somebody else meanwhile")


def _length(start: int, end: int | None) -> int | None:
    return None if end is None else end - start
