"""The index rows of two datasets, joined a bounded number at a time.

```
index files ── read_rows ──> tables ── Buckets ──> rows of A and B whose names have one hash ── join ──> Joined
```

A bucket holds the rows of both datasets whose names have one hash, so each is joined alone and memory depends on the
size of a bucket, not of the datasets. Where one bucket would do, nothing is written; otherwise buckets lie in a folder
that is removed afterwards. Arrow does the joining: no row becomes a Python object unless it is shown.
"""

import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from omniprep.errors import DatasetError
from omniprep.shards.index import COLUMNS, read_index_table
from omniprep.storage.folder import Folder

if TYPE_CHECKING:
    import pyarrow as pa

Match = Literal["key", "id", "content"]

NAME = "name"
"""The column that rows are joined by, where it is neither their key nor their content."""
BYTES_OF = "bytes of "
"""Prefix of the columns that hold the size of a member."""
_READ = tuple(name for name in COLUMNS if name not in ("offset", "size", "member_offsets") and not name.startswith("has_"))
"""Where a record lies is no matter, and what it has follows from the counts."""
_PLACE = ("shard", "number")
"""Where a row's record is: number of the shard in the manifest, number of the record in the shard."""
_CONTENT_DIGITS = 32
"""Of `content_sha256`: 128 bits tell records apart, and half the memory is saved."""
BUCKET_ROWS = 1 << 17
_MAX_BUCKETS = 256
"""Beyond 30 million rows buckets grow instead: very many would be written a few rows at a time."""
_READ_TOGETHER = 32


def read_rows(folder: Folder, names: Sequence[tuple[int, str]], members: Sequence[str]) -> Iterator["pa.Table"]:
    """Yield the rows of the indices `(shard number, file name)`, a table for each few of them.

    Raises `DatasetError` if one is missing or not an index.
    """
    import pyarrow as pa

    # Threads hide the latency of an object store; a few files at a time keep memory bounded.
    with ThreadPoolExecutor(8) as pool:
        for start in range(0, len(names), _READ_TOGETHER):
            some = names[start : start + _READ_TOGETHER]
            tables = pool.map(lambda name: _read_index(folder, name[0], name[1]), some)
            yield _with_member_sizes(pa.concat_tables(list(tables)), members)


def _read_index(folder: Folder, shard: int, name: str) -> "pa.Table":
    import pyarrow as pa

    try:
        table = read_index_table(folder, name, _READ)
    except DatasetError as error:
        raise DatasetError(f"{folder.place}: {error}; see `omniprep verify`") from None
    numbers = np.arange(table.num_rows, dtype=np.int32)
    return (
        table.replace_schema_metadata(None)
        .append_column("shard", pa.array(np.full(table.num_rows, shard, np.int32)))
        .append_column("number", pa.array(numbers))
    )


def _with_member_sizes(table: "pa.Table", members: Sequence[str]) -> "pa.Table":
    import pyarrow as pa
    import pyarrow.compute as pc

    table = table.combine_chunks()
    sizes = pc.list_flatten(table["member_sizes"]).to_numpy()
    if len(sizes) != table.num_rows * len(members):
        raise DatasetError(f"an index states {len(sizes)} member sizes for {table.num_rows} records of {len(members)} members")
    for position, member in enumerate(members):
        table = table.append_column(BYTES_OF + member, pa.array(sizes[position :: len(members)]))
    content = pc.utf8_slice_codeunits(table["content_sha256"], 0, _CONTENT_DIGITS)
    return table.drop_columns(["member_sizes", "content_sha256"]).append_column("content", content)


def name_column(match: Match) -> str:
    """Return the column by which rows are joined first."""
    return "key" if match == "key" else NAME


def with_name(table: "pa.Table", match: Match) -> "pa.Table":
    """Add that column where it has to be made.

    By `content`, rows that share the key too are paired before others; rows without an id are known by their key.
    """
    import pyarrow.compute as pc

    if match == "key":
        return table
    if match == "id":
        own = pc.binary_join_element_wise("id", table["id"], " ")
        name = pc.if_else(pc.equal(table["id"], ""), pc.binary_join_element_wise("key", table["key"], " "), own)
    else:
        name = pc.binary_join_element_wise(table["content"], table["key"], " ")
    return table.append_column(NAME, name)


class Buckets:
    """Rows of two datasets, kept apart by a hash of their names. As a context manager it leaves nothing on the disk."""

    def __init__(self, num_rows: int, *, by: str, bucket_rows: int = BUCKET_ROWS) -> None:
        self._by = by
        self._num_buckets = min(_MAX_BUCKETS, max(1, -(-num_rows // bucket_rows)))
        self._flush_rows = num_rows // self._num_buckets // 2
        self._folder: Path | None = None
        self._held: dict[tuple[int, int], list[Any]] = {}
        self._num_held = 0

    def __enter__(self) -> "Buckets":
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, side: int, table: "pa.Table") -> None:
        """Put rows of dataset 0 or 1 into their buckets."""
        if self._num_buckets == 1:
            self._held.setdefault((0, side), []).append(table)
            return
        names = table[self._by].cast("binary").to_pylist()
        bucket = np.fromiter(map(zlib.crc32, names), np.int64, len(names)) % self._num_buckets
        order = np.argsort(bucket, kind="stable")
        table = table.take(order)
        edges = np.searchsorted(bucket[order], np.arange(self._num_buckets + 1)).tolist()
        for number in range(self._num_buckets):
            if edges[number] < edges[number + 1]:
                rows = table.slice(edges[number], edges[number + 1] - edges[number])
                self._held.setdefault((number, side), []).append(rows)
        self._num_held += table.num_rows
        if self._num_held >= self._flush_rows:
            self._flush()

    def pairs(self) -> Iterator[tuple["pa.Table", "pa.Table"]]:
        """Yield the rows of both datasets, bucket by bucket."""
        if self._folder is not None:
            self._flush()
        for number in range(self._num_buckets):
            left, right = self._take(number, 0), self._take(number, 1)
            if left is not None and right is not None:
                yield left, right
            elif left is not None:
                yield left, left.schema.empty_table()
            elif right is not None:
                yield right.schema.empty_table(), right

    def _path(self, number: int, side: int) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="omniprep-diff-"))
        return self._folder / f"{number}-{side}"

    def _flush(self) -> None:
        """Append what is held to the files, opened one at a time: there may be more buckets than file descriptors."""
        import pyarrow as pa

        for (number, side), tables in self._held.items():
            table = pa.concat_tables(tables)
            with self._path(number, side).open("ab") as file, pa.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table)
        self._held.clear()
        self._num_held = 0

    def _take(self, number: int, side: int) -> "pa.Table | None":
        import pyarrow as pa

        tables = self._held.pop((number, side), [])
        if self._folder is not None and self._path(number, side).exists():
            with self._path(number, side).open("rb") as file:
                num_bytes = self._path(number, side).stat().st_size
                while file.tell() < num_bytes:
                    tables.append(pa.ipc.open_stream(file).read_all())
            self._path(number, side).unlink()
        return pa.concat_tables(tables).combine_chunks() if tables else None


@dataclass(frozen=True, kw_only=True)
class Joined:
    """Two tables, and which row of one is which row of the other."""

    a: "pa.Table"
    b: "pa.Table"
    in_a: npt.NDArray[np.int64]
    """(n,) rows of `a` that have a partner."""
    in_b: npt.NDArray[np.int64]
    """(n,) their partners in `b`."""

    def only_a(self) -> "pa.Table":
        """Return the rows of `a` without a partner."""
        return _without(self.a, self.in_a)

    def only_b(self) -> "pa.Table":
        """Return the rows of `b` without a partner."""
        return _without(self.b, self.in_b)

    def differ(self, column: str) -> npt.NDArray[np.bool_]:
        """Return, for every pair, whether the column's values differ."""
        import pyarrow.compute as pc

        unequal = pc.not_equal(self.a[column].take(self.in_a), self.b[column].take(self.in_b))
        return np.asarray(unequal, np.bool_)

    def values(self, column: str, chosen: npt.NDArray[np.int64]) -> list[tuple[Any, Any]]:
        """Return a column's two values of the chosen pairs."""
        left, right = self.a[column].take(self.in_a[chosen]), self.b[column].take(self.in_b[chosen])
        return list(zip(left.to_pylist(), right.to_pylist(), strict=True))

    def smallest(self, column: str, rows: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
        """Return those of the given pairs whose values in `a` are the smallest, in their order."""
        import pyarrow.compute as pc

        if not len(rows) or not count:
            return rows[:0]
        values = self.a[column].take(self.in_a[rows])
        first: npt.NDArray[np.int64] = pc.bottom_k_unstable(values, min(count, len(rows))).to_numpy().astype(np.int64)
        return rows[first]


def join(a: "pa.Table", b: "pa.Table", by: str) -> Joined:
    """Pair the rows of two tables; of several rows with one name the first is paired with the first, and so on."""
    import pyarrow.compute as pc

    left, right = _told_apart(a[by]), _told_apart(b[by])
    hits = pc.index_in(left, value_set=right)
    found = np.asarray(pc.is_valid(hits), np.bool_)
    return Joined(
        a=a,
        b=b,
        in_a=np.flatnonzero(found),
        in_b=np.asarray(hits.filter(pc.is_valid(hits)).to_numpy(), np.int64),
    )


def _told_apart(names: "pa.ChunkedArray") -> "pa.Array":
    """Return names that differ: the second row of a name gets a number behind it, and so on."""
    import pyarrow as pa
    import pyarrow.compute as pc

    plain = names.combine_chunks()
    codes = plain.dictionary_encode().indices.to_numpy()
    if not len(codes) or int(codes.max()) + 1 == len(codes):
        return plain
    order = np.argsort(codes, kind="stable")
    counts = np.bincount(codes)
    rank = np.empty(len(codes), np.int64)
    rank[order] = np.arange(len(codes)) - np.repeat(np.cumsum(counts) - counts, counts)
    # A NUL, so that the second "a" does not meet a record that is called "a1".
    numbers = pc.if_else(
        pc.equal(pa.array(rank), 0), "", pc.binary_join_element_wise("", pc.cast(pa.array(rank), "string"), "\0")
    )
    return pc.binary_join_element_wise(plain, numbers, "")


def _without(table: "pa.Table", rows: npt.NDArray[np.int64]) -> "pa.Table":
    keep = np.ones(table.num_rows, np.bool_)
    keep[rows] = False
    return table.filter(keep)
