"""Read shards: any record with one `pread` through the index, or all of them in order."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from omniprep.errors import DatasetError
from omniprep.shards.index import read_index
from omniprep.shards.manifest import read_manifest
from omniprep.shards.members import from_members
from omniprep.types import EncodedSample


class ShardReader:
    """One shard and its index. Safe to use from several threads; close it, or use it as a context manager.

    Raises `DatasetError` if the tar or the index is missing or not readable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows, self.member_names = read_index(path.with_suffix(".parquet"))
        """Index rows as `index.COLUMNS` describes them, and the names of every record's members."""
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DatasetError(f"{path}: cannot be read: {error.strerror}") from None

    def __len__(self) -> int:
        return len(self.rows)

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def pread(self, num_bytes: int, offset: int) -> bytes:
        """Return bytes of the tar at an offset; fewer where it ends."""
        return os.pread(self._descriptor, num_bytes, offset)

    def read_members(self, number: int) -> dict[str, bytes]:
        """Return the members of record `number` of the shard, read with one `pread`."""
        row = self.rows[number]
        data = self.pread(row["size"], row["offset"])
        if len(data) != row["size"]:
            raise DatasetError(
                f"{self.path.name}: {row['key']}: expected {row['size']} bytes at {row['offset']}, got {len(data)}: cut short"
            )
        starts = (offset - row["offset"] for offset in row["member_offsets"])
        spans = zip(self.member_names, starts, row["member_sizes"], strict=True)
        return {name: data[start : start + size] for name, start, size in spans}

    def read(self, number: int) -> EncodedSample:
        """Return record `number` of the shard. Raises `DatasetError` that names the shard, the key and the member."""
        try:
            return from_members(self.read_members(number))
        except DatasetError as error:
            raise DatasetError(f"{self.path.name}: {self.rows[number]['key']}: {error}") from None


def iter_samples(folder: Path, *, split: str | None = None) -> Iterator[EncodedSample]:
    """Yield the samples of a finished dataset in order, of one split or of all."""
    for shard in read_manifest(folder).shards:
        if split is None or shard.split == split:
            with ShardReader(folder / shard.name) as reader:
                for number in range(len(reader)):
                    yield reader.read(number)


def find_sample(folder: Path, key: str) -> EncodedSample:
    """Return the sample with this key, or the first with this id. Raises `DatasetError` if there is none."""
    by_id: tuple[Path, int] | None = None
    for shard in read_manifest(folder).shards:
        with ShardReader(folder / shard.name) as reader:
            for number, row in enumerate(reader.rows):
                if row["key"] == key:
                    return reader.read(number)
                if row["id"] == key and by_id is None:
                    by_id = (reader.path, number)
    if by_id is None:
        raise DatasetError(f"{folder}: no record with the key or id {key!r}; `omniprep inspect {folder}` lists the keys")
    with ShardReader(by_id[0]) as reader:
        return reader.read(by_id[1])


def index_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the index rows of a finished dataset, each with its shard's name under `shard`."""
    for shard in read_manifest(folder).shards:
        rows, _ = read_index(folder / shard.index_name)
        yield from ({**row, "shard": shard.name} for row in rows)
