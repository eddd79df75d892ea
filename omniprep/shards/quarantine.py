"""The quarantine: every record that was rejected, whole, with the reason. Nothing that came in is lost."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from omniprep.errors import DatasetError
from omniprep.shards.index import parquet_bytes
from omniprep.shards.manifest import QuarantineInfo
from omniprep.storage.folder import Folder
from omniprep.types import Rejection

QUARANTINE_FOLDER = "quarantine"
BLOBS_FOLDER = "_blobs"
"""Arrow, pandas and `datasets` skip names that start with `_`, and so open `quarantine/` as the table that it is."""
COLUMNS = {
    "key": "string",
    "source": "string",
    "row": "int64",
    "place": "string",
    "stage": "string",
    "reason": "string",
    "detail": "string",
    "retryable": "bool",
    "probe": "string",
    "record": "binary",
    "blobs": "list<string>",
}
"""Columns and their Arrow types. `record` is the row's JSON text (or the line as it came, if it is not JSON), in which
media bytes are `{"sha256", "num_bytes"}`; `blobs` names those media under `quarantine/_blobs/`. `probe` is a JSON list of
the media files that were looked for before the record failed: `{"name", "num_bytes", "sha256"}`, -1 bytes for a missing one."""


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A rejection with the media that came inside its row, by sha256."""

    rejection: Rejection
    blobs: tuple[str, ...] = ()


def store_blobs(folder: Folder, blobs: Mapping[str, bytes]) -> tuple[str, ...]:
    """Write a row's media once under their sha256 and return the names, sorted."""
    for digest, data in blobs.items():
        if folder.size(blob_name(digest)) != len(data):
            folder.write(blob_name(digest), data)
    return tuple(sorted(blobs))


def blob_name(digest: str) -> str:
    """Return the name of a quarantined medium."""
    return f"{QUARANTINE_FOLDER}/{BLOBS_FOLDER}/{digest}"


def write_quarantine(
    folder: Folder, stem: str, *, partition: int, source: str, rejected: Sequence[Rejected]
) -> QuarantineInfo | None:
    """Write the rejected records of one partition, if any, as `STEM.parquet`; return what the manifest says of them."""
    if not rejected:
        return None
    import pyarrow as pa

    rows = [{**_as_row(item.rejection), "blobs": list(item.blobs)} for item in rejected]
    fields = [pa.field(name, _arrow_type(kind), nullable=False) for name, kind in COLUMNS.items()]
    table = pa.Table.from_pylist(rows, schema=pa.schema(fields))
    name = f"{stem}.parquet"
    return QuarantineInfo(
        name=name,
        source=source,
        partition=partition,
        num_records=len(rows),
        sha256=folder.write(f"{QUARANTINE_FOLDER}/{name}", parquet_bytes(table)),
        blobs=tuple(sorted({blob for item in rejected for blob in item.blobs})),
    )


def read_quarantine(folder: Folder, name: str) -> Iterator[Rejected]:
    """Yield the rejected records of the quarantine file `name`. Raises `DatasetError` if it is not readable."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        data = pa.BufferReader(folder.read(f"{QUARANTINE_FOLDER}/{name}"))
        rows = pq.ParquetFile(data).read(columns=list(COLUMNS), use_threads=False).to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: text that is no UTF-8
        raise DatasetError(f"{name}: not a readable quarantine file: {' '.join(str(error).split())}") from None
    missing = [column for column in COLUMNS if any(row.get(column) is None for row in rows)]
    if missing:
        raise DatasetError(f"{name}: not a quarantine file: lacks {', '.join(missing)}")
    for row in rows:
        blobs = tuple(row.pop("blobs"))
        yield Rejected(rejection=Rejection(**row), blobs=blobs)


def _as_row(rejection: Rejection) -> dict[str, object]:
    return {name: _storable(getattr(rejection, name)) for name in COLUMNS if name != "blobs"}


def _storable(value: object) -> object:
    """Return text that UTF-8 can hold: a reason may quote a row that has half a surrogate pair."""
    return value.encode("utf-8", "backslashreplace").decode("utf-8") if isinstance(value, str) else value


def _arrow_type(kind: str) -> object:
    import pyarrow as pa

    return pa.list_(pa.string()) if kind == "list<string>" else pa.type_for_alias(kind)
