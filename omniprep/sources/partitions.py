"""Rows and the deterministic slices of a source that workers read.

`partitions()` of a source looks at every file once (a scan for line ends, a Parquet footer, tar headers), on the driver.
Each reader states its file as `Unit`s, the smallest pieces that may be told apart, in order; `cut` packs them into
partitions. A partition is plain values: it is written into receipts, and its digest says what it reads.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

from omniprep.errors import ConfigError, RejectSample


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a source, parsed or with the reason why it could not be.

    For a row of a text file `line` is the row as it came. Rows of binary containers have none: their text is made when
    `raw` is asked for, because hashing the media of rows that are never rejected would be wasted.
    """

    index: int
    """Row in the source, from 0; the same for any number of partitions."""
    place: str
    """Where a person finds it: `data.jsonl:17` (lines from 1), `data.parquet[16]` (rows from 0), `data.tar/key`."""
    value: Any = None
    """The parsed row; media that came with it are `{"path": ..., "bytes": ...}`. None if `error` is set."""
    error: RejectSample | None = None
    base: str = ""
    """Folder or URL that relative media paths are resolved against."""
    line: bytes | None = None

    @cached_property
    def raw(self) -> bytes:
        """Return the row for the quarantine: the line, or JSON with media bytes as `{"sha256", "num_bytes"}`."""
        if self.line is not None:
            return self.line
        return json.dumps(_without_bytes(self.value), ensure_ascii=False, default=str).encode("utf-8", "backslashreplace")

    @cached_property
    def blobs(self) -> Mapping[str, bytes]:
        """Return the media bytes that came inside the row, by the SHA-256 that `raw` names."""
        found: dict[str, bytes] = {}
        _collect_bytes(self.value, found)
        return found


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _without_bytes(value: object) -> object:
    match value:
        case bytes():
            return {"sha256": _sha256(value), "num_bytes": len(value)}
        case dict():
            return {str(key): _without_bytes(item) for key, item in value.items()}
        case list() | tuple():
            return [_without_bytes(item) for item in value]
        case _:
            return value


def _collect_bytes(value: object, found: dict[str, bytes]) -> None:
    match value:
        case bytes():
            found[_sha256(value)] = value
        case dict():
            for item in value.values():
                _collect_bytes(item, found)
        case list() | tuple():
            for item in value:
                _collect_bytes(item, found)
        case _:
            pass


@dataclass(frozen=True, kw_only=True, slots=True)
class InputFile:
    """A file that a source matched."""

    path: str
    """Local path or fsspec URL."""
    name: str
    """Path below the folder that all files of the source share: short, and the same wherever the data set lies."""
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """Consecutive rows of one file."""

    path: str
    name: str
    num_bytes: int
    """Size of the whole file when it was planned."""
    offset: int
    """Byte at which the first row starts, where the container can be entered there."""
    line: int
    """Line (from 1) or ordinal of the first row in its file, blank lines counted."""
    row: int
    """Rows of the file before this slice."""
    num_rows: int
    checksum: int
    """CRC-32 of what was read while planning (the rows, or a footer), so that an edit is noticed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """A deterministic slice of one source: the unit of work."""

    source: str
    index: int
    first_row: int
    """`Row.index` of its first row."""
    slices: tuple[Slice, ...]

    @property
    def num_rows(self) -> int:
        """Return how many rows it holds, bad ones included."""
        return sum(piece.num_rows for piece in self.slices)

    @property
    def digest(self) -> str:
        """Return a SHA-256 over names, row ranges and checksums.

        Not over the folder that the files lie in, nor over a file's size: rows added to its end leave the others' work valid.
        """
        facts = [self.first_row, *([s.name, s.offset, s.row, s.num_rows, s.checksum] for s in self.slices)]
        return _sha256(json.dumps(facts).encode())

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Partition":
        """Return the partition that `to_json` wrote."""
        return cls(**{**values, "slices": tuple(Slice(**piece) for piece in values["slices"])})


class Unit(NamedTuple):
    """The smallest piece of a file that can be given to a partition: a line, a sample, a run of a row group."""

    file: InputFile
    offset: int
    line: int
    row: int
    num_rows: int
    checksum: int


class _OpenSlice:
    """A slice that still grows."""

    def __init__(self, unit: Unit) -> None:
        self.first = unit
        self.num_rows = 0
        self.checksum = 0
        self.add(unit, unit.num_rows)

    def add(self, unit: Unit, num_rows: int) -> None:
        self.num_rows += num_rows
        self.checksum = zlib.crc32(unit.checksum.to_bytes(4, "little"), self.checksum)

    def close(self) -> Slice:
        file, offset, line, row, _, _ = self.first
        return Slice(
            path=file.path,
            name=file.name,
            num_bytes=file.num_bytes,
            offset=offset,
            line=line,
            row=row,
            num_rows=self.num_rows,
            checksum=self.checksum,
        )


def cut(units: Iterable[Unit], *, source: str, rows_per_partition: int, limit: int | None = None) -> list[Partition]:
    """Pack units, in order, into partitions of at most `rows_per_partition` rows (more only where one unit has more).

    >>> file = InputFile(path="a.jsonl", name="a.jsonl", num_bytes=30)
    >>> lines = [Unit(file, 10 * k, k + 1, k, 1, 0) for k in range(3)]
    >>> [(part.first_row, part.num_rows) for part in cut(lines, source="a", rows_per_partition=2)]
    [(0, 2), (2, 1)]
    """
    if rows_per_partition < 1:
        raise ConfigError(f"source {source!r}: expected rows_per_partition >= 1, got {rows_per_partition}")
    done: list[Partition] = []
    slices: list[_OpenSlice] = []
    num_rows = 0  # of the open partition
    first_row = 0

    def close() -> None:
        nonlocal slices, num_rows, first_row
        if slices:
            pieces = tuple(piece.close() for piece in slices)
            done.append(Partition(source=source, index=len(done), first_row=first_row, slices=pieces))
        first_row += num_rows
        slices, num_rows = [], 0

    for unit in units:
        if limit is not None and first_row + num_rows >= limit:
            break
        if num_rows and num_rows + unit.num_rows > rows_per_partition:
            close()
        kept = unit if limit is None else unit._replace(num_rows=min(unit.num_rows, limit - first_row - num_rows))
        if slices and slices[-1].first.file is unit.file:
            slices[-1].add(kept, kept.num_rows)
        else:
            slices.append(_OpenSlice(kept))
        num_rows += kept.num_rows
    close()
    return done
