"""From the media that a record names to a file that may be read.

A record's text is not trusted with the file system. A local path is used only if, with every link and `..` resolved, it
lies in a declared root: the folder of the record's own file (or the source's `media_root`) and `MediaConfig.roots`. A
URL is used only if a root or `allow_urls` covers it (`web.py` says how). What is not a regular file is refused unopened, so
a named pipe cannot hang a worker.

A file is opened once to see that it is the one that was judged (no link was put in its way meanwhile) and then handed on as a
path, because the decoders take paths. Whoever may write in a media root while a build runs can therefore still exchange a
file under a decoder; roots are to be writable only by those who are trusted.
"""

import base64
import binascii
import os
import re
import stat
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from pydantic import Field, field_validator

from omniprep.config import Config
from omniprep.errors import OmniPrepError, Reason, RejectSample
from omniprep.records import MediaBlob
from omniprep.sources import web
from omniprep.sources.files import is_url, one_line
from omniprep.types import MediaFile

_MAX_PATH_CHARACTERS = 4096
"""Longer ones no system opens; resolving one of a million steps would take minutes."""
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.\-]+):")


class MediaConfig(Config):
    """Which media records may name."""

    roots: tuple[str, ...] = ()
    """Folders or URLs under which media may lie, besides the folder of each data file."""
    allow_urls: tuple[str, ...] = ()
    """Schemes ("s3", "https") or beginnings of URLs ("https://example.org/") that records may name anywhere. A scheme is broad:
    records may name any address of it (of http(s) only public ones), while a beginning opens just that host, wherever it is."""
    max_bytes: int = Field(default=2 << 30, gt=0)
    """Largest medium that is held in memory: fetched from a URL, or in a `data:` URI."""
    timeout_s: float = Field(default=60.0, gt=0)
    """For a fetch: connection, and each moment in which nothing arrives."""
    max_fetch_s: float = Field(default=600.0, gt=0)
    """For a whole fetch over http(s), however busy it looks."""

    @field_validator("roots", "allow_urls")
    @classmethod
    def _urls_are_urls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for given in value:
            try:
                web.Rules([given] if is_url(given) else [])
            except web.ForbiddenError as error:
                raise ValueError(f"{given!r}: {error}") from None
        return value


class MediaStore:
    """Resolves what records name. Holds settings only; safe to pickle and to share between threads.

    `folder` is where the recipe's relative paths start. What is told of a rejected record is part of the dataset, so paths
    below it are told as the recipe writes them: the same wherever the recipe and its inputs lie.
    """

    def __init__(self, config: MediaConfig, roots: Iterable[str] = (), *, folder: str = "") -> None:
        given = (*config.roots, *roots)
        self._config = config
        self._folders = (folder, _real(folder)) if folder else ()
        self._shown_roots = tuple(self._shown(root) for root in given if not is_url(root))
        self._roots = tuple(_real(root) for root in given if not is_url(root))
        self._url_rules = (*config.allow_urls, *(root for root in given if is_url(root)))

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
        if len(path) > _MAX_PATH_CHARACTERS:
            raise RejectSample(Reason.MEDIA_UNREADABLE, f"{name:.100}...: a path of {len(path)} characters")
        roots = self._roots if is_url(base) else (_real(base), *self._roots)
        expanded = os.path.expanduser(path) if path.startswith("~/") else path  # noqa: PTH111
        try:
            real = os.path.realpath(os.path.join(base, expanded))  # noqa: PTH118
            if not any(real == root or real.startswith(root.rstrip("/") + "/") for root in roots):
                if _SCHEME.match(path) and not path.startswith("/"):
                    raise RejectSample(Reason.MEDIA_FORBIDDEN, f"{name:.200}: not a path below the media roots or an allowed URL")
                is_link = os.path.normpath(os.path.join(_real(base), expanded)) != real  # noqa: PTH118
                where = f"leads to {self._shown(real)}," if is_link else "lies"
                shown = (*(() if is_url(base) else (self._shown(base),)), *self._shown_roots)
                raise RejectSample(
                    Reason.MEDIA_FORBIDDEN,
                    f"{name:.200}: {where} outside the media roots ({', '.join(shown)}); "
                    "add its folder to `media.roots` if it may be read",
                )
            status = _status_of_judged(real, name)
        except FileNotFoundError:
            if (scheme := _SCHEME.match(path)) is not None:
                raise RejectSample(
                    Reason.MEDIA_FORBIDDEN, f"{name:.200}: no such file, and `{scheme.group(1)}:` is not a scheme for media"
                ) from None
            raise RejectSample(Reason.MEDIA_MISSING, f"{name:.200}: no such file (looked in {self._shown(base)})") from None
        except PermissionError:
            raise RejectSample(Reason.MEDIA_UNREADABLE, f"{name:.200}: no permission to read it") from None
        except (OSError, ValueError) as error:  # an `OSError` as text names the whole path
            told = (error.strerror if isinstance(error, OSError) else None) or one_line(error)
            raise RejectSample(Reason.MEDIA_UNREADABLE, f"{name:.200}: {told:.200}") from None
        if status.st_size == 0:
            raise RejectSample(Reason.MEDIA_EMPTY, f"{name:.200}: the file has 0 bytes")
        return MediaFile(name=name, path=Path(real), stamp=str(status.st_mtime_ns))

    def _shown(self, path: str) -> str:
        """Return a path as the recipe writes it."""
        below = next((path[len(folder) :] for folder in self._folders if f"{path}/".startswith(f"{folder}/")), None)
        return path if below is None else below.lstrip("/") or "."

    def _remote(self, url: str, *, name: str, base: str) -> MediaFile:
        rules = _rules(self._url_rules, base if is_url(base) else None)
        try:
            data, stamp = self._fetch(url, rules.judge(url), rules)
        except web.ForbiddenError as error:
            raise RejectSample(Reason.MEDIA_FORBIDDEN, f"{name:.200}: {error}") from None
        except (web.MissingError, FileNotFoundError):
            raise RejectSample(Reason.MEDIA_MISSING, f"{name:.200}: not found") from None
        except (ImportError, ValueError) as error:  # no such protocol, or its package is not installed
            raise RejectSample(Reason.MEDIA_UNREADABLE, f"{name:.200}: {one_line(error):.200}") from None
        except (OSError, OmniPrepError, web.StatusError, web.UnreadableError) as error:
            raise RejectSample(Reason.MEDIA_UNREADABLE, f"{name:.200}: {one_line(error):.200}", retryable=True) from None
        return MediaFile(name=name, data=_checked(data, name, self._config.max_bytes), stamp=stamp)

    def _fetch(self, url: str, address: web.Address, rules: web.Rules) -> tuple[bytes, str]:
        config = self._config
        if address.scheme in ("http", "https"):
            return web.fetch(url, rules, max_bytes=config.max_bytes, timeout_s=config.timeout_s, max_fetch_s=config.max_fetch_s)
        from omniprep.storage.remote import read_url

        return read_url(url, max_bytes=config.max_bytes, timeout_s=config.timeout_s)

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


@lru_cache(maxsize=256)
def _rules(allowed: tuple[str, ...], base: str | None) -> web.Rules:
    if base is not None:
        with suppress(web.ForbiddenError):  # a folder inside an archive, say: names beside it are refused one by one
            return web.Rules((*allowed, base))
    return web.Rules(allowed)


def _status_of_judged(real: str, name: str) -> os.stat_result:
    """Return the status of a regular file, having opened it: it can be read, and is what `real` was when it was judged.

    The path is looked at before it is opened, since opening a device can do things; opening then neither waits (a pipe) nor
    follows a link.
    """
    _check_regular(os.lstat(real), name)
    handle = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(handle)
        _check_regular(status, name)
        if os.path.realpath(real) != real:
            raise RejectSample(Reason.MEDIA_FORBIDDEN, f"{name:.200}: its path was changed while it was looked at")
    finally:
        os.close(handle)
    return status


def _check_regular(status: os.stat_result, name: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise RejectSample(Reason.MEDIA_UNREADABLE, f"{name:.200}: expected a file, got {_kind_of(status.st_mode)}")


def _path_of_file_url(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise RejectSample(Reason.MEDIA_FORBIDDEN, f"{url:.200}: not a URL: {one_line(error)}") from None
    if parts.netloc not in ("", "localhost"):
        raise RejectSample(Reason.MEDIA_FORBIDDEN, f"{url:.200}: a file on another host")
    return unquote(parts.path)


def _kind_of(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFLNK: "a link that leads back to itself",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")
