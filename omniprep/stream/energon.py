"""Megatron-Energon opens a dataset as it is: the files that its `energon prepare` would write, made from our index.

```
OUT/train-chat-00000.tar.idx   byte offsets of the records and of their end, uint64
OUT/.nv-meta/index.sqlite      the same with names and sizes, for access by key
             index.uuid        what changes when the shards do
             split.yaml        shards of each split of the manifest
             dataset.yaml      the sample type: CrudeWebdataset, members as they are
             .info.json        records of each shard; written last: without it Energon sees no dataset
```

Energon reads every tar to know this; the index knows it already. In training a *cooker* makes what is wanted of each record:

```
from megatron.energon import Cooker, DefaultTaskEncoder, Sample, basic_sample_keys, edataclass, stateless
import numpy as np

@edataclass
class Packed(Sample):
    tokens: np.ndarray      # int32 (5, T): input_ids, labels, t, h, w
    mel: np.ndarray         # float16 (128, F)
    frames: bytes           # JPEG files one after another; `json` says where each begins
    facts: dict             # the `json` member

@stateless
def cook(record: dict) -> Packed:
    return Packed(**basic_sample_keys(record), tokens=record["tokens.npy"], mel=record["mel.npy"],
                  frames=record["frames.mjpg"], facts=record["json"])

class TaskEncoder(DefaultTaskEncoder):
    cookers = [Cooker(cook)]
```

What Energon does not take over is the plan: it shuffles, blends and packs by rules of its own.
"""

import json
import sqlite3
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml

from omniprep.errors import DatasetError
from omniprep.shards.index import read_index_table
from omniprep.shards.manifest import Manifest, ShardInfo, read_manifest
from omniprep.storage.folder import Folder, Place, as_folder

if TYPE_CHECKING:
    import pyarrow as pa

ENERGON_FOLDER = ".nv-meta"
ENERGON_SUFFIX = ".idx"
"""What is added to the name of a shard for the file of its offsets."""
_INFO, _UUID, _SPLITS = f"{ENERGON_FOLDER}/.info.json", f"{ENERGON_FOLDER}/index.uuid", f"{ENERGON_FOLDER}/split.yaml"
_DATASET, _DATABASE = f"{ENERGON_FOLDER}/dataset.yaml", f"{ENERGON_FOLDER}/index.sqlite"
_STANDARD_SPLITS = ("train", "val", "test")
"""Energon's tools ask for these; one that is listed without shards is empty, one that is not listed is an error."""
_COLUMNS = ("key", "offset", "size", "member_offsets", "member_sizes")
_PIECE_BYTES = 1 << 22
_TABLES = """
CREATE TABLE samples (
    tar_file_id INTEGER NOT NULL, sample_key TEXT NOT NULL UNIQUE, sample_index INTEGER NOT NULL,
    byte_offset INTEGER, byte_size INTEGER);
CREATE TABLE sample_parts (
    tar_file_id INTEGER, sample_index INTEGER, part_name TEXT, content_byte_offset INTEGER, content_byte_size INTEGER);
"""
_INDEXES = """
CREATE INDEX idx_samples_by_tar_and_idx ON samples(tar_file_id, sample_index);
CREATE INDEX idx_sample_parts_seq ON sample_parts(tar_file_id, sample_index, content_byte_offset);
CREATE INDEX idx_sample_parts_full ON sample_parts(
    tar_file_id, sample_index, part_name, content_byte_offset, content_byte_size);
"""


def export_energon(place: Place) -> None:
    """Write what Megatron-Energon needs beside the shards of a finished dataset; the shards are not read or changed.

    Splits are those of the manifest; records that are in the quarantine are in no split. Run it again when the dataset has
    changed: `energon_is_current` tells. A `dataset.yaml` that is there is kept, for a person may have set something in it.
    Raises `DatasetError` if the dataset or an index cannot be read.
    """
    folder = as_folder(place)
    manifest = read_manifest(folder)
    shards = _shards(manifest)
    if folder.size(_INFO) is not None:  # from here on Energon sees no dataset, rather than one half old and half new
        folder.remove(_INFO)
        folder.sync([_INFO])
    _remove_strays(folder, shards)
    with tempfile.TemporaryDirectory() as scratch:
        database = Path(scratch) / "index.sqlite"
        _write_indexes(folder, shards, manifest.members, database)
        _copy(database, folder, _DATABASE)
    folder.write(_UUID, _uuid(manifest).encode())
    folder.write(_SPLITS, yaml.safe_dump({"split_parts": _splits(shards), "exclude": []}, sort_keys=False).encode())
    if folder.size(_DATASET) is None:
        folder.write(_DATASET, b"__module__: megatron.energon\n__class__: CrudeWebdataset\n")
    counts = {shard.name: shard.totals.num_records for shard in shards}
    folder.sync([*(shard.name for shard in shards), _DATABASE])
    folder.write(_INFO, (json.dumps({"shard_counts": counts}, indent=2) + "\n").encode())
    folder.sync([_INFO])


def energon_is_current(place: Place) -> bool | None:
    """Return whether Energon's files describe the dataset as it is now, or None if there are none."""
    folder = as_folder(place)
    try:
        folder.read(_INFO)
        return folder.read(_UUID).decode() == _uuid(read_manifest(folder))
    except FileNotFoundError:
        return None


def _shards(manifest: Manifest) -> list[ShardInfo]:
    """Return the shards that hold a record: Energon takes none that do not."""
    return [shard for shard in manifest.shards if shard.totals.num_records]


def _uuid(manifest: Manifest) -> str:
    """Return a UUID that follows from what is in the shards: a second export of the same dataset gives the same."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, "".join(f"{shard.name} {shard.sha256}\n" for shard in manifest.shards)))


def _splits(shards: Iterable[ShardInfo]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {split: [] for split in _STANDARD_SPLITS}
    for shard in shards:
        names.setdefault(shard.split, []).append(shard.name)
    return names


def _remove_strays(folder: Folder, shards: Iterable[ShardInfo]) -> None:
    """Remove the offsets of shards that are no more."""
    kept = {f"{shard.name}{ENERGON_SUFFIX}" for shard in shards}
    for name in folder.files():
        if name.endswith(f".tar{ENERGON_SUFFIX}") and name not in kept:
            folder.remove(name)


def _write_indexes(folder: Folder, shards: Iterable[ShardInfo], members: tuple[str, ...], database: Path) -> None:
    """Write the offsets of each shard, and all of them together into a database."""
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + _TABLES)
        connection.execute("BEGIN")
        for number, shard in enumerate(shards):
            table = read_index_table(folder, shard.index_name, _COLUMNS)
            if table.num_rows != shard.totals.num_records:
                told = f"expected {shard.totals.num_records} records, as the manifest says, got {table.num_rows}"
                raise DatasetError(f"{folder.place}/{shard.index_name}: {told}; `omniprep verify {folder.place}` says more")
            folder.write(f"{shard.name}{ENERGON_SUFFIX}", _offsets(table))
            try:
                connection.executemany("INSERT INTO samples VALUES (?, ?, ?, ?, ?)", _sample_rows(number, table))
                connection.executemany("INSERT INTO sample_parts VALUES (?, ?, ?, ?, ?)", _part_rows(number, table, members))
            except (sqlite3.IntegrityError, ValueError) as error:
                twice = isinstance(error, sqlite3.IntegrityError)
                told = "a key of it stands in another shard too" if twice else f"expected the members {', '.join(members)}"
                raise DatasetError(
                    f"{folder.place}/{shard.index_name}: {told}; `omniprep verify {folder.place}` says more"
                ) from None
        connection.execute("COMMIT")
        connection.executescript(_INDEXES)


def _offsets(table: "pa.Table") -> bytes:
    """Return where each record begins, and where the last one ends."""
    starts = table["offset"].to_pylist()
    return np.array([*starts, starts[-1] + table["size"][-1].as_py()], "<u8").tobytes()


def _sample_rows(number: int, table: "pa.Table") -> Iterator[tuple[int, str, int, int, int]]:
    columns = (table[name].to_pylist() for name in ("key", "offset", "size"))
    return ((number, key, row, offset, size) for row, (key, offset, size) in enumerate(zip(*columns, strict=True)))


def _part_rows(number: int, table: "pa.Table", members: tuple[str, ...]) -> Iterator[tuple[int, int, str, int, int]]:
    columns = (table[name].to_pylist() for name in ("member_offsets", "member_sizes"))
    for row, (offsets, sizes) in enumerate(zip(*columns, strict=True)):
        for name, offset, size in zip(members, offsets, sizes, strict=True):
            yield number, row, name, offset, size


def _copy(source: Path, folder: Folder, name: str) -> None:
    with source.open("rb") as file, folder.create(name) as target:
        while piece := file.read(_PIECE_BYTES):
            target.write(piece)
        target.publish()
