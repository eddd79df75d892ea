"""Finding and opening input files: local paths, any fsspec URL, globs; plain, gzip and zstd."""

import glob
import gzip
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from omniprep.errors import ConfigError
from omniprep.sources.partitions import InputFile, Slice

_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.\-]*://")
_COMPRESSIONS = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd", ".zstd": "zstd"}


def is_url(path: str) -> bool:
    """Return whether `path` is an fsspec URL rather than a local path.

    >>> is_url("s3://bucket/a.jsonl"), is_url("/data/a:b.jsonl")
    (True, False)
    """
    return _URL.match(path) is not None


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
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
        names = sorted(filesystem.glob(path)) if glob.has_magic(path) else [path]
        infos = [filesystem.info(name) for name in names]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"{url!r} cannot be listed: {one_line(error)}") from None
    return [(filesystem.unstrip_protocol(str(i["name"])), int(i["size"] or 0)) for i in infos if i["type"] == "file"]


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
    """Raise `ConfigError` if a local file has another size than when it was planned."""
    if is_url(piece.path):
        return
    try:
        num_bytes = Path(piece.path).stat().st_size
    except OSError as error:
        raise ConfigError(f"{piece.path}: cannot be read any more: {error.strerror}") from None
    if num_bytes != piece.num_bytes:
        raise ConfigError(f"{piece.path}: had {piece.num_bytes} bytes when planned, has {num_bytes} now; run again")


@contextmanager
def open_input(path: str) -> Iterator[BinaryIO]:
    """Open a local file or URL, decompressed. What cannot be opened or decompressed is a `ConfigError` with the path."""
    import zlib

    try:
        with _open_plain(path) as plain:
            match compression_of(path):
                case "gzip":
                    with gzip.open(plain, "rb") as unzipped:
                        yield cast(BinaryIO, unzipped)
                case "zstd":
                    yield cast(BinaryIO, io.BufferedReader(_ZstdReader(plain), 1 << 18))
                case _:
                    yield plain
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: cannot be read: {one_line(error)}") from None


def _open_plain(path: str) -> BinaryIO:
    if not is_url(path):
        return Path(path).open("rb")
    import fsspec

    return cast(BinaryIO, fsspec.open(path, "rb").open())


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
                raise OSError(one_line(error)) from None
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        num_bytes = min(len(buffer), len(self._out))
        buffer[:num_bytes] = self._out[:num_bytes]
        self._out = self._out[num_bytes:]
        return num_bytes
