"""Every container gives the same rows, in order, however it is cut."""

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from omniprep.errors import ConfigError
from omniprep.sources.huggingface import HuggingFaceSource
from omniprep.sources.jsonl import JsonlSource
from omniprep.sources.parquet import ParquetSource
from omniprep.sources.partitions import Partition, Row
from omniprep.sources.source import Source
from omniprep.sources.webdataset import WebDatasetSource

SOURCES: TypeAdapter[Any] = TypeAdapter(Source)


def make_rows(num_rows: int) -> list[dict[str, Any]]:
    """Rows that all containers can hold: every column in every row."""
    return [
        {
            "id": f"r{k}",
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": f"Zeile {k}\n\u2028é<image>"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "x" * (k % 7) + "."}]},
            ],
        }
        for k in range(num_rows)
    ]


def read_all(source: Any, rows_per_partition: int) -> list[Row]:
    rows: list[Row] = []
    for partition in source.partitions(rows_per_partition=rows_per_partition):
        again = Partition.from_json(json.loads(json.dumps(partition.to_json())))
        assert again == partition
        rows.extend(source.read(again))
    return rows


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=k % 2 == 0) + "\n" for k, row in enumerate(rows)).encode()
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text[:50]) + gzip.compress(text[50:]))  # two members, as `cat a.gz b.gz` makes
    elif path.suffix == ".zst":
        compress = zstandard.ZstdCompressor().compress
        path.write_bytes(compress(text[:70]) + compress(text[70:]))
    else:
        path.write_bytes(text)


def jsonl_source(suffix: str) -> Callable[[Path, list[dict[str, Any]]], Any]:
    def write(folder: Path, rows: list[dict[str, Any]]) -> Any:
        half = len(rows) // 2
        write_lines(folder / f"a{suffix}", rows[:half])
        write_lines(folder / f"b{suffix}", rows[half:])
        return JsonlSource(name="s", path=(str(folder / f"*{suffix}"),))

    return write


def json_array_source(folder: Path, rows: list[dict[str, Any]]) -> Any:
    (folder / "a.json").write_text(json.dumps(rows, indent=1), encoding="utf-8-sig")
    return JsonlSource(name="s", path=(str(folder / "a.json"),))


def parquet_source(folder: Path, rows: list[dict[str, Any]]) -> Any:
    pq.write_table(pa.Table.from_pylist(rows[:5]), folder / "a.parquet", row_group_size=2)
    pq.write_table(pa.Table.from_pylist(rows[5:]), folder / "b.parquet")
    return ParquetSource(name="s", path=(str(folder / "*.parquet"),))


def huggingface_source(folder: Path, rows: list[dict[str, Any]]) -> Any:
    import datasets

    datasets.disable_progress_bars()
    datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)}).save_to_disk(str(folder / "saved"))
    return HuggingFaceSource(name="s", path=str(folder / "saved"), dataset_split="test")


def tar_source(suffix: str) -> Callable[[Path, list[dict[str, Any]]], Any]:
    def write(folder: Path, rows: list[dict[str, Any]]) -> Any:
        members = [(f"x/{k:03d}.json", json.dumps(row).encode()) for k, row in enumerate(rows)]
        write_tar(folder / f"a{suffix}", members[:5])
        write_tar(folder / f"b{suffix}", members[5:])
        return WebDatasetSource(name="s", path=(str(folder / f"*{suffix}"),))

    return write


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    text = data.getvalue()
    path.write_bytes({".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, bytes)(text))


WRITERS = {
    "jsonl": jsonl_source(".jsonl"),
    "jsonl.gz": jsonl_source(".jsonl.gz"),
    "jsonl.zst": jsonl_source(".jsonl.zst"),
    "json array": json_array_source,
    "parquet": parquet_source,
    "huggingface": huggingface_source,
    "tar": tar_source(".tar"),
    "tar.gz": tar_source(".tar.gz"),
    "tar.zst": tar_source(".tar.zst"),
}
NUM_ROWS = 12


@pytest.fixture(scope="module", params=WRITERS)
def container(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return WRITERS[request.param](tmp_path_factory.mktemp("container"), make_rows(NUM_ROWS))


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows_per_partition=st.integers(1, NUM_ROWS + 2), limit=st.none() | st.integers(1, NUM_ROWS + 2))
def test_any_cut_gives_the_same_records_in_order(container: Any, rows_per_partition: int, limit: int | None) -> None:
    source = container.model_copy(update={"limit": limit})
    expected = [JsonlSource(name="x", path="-").to_record(row) for row in make_rows(NUM_ROWS)][:limit]
    rows = read_all(source, rows_per_partition)
    assert [source.to_record(row.value) for row in rows] == expected
    assert [row.index for row in rows] == list(range(len(expected)))
    assert all(row.error is None for row in rows)
    assert len({row.place for row in rows}) == len(rows)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows_per_partition=st.integers(1, NUM_ROWS + 2))
def test_partitions_are_the_same_on_every_call_and_tile_the_rows(container: Any, rows_per_partition: int) -> None:
    first, second = (container.partitions(rows_per_partition=rows_per_partition) for _ in range(2))
    assert first == second
    assert [part.first_row for part in first] == [sum(p.num_rows for p in first[:k]) for k in range(len(first))]
    assert [part.index for part in first] == list(range(len(first)))
    assert sum(part.num_rows for part in first) == NUM_ROWS
    assert len({part.digest for part in first}) == len(first)


def test_a_source_is_chosen_by_its_kind() -> None:
    source = SOURCES.validate_python({"kind": "parquet", "name": "s", "path": "a.parquet"})
    assert isinstance(source, ParquetSource)
    assert source.path == ("a.parquet",)


def test_a_digest_says_what_is_read_and_not_where_it_lies(tmp_path: Path) -> None:
    digests = []
    for folder, text in (("a", '{"x": 1}\n'), ("b", '{"x": 1}\n'), ("c", '{"x": 2}\n')):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "d.jsonl").write_text(text)
        (part,) = JsonlSource(name="s", path=str(tmp_path / folder / "d.jsonl")).partitions(rows_per_partition=9)
        digests.append(part.digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_file_that_changed_after_planning_stops_the_run(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"x": 1}\n')
    source = JsonlSource(name="s", path=str(path))
    (part,) = source.partitions(rows_per_partition=9)
    path.write_text('{"x": 1}\n{"x": 2}\n')
    with pytest.raises(ConfigError, match="had 9 bytes when planned, has 18 now; run again"):
        list(source.read(part))


def test_places_name_files_below_their_shared_folder(tmp_path: Path) -> None:
    for folder in ("aa", "ab"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "d.jsonl").write_text('\n{"x": 1}\n')
    rows = read_all(JsonlSource(name="s", path=str(tmp_path / "*" / "d.jsonl")), 1)
    assert [row.place for row in rows] == ["aa/d.jsonl:2", "ab/d.jsonl:2"]
    assert [row.base for row in rows] == [str(tmp_path / "aa"), str(tmp_path / "ab")]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.jsonl", "no file matches"),
        ("*.jsonl", "no file matches"),
        ("folder", "is a folder; name its files"),
        ("memory://nowhere/a.jsonl", "no file matches"),
        ("nosuch://a/b.jsonl", "cannot be listed: Protocol not known: nosuch"),
    ],
)
def test_a_path_without_files_is_a_config_error(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    source = JsonlSource(name="s", path="x" if "://" in path else str(tmp_path / path))
    source = source if "://" not in path else JsonlSource(name="s", path=path)
    with pytest.raises(ConfigError, match=message):
        source.partitions(rows_per_partition=1)


def test_a_file_matched_twice_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    source = JsonlSource(name="s", path=(str(tmp_path / "*.jsonl"), str(tmp_path / "a.jsonl")))
    with pytest.raises(ConfigError, match="is matched by two paths"):
        source.partitions(rows_per_partition=1)


def test_urls_are_read_like_paths() -> None:
    import fsspec

    with fsspec.open("memory://data/a.jsonl", "wb") as handle:
        handle.write(b'{"text": "a"}\n{"text": "b"}\n')
    rows = read_all(JsonlSource(name="s", path="memory://data/*.jsonl"), 1)
    assert [(row.value["text"], row.place) for row in rows] == [("a", "a.jsonl:1"), ("b", "a.jsonl:2")]
    assert rows[0].base == "memory:///data"


def test_relative_paths_are_placed_below_the_recipes_folder(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    source = JsonlSource(name="s", path=("a.jsonl", "/abs/b.jsonl", "s3://b/c.jsonl"), media_root="media").below(tmp_path)
    assert source.path == (str(tmp_path / "a.jsonl"), "/abs/b.jsonl", "s3://b/c.jsonl")
    assert source.media_root == str(tmp_path / "media")


def test_media_root_replaces_the_folder_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    (row,) = read_all(JsonlSource(name="s", path=str(tmp_path / "a.jsonl"), media_root=str(tmp_path / "media")), 1)
    assert row.base == str(tmp_path / "media")


def test_rows_of_one_row_group_are_shared_between_at_most_16_partitions(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"text": str(k)} for k in range(100)]), tmp_path / "a.parquet")
    source = ParquetSource(name="s", path=str(tmp_path / "a.parquet"))
    assert len(source.partitions(rows_per_partition=1)) == 15  # pieces of 7 rows
    assert [row.value["text"] for row in read_all(source, 1)] == [str(k) for k in range(100)]


def test_what_is_not_parquet_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(ConfigError, match="cannot be read as Parquet"):
        ParquetSource(name="s", path=str(tmp_path / "a.parquet")).partitions(rows_per_partition=1)


def test_memory_of_planning_does_not_grow_with_the_file(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "%s"}\n' % (b"x" * 1000) * 20_000)
    source = JsonlSource(name="s", path=str(path))
    tracemalloc.start()
    parts = source.partitions(rows_per_partition=5000)
    first = next(source.read(parts[-1]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert first.place == "a.jsonl:15001"
    assert peak < 2 << 20


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_a_config_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n")
    path.chmod(0)
    with pytest.raises(ConfigError, match="cannot be read: "):
        JsonlSource(name="s", path=str(path)).partitions(rows_per_partition=1)
