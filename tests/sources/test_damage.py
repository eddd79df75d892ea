"""Of a damaged file everything that can be read is used, and planning and reading agree on what that is."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from omniprep.errors import ConfigError, Reason
from omniprep.sources.jsonl import JsonlSource
from omniprep.sources.parquet import ParquetSource
from omniprep.sources.partitions import Row

RANDOM = random.Random(0)
LINES = [json.dumps({"n": k, "text": RANDOM.randbytes(60).hex()}) for k in range(2000)]


def rows_of(source: Any, rows_per_partition: int) -> list[Row]:
    partitions = source.partitions(rows_per_partition=rows_per_partition)
    rows = [row for part in partitions for row in source.read(part)]
    assert len(rows) == sum(part.num_rows for part in partitions)
    return rows


def good_then_damage(rows: list[Row]) -> tuple[list[int], str]:
    *good, last = rows
    assert [row.error for row in good] == [None] * len(good)
    assert last.error is not None
    assert last.error.reason == Reason.SCHEMA_INVALID
    return [row.value["n"] for row in good], last.error.detail


def compressed(kind: str, text: bytes) -> bytes:
    if kind == "gz":
        return gzip.compress(text)
    half, compress = len(text) // 2, zstandard.ZstdCompressor().compress
    return compress(text[:half]) + compress(text[half:])


@pytest.mark.parametrize("rows_per_partition", [90, 700, 5000])
@pytest.mark.parametrize(
    ("kind", "detail"),
    [("gz", "the gzip stream ends early; what follows is lost"), ("zst", "the zstd stream ends early; what follows is lost")],
)
@pytest.mark.parametrize("is_array", [False, True], ids=["lines", "array"])
def test_a_compressed_file_cut_in_the_middle_gives_the_rows_before_and_one_more(
    tmp_path: Path, kind: str, detail: str, is_array: bool, rows_per_partition: int
) -> None:
    text = ("[" + ",\n".join(LINES) + "]" if is_array else "\n".join(LINES) + "\n").encode()
    data = compressed(kind, text)
    path = tmp_path / ("a.json." if is_array else "a.jsonl.")
    path = path.with_name(path.name + kind)
    path.write_bytes(data[: len(data) * 4 // 5])
    numbers, told = good_then_damage(rows_of(JsonlSource(name="s", path=str(path)), rows_per_partition))
    assert told == detail
    assert numbers == list(range(len(numbers)))
    assert len(LINES) // 2 - 1 <= len(numbers) <= len(LINES) * 4 // 5 + 1


@pytest.mark.parametrize("where", [0.3, 0.7])
def test_a_gzip_stream_damaged_in_the_middle_gives_the_rows_before_and_one_more(tmp_path: Path, where: float) -> None:
    data = bytearray(gzip.compress("\n".join(LINES).encode()))
    middle = int(len(data) * where)
    data[middle : middle + 200] = bytes(200)
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    rows = rows_of(JsonlSource(name="s", path=str(tmp_path / "a.jsonl.gz")), 300)
    assert rows[-1].error is not None
    assert rows[-1].error.detail.startswith("the gzip stream is damaged: ")
    assert rows[-1].error.detail.endswith("; what follows is lost")
    whole = [row.value for row in rows if row.error is None]
    num_before = int(len(LINES) * where) - 150
    assert whole[:num_before] == [json.loads(line) for line in LINES[:num_before]]


def test_a_wrong_checksum_at_the_end_is_told_after_all_rows(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(("\n".join(LINES) + "\n").encode()))
    data[-8] ^= 1
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    numbers, told = good_then_damage(rows_of(JsonlSource(name="s", path=str(tmp_path / "a.jsonl.gz")), 1500))
    assert numbers == list(range(len(LINES)))
    assert told.startswith("the gzip stream is damaged: CRC check failed")


def test_the_rows_after_a_damaged_file_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(("\n".join(LINES)).encode())[:-100])
    (tmp_path / "b.jsonl").write_text("\n".join(LINES[:10]))
    rows = rows_of(JsonlSource(name="s", path=(str(tmp_path / "a.jsonl.gz"), str(tmp_path / "b.jsonl"))), 600)
    assert [row.value["n"] for row in rows[-10:]] == list(range(10))
    assert sum(row.error is not None for row in rows) == 1


@pytest.mark.parametrize("text", ["", "\n".join(LINES), "[" + ",".join(LINES) + "]"], ids=["nothing", "lines", "array"])
def test_a_file_of_which_no_row_is_whole_is_a_config_error(tmp_path: Path, text: str) -> None:
    data = gzip.compress(text.encode())
    (tmp_path / "a.json.gz").write_bytes(data[:14])
    with pytest.raises(ConfigError, match=r"a\.json\.gz: cannot be read: Compressed file ended before"):
        rows_of(JsonlSource(name="s", path=str(tmp_path / "a.json.gz")), 100)


def write_parquet(path: Path, **options: Any) -> bytearray:
    rows = [{"n": k, "text": RANDOM.randbytes(200).hex()} for k in range(400)]
    pq.write_table(
        pa.Table.from_pylist(rows),
        path,
        row_group_size=100,
        use_dictionary=False,
        data_page_size=2000,
        write_batch_size=8,
        **options,
    )
    return bytearray(path.read_bytes())


def damage_group(path: Path, data: bytearray, group: int, where: float) -> None:
    column = pq.ParquetFile(path).metadata.row_group(group).column(1)
    middle = column.data_page_offset + int(column.total_compressed_size * where)
    data[middle : middle + 64] = bytes(64)
    path.write_bytes(data)


@pytest.mark.parametrize("rows_per_partition", [7, 100, 1000])
@pytest.mark.parametrize("options", [{"compression": "gzip"}, {"compression": "zstd"}, {"write_page_checksum": True}], ids=str)
def test_the_rows_of_a_damaged_row_group_are_errors_and_all_others_are_read(
    tmp_path: Path, rows_per_partition: int, options: dict[str, Any]
) -> None:
    path = tmp_path / "a.parquet"
    damage_group(path, write_parquet(path, **options), 1, 0.7)
    rows = rows_of(ParquetSource(name="s", path=str(path)), rows_per_partition)
    assert len(rows) == 400
    bad = [k for k, row in enumerate(rows) if row.error is not None]
    assert bad == list(range(bad[0], 200))
    assert 132 <= bad[0] < 170
    assert [row.value["n"] for row in rows if row.error is None] == [*range(bad[0]), *range(200, 400)]
    error = rows[199].error
    assert error is not None
    assert error.detail.startswith(f"row group 1 is damaged from its row {bad[0] - 100} on: ")


def test_which_rows_are_lost_does_not_depend_on_the_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    damage_group(path, write_parquet(path, compression="zstd"), 2, 0.5)
    source = ParquetSource(name="s", path=str(path))
    outcomes = [[row.error and row.error.detail for row in rows_of(source, size)] for size in (7, 33, 1000)]
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert 0 < sum(detail is not None for detail in outcomes[0]) <= 70


def test_a_text_that_is_not_utf8_costs_its_own_row(tmp_path: Path) -> None:
    texts = pa.array([b"good", b"\xff\xfe", b"fine"] * 20).view(pa.string())
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    rows = rows_of(ParquetSource(name="s", path=str(tmp_path / "a.parquet")), 1000)
    assert [row.value and row.value["text"] for row in rows] == ["good", None, "fine"] * 20
    assert {row.error.detail for row in rows if row.error is not None} == {"a text is not valid UTF-8 at byte 0"}
