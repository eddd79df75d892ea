"""From the media that a record names to a file that may be read.

A record's text is not trusted with the file system. A local path is used only if, with every link and `..` resolved, it
lies in a declared root: the folder of the record's own file (or the source's `media_root`) and `MediaConfig.roots`. A
URL is used only if a root or `allow_urls` covers it. What is not a regular file is refused unopened, so a named pipe
cannot hang a worker.
"""

import base64
import binascii
import os
import re
import stat
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from pydantic import Field

from omniprep.config import Config
from omniprep.errors import Reason, RejectSample
from omniprep.records import MediaBlob
from omniprep.sources.files import is_url, one_line
from omniprep.types import MediaFile

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.\-]+):")


class MediaConfig(Config):
    """Which media records may name."""

    roots: tuple[str, ...] = ()
    """Folders or URLs under which media may lie, besides the folder of each data file."""
    allow_urls: tuple[str, ...] = ()
    """Schemes ("s3", "https") or beginnings of URLs ("https://example.org/") that records may name anywhere."""
    max_bytes: int = Field(default=2 << 30, gt=0)
    """Largest medium that is held in memory: fetched from a URL, or in a `data:` URI."""
    timeout_s: float = Field(default=60.0, gt=0)
    """For a fetch over http(s): connection, and each read."""


class MediaStore:
    """Resolves what records name. Holds settings only; safe to pickle and to share between threads."""

    def __init__(self, config: MediaConfig, roots: Iterable[str] = ()) -> None:
        given = (*config.roots, *roots)
        self._config = config
        self._roots = tuple(_real(root) for root in given if not is_url(root))
        self._url_roots = tuple(root.rstrip("/") + "/" for root in given if is_url(root))

    def resolve(self, ref: str | MediaBlob, *, base: str) -> MediaFile:
        """Return the file or the bytes that `ref` means. `base` is the source's folder or URL, itself a root.

        Raises `RejectSample`: `MEDIA_MISSING`, `MEDIA_FORBIDDEN`, `MEDIA_UNREADABLE` or `MEDIA_EMPTY`.
        """
        if isinstance(ref, MediaBlob):
            if ref.bytes is None:
                return self.resolve(ref.path or "", base=base)
            name = ref.path or "bytes in the row"
            if not ref.bytes:
                raise RejectSample(Reason.MEDIA_EMPTY, f"{name}: the row holds 0 bytes for it")
            return MediaFile(name=name, data=ref.bytes)
        return self._resolve_name(ref, base)

    def _resolve_name(self, ref: str, base: str) -> MediaFile:
        if ref[:5].lower() == "data:":
            return self._from_data_uri(ref)
        if ref[:5].lower() == "file:":
            return self._local(_path_of_file_url(ref), name=ref, base=base)
        if is_url(ref):
            return self._remote(ref, name=ref, base=base)
        if is_url(base):
            return self._remote(f"{base.rstrip('/')}/{ref.lstrip('/')}", name=ref, base=base)
        return self._local(ref, name=ref, base=base)

    def _local(self, path: str, *, name: str, base: str) -> MediaFile:
        if "\0" in path or not path:
            raise RejectSample(Reason.MEDIA_FORBIDDEN, f"{name!a:.200}: not a path")
        roots = self._roots if is_url(base) else (_real(base), *self._roots)
        joined = os.path.join(base, os.path.expanduser(path) if path.startswith("~/") else path)  # noqa: PTH111, PTH118
        try:
            real = os.path.realpath(joined)
            if not any(real == root or real.startswith(root.rstrip("/") + "/") for root in roots):
                if _SCHEME.match(path) and not path.startswith("/"):
                    raise RejectSample(Reason.MEDIA_FORBIDDEN, f"{name:.200}: not a path below the media roots or an allowed URL")
                raise RejectSample(
                    Reason.MEDIA_FORBIDDEN,
                    f"{name:.200}: {_where(joined, real)} outside the media roots ({', '.join(roots)}); "
                    "add its folder to `media.roots` if it may be read",
                )
            status = os.stat(real)  # noqa: PTH116
        except FileNotFoundError:
            if (scheme := _SCHEME.match(path)) is not None:
                raise RejectSample(
                    Reason.MEDIA_FORBIDDEN, f"{name:.200}: no such file, and `{scheme.group(1)}:` is not a scheme for media"
                ) from None
            raise RejectSample(Reason.MEDIA_MISSING, f"{name:.200}: no such file (looked in {base})") from None
        except (OSError, ValueError) as error:
            raise RejectSample(Reason.MEDIA_UNREADABLE, f"{name:.200}: {one_line(error):.200}") from None
        if not stat.S_ISREG(status.st_mode):
            raise RejectSample(Reason.MEDIA_UNREADABLE, f"{name:.200}: expected a file, got {_kind_of(status.st_mode)}")
        if status.st_size == 0:
            raise RejectSample(Reason.MEDIA_EMPTY, f"{name:.200}: the file has 0 bytes")
        if not os.access(real, os.R_OK):
            raise RejectSample(Reason.MEDIA_UNREADABLE, f"{name:.200}: no permission to read it")
        return MediaFile(name=name, path=Path(real))

    def _remote(self, url: str, *, name: str, base: str) -> MediaFile:
        roots = (*self._url_roots, base.rstrip("/") + "/") if is_url(base) else self._url_roots
        if "::" in url or "\0" in url or ".." in unquote(urlsplit(url).path).split("/"):
            raise RejectSample(Reason.MEDIA_FORBIDDEN, f"{name:.200}: `..` and chained URLs (`::`) are not allowed")
        if not url.startswith(roots) and not self._is_allowed(url):
            raise RejectSample(
                Reason.MEDIA_FORBIDDEN,
                f"{name:.200}: URL not under a media root; add its scheme or address to `media.allow_urls`",
            )
        return MediaFile(name=name, data=self._fetch(url, name))

    def _is_allowed(self, url: str) -> bool:
        scheme = urlsplit(url).scheme.lower()
        return any(
            allowed.lower() == scheme or (is_url(allowed) and _covers(allowed, url)) for allowed in self._config.allow_urls
        )

    def _fetch(self, url: str, name: str) -> bytes:
        import fsspec

        limit = self._config.max_bytes
        options: dict[str, Any] = {}
        if urlsplit(url).scheme in ("http", "https"):
            import aiohttp

            seconds = self._config.timeout_s
            options = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, connect=seconds, sock_read=seconds)}}
        try:
            with fsspec.open(url, "rb", **options) as handle:
                data: bytes = handle.read(limit + 1)
        except FileNotFoundError as error:
            # fsspec calls every http failure "not found"; its cause tells a missing file from a network that is down.
            if error.__cause__ is None or getattr(error.__cause__, "status", None) in (404, 410):
                raise RejectSample(Reason.MEDIA_MISSING, f"{name:.200}: not found") from None
            raise RejectSample(
                Reason.MEDIA_UNREADABLE, f"{name:.200}: {one_line(error.__cause__):.200}", retryable=True
            ) from None
        except (ImportError, ValueError) as error:  # no such protocol, or its package is not installed
            raise RejectSample(Reason.MEDIA_UNREADABLE, f"{name:.200}: {one_line(error):.200}") from None
        except Exception as error:  # each fsspec backend has its own
            raise RejectSample(Reason.MEDIA_UNREADABLE, f"{name:.200}: {one_line(error):.200}", retryable=True) from None
        return _checked(data, name, limit)

    def _from_data_uri(self, uri: str) -> MediaFile:
        head, comma, body = uri.partition(",")
        name = f"{head[:60]},..."
        if not comma:
            raise RejectSample(Reason.MEDIA_UNREADABLE, f"{name}: a data: URI without a comma")
        if len(body) > self._config.max_bytes * 4 // 3 + 4:
            raise RejectSample(Reason.MEDIA_UNREADABLE, f"{name}: larger than max_bytes={self._config.max_bytes}")
        try:
            data = base64.b64decode(unquote(body), validate=True) if head.lower().endswith(";base64") else unquote_to_bytes(body)
        except (binascii.Error, ValueError) as error:
            raise RejectSample(Reason.MEDIA_UNREADABLE, f"{name}: not valid base64: {one_line(error)}") from None
        return MediaFile(name=name, data=_checked(data, name, self._config.max_bytes))


def _checked(data: bytes, name: str, limit: int) -> bytes:
    if len(data) > limit:
        raise RejectSample(Reason.MEDIA_UNREADABLE, f"{name:.200}: larger than max_bytes={limit}")
    if not data:
        raise RejectSample(Reason.MEDIA_EMPTY, f"{name:.200}: 0 bytes")
    return data


@lru_cache(maxsize=256)
def _real(folder: str) -> str:
    """Return a root with its links resolved; the same few roots are asked for with every record."""
    return os.path.realpath(os.path.expanduser(folder))  # noqa: PTH111


def _covers(allowed: str, url: str) -> bool:
    """Return whether `allowed` is the beginning of `url`, ending where a path component ends.

    >>> _covers("https://a.org", "https://a.org/x.png"), _covers("https://a.org", "https://a.org.evil/x.png")
    (True, False)
    """
    return url == allowed or url.startswith(allowed.rstrip("/") + "/")


def _path_of_file_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise RejectSample(Reason.MEDIA_FORBIDDEN, f"{url:.200}: a file on another host")
    return unquote(parts.path)


def _where(joined: str, real: str) -> str:
    return "lies" if os.path.normpath(joined) == real else f"leads to {real},"


def _kind_of(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")
