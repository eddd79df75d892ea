"""`omniprep encode`: the rows of a file to `.npz` files with the model's own argument names, for a look or a diff."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np

from omniprep.encode.model_inputs import model_inputs
from omniprep.encode.thinker import ThinkerEncoder
from omniprep.errors import ConfigError, RejectSample
from omniprep.records import Record
from omniprep.sources.jsonl import JsonlSource
from omniprep.sources.media_store import MediaStore
from omniprep.sources.partitions import Row
from omniprep.storage.local import LocalFolder
from omniprep.types import EncodedSample


@dataclass(frozen=True, kw_only=True)
class EncodedRow:
    """What became of one row: the files written, or why there are none."""

    place: str
    key: str
    files: tuple[Path, ...] = ()
    num_tokens: int = 0
    error: RejectSample | None = None


def encode_file(
    source: JsonlSource, out: Path, *, encoder: ThinkerEncoder, store: MediaStore, add_generation_prompt: bool = False
) -> Iterator[EncodedRow]:
    """Write one `KEY.npz` a row into `out` (a preference: `KEY.chosen.npz` and `KEY.rejected.npz`) and yield what was done.

    KEY is the record's id, made safe for a file name, or `row-N`. A row that cannot be used is yielded with its reason
    and the rest goes on.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be made: {error.strerror}") from None
    names: Counter[str] = Counter()
    for partition in source.partitions(rows_per_partition=1000):
        for row in source.read(partition):
            key = _unique(_file_name(_id_of(row) or f"row-{row.index}"), names)
            try:
                record = _record_of(row, source)
                resolve = partial(store.resolve, base=row.base)
                sample = encoder.encode(record, key=key, resolve=resolve, add_generation_prompt=add_generation_prompt)
            except RejectSample as error:
                yield EncodedRow(place=row.place, key=key, error=error)
                continue
            yield EncodedRow(place=row.place, key=key, files=tuple(_write(sample, out)), num_tokens=sample.num_tokens)


def _record_of(row: Row, source: JsonlSource) -> Record:
    if row.error is not None:
        raise row.error
    return source.to_record(row.value)


def _write(sample: EncodedSample, out: Path) -> Iterator[Path]:
    for name in sample.layouts:
        path = out / (f"{sample.key}.npz" if name == "tokens" else f"{sample.key}.{name}.npz")
        data = BytesIO()
        np.savez(data, **model_inputs(sample, name))  # type: ignore[arg-type]
        LocalFolder(str(out)).write(path.name, data.getvalue())
        yield path


def _id_of(row: Row) -> str | None:
    value = row.value.get("id") if isinstance(row.value, dict) else None
    return str(value) if isinstance(value, (str, int)) and str(value) else None


def _file_name(text: str) -> str:
    """Return `text` with everything that a file name should not hold replaced.

    >>> _file_name("a/b c.jpg")
    'a_b_c.jpg'
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).lstrip(".")[:150] or "_"


def _unique(name: str, names: Counter[str]) -> str:
    names[name] += 1
    return name if names[name] == 1 else f"{name}~{names[name]}"


def as_values(row: EncodedRow) -> dict[str, object]:
    """Return plain values for a script."""
    reason = {"reason": row.error.reason, "detail": row.error.detail} if row.error is not None else {}
    files = [str(file) for file in row.files]
    return {"place": row.place, "key": row.key, "files": files, "num_tokens": row.num_tokens, **reason}
