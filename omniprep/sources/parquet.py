"""Parquet files. Media are bytes, paths, or the struct `{bytes, path}` of HF `datasets`.

A partition is whole row groups where they are small. A row group larger than a partition is read by several, each of
which decodes the pages before its own rows; it is therefore split into at most `MAX_PIECES` pieces. Rows are counted by the
footer: of a row group whose data are damaged, every row that cannot be read becomes a `Row` with its error.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal

from omniprep.errors import ConfigError, Reason, RejectSample
from omniprep.sources.base import FilesSource, plain_row
from omniprep.sources.files import check_unchanged, find_files, one_line, open_input
from omniprep.sources.partitions import InputFile, Partition, Row, Slice, Unit, cut
from omniprep.storage.folder import StorageError

MAX_PIECES = 16
"""Pieces that one row group is split into at most."""
_BATCH_ROWS = 32
"""Rows turned into Python values at a time; with media inside they are the reader's memory."""


class ParquetSource(FilesSource):
    """Rows of Parquet files."""

    kind: Literal["parquet"] = "parquet"

    def partitions(self, *, rows_per_partition: int) -> list[Partition]:
        """Return runs of row groups, or of rows in one large row group; the same on every call. Raises `ConfigError`."""
        files = find_files(self.path, place=f"source {self.name!r}")
        units = (unit for file in files for unit in _units(file, rows_per_partition))
        return cut(units, source=self.name, rows_per_partition=rows_per_partition, limit=self.limit)

    def read(self, partition: Partition) -> Iterator[Row]:
        """Yield the partition's rows, in order; one whose data are damaged with its error."""
        index = partition.first_row
        for piece in partition.slices:
            check_unchanged(piece)
            base = self._base_of(piece.path)
            for number, (value, error) in enumerate(_slice_rows(piece), start=piece.row):
                yield Row(index=index, place=f"{piece.name}[{number}]", value=value, error=error, base=base)
                index += 1


@contextmanager
def _open(path: str) -> Iterator[tuple[Any, BinaryIO]]:
    """Open a file and its footer. Raises `ConfigError` if it has none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_input(path) as handle:
        try:
            parquet = pq.ParquetFile(handle, page_checksum_verification=True)
        except pa.ArrowException as error:
            raise ConfigError(f"{path}: cannot be read as Parquet: {one_line(error)}") from None
        yield parquet, handle


def _units(file: InputFile, rows_per_partition: int) -> Iterator[Unit]:
    with _open(file.path) as (parquet, handle):
        handle.seek(-8, 2)
        handle.seek(-8 - int.from_bytes(handle.read(4), "little"), 2)
        footer = zlib.crc32(handle.read())
        row = 0
        for group in range(parquet.metadata.num_row_groups):
            num_rows = parquet.metadata.row_group(group).num_rows
            step = max(rows_per_partition, -(-num_rows // MAX_PIECES), 1)
            for start in range(0, num_rows, step):
                yield Unit(file, 0, row + start, row + start, min(step, num_rows - start), footer)
            row += num_rows


def _slice_rows(piece: Slice) -> Iterator[tuple[Any, RejectSample | None]]:
    """Yield rows [row, row + num_rows) of the file, or their errors, decoding only the row groups that hold them."""
    stop = piece.row + piece.num_rows
    with _open(piece.path) as (parquet, _):
        first = 0  # row of the file at which the current group starts
        for group in range(parquet.metadata.num_row_groups):
            num_rows = parquet.metadata.row_group(group).num_rows
            low, high = max(piece.row - first, 0), min(stop - first, num_rows)
            if low < high:
                yield from _group_rows(parquet, group, low, high)
            first += num_rows


def _group_rows(parquet: Any, group: int, low: int, high: int) -> Iterator[tuple[Any, RejectSample | None]]:
    """Yield rows [low, high) of a row group. Where its data are damaged, each row from there on is an error."""
    import pyarrow as pa

    start = 0  # row of the group at which the current batch starts
    damage = f"it holds fewer than the {high} rows that the footer promises"
    try:
        for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group], use_threads=False):
            begin, end = max(low - start, 0), min(high - start, batch.num_rows)
            if begin < end:
                yield from _values(batch.slice(begin, end - begin))
            start += batch.num_rows
            if start >= high:
                return
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, StorageError) or getattr(error, "errno", None) is not None:
            raise  # the file may be whole: it could not be read
        damage = one_line(error)
    for _ in range(max(low, start), high):
        yield None, RejectSample(Reason.SCHEMA_INVALID, f"row group {group} is damaged from its row {start} on: {damage:.300}")


def _values(batch: Any) -> Iterator[tuple[Any, RejectSample | None]]:
    """Yield the rows of a batch; one by one where a text is not UTF-8, which Arrow does not check."""
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            yield None, RejectSample(Reason.SCHEMA_INVALID, f"a text is not valid UTF-8 at byte {error.start}")
            return
        for k in range(batch.num_rows):
            yield from _values(batch.slice(k, 1))
        return
    for row in rows:
        yield plain_row(row), None
