"""JSON lines (plain, gzip, zstd), and JSON files that hold one array, or one object over several lines.

Planning reads a file once, line by line, and keeps one line in memory. A partition of a plain file starts with a seek;
a compressed one is read from its start and rows before the partition are skipped unparsed.
A row that is not strict JSON (RFC 8259, UTF-8, no duplicate keys) becomes a `Row` with its error. So does, once, the damage of
a compressed file of which the beginning can be read.
"""

import io
import json
import mmap
import re
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from omniprep.errors import ConfigError, Reason, RejectSample
from omniprep.sources.base import FilesSource
from omniprep.sources.files import (
    DAMAGE,
    check_unchanged,
    compression_of,
    damage_of,
    find_files,
    is_url,
    open_input,
    read_to_damage,
)
from omniprep.sources.partitions import InputFile, Partition, Row, Slice, Unit, cut

MAX_ROW_BYTES = 1 << 28
"""A line of 256 MiB or more is rejected: a file without line ends must not fill the memory."""
_BOM = b"\xef\xbb\xbf"
_PEEK_BYTES = 64
_JSON_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{},]', re.DOTALL)


class _Line(NamedTuple):
    offset: int
    line: int
    """Line number from 1, or ordinal in an array from 0."""
    text: bytes
    damage: str | None = None
    """What ends the file here, instead of a row."""


class JsonlSource(FilesSource):
    """Rows of `.jsonl` or `.json` files, `.gz` and `.zst` included."""

    kind: Literal["jsonl"] = "jsonl"

    def partitions(self, *, rows_per_partition: int) -> list[Partition]:
        """Return slices of `rows_per_partition` rows, the same on every call. Raises `ConfigError`."""
        units = (
            Unit(file, line.offset, line.line, row, 1, zlib.crc32(line.text))
            for file in find_files(self.path, place=f"source {self.name!r}")
            for row, line in enumerate(_rows(file))
        )
        return cut(units, source=self.name, rows_per_partition=rows_per_partition, limit=self.limit)

    def read(self, partition: Partition) -> Iterator[Row]:
        """Yield the partition's rows, in order; a bad one with its error."""
        index = partition.first_row
        for piece in partition.slices:
            check_unchanged(piece)
            base = self._base_of(piece.path)
            num_read = 0
            for line, is_element in _slice_rows(piece):
                place = f"{piece.name}[{line.line}]" if is_element else f"{piece.name}:{line.line}"
                text = line.text.strip()
                value, error = parse_json(text) if line.damage is None else (None, _invalid(line.damage))
                yield Row(index=index, place=place, value=value, error=error, base=base, line=text)
                index += 1
                num_read += 1
            if num_read != piece.num_rows:
                raise ConfigError(f"{piece.path}: had {piece.num_rows} rows here when planned, has {num_read}; run again")


def parse_json(text: bytes) -> tuple[Any, RejectSample | None]:
    """Return (value, None) of strict JSON, or (None, the reason).

    >>> parse_json(b'{"a": 1}')
    ({'a': 1}, None)
    >>> parse_json(b'{"a": NaN}')[1].detail
    'not valid JSON: NaN is not a JSON number'
    """
    if len(text) >= MAX_ROW_BYTES:
        return None, _invalid(f"row of {MAX_ROW_BYTES >> 20} MiB or more; is the file one JSON value per line?")
    try:
        decoded = text.decode("utf-8")
        value = _DECODER.decode(decoded)
        if "\\u" in decoded:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        return None, _invalid(_why_not(error))
    return value, None


def _why_not(error: ValueError | RecursionError) -> str:
    match error:
        case UnicodeDecodeError():
            return f"not valid UTF-8: byte 0x{error.object[error.start]:02x} at byte {error.start} of the row"
        case UnicodeEncodeError():
            return f"not valid Unicode: half of a surrogate pair, {error.object[error.start]!a}"
        case json.JSONDecodeError():
            return f"not valid JSON: {error.msg} at character {error.pos} of {len(error.doc)}"
        case RecursionError():
            return "not usable JSON: nested too deeply"
        case _:
            return f"not valid JSON: {error}"


def _invalid(detail: str) -> RejectSample:
    return RejectSample(Reason.SCHEMA_INVALID, detail)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r:.80} twice in one object")
    return value


def _constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"number {text:.40} is too large")
    return value


def _int(text: str) -> int:
    if len(text) > 400:  # past any float; Python refuses 4300 digits with a message about its own limits
        raise ValueError(f"number of {len(text)} digits")
    return int(text)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_int)


def _rows(file: InputFile) -> Iterator[_Line]:
    """Yield the rows of a whole file. Raises `ConfigError` if it is not text."""
    with open_input(file.path) as handle:
        if b"\0" in cast(io.BufferedReader, handle).peek(_PEEK_BYTES)[:_PEEK_BYTES]:
            raise ConfigError(f"{file.path}: expected lines of JSON in UTF-8, got binary data (or UTF-16)")
        if not _is_one_value(file.path):
            yield from _lines(handle, file.path, offset=0, line=1)
            return
    data, damage = _read_whole(file.path)
    yield from _elements(data, damage=damage)


def _slice_rows(piece: Slice) -> Iterator[tuple[_Line, bool]]:
    """Yield the rows of a slice, and whether they are elements of an array."""
    if _is_one_value(piece.path):
        data, damage = _read_whole(piece.path)
        for line in _take(_elements(data, offset=piece.offset, ordinal=piece.line, damage=damage), piece.num_rows):
            yield line, True
        return
    with open_input(piece.path) as handle:
        if compression_of(piece.path) is None:
            handle.seek(piece.offset)
            lines = _lines(handle, piece.path, offset=piece.offset, line=piece.line)
        else:
            lines = _lines(handle, piece.path, offset=0, line=1)
            for _ in _take(lines, piece.row):
                pass
        for line in _take(lines, piece.num_rows):
            yield line, False


def _take(lines: Iterator[_Line], num_rows: int) -> Iterator[_Line]:
    for _ in range(num_rows):
        line = next(lines, None)
        if line is None:
            return
        yield line


def _lines(handle: BinaryIO, path: str, *, offset: int, line: int) -> Iterator[_Line]:
    """Yield the lines that are not blank; of one over `MAX_ROW_BYTES` only its first bytes; damage after a line as one more."""
    try:
        while text := handle.readline(MAX_ROW_BYTES):
            num_bytes = len(text)
            rest = text
            while len(rest) == MAX_ROW_BYTES and not rest.endswith(b"\n"):
                rest = handle.readline(MAX_ROW_BYTES)
                num_bytes += len(rest)
            row = text.removeprefix(_BOM) if offset == 0 else text
            if not row.isspace() and row:
                yield _Line(offset, line, row)
            offset += num_bytes
            line += 1
    except DAMAGE as error:
        if offset == 0:  # not one line is whole: the file is none of ours
            raise
        yield _Line(offset, line, b"", damage_of(error, path))


def _is_one_value(path: str) -> bool:
    """Return whether a `.json` file is one array, by its first character, or one object that does not end with its line."""
    stem = path.lower() if compression_of(path) is None else path.lower().rsplit(".", 1)[0]
    if not stem.endswith(".json"):
        return False
    with open_input(path) as handle:
        head, damage = read_to_damage(handle, path, 1 << 16)
        head = head.removeprefix(_BOM).lstrip()
        if not head.startswith(b"{") or parse_json(head.partition(b"\n")[0])[1] is None:
            return head.startswith(b"[")
        if head.partition(b"\n")[0].strip() == b"{":
            return True
        rest, damage = (b"", damage) if damage else read_to_damage(handle, path)
        return damage is None and parse_json((head + rest).strip())[1] is None


def _read_whole(path: str) -> tuple[bytes | mmap.mmap, str | None]:
    """Return a file, and what is wrong if it is compressed and breaks off."""
    with open_input(path) as handle:
        if compression_of(path) is not None or is_url(path):
            return read_to_damage(handle, path)
        return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ), None


def _elements(
    data: bytes | mmap.mmap, *, offset: int | None = None, ordinal: int = 0, damage: str | None = None
) -> Iterator[_Line]:
    """Yield the elements of an array, found by brackets alone so that a bad one does not hide the others.

    What is no array is one row. `damage` says why the data end where they do, and is the last row.

    >>> [bytes(line.text) for line in _elements(b'[{"a": "]"}, 2 ]')]
    [b'{"a": "]"}', b' 2 ']
    """
    if data[: 1 << 16].removeprefix(_BOM).lstrip().startswith(b"{") and not offset:
        yield _Line(0, ordinal, data[:].removeprefix(_BOM), damage)
        return
    start = data.find(b"[") + 1 if offset is None else offset
    depth = 1
    for token in _JSON_TOKEN.finditer(data, start):
        mark = token.group()[:1]
        if mark in b"[{":
            depth += 1
        elif mark in b"]}":
            depth -= 1
        if (mark == b"," and depth == 1) or depth == 0:
            text = data[start : token.start()]
            if depth or text.strip():  # nothing before the closing bracket: an empty array or a trailing comma
                yield _Line(start, ordinal, text)
                ordinal += 1
            start = token.end() if depth else token.start()
        if depth == 0:
            break
    rest = data[start:]
    # The array is not closed, or something follows its bracket: one row more, which will not parse.
    if damage is not None or (rest.strip() if depth else rest[1:].strip()):
        yield _Line(start, ordinal, rest, damage)
