"""The index beside a shard: one row a record, enough to plan an epoch and to read any record with one `pread`."""

import hashlib
from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from omniprep.errors import DatasetError
from omniprep.profile import QWEN2_5_OMNI, ModelProfile
from omniprep.storage.folder import Folder
from omniprep.types import EncodedSample

if TYPE_CHECKING:
    import pyarrow as pa

MODALITIES = ("text", "audio", "image", "video", "video_with_sound")
"""What a record may hold. `text` is a record without media; the others are not exclusive."""

_INT64, _INT32, _BOOL, _DOUBLE, _STRING = "int64", "int32", "bool", "double", "string"
COLUMNS: dict[str, str] = {
    "key": _STRING,
    "id": _STRING,
    "source": _STRING,
    "row": _INT64,
    "split": _STRING,
    "offset": _INT64,
    "size": _INT64,
    "member_offsets": "list<int64>",
    "member_sizes": "list<int64>",
    "num_tokens": _INT32,
    "num_supervised": _INT32,
    "num_mel_frames": _INT32,
    "num_patches": _INT32,
    "num_audio_items": _INT32,
    "num_images": _INT32,
    "num_videos": _INT32,
    "audio_s": _DOUBLE,
    "video_s": _DOUBLE,
    "has_audio": _BOOL,
    "has_image": _BOOL,
    "has_video": _BOOL,
    "has_video_with_sound": _BOOL,
    "content_sha256": _STRING,
}
"""Columns and their Arrow types. `offset` and `size` span the record in the tar, headers and padding included;
`member_offsets` are those of the members' data in the tar, in the order of the members' names."""


def describe_sample(sample: EncodedSample, profile: ModelProfile = QWEN2_5_OMNI) -> dict[str, Any]:
    """Return the index columns that follow from the sample alone."""
    tracks = {item.audio_index for item in sample.vision if item.audio_index is not None}
    num_images = sum(item.kind == "image" for item in sample.vision)
    return {
        "key": sample.key,
        "id": sample.id,
        "source": sample.source,
        "row": sample.row,
        "split": sample.split,
        "num_tokens": sample.num_tokens,
        "num_supervised": sum(layout.num_supervised for layout in sample.layouts.values()),
        "num_mel_frames": sum(item.num_mel_frames for item in sample.audio),
        "num_patches": sum(prod(item.grid_thw) for item in sample.vision),
        "num_audio_items": len(sample.audio),
        "num_images": num_images,
        "num_videos": len(sample.vision) - num_images,
        "audio_s": sum(item.num_samples for item in sample.audio) / profile.sample_rate_hz,
        "video_s": sum(
            len(item.frames) / item.timing.sample_fps
            for item in sample.vision
            if item.timing is not None and item.timing.sample_fps > 0
        ),
        "has_audio": len(tracks) < len(sample.audio),
        "has_image": num_images > 0,
        "has_video": num_images < len(sample.vision),
        "has_video_with_sound": bool(tracks),
    }


def content_sha256(members: Mapping[str, bytes]) -> str:
    """Return the hash of what a record trains on: every member but `json`, which also says where it came from."""
    digest = hashlib.sha256()
    for name in sorted(members):
        if name != "json":
            digest.update(f"{name} {len(members[name])}\n".encode())
            digest.update(members[name])
    return digest.hexdigest()


def modalities(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the modalities of an index row.

    >>> modalities({"has_audio": True, "has_image": False, "has_video": True, "has_video_with_sound": False})
    ('audio', 'video')
    """
    return tuple(name for name in MODALITIES[1:] if row[f"has_{name}"]) or MODALITIES[:1]


def index_bytes(rows: Sequence[Mapping[str, Any]], *, members: Sequence[str]) -> bytes:
    """Return the index as a Parquet file: the same rows give the same bytes (with one version of Arrow)."""
    import pyarrow as pa

    fields = [pa.field(name, _arrow_type(kind), nullable=False) for name, kind in COLUMNS.items()]
    schema = pa.schema(fields, metadata={"omniprep.members": " ".join(members)})
    columns = [pa.array([row[name] for row in rows], type=_arrow_type(kind)) for name, kind in COLUMNS.items()]
    return parquet_bytes(pa.Table.from_arrays(columns, schema=schema))


def parquet_bytes(table: "pa.Table") -> bytes:
    """Return a table as a Parquet file, with every setting that shows in the bytes fixed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, version="2.6", compression="zstd", compression_level=3, row_group_size=65_536)
    return bytes(sink.getvalue())


def read_index(folder: Folder, name: str) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Return the rows of an index and the names of the members. Raises `DatasetError` if it is not one."""
    table = read_index_table(folder, name)
    wrong = [column for column, kind in COLUMNS.items() if table.schema.field(column).type != _arrow_type(kind)]
    wrong += [column for column in COLUMNS if table.column(column).null_count]
    if wrong:
        raise DatasetError(f"{name}: not an OmniPrep index: {', '.join(wrong)} hold other values than they should")
    try:
        rows: list[dict[str, Any]] = table.to_pylist()
        return rows, tuple((table.schema.metadata or {})[b"omniprep.members"].decode().split())
    except ValueError as error:  # text that is no UTF-8
        raise DatasetError(f"{name}: a damaged index: {' '.join(str(error).split())}") from None


def read_index_table(folder: Folder, name: str, columns: Sequence[str] | None = None) -> "pa.Table":
    """Return an index as a table, of all columns or of some. Raises `DatasetError` if it is not one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # One row group each of these small files: threads would only cost their start.
        file = pq.ParquetFile(pa.BufferReader(folder.read(name)))
        schema = file.schema_arrow
        members = (schema.metadata or {}).get(b"omniprep.members", b"").decode("utf-8", "replace").split()
        missing = [column for column in COLUMNS if column not in schema.names]
        if missing or not members:
            raise DatasetError(f"{name}: not an OmniPrep index: lacks {', '.join(missing) or 'the member names'}")
        return file.read(columns=list(columns or COLUMNS), use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(f"{name}: not a readable Parquet file: {' '.join(str(error).split())}") from None


def _arrow_type(kind: str) -> "pa.DataType":
    import pyarrow as pa

    return pa.list_(pa.int64()) if kind == "list<int64>" else pa.type_for_alias(kind)
