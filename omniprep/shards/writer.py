"""Shards: WebDataset tars whose bytes depend on nothing but the records in them.

Headers are plain ustar with mtime 0 and owner 0, members sorted, one record after another. A shard appears under its
name only when it is complete; its index appears after it.
"""

import hashlib
import re
import zlib
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple

from omniprep.errors import Reason, RejectSample
from omniprep.profile import QWEN2_5_OMNI, ModelProfile
from omniprep.shards.index import content_sha256, describe_sample, index_bytes
from omniprep.shards.manifest import ShardInfo, totals_by_modality, totals_of
from omniprep.shards.members import MemberFormat, to_members
from omniprep.storage.folder import FileWriter, Folder
from omniprep.types import EncodedSample

BLOCK_BYTES = 512
_MAX_MEMBER_BYTES = 8**11 - 1
"""The largest size that a ustar header can state (8 GiB)."""
_MAX_NAME_BYTES = 100
_MAX_OPEN_SHARDS = 32
"""Records name their splits; one each must not use up the process's file descriptors."""
_SMALL_BYTES = 1 << 18
"""Pieces are gathered up to this: below it, one copy is cheaper than hashing and writing each by itself."""
_PADDING = bytes(BLOCK_BYTES)
_TAIL = b"0".ljust(101, b"\0") + b"ustar\x0000".ljust(255, b"\0")
"""A header after its checksum: a regular file, no link, no owner's name."""
_TAIL_SUM = sum(_TAIL) + 8 * ord(" ")  # a checksum counts its own field as spaces


def tar_header(name: str, num_bytes: int) -> bytes:
    """Return the 512-byte ustar header of a regular file: mode 644, owner 0, mtime 0.

    The same bytes as `tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT)`, at a tenth of the cost.
    """
    head = name.encode("ascii").ljust(100, b"\0") + b"0000644\x000000000\x000000000\x00%011o\x0000000000000\x00" % num_bytes
    # Adler-32's lower half is 1 + the sum of the bytes, modulo a prime that 156 bytes do not reach: `sum(head)`, but quick.
    checksum = (zlib.adler32(head) & 0xFFFF) - 1 + _TAIL_SUM
    return b"%b%06o\x00 %b" % (head, checksum, _TAIL)


def safe_name(name: str) -> str:
    """Return a source's name as it may stand in a key: letters, digits, `_` and `-`; changed names get a hash.

    webdataset takes everything after the first dot for the member's name and a slash for a folder.

    >>> safe_name("film_clips"), safe_name("a.b/c")
    ('film_clips', 'a_b_c-fc7cd9c4')
    """
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:48]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def record_key(source: str, row: int) -> str:
    """Return the key of a record: unique in a dataset, whatever ids the user's rows have.

    >>> record_key("chat", 17)
    'chat-00000017'
    """
    return f"{safe_name(source)}-{row:08d}"


def partition_stem(source: str, partition: int) -> str:
    """Return what names a partition's files: its source and its place in that source.

    A source that grows, or a new one, leaves the names of all others as they are.

    >>> partition_stem("chat", 3)
    'chat-00003'
    """
    return f"{safe_name(source)}-{partition:05d}"


def shard_stem(split: str, source: str, partition: int, number: int = 0) -> str:
    """Return the name of a partition's shard without `.tar`; `number` counts the shards it was cut into.

    >>> shard_stem("train", "chat", 3), shard_stem("train", "chat", 3, 2)
    ('train-chat-00003', 'train-chat-00003-02')
    """
    return f"{split}-{partition_stem(source, partition)}" + (f"-{number:02d}" if number else "")


class ShardRecord(NamedTuple):
    """A sample as it is stored: what crosses from the process that encodes to the one that writes, hence a tuple."""

    key: str
    split: str
    members: dict[str, bytes]
    facts: dict[str, Any]
    """Its index row, but for where it lies in the shard."""

    @property
    def num_bytes(self) -> int:
        """Return about what it takes in a tar."""
        return sum(map(len, self.members.values())) + 2 * BLOCK_BYTES * len(self.members)


def to_record(sample: EncodedSample, form: MemberFormat | None = None, *, profile: ModelProfile = QWEN2_5_OMNI) -> ShardRecord:
    """Return a sample as it is stored. Raises `RejectSample` if it cannot be."""
    members = to_members(sample, form, profile=profile)
    check_storable(sample.key, members)
    facts = {
        **describe_sample(sample, profile),
        "member_sizes": [len(data) for data in members.values()],
        "content_sha256": content_sha256(members),
    }
    return ShardRecord(key=sample.key, split=sample.split, members=members, facts=facts)


class ShardWriter:
    """Writes one shard and its index. Nothing has a final name until `close`; `abandon` leaves nothing."""

    def __init__(self, folder: Folder, stem: str, *, source: str, split: str, partition: int, form: MemberFormat) -> None:
        self.stem = stem
        self._folder, self._source, self._split, self._partition, self._form = folder, source, split, partition, form
        self._file: FileWriter = folder.create(f"{stem}.tar")
        self._digest = hashlib.sha256()
        self._rows: list[dict[str, Any]] = []
        self._gathered: list[bytes] = []
        self._num_written = 0
        self.num_bytes = 0

    @property
    def num_records(self) -> int:
        """Return the records written so far."""
        return len(self._rows)

    def add(self, record: ShardRecord) -> None:
        """Append one record."""
        start = at = self.num_bytes
        offsets: list[int] = []
        for name, data in record.members.items():
            num_padding = -len(data) % BLOCK_BYTES
            self._gathered += (tar_header(f"{record.key}.{name}", len(data)), data, _PADDING[:num_padding])
            offsets.append(at + BLOCK_BYTES)
            at += BLOCK_BYTES + len(data) + num_padding
        self.num_bytes = at
        if at - self._num_written >= _SMALL_BYTES:
            self._write()
        self._rows.append({**record.facts, "offset": start, "size": at - start, "member_offsets": offsets})

    def close(self) -> ShardInfo:
        """Finish the tar, give it its name, then write its index; return what the manifest says of both."""
        self._gathered.append(b"\0" * (2 * BLOCK_BYTES))
        self.num_bytes += 2 * BLOCK_BYTES
        self._write()
        with self._file:
            self._file.publish()
        index_sha256 = self._folder.write(f"{self.stem}.parquet", index_bytes(self._rows, members=self._form.names))
        return ShardInfo(
            name=f"{self.stem}.tar",
            split=self._split,
            source=self._source,
            partition=self._partition,
            num_bytes=self.num_bytes,
            sha256=self._digest.hexdigest(),
            index_sha256=index_sha256,
            totals=totals_of(self._rows),
            modalities=totals_by_modality(self._rows),
        )

    def abandon(self) -> None:
        """Close without publishing and remove what was written."""
        with self._file:
            pass

    def _write(self) -> None:
        """Write what was gathered; a large record's pieces are not copied first."""
        whole = self.num_bytes - self._num_written < 2 * _SMALL_BYTES
        for piece in [b"".join(self._gathered)] if whole else self._gathered:
            self._file.write(piece)
            self._digest.update(piece)
        self._gathered.clear()
        self._num_written = self.num_bytes


class PartitionWriter:
    """Writes the records of one partition: a shard for each split, and more when one would grow too large.

    As a context manager it leaves nothing behind when an exception passes through it.
    """

    def __init__(
        self,
        folder: Folder,
        *,
        source: str,
        partition: int,
        form: MemberFormat,
        max_shard_bytes: int,
        first_numbers: Mapping[str, int] | None = None,
    ) -> None:
        """`first_numbers` says, by split, how many shards the partition has already; they are left alone."""
        self._folder, self._source, self._partition = folder, source, partition
        self._form, self._max_shard_bytes = form, max_shard_bytes
        self._open: dict[str, ShardWriter] = {}
        self._number: dict[str, int] = dict(first_numbers or {})
        self._closed: list[ShardInfo] = []

    def __enter__(self) -> "PartitionWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for writer in self._open.values():
            writer.abandon()

    def add(self, record: ShardRecord) -> None:
        """Append a record to the shard of its split."""
        writer = self._open.get(record.split)
        if writer is not None and writer.num_bytes + record.num_bytes > self._max_shard_bytes:
            self._close_shard(record.split)
            writer = None
        if writer is None and len(self._open) >= _MAX_OPEN_SHARDS:
            self._close_shard(next(iter(self._open)))
        (writer or self._start(record.split)).add(record)

    def close(self) -> tuple[ShardInfo, ...]:
        """Publish every shard and return them by name."""
        while self._open:
            self._close_shard(min(self._open))
        return tuple(sorted(self._closed, key=lambda shard: shard.name))

    def _close_shard(self, split: str) -> None:
        self._closed.append(self._open.pop(split).close())
        self._number[split] += 1

    def _start(self, split: str) -> ShardWriter:
        writer = ShardWriter(
            self._folder,
            shard_stem(split, self._source, self._partition, self._number.setdefault(split, 0)),
            source=self._source,
            split=split,
            partition=self._partition,
            form=self._form,
        )
        self._open[split] = writer
        return writer


def check_storable(key: str, members: Mapping[str, bytes]) -> None:
    """Raise `RejectSample` if a record does not fit into a plain tar, or `ValueError` for a key that is not one of ours."""
    for name, data in members.items():
        if len(data) > _MAX_MEMBER_BYTES:
            raise RejectSample(
                Reason.TOO_MANY_TOKENS,
                f"{name}: {len(data)} bytes > {_MAX_MEMBER_BYTES}, the most that a tar member can hold; cut the media",
            )
        if len(key) + 1 + len(name) > _MAX_NAME_BYTES or not re.fullmatch(r"[A-Za-z0-9_-]+", key):
            raise ValueError(f"{key}.{name}: expected a key of letters, digits, - and _ that fits {_MAX_NAME_BYTES} bytes")
