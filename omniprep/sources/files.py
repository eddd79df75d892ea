"""Finding and opening input files: local paths, any fsspec URL, globs; plain, gzip and zstd.

What lies at a URL is read by ranges, each of them tried again if it fails (`omniprep.storage.remote`): a row group or a seek
costs what it needs, and a connection that breaks costs the piece that it was carrying.
"""

import glob
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from omniprep.errors import ConfigError
from omniprep.sources.partitions import InputFile, Slice
from omniprep.storage.folder import StorageError
from omniprep.storage.remote import find_url, is_url, open_url, size_of_url

__all__ = [
    "DAMAGE",
    "check_unchanged",
    "compression_of",
    "damage_of",
    "find_files",
    "is_url",
    "one_line",
    "open_input",
    "parent_of",
    "read_to_damage",
]

_COMPRESSIONS = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd", ".zstd": "zstd"}


def find_files(paths: tuple[str, ...], *, place: str) -> tuple[InputFile, ...]:
    """Return the files that paths and globs match: the paths in their order, each glob's matches sorted.

    Raises `ConfigError` for a path that matches nothing, a folder, or a file that two paths match.
    """
    found: list[tuple[str, int]] = []
    for path in paths:
        matches = _match_url(path) if is_url(path) else _match_local(path)
        if not matches:
            start = "" if is_url(path) or Path(path).expanduser().is_absolute() else f" (relative ones start at {Path.cwd()})"
            raise ConfigError(f"{place}: no file matches {path!r}; check the path{start}")
        found.extend(matches)
    names = [path for path, _ in found]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise ConfigError(f"{place}: {twice!r} is matched by two paths; each file must be read once")
    folder = parent_of(names[0]) if len(names) == 1 else _common_folder(names)
    return tuple(
        InputFile(path=path, name=path[len(folder) :].lstrip("/") if path.startswith(folder) else path, num_bytes=size)
        for path, size in found
    )


def parent_of(path: str) -> str:
    """Return the folder of a local path (absolute) or URL.

    >>> parent_of("s3://bucket/data/a.jsonl")
    's3://bucket/data'
    """
    return path.rsplit("/", 1)[0] if is_url(path) else str(Path(path).absolute().parent)


def _common_folder(paths: list[str]) -> str:
    folders = [f"{parent_of(path)}/" for path in paths]
    shortest = min(folders, key=len)
    same = next((k for k, char in enumerate(shortest) if any(folder[k] != char for folder in folders)), len(shortest))
    return shortest[:same].rpartition("/")[0]


def _match_local(path: str) -> list[tuple[str, int]]:
    expanded = str(Path(path).expanduser().absolute())
    if Path(expanded).is_file():  # a name with brackets is a name if such a file exists
        return [(expanded, Path(expanded).stat().st_size)]
    if Path(expanded).is_dir():
        raise ConfigError(f"{path!r} is a folder; name its files, for example {path.rstrip('/')}/*.jsonl")
    matches = sorted(name for name in glob.iglob(expanded, recursive=True) if Path(name).is_file())  # noqa: PTH207
    return [(name, Path(name).stat().st_size) for name in matches]


def _match_url(url: str) -> list[tuple[str, int]]:
    try:
        return sorted(find_url(url).items())
    except StorageError as error:
        raise ConfigError(f"{url!r} cannot be listed: {_without(url, error)}") from None


def _without(path: str, error: Exception) -> str:
    """Return an error's message without the path that it starts with."""
    return one_line(error).removeprefix(f"{path}: ")


def one_line(error: BaseException) -> str:
    """Return an exception's message without line breaks, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def compression_of(path: str) -> str | None:
    """Return "gzip", "zstd" or None, by suffix.

    >>> compression_of("a.jsonl.zst")
    'zstd'
    """
    return _COMPRESSIONS.get(Path(path).suffix.lower())


def check_unchanged(piece: Slice) -> None:
    """Raise `ConfigError` if a file has another size than when it was planned."""
    num_bytes: int | None
    try:
        num_bytes = size_of_url(piece.path) if is_url(piece.path) else Path(piece.path).stat().st_size
    except OSError as error:
        reason = error.strerror or _without(piece.path, error)
        raise ConfigError(f"{piece.path}: cannot be read any more: {reason}") from None
    if num_bytes != piece.num_bytes and num_bytes is not None:
        raise ConfigError(f"{piece.path}: had {piece.num_bytes} bytes when planned, has {num_bytes} now; run again")


@contextmanager
def open_input(path: str) -> Iterator[BinaryIO]:
    """Open a local file or URL, decompressed.

    What cannot be opened or decompressed is a `ConfigError` with the path; a store that does not answer a `StorageError`.
    """
    try:
        with open_url(path) if is_url(path) else Path(path).open("rb") as plain:
            match compression_of(path):
                case "gzip":
                    with gzip.open(plain, "rb") as unzipped:
                        yield cast(BinaryIO, unzipped)
                case "zstd":
                    yield cast(BinaryIO, io.BufferedReader(_ZstdReader(plain), 1 << 18))
                case _:
                    yield plain
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: cannot be read: {_without(path, error)}") from None


class DamagedFrameError(OSError):
    """What should be zstd is not."""


DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, DamagedFrameError)
"""What reading from `open_input` raises where a compressed stream is cut short or damaged; what came before it was whole."""


def damage_of(error: Exception, path: str) -> str:
    """Return one line about a stream that raised one of `DAMAGE`.

    >>> damage_of(EOFError("Compressed file ended before ..."), "a.jsonl.gz")
    'the gzip stream ends early; what follows is lost'
    """
    how = "ends early" if isinstance(error, EOFError) else f"is damaged: {one_line(error)}"
    return f"the {compression_of(path)} stream {how}; what follows is lost"


def read_to_damage(handle: BinaryIO, path: str, num_bytes: int | None = None) -> tuple[bytes, str | None]:
    """Return up to `num_bytes` bytes (None: all), and what is wrong with the stream if it breaks off before."""
    pieces: list[bytes] = []
    rest = num_bytes
    while rest != 0:
        try:
            # One read of the stream a time: a longer one would lose what it had read already when it fails.
            piece = cast(io.BufferedReader, handle).read1(1 << 18 if rest is None else min(rest, 1 << 18))
        except DAMAGE as error:
            return b"".join(pieces), damage_of(error, path)
        if not piece:
            break
        pieces.append(piece)
        rest = None if rest is None else rest - len(piece)
    return b"".join(pieces), None


class _ZstdReader(io.RawIOBase):
    """Decompress zstd frames one after another; a frame cut short is an error, which `stream_reader` would not tell."""

    def __init__(self, source: BinaryIO) -> None:
        import zstandard

        self._source = source
        self._context = zstandard.ZstdDecompressor()
        self._error: type[Exception] = zstandard.ZstdError
        self._frame: Any = None
        self._rest = b""
        self._out = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._out:
            data = self._rest or self._source.read(1 << 18)
            self._rest = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("the zstd stream ends in the middle of a frame")
                return 0
            if self._frame is None:
                self._frame = self._context.decompressobj()
            try:
                self._out = self._frame.decompress(data)
            except self._error as error:
                raise DamagedFrameError(one_line(error)) from None
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        num_bytes = min(len(buffer), len(self._out))
        buffer[:num_bytes] = self._out[:num_bytes]
        self._out = self._out[num_bytes:]
        return num_bytes
