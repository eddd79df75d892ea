"""What a plan needs to know of a dataset: how long each sample is, as flat columns over all shards of a split.

Three columns of every index are read, nothing of the shards: a million samples in 350 shards take about 0.3 s of CPU time
and 16 MB, little enough to do it again at every start instead of keeping a copy that might be of another dataset.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from omniprep.errors import ConfigError, DatasetError
from omniprep.shards.index import COLUMNS, read_index_table
from omniprep.shards.manifest import Manifest, ShardInfo, read_manifest
from omniprep.shards.members import NPY_HEADER_BYTES, NUM_TOKEN_ROWS, SEQUENCES, MemberFormat, SampleKind, sequence_member
from omniprep.storage.folder import Folder, Place, as_folder
from omniprep.types import Int32Array, Int64Array

if TYPE_CHECKING:
    import pyarrow as pa

_LENGTHS = ("num_tokens", "num_mel_frames", "num_patches")
_THREADS = 8
"""Indices read at a time: an object store takes tens of milliseconds to answer."""
_TOKEN_BYTES = NUM_TOKEN_ROWS * 4
"""Of one token in a member of tokens: rows of int32."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Catalog:
    """The lengths of all N samples of one split, in the order of the manifest. It pickles; arrays are not to be written to."""

    place: str
    """The dataset's folder or URL."""
    split: str
    kind: SampleKind
    member_format: MemberFormat
    shards: tuple[ShardInfo, ...]
    """Those of the split, in the order of the manifest."""
    starts: Int64Array
    """(len(shards) + 1,) number of the first sample of each shard; the last is N."""
    num_tokens: Int32Array
    """(N,) tokens of all sequences of the sample together (a preference: chosen and rejected)."""
    longest: Int32Array
    """(N,) tokens of the longest sequence of the sample: the same as `num_tokens` but for preferences."""
    num_mel_frames: Int32Array
    """(N,) as the model sees them: a preference's media count twice."""
    num_patches: Int32Array
    """(N,) as the model sees them."""
    digest: str
    """sha256 of what a plan depends on: the split, the shards' digests and the columns."""

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, sample: int) -> tuple[int, int]:
        """Return the shard that a sample is in and its record there."""
        if not 0 <= sample < len(self):
            raise IndexError(f"{self.place}: sample {sample}: there are {len(self)}")
        shard = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return shard, sample - int(self.starts[shard])

    def describe(self, sample: int) -> str:
        """Return where a sample is, for a message: `build/sft: train-chat-00000.tar, record 17`."""
        shard, record = self.locate(sample)
        return f"{self.place}: {self.shards[shard].name}, record {record}"

    def key_of(self, sample: int) -> str:
        """Return the key of a sample; the index of its shard is read."""
        shard, record = self.locate(sample)
        keys = read_index_table(as_folder(self.place), self.shards[shard].index_name, ("key",))["key"]
        return str(keys[record].as_py())


def read_catalog(place: Place, *, split: str = "train") -> Catalog:
    """Return the catalog of a finished dataset's split.

    Raises `ConfigError` if there is no such split, `DatasetError` if the dataset is unfinished or an index is damaged.
    """
    folder = as_folder(place)
    manifest = read_manifest(folder)
    shards = tuple(shard for shard in manifest.shards if shard.split == split and shard.totals.num_records)
    if not shards:
        known = sorted({shard.split for shard in manifest.shards if shard.totals.num_records})
        raise ConfigError(f"{folder.place}: no samples in split {split!r}; it has {', '.join(map(repr, known)) or 'none at all'}")
    columns = _read_columns(folder, manifest, shards)
    digest = _digest(split, shards, columns)
    starts = np.cumsum([0, *(shard.totals.num_records for shard in shards)], dtype=np.int64)
    return Catalog(
        place=folder.place,
        split=split,
        kind=manifest.kind,
        member_format=manifest.member_format,
        shards=shards,
        starts=starts,
        digest=digest,
        **{"longest": columns["num_tokens"], **columns},
    )


def _read_columns(folder: Folder, manifest: Manifest, shards: Sequence[ShardInfo]) -> dict[str, Int32Array]:
    """Return the columns of all shards; `longest` only where it is not `num_tokens`."""
    form = manifest.member_format
    with ThreadPoolExecutor(min(_THREADS, len(shards))) as pool:
        parts = list(pool.map(lambda shard: _read_shard_columns(folder, shard, form), shards))
    columns: dict[str, Int32Array] = {name: np.concatenate([part[name] for part in parts]) for name in _LENGTHS}
    if form.kind == "sequence":
        return columns
    for name in ("num_mel_frames", "num_patches"):
        columns[name] *= len(SEQUENCES[form.kind])
    return {**columns, "longest": np.concatenate([part["longest"] for part in parts])}


def _read_shard_columns(folder: Folder, shard: ShardInfo, form: MemberFormat) -> dict[str, Int32Array]:
    sizes = () if form.kind == "sequence" else ("member_sizes",)
    table = read_index_table(folder, shard.index_name, (*_LENGTHS, *sizes))
    if table.num_rows != shard.totals.num_records:
        raise DatasetError(
            f"{folder.place}/{shard.index_name}: expected {shard.totals.num_records} rows as the manifest says, "
            f"got {table.num_rows}: it is not the index that was built with the shard"
        )
    columns = {name: _values(table, name, shard) for name in _LENGTHS}
    if min(int(column.min()) for column in columns.values()) < 0 or not columns["num_tokens"].all():
        raise DatasetError(f"{folder.place}/{shard.index_name}: a damaged index: a length is negative, or a sample has no tokens")
    if sizes:
        columns["longest"] = _longest(table, columns["num_tokens"], form, shard)
    return columns


def _values(table: "pa.Table", name: str, shard: ShardInfo) -> Int32Array:
    """Return a column as an array. (Through DLPack: `to_numpy` of Arrow imports pandas, which takes as long as all the rest.)"""
    column = table[name]
    if str(column.type) != COLUMNS[name] or column.null_count:
        raise DatasetError(f"{shard.index_name}: not an OmniPrep index: {name} holds other values than it should")
    values: Int32Array = np.concatenate([np.from_dlpack(chunk) for chunk in column.chunks])
    return values


def _longest(table: "pa.Table", num_tokens: Int32Array, form: MemberFormat, shard: ShardInfo) -> Int32Array:
    """Return the tokens of the longest sequence of each sample: the index states their sum, and how many bytes each takes."""
    sizes: Any = table["member_sizes"].combine_chunks()
    flat = np.from_dlpack(sizes.flatten())
    if len(flat) != len(num_tokens) * len(form.names):
        raise DatasetError(f"{shard.index_name}: not an OmniPrep index: member_sizes holds other values than it should")
    members = [form.names.index(sequence_member(name)) for name in SEQUENCES[form.kind]]
    lengths = (flat.reshape(-1, len(form.names))[:, members] - NPY_HEADER_BYTES) // _TOKEN_BYTES
    if not np.array_equal(lengths.sum(1), num_tokens):
        raise DatasetError(f"{shard.index_name}: a damaged index: num_tokens disagrees with the sizes of the members")
    longest: Int32Array = lengths.max(1).astype(np.int32)
    return longest


def _digest(split: str, shards: Sequence[ShardInfo], columns: dict[str, Int32Array]) -> str:
    digest = hashlib.sha256(split.encode())
    for shard in shards:
        digest.update(f"\n{shard.name} {shard.sha256} {shard.totals.num_records}".encode())
    for name, column in sorted(columns.items()):
        # The columns as well: a rank whose copy of an index is damaged must not follow another plan unseen.
        digest.update(f"\n{name} ".encode())
        digest.update(np.ascontiguousarray(column, "<i4").data)
    return digest.hexdigest()
