"""An open shard: its bytes, and of its index what reading records needs, as one table of numbers."""

import os
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from omniprep.errors import DatasetError
from omniprep.shards.index import content_sha256, read_index_table
from omniprep.shards.manifest import ShardInfo
from omniprep.shards.members import MemberFormat
from omniprep.shards.writer import BLOCK_BYTES, tar_header
from omniprep.storage.folder import Folder, RandomReader, StorageError, sha256_of
from omniprep.stream.corrupt import Corrupt
from omniprep.stream.record import NO_ITEMS, MemberPlaces, Record, view_record
from omniprep.stream.shard_cache import ShardCache
from omniprep.types import Int32Array, Int64Array

if TYPE_CHECKING:
    import pyarrow as pa

_NUMBERS = ("offset", "size", "num_tokens", "num_mel_frames", "num_audio_items", "num_images", "num_videos")
_LISTS = ("member_offsets", "member_sizes")
_HEADER_FACTS = 136
"""Bytes of a tar header up to the end of the size: name, mode, owner, group, size."""


class ShardBytes(Protocol):
    """The bytes of a shard."""

    def fill(self, view: memoryview, offset: int) -> int:
        """Read from `offset` on until `view` is full or the file ends; return the number of bytes read."""


class FileBytes:
    """A shard on a disk. It is closed when nobody refers to it: no thread reads from a descriptor that means another file."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)

    def fill(self, view: memoryview, offset: int) -> int:
        """Read from `offset` on."""
        return _fill(self._descriptor, view, offset)


class CachedBytes:
    """A shard in a store, read through a cache, which may let go of its copy between two reads."""

    def __init__(self, cache: ShardCache, folder: Folder, shard: ShardInfo) -> None:
        self._cache, self._folder, self._shard = cache, folder, shard

    def fill(self, view: memoryview, offset: int) -> int:
        """Read from `offset` on, from a local copy."""
        descriptor = self._cache.open(self._folder, self._shard)
        try:
            return _fill(descriptor, view, offset)
        finally:
            os.close(descriptor)


def _fill(descriptor: int, view: memoryview, offset: int) -> int:
    num_read = os.preadv(descriptor, [view], offset)
    while 0 < num_read < len(view):
        got = os.preadv(descriptor, [view[num_read:]], offset + num_read)
        if not got:
            break
        num_read += got
    return num_read


class RangeBytes:
    """A shard in a store, read by ranges."""

    def __init__(self, reader: RandomReader) -> None:
        self._reader = reader

    def fill(self, view: memoryview, offset: int) -> int:
        """Read from `offset` on, with one request."""
        data = self._reader.pread(len(view), offset)
        view[: len(data)] = data
        return len(data)


OFFSET, SIZE, NUM_TOKENS, NUM_MEL_FRAMES, NUM_ITEMS, SPANS = range(6)
"""Columns of `Locations.facts`; from `SPANS` on, start and size of each member's data in its record."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Locations:
    """Where the N records of a shard and their members lie, from its index."""

    facts: Int64Array
    """(N, 5 + 2 x members): see `OFFSET`, `SIZE`... above."""
    keys: npt.NDArray[np.bytes_]
    digests: npt.NDArray[np.bytes_] | None
    """Hashes of what is trained on, where they are asked for."""

    @property
    def num_bytes(self) -> int:
        """Return the memory that it takes."""
        return self.facts.nbytes + self.keys.nbytes + (0 if self.digests is None else self.digests.nbytes)


class OpenShard:
    """An open shard. Safe for threads."""

    def __init__(self, *, place: str, source: str, form: MemberFormat, data: ShardBytes, locations: Locations) -> None:
        self.place = place
        self.num_index_bytes = locations.num_bytes
        self._source, self._data = source, data
        self._facts, self._keys, self._digests = locations.facts, locations.keys, locations.digests
        self._places = MemberPlaces(form)
        self._frames_name = form.names[self._places.frames]

    def facts(self, number: int) -> list[int]:
        """Return the facts of a record, as `Locations.facts` has them."""
        found: list[int] = self._facts[number].tolist()
        return found

    def corrupt(self, number: int, why: str) -> Corrupt:
        """Return what is reported of a record."""
        return Corrupt(self._keys[number].decode("ascii"), self.place, why)

    def read(self, number: int, facts: list[int], view: memoryview) -> tuple[Record | None, str]:
        """Read a record into `view`, which is as large as it; return it, or None and why it is not what the index says.

        Raises `DatasetError`, `StorageError` if the whole shard cannot be had.
        """
        try:
            num_read = self._data.fill(view, facts[OFFSET])
        except FileNotFoundError:
            raise StorageError(f"{self.place}: is there no longer; was it removed while it is read?") from None
        except OSError as error:  # a bad sector: one record, not the whole run
            return None, f"cannot be read: {error.strerror or error}"
        if num_read != len(view):
            return None, f"expected {len(view)} bytes at {facts[OFFSET]}, got {num_read}: the shard is cut short"
        try:
            return self._view(number, facts, view), ""
        except DatasetError as error:
            return None, str(error)

    def _view(self, number: int, facts: list[int], view: memoryview) -> Record:
        spans = list(zip(facts[SPANS::2], facts[SPANS + 1 :: 2], strict=True))
        if self._digests is not None:
            self._check_sha256(view, spans, self._digests[number].decode("ascii"))
        key = self._keys[number].decode("ascii")
        self._check_header(view, *spans[self._places.frames], name=f"{key}.{self._frames_name}")
        record = view_record(view, spans, places=self._places, key=key, source=self._source)
        if record.mel.shape[1] != facts[NUM_MEL_FRAMES] or record.num_tokens != facts[NUM_TOKENS]:
            told = f"{facts[NUM_TOKENS]} tokens and {facts[NUM_MEL_FRAMES]} mel frames"
            raise DatasetError(f"expected {told}, got {record.num_tokens} and {record.mel.shape[1]}")
        if facts[NUM_ITEMS] or not record.has_its_json():
            audio, vision = record.parse()
            if len(audio) + len(vision) != facts[NUM_ITEMS]:
                raise DatasetError(f"json: expected {facts[NUM_ITEMS]} media items, got {len(audio) + len(vision)}")
        else:
            record.items = NO_ITEMS
        return record

    def _check_header(self, view: memoryview, start: int, size: int, *, name: str) -> None:
        """Check that the bytes are this record's, and the size of the member that has no header of its own."""
        header = view[start - BLOCK_BYTES : start - BLOCK_BYTES + _HEADER_FACTS]
        if header.tobytes() != tar_header(name, size)[:_HEADER_FACTS]:
            got = bytes(header[:100]).rstrip(b"\0")
            raise DatasetError(f"expected the tar header of {name} with {size} bytes, got that of {got!r:.120}")

    def _check_sha256(self, view: memoryview, spans: list[tuple[int, int]], expected: str) -> None:
        members: dict[str, Any] = {
            name: view[start : start + size] for name, (start, size) in zip(self._places.form.names, spans, strict=True)
        }
        got = content_sha256(members)
        if got != expected:
            raise DatasetError(f"expected content with sha256 {expected:.12}…, got {got:.12}…: it was changed or damaged")


def read_locations(
    folder: Folder, shard: ShardInfo, *, form: MemberFormat, num_tokens: Int32Array, with_sha256: bool
) -> Locations:
    """Read a shard's index; `num_tokens` are those of the plan. Raises `DatasetError` if it is not the index of that shard.

    `with_sha256` also checks the index itself against the manifest.
    """
    place = f"{folder.place}/{shard.index_name}"
    try:
        if with_sha256 and sha256_of(folder, shard.index_name) != shard.index_sha256:
            raise DatasetError(f"{place}: its sha256 is not the manifest's: it was changed or damaged; copy it again")
    except FileNotFoundError:
        raise DatasetError(
            f"{place}: is missing, though the manifest names its shard; copy it there, or build it again"
        ) from None
    try:
        table = read_index_table(folder, shard.index_name, ("key", *_NUMBERS, *_LISTS, *(["content_sha256"] * with_sha256)))
    except DatasetError as error:
        raise DatasetError(f"{folder.place}/{error}; copy it there again, or build it again") from None
    try:
        columns = {name: _values(table, name) for name in (*_NUMBERS, *_LISTS)}
        facts = _facts(columns, num_members=len(form.names), num_bytes=shard.num_bytes)
        if not np.array_equal(columns["num_tokens"], num_tokens):
            raise DatasetError(f"{place}: is not the index that the plan was made from; copy it again, with its shard")
        keys = np.array([key.encode("ascii") for key in table["key"].to_pylist()], np.bytes_)
        digests = np.array(table["content_sha256"].to_pylist(), np.bytes_) if with_sha256 else None
    except (ValueError, TypeError, AttributeError) as error:
        raise DatasetError(f"{place}: a damaged index: {' '.join(str(error).split()):.200}; copy it again") from None
    return Locations(facts=facts, keys=keys, digests=digests)


def _values(table: "pa.Table", name: str) -> npt.NDArray[Any]:
    """Return the integers of a column, of lists one after another."""
    column: Any = table[name].combine_chunks()
    values = np.from_dlpack(column.flatten() if name in _LISTS else column)  # refuses nulls
    if values.dtype.kind != "i":
        raise ValueError(f"{name} holds other values than it should")
    return values


def _facts(columns: dict[str, npt.NDArray[Any]], *, num_members: int, num_bytes: int) -> Int64Array:
    """Return the columns side by side, after a look whether they fit each other: `pread` must not be asked for nonsense."""
    num_records = len(columns["offset"])
    offsets, sizes = (columns[name].reshape(num_records, num_members) for name in _LISTS)
    facts = np.empty((num_records, SPANS + 2 * num_members), np.int64)
    facts[:, OFFSET], facts[:, SIZE] = columns["offset"], columns["size"]
    facts[:, NUM_TOKENS], facts[:, NUM_MEL_FRAMES] = columns["num_tokens"], columns["num_mel_frames"]
    facts[:, NUM_ITEMS] = columns["num_audio_items"] + columns["num_images"] + columns["num_videos"]
    facts[:, SPANS::2], facts[:, SPANS + 1 :: 2] = offsets - columns["offset"][:, None], sizes
    start, size = facts[:, SPANS::2], facts[:, SPANS + 1 :: 2]
    # Each number is bounded before it is added to another: a damaged one may be near the largest that there is.
    if (facts < 0).any() or (facts[:, :SPANS] > num_bytes).any() or (start > num_bytes).any() or (size > num_bytes).any():
        raise ValueError(f"a number below 0 or beyond the shard's {num_bytes} bytes")
    if (start < BLOCK_BYTES).any() or (start + size > facts[:, SIZE : SIZE + 1]).any():
        raise ValueError("a member outside its record")
    return facts
