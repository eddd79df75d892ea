"""Sources in an object store: only what is needed is fetched, and what fails on the way is fetched again."""

import gzip
import io
import json
import random
import tarfile
import zipfile
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from omniprep.errors import ConfigError
from omniprep.sources.jsonl import JsonlSource
from omniprep.sources.parquet import ParquetSource
from omniprep.sources.partitions import Row
from omniprep.sources.webdataset import WebDatasetSource
from omniprep.storage import remote
from omniprep.storage.folder import StorageError
from tests.s3_server import S3, Request, s3

__all__ = ["s3"]

NUM_ROWS = 3000
RANDOM = random.Random(0)
ROWS = [{"n": k, "text": RANDOM.randbytes(500).hex()} for k in range(NUM_ROWS)]  # 3 MB, half of it when compressed
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def is_get(request: Request) -> bool:
    return request.method == "GET" and bool(request.range)


def parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), file, row_group_size=500, compression="none", use_dictionary=False)
    return file.getvalue()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for row in ROWS:
            data = json.dumps(row).encode()
            info = tarfile.TarInfo(f"{row['n']}.json")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


FILES: dict[str, tuple[Any, Callable[[], bytes]]] = {
    "a.jsonl": (JsonlSource, lambda: LINES),
    "a.jsonl.gz": (JsonlSource, lambda: gzip.compress(LINES)),
    "a.jsonl.zst": (JsonlSource, lambda: zstandard.ZstdCompressor().compress(LINES)),
    "a.json": (JsonlSource, lambda: json.dumps(ROWS).encode()),
    "a.parquet": (ParquetSource, parquet),
    "a.tar": (WebDatasetSource, tar),
    "a.tar.gz": (WebDatasetSource, lambda: gzip.compress(tar())),
}


def source_of(s3: S3, name: str) -> tuple[Any, int]:
    kind, content = FILES[name]
    data = content()
    s3.put(f"data/{name}", data)
    return kind(name="s", path=f"{s3.url}/data/{name}"), len(data)


def num_bytes_read(s3: S3) -> int:
    return sum(request.num_bytes_out for request in s3.seen("GET"))


@pytest.mark.parametrize("name", FILES)
def test_every_container_is_read_from_s3_as_from_a_disk(s3: S3, name: str) -> None:
    source, _ = source_of(s3, name)
    parts = source.partitions(rows_per_partition=1300)
    assert len(parts) == 3
    rows: list[Row] = [row for part in parts for row in source.read(part)]
    assert [row.value for row in rows] == ROWS
    assert rows[0].base == f"{s3.url}/data"


@pytest.mark.parametrize("name", ["a.jsonl", "a.tar", "a.parquet"])
def test_a_partition_fetches_little_more_than_its_rows(s3: S3, name: str) -> None:
    source, num_bytes = source_of(s3, name)
    parts = source.partitions(rows_per_partition=500)
    s3.requests.clear()
    rows = list(source.read(parts[2]))
    assert [row.value for row in rows] == ROWS[1000:1500]
    assert num_bytes / 6 < num_bytes_read(s3) < num_bytes / 6 + 2.5 * remote.FIRST_AHEAD_BYTES


def test_planning_parquet_fetches_its_footer_and_not_its_rows(s3: S3) -> None:
    source, num_bytes = source_of(s3, "a.parquet")
    source.partitions(rows_per_partition=500)
    assert num_bytes_read(s3) < 70_000 < num_bytes / 40
    assert len(s3.requests) <= 5


def test_planning_lines_reads_each_byte_once(s3: S3) -> None:
    source, num_bytes = source_of(s3, "a.jsonl")
    source.partitions(rows_per_partition=500)
    assert num_bytes <= num_bytes_read(s3) <= num_bytes + remote.FIRST_AHEAD_BYTES  # and once more its first ones


@pytest.mark.parametrize("name", FILES)
def test_a_read_goes_on_at_the_byte_at_which_it_broke(s3: S3, name: str) -> None:
    source, _ = source_of(s3, name)
    s3.fail(is_get, "reset", times=2)
    s3.fail(is_get, status=503, code="SlowDown", skip=1, times=2)
    rows = [row.value for part in source.partitions(rows_per_partition=1300) for row in source.read(part)]
    assert rows == ROWS
    assert all(fault.times == 0 for fault in s3.faults)


def test_a_store_that_stays_away_is_no_damage_to_the_file(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of a gzip stream nor of a row group, of which the rest would be given up."""
    monkeypatch.setattr(remote, "with_retries", lambda call, **options: with_two(call, **{**options, "attempts": 2}))
    with_two = remote_with_retries
    for name in ("a.jsonl.gz", "a.parquet", "a.tar.gz"):
        source, _ = source_of(s3, name)
        (part,) = source.partitions(rows_per_partition=NUM_ROWS)
        fault = s3.fail(is_get, status=500, times=99, skip=1)
        with pytest.raises(StorageError, match=rf"data/{name}: .*, 2 times in a row"):
            list(source.read(part))
        fault.times = 0


remote_with_retries = remote.with_retries


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_access_lost_on_the_way_is_no_damage_either(s3: S3, name: str) -> None:
    source, _ = source_of(s3, name)
    (part,) = source.partitions(rows_per_partition=NUM_ROWS)
    s3.fail(is_get, status=403, code="ExpiredToken", times=99, skip=1)
    with pytest.raises((ConfigError, StorageError), match="check the credentials and what they may do there"):
        list(source.read(part))


def test_a_glob_asks_nothing_of_each_file_and_is_sorted(s3: S3) -> None:
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", "other.txt"):
        s3.put(f"data/{name}", LINES[:100].replace(b"\n", b"") + b'"}\n')
    source = JsonlSource(name="s", path=f"{s3.url}/data/*.jsonl")
    (part,) = source.partitions(rows_per_partition=10)
    assert [piece.name for piece in part.slices] == ["a.jsonl", "b.jsonl"]
    to_plan = [request.key.removeprefix(f"{s3.bucket}/data/") for request in s3.requests if "data/" in request.key]
    assert to_plan == ["a.jsonl", "a.jsonl", "b.jsonl", "b.jsonl"]  # a HEAD and a range, to read each
    deep = JsonlSource(name="s", path=f"{s3.url}/data/**/*.jsonl")
    assert [piece.name for part in deep.partitions(rows_per_partition=10) for piece in part.slices] == [
        "a.jsonl",
        "b.jsonl",
        "deep/c.jsonl",
    ]


def test_a_named_file_that_a_listing_does_not_show_yet_is_read(s3: S3) -> None:
    source, _ = source_of(s3, "a.jsonl")
    s3.unlisted.add("data/a.jsonl")
    (part,) = source.partitions(rows_per_partition=NUM_ROWS)
    assert len(list(source.read(part))) == NUM_ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.tar"])
def test_a_file_that_changed_or_went_away_after_planning_stops_the_run(s3: S3, name: str) -> None:
    source, num_bytes = source_of(s3, name)
    (part, *_) = source.partitions(rows_per_partition=NUM_ROWS)
    s3.put(f"data/{name}", FILES[name][1]() + b"x")
    with pytest.raises(ConfigError, match=f"had {num_bytes} bytes when planned, has {num_bytes + 1} now; run again"):
        list(source.read(part))
    s3.client.delete_object(Bucket=s3.bucket, Key=f"data/{name}")
    with pytest.raises(ConfigError, match=r"a\.\w+: cannot be read any more: no such file$"):
        list(source.read(part))


def test_what_is_not_there_or_not_allowed_is_one_line(s3: S3) -> None:
    for path in (f"{s3.url}/none.jsonl", f"{s3.url}/none/*.jsonl", "s3://no-such-bucket/a.jsonl", "s3://no-such-bucket/*.jsonl"):
        with pytest.raises(ConfigError, match="no file matches"):
            JsonlSource(name="s", path=path).partitions(rows_per_partition=1)
    s3.fail(lambda request: True, status=403, code="AccessDenied", times=99)
    for path in (f"{s3.url}/a.jsonl", f"{s3.url}/*.jsonl"):
        s3.requests.clear()
        with pytest.raises(ConfigError, match=r"cannot be listed: .*; check the credentials and what they may do there$"):
            JsonlSource(name="s", path=path).partitions(rows_per_partition=1)
        assert len(s3.requests) == 1


def test_plain_http_is_read_by_ranges_too(s3: S3) -> None:
    s3.put("data/a.jsonl", LINES)
    source = JsonlSource(name="s", path=f"{s3.endpoint}/{s3.bucket}/data/a.jsonl")
    parts = source.partitions(rows_per_partition=500)
    s3.requests.clear()
    assert [row.value for row in source.read(parts[2])] == ROWS[1000:1500]
    assert num_bytes_read(s3) < len(LINES) / 2


def test_a_file_in_a_zip_in_a_bucket_is_read(s3: S3) -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("inner/a.jsonl", b"".join(LINES.splitlines(keepends=True)[:100]))
    s3.put("a.zip", data.getvalue())
    source = JsonlSource(name="s", path=f"zip://inner/*.jsonl::{s3.url}/a.zip")
    rows = [row.value for part in source.partitions(rows_per_partition=2000) for row in source.read(part)]
    assert rows == ROWS[:100]
