"""Which media a record used, and whether they are still what they were.

A receipt names the media of its partition with size, time stamp and digest. A later build asks for size and time stamp
alone, as make and rsync do, and reads only the files where those differ: touching a file costs its digest, not its encoding.
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from omniprep.errors import Reason, RejectSample
from omniprep.records import MediaBlob
from omniprep.sources.files import is_url
from omniprep.types import MediaFile

ABSENT = -1
"""`MediaFact.num_bytes` of what was not there."""
OF_ROWS = "rows"
"""`MediaFact.sha256` of a file that rows, not media, were read from: their own digest covers what was read."""
_MAX_DIGESTS_KEPT = 4096
_MAX_PATH = 4096
"""Longer names cannot be paths, and a hostile record's would only fill the receipt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaFact:
    """A file that a record named, as it was found. Media inside rows have none: the digest of the rows covers them."""

    location: str
    """Absolute path or URL. Links in it are not resolved: one that leads elsewhere later is another file."""
    name: str
    """What the record called it."""
    num_bytes: int
    """`ABSENT` if it was not there, or was not looked for behind a URL."""
    stamp: str
    """mtime in nanoseconds, or a URL's ETag; "" if unknown."""
    sha256: str
    """Of the content; "" if it was not read: absent, refused, not a file. Of a source's own file `OF_ROWS`."""


class MediaLedger:
    """Stands before a `resolve` function for one record: notes what was asked for, and puts digests on what was found.

    A refused or missing medium is noted too, so that a file that appears later is noticed. `hash_rows` has bytes that came
    with the row digested as well, which a cache of encoded media needs and nothing else does.
    """

    def __init__(self, resolve: Callable[..., MediaFile], *, hash_rows: bool = False) -> None:
        self._resolve = resolve
        self._hash_rows = hash_rows
        self._facts: dict[tuple[str, str], MediaFact] = {}

    @property
    def facts(self) -> tuple[MediaFact, ...]:
        """Return what was asked for so far, each once, in order."""
        return tuple(self._facts.values())

    def resolve(self, ref: str | MediaBlob, *, base: str) -> MediaFile:
        """Resolve as `MediaStore.resolve` does, and take note. Raises its `RejectSample`."""
        name = ref if isinstance(ref, str) else ref.path or ""
        in_row = (isinstance(ref, MediaBlob) and ref.bytes is not None) or name[:5].lower() == "data:"
        url = None if in_row else _url_of(name, base)
        try:
            media = self._resolve(ref, base=base)
            if in_row:
                return replace(media, sha256=_content_sha256(media)) if self._hash_rows else media
            if url is None and media.path is not None:
                num_bytes, stamp, sha256 = _look(media.path, name)
            else:
                num_bytes, stamp, sha256 = media.num_bytes, media.stamp, media.sha256 or _content_sha256(media)
        except RejectSample:
            if not in_row:
                self._note(_refused(name, url, base))
            raise
        self._note(MediaFact(location=location_of(name, base), name=name, num_bytes=num_bytes, stamp=stamp, sha256=sha256))
        return replace(media, stamp=stamp, sha256=sha256)

    def _note(self, fact: MediaFact | None) -> None:
        if fact is not None:
            self._facts[fact.location, fact.name] = fact


def media_sha256(facts: Iterable[MediaFact]) -> str:
    """Return one digest of what was named and what it held; the order and repetitions do not count.

    >>> one = MediaFact(location="/a", name="a", num_bytes=1, stamp="1", sha256="0f")
    >>> media_sha256([one, one]) == media_sha256([one])
    True
    """
    pairs = sorted({(fact.name, fact.sha256) for fact in facts})
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def location_of(name: str, base: str) -> str:
    """Return the absolute path or URL that a name means beside `base`: the rule of `MediaStore`.

    >>> location_of("a.png", "/data"), location_of("a.png", "s3://bucket/data")
    ('/data/a.png', 's3://bucket/data/a.png')
    """
    return _url_of(name, base) or _local_path(name, base)


def changed(fact: MediaFact, *, content: bool = False, fetch: Callable[[str], MediaFile] | None = None) -> bool:
    """Return whether a medium is another than it was: gone, new, or of other bytes.

    Equal size and time stamp are taken for equal content unless `content` is given, which reads everything. URLs are
    asked only then, through `fetch`: a `MediaStore.resolve`, which knows what may be fetched.
    """
    if is_url(fact.location):
        return content and fetch is not None and _url_changed(fact, fetch)
    try:
        status = os.stat(fact.location)  # noqa: PTH116 - a Path would be made for every medium of a dataset
        if status.st_size != fact.num_bytes:
            return True
        if str(status.st_mtime_ns) == fact.stamp and not (content and fact.sha256):
            return False
        return not (fact.sha256 and stat.S_ISREG(status.st_mode)) or _file_sha256(fact.location) != fact.sha256
    except (OSError, ValueError):
        return fact.num_bytes != ABSENT


def _url_of(name: str, base: str) -> str | None:
    """Return the URL that a name means beside `base`, None for a local path: the rule of `MediaStore`."""
    if name[:5].lower() == "file:":
        return None
    if is_url(name):
        return name
    return f"{base.rstrip('/')}/{name.lstrip('/')}" if is_url(base) else None


def _local_path(name: str, base: str) -> str:
    """Return the absolute path that a name means beside `base`: the rule of `MediaStore`."""
    path = unquote(urlsplit(name).path) if name[:5].lower() == "file:" else name
    path = os.path.expanduser(path) if path.startswith("~/") else path  # noqa: PTH111
    return os.path.join(os.getcwd(), base, path)  # noqa: PTH109, PTH118


def _look(path: Path, name: str) -> tuple[int, str, str]:
    """Return (size, stamp, digest) of a file; the first two are taken before it is read."""
    try:
        status = path.stat()
        return status.st_size, str(status.st_mtime_ns), _kept_sha256(str(path), status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise RejectSample(Reason.MEDIA_UNREADABLE, f"{name:.200}: {error.strerror}", retryable=True) from None


@lru_cache(maxsize=_MAX_DIGESTS_KEPT)
def _kept_sha256(path: str, num_bytes: int, mtime_ns: int) -> str:
    """Return the digest of a file, remembered for this size and time: one film may be cut into hundreds of records."""
    return _file_sha256(path)


def _file_sha256(path: str) -> str:
    # What was a file a moment ago may be a pipe now; it is not waited for.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refused(name: str, url: str | None, base: str) -> MediaFact | None:
    """Return the fact of a medium that could not be used: what is there, if anything; nothing is read."""
    if url is not None:
        return MediaFact(location=url, name=name, num_bytes=ABSENT, stamp="", sha256="")
    location = _local_path(name, base)
    if not name or len(location) > _MAX_PATH:
        return None
    try:
        status = os.stat(location)  # noqa: PTH116
    except ValueError:
        return None  # a zero byte or half a character: no file can ever appear there
    except OSError:
        return MediaFact(location=location, name=name, num_bytes=ABSENT, stamp="", sha256="")
    return MediaFact(location=location, name=name, num_bytes=status.st_size, stamp=str(status.st_mtime_ns), sha256="")


def _content_sha256(media: MediaFile) -> str:
    return _file_sha256(str(media.path)) if media.path is not None else hashlib.sha256(media.data or b"").hexdigest()


def _url_changed(fact: MediaFact, fetch: Callable[[str], MediaFile]) -> bool:
    try:
        return _content_sha256(fetch(fact.location)) != fact.sha256
    except RejectSample:
        return fact.num_bytes != ABSENT
