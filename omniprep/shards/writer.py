"""Shards: WebDataset tars whose bytes depend on nothing but the records in them.

Headers are plain ustar with mtime 0 and owner 0, members sorted, one record after another. A shard appears under its
name only when it is complete; its index appears after it.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from omniprep.errors import Reason, RejectSample
from omniprep.profile import QWEN2_5_OMNI, ModelProfile
from omniprep.shards.files import partial_path, publish, write_file
from omniprep.shards.index import content_sha256, describe_sample, index_bytes
from omniprep.shards.manifest import ShardInfo, Totals, add_up, totals_by_modality, totals_of
from omniprep.shards.members import MemberFormat, to_members
from omniprep.types import EncodedSample

BLOCK_BYTES = 512
_MAX_MEMBER_BYTES = 8**11 - 1
"""The largest size that a ustar header can state (8 GiB)."""
_MAX_NAME_BYTES = 100
_BUFFER_BYTES = 1 << 20
_MAX_OPEN_SHARDS = 32
"""Records name their splits; one each must not use up the process's file descriptors."""
_SMALL_BYTES = 1 << 18
"""Below this, one copy of a record is cheaper than hashing and writing it in pieces."""
_TAIL = b"0".ljust(101, b"\0") + b"ustar\x0000".ljust(255, b"\0")
"""A header after its checksum: a regular file, no link, no owner's name."""
_TAIL_SUM = sum(_TAIL) + 8 * ord(" ")  # a checksum counts its own field as spaces


def tar_header(name: str, num_bytes: int) -> bytes:
    """Return the 512-byte ustar header of a regular file: mode 644, owner 0, mtime 0.

    The same bytes as `tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT)`, at a tenth of the cost.
    """
    head = name.encode("ascii").ljust(100, b"\0") + b"0000644\x000000000\x000000000\x00%011o\x0000000000000\x00" % num_bytes
    checksum = sum(head) + _TAIL_SUM
    return head + b"%06o\x00 " % checksum + _TAIL


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


def shard_stem(split: str, partition: int, number: int = 0) -> str:
    """Return the name of a partition's shard without `.tar`; `number` counts the shards it was cut into.

    >>> shard_stem("train", 3), shard_stem("train", 3, 2)
    ('train-00003', 'train-00003-02')
    """
    return f"{split}-{partition:05d}" + (f"-{number:02d}" if number else "")


class ShardWriter:
    """Writes one shard and its index. Nothing has a final name until `close`; `abandon` leaves nothing."""

    def __init__(
        self,
        folder: Path,
        stem: str,
        *,
        source: str,
        split: str,
        partition: int,
        form: MemberFormat,
        profile: ModelProfile = QWEN2_5_OMNI,
    ) -> None:
        self.path = folder / f"{stem}.tar"
        self._source, self._split, self._partition = source, split, partition
        self._form, self._profile = form, profile
        self._partial = partial_path(self.path)
        self._file: BinaryIO = self._partial.open("wb", buffering=_BUFFER_BYTES)
        self._digest = hashlib.sha256()
        self._rows: list[dict[str, Any]] = []
        self.num_bytes = 0

    @property
    def num_records(self) -> int:
        """Return the records written so far."""
        return len(self._rows)

    def add(self, sample: EncodedSample, members: Mapping[str, bytes]) -> None:
        """Append one record, whose members `to_members` made."""
        start = self.num_bytes
        pieces: list[bytes] = []
        offsets: list[int] = []
        at = start
        for name, data in members.items():
            padding = b"\0" * (-len(data) % BLOCK_BYTES)
            pieces += (tar_header(f"{sample.key}.{name}", len(data)), data, padding)
            offsets.append(at + BLOCK_BYTES)
            at += BLOCK_BYTES + len(data) + len(padding)
        self._write(pieces)
        self._rows.append(
            {
                **describe_sample(sample, self._profile),
                "offset": start,
                "size": at - start,
                "member_offsets": offsets,
                "member_sizes": [len(data) for data in members.values()],
                "content_sha256": content_sha256(members),
            }
        )

    def close(self) -> ShardInfo:
        """Finish the tar, give it its name, then write its index; return what the manifest says of both."""
        self._write([b"\0" * (2 * BLOCK_BYTES)])
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        publish(self._partial, self.path)
        index_sha256 = write_file(self.path.with_suffix(".parquet"), index_bytes(self._rows, members=self._form.names))
        return ShardInfo(
            name=self.path.name,
            split=self._split,
            source=self._source,
            partition=self._partition,
            num_bytes=self.num_bytes,
            sha256=self._digest.hexdigest(),
            index_sha256=index_sha256,
            totals=add_up(("", totals_of(row)) for row in self._rows).get("", Totals()),
            modalities=totals_by_modality(self._rows),
        )

    def abandon(self) -> None:
        """Close without publishing and remove what was written."""
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def _write(self, pieces: list[bytes]) -> None:
        if sum(map(len, pieces)) < _SMALL_BYTES:
            pieces = [b"".join(pieces)]
        self._file.writelines(pieces)
        for piece in pieces:
            self._digest.update(piece)
            self.num_bytes += len(piece)


class PartitionWriter:
    """Writes the records of one partition: a shard for each split, and more when one would grow too large.

    As a context manager it leaves nothing behind when an exception passes through it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        source: str,
        partition: int,
        form: MemberFormat,
        max_shard_bytes: int,
        profile: ModelProfile = QWEN2_5_OMNI,
    ) -> None:
        self._folder, self._source, self._partition = folder, source, partition
        self._form, self._max_shard_bytes, self._profile = form, max_shard_bytes, profile
        self._open: dict[str, ShardWriter] = {}
        self._number: dict[str, int] = {}
        self._closed: list[ShardInfo] = []

    def __enter__(self) -> "PartitionWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for writer in self._open.values():
            writer.abandon()

    def add(self, sample: EncodedSample) -> None:
        """Append a sample to the shard of its split. Raises `RejectSample` if it cannot be stored."""
        members = to_members(sample, self._form, profile=self._profile)
        check_storable(sample.key, members)
        size = sum(2 * BLOCK_BYTES + len(data) for data in members.values())
        writer = self._open.get(sample.split)
        if writer is not None and writer.num_bytes + size > self._max_shard_bytes:
            self._close_shard(sample.split)
            writer = None
        if writer is None and len(self._open) >= _MAX_OPEN_SHARDS:
            self._close_shard(next(iter(self._open)))
        (writer or self._start(sample.split)).add(sample, members)

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
            shard_stem(split, self._partition, self._number.setdefault(split, 0)),
            source=self._source,
            split=split,
            partition=self._partition,
            form=self._form,
            profile=self._profile,
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
