"""Parquet files. Media are bytes, paths, or the struct `{bytes, path}` of HF `datasets`.

A partition is whole row groups where they are small. A row group larger than a partition is read by several, each of
which decodes the pages before its own rows; it is therefore split into at most `MAX_PIECES` pieces.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from omniprep.errors import ConfigError
from omniprep.sources.base import FilesSource, plain_row
from omniprep.sources.files import check_unchanged, find_files, one_line, open_input
from omniprep.sources.partitions import InputFile, Partition, Row, Slice, Unit, cut

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
        """Yield the partition's rows, in order."""
        index = partition.first_row
        for piece in partition.slices:
            check_unchanged(piece)
            base = self._base_of(piece.path)
            for number, value in enumerate(_slice_rows(piece), start=piece.row):
                yield Row(index=index, place=f"{piece.name}[{number}]", value=value, base=base)
                index += 1


@contextmanager
def _open(path: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_input(path) as handle:
        try:
            yield pq.ParquetFile(handle)
        except pa.ArrowException as error:
            raise ConfigError(f"{path}: cannot be read as Parquet: {one_line(error)}") from None


def _units(file: InputFile, rows_per_partition: int) -> Iterator[Unit]:
    with _open(file.path) as parquet, open_input(file.path) as handle:
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


def _slice_rows(piece: Slice) -> Iterator[Any]:
    """Yield rows [row, row + num_rows) of the file, decoding only the row groups that hold them."""
    stop = piece.row + piece.num_rows
    with _open(piece.path) as parquet:
        first = 0  # row of the file at which the current group starts
        for group in range(parquet.metadata.num_row_groups):
            num_rows = parquet.metadata.row_group(group).num_rows
            if first < stop and first + num_rows > piece.row:
                start = first
                for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group], use_threads=False):
                    low, high = max(piece.row - start, 0), min(stop - start, batch.num_rows)
                    if low < high:
                        yield from map(plain_row, batch.slice(low, high - low).to_pylist())
                    start += batch.num_rows
                    if start >= stop:
                        break
            first += num_rows
