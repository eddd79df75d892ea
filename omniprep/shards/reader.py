"""Read shards: any record with one `pread` through the index, or all of them in order."""

from collections.abc import Iterator
from types import TracebackType
from typing import Any

from omniprep.errors import DatasetError
from omniprep.shards.index import read_index, read_index_table
from omniprep.shards.manifest import read_manifest
from omniprep.shards.members import from_members
from omniprep.storage.folder import Folder, Place, as_folder
from omniprep.types import EncodedSample


class ShardReader:
    """One shard and its index. Safe to use from several threads; close it, or use it as a context manager.

    Raises `DatasetError` if the tar or the index is missing or not readable.
    """

    def __init__(self, folder: Place, name: str) -> None:
        """`name` is the tar's name in the dataset's folder."""
        self.folder = as_folder(folder)
        self.name = name
        self.rows, self.member_names = read_index(self.folder, f"{name.removesuffix('.tar')}.parquet")
        """Index rows as `index.COLUMNS` describes them, and the names of every record's members."""
        try:
            self._tar = self.folder.open_random(name)
        except OSError as error:
            raise DatasetError(f"{self.folder.place}/{name}: cannot be read: {error.strerror}") from None

    def __len__(self) -> int:
        return len(self.rows)

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._tar.close()

    def pread(self, num_bytes: int, offset: int) -> bytes:
        """Return bytes of the tar at an offset; fewer where it ends."""
        return self._tar.pread(num_bytes, offset)

    def read_members(self, number: int) -> dict[str, bytes]:
        """Return the members of record `number` of the shard, read with one `pread`."""
        row = self.rows[number]
        size, offset = row["size"], row["offset"]
        # Asked before the bytes are: a damaged index may state any number.
        data = self.pread(size, offset) if offset >= 0 and 0 <= size <= self._tar.num_bytes - offset else b""
        if len(data) != size:
            got = max(0, min(size, self._tar.num_bytes - offset))
            raise DatasetError(f"{self.name}: {row['key']}: expected {size} bytes at {offset}, got {got}: cut short")
        if not len(row["member_offsets"]) == len(row["member_sizes"]) == len(self.member_names):
            raise DatasetError(f"{self.name}: {row['key']}: its index names {len(row['member_offsets'])} members")
        starts = (offset - row["offset"] for offset in row["member_offsets"])
        spans = zip(self.member_names, starts, row["member_sizes"], strict=True)
        return {name: data[start : start + size] for name, start, size in spans}

    def read(self, number: int) -> EncodedSample:
        """Return record `number` of the shard. Raises `DatasetError` that names the shard, the key and the member."""
        try:
            return from_members(self.read_members(number))
        except DatasetError as error:
            raise DatasetError(f"{self.name}: {self.rows[number]['key']}: {error}") from None


def iter_samples(folder: Place, *, split: str | None = None) -> Iterator[EncodedSample]:
    """Yield the samples of a finished dataset in order, of one split or of all."""
    folder = as_folder(folder)
    for shard in read_manifest(folder).shards:
        if split is None or shard.split == split:
            with ShardReader(folder, shard.name) as reader:
                for number in range(len(reader)):
                    yield reader.read(number)


def find_sample(folder: Place, key: str) -> EncodedSample:
    """Return the sample with this key, or the first with this id. Raises `DatasetError` if there is none."""
    folder = as_folder(folder)
    place = _find(folder, key)
    if place is None:
        told = f"no record with the key or id {key!r}; `omniprep inspect {folder.place}` lists the keys"
        raise DatasetError(f"{folder.place}: {told}")
    with ShardReader(folder, place[0]) as reader:
        return reader.read(place[1])


def _find(folder: Folder, key: str) -> tuple[str, int] | None:
    """Return the shard and the row in it: two columns of each index are read, so a million records take a second."""
    by_id: tuple[str, int] | None = None
    for shard in read_manifest(folder).shards:
        table = read_index_table(folder, shard.index_name, ("key", "id"))
        number = table["key"].index(key).as_py()
        if number >= 0:
            return shard.name, number
        if by_id is None and (number := table["id"].index(key).as_py()) >= 0:
            by_id = (shard.name, number)
    return by_id


def index_rows(folder: Place) -> Iterator[dict[str, Any]]:
    """Yield the index rows of a finished dataset, each with its shard's name under `shard`."""
    folder = as_folder(folder)
    for shard in read_manifest(folder).shards:
        rows, _ = read_index(folder, shard.index_name)
        yield from ({**row, "shard": shard.name} for row in rows)
