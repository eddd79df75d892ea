"""A `.json` file may be lines, an array, or one object over several lines; what is no text is refused."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from omniprep.errors import ConfigError
from omniprep.sources.jsonl import JsonlSource

OBJECT = {"messages": [{"role": "user", "content": "q"}], "meta": {"a": [1, 2]}}


def rows_of(path: Path) -> list[tuple[str, Any]]:
    source = JsonlSource(name="s", path=(str(path),))
    return [(row.place, row.value) for part in source.partitions(rows_per_partition=2) for row in source.read(part)]


@pytest.mark.parametrize("indent", [None, 0, 2, "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_one_object_is_one_row(tmp_path: Path, indent: int | None, encoding: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(OBJECT, indent=indent) + "\n", encoding=encoding)
    assert rows_of(path) == [("a.json:1" if indent is None else "a.json[0]", OBJECT)]


def test_one_object_may_be_compressed(tmp_path: Path) -> None:
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(json.dumps(OBJECT, indent=1).encode()))
    assert rows_of(path) == [("a.json.gz[0]", OBJECT)]


def test_a_damaged_object_is_one_rejection(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(OBJECT, indent=1)[:-2])
    source = JsonlSource(name="s", path=(str(path),))
    (row,) = [row for part in source.partitions(rows_per_partition=2) for row in source.read(part)]
    assert row.error is not None
    assert row.raw == path.read_bytes().strip()


def test_lines_stay_lines_whatever_the_suffix_and_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1\n{"a": 2}\n{"a": 3}\n')
    assert rows_of(path) == [("a.json:1", None), ("a.json:2", {"a": 2}), ("a.json:3", {"a": 3})]


@pytest.mark.parametrize("data", [b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" * 9, '{"a": 1}\n'.encode("utf-16")])
def test_what_is_no_text_is_one_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"a.jsonl: expected lines of JSON in UTF-8, got binary data"):
        rows_of(path)
