"""A bad row is a `Row` with its reason and its own bytes; the rows around it are not touched."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
import zstandard

from omniprep.errors import ConfigError, Reason
from omniprep.sources import jsonl
from omniprep.sources.jsonl import JsonlSource, parse_json
from omniprep.sources.webdataset import WebDatasetSource

BAD_ROWS = [
    (b'{"a": 1', "not valid JSON: Expecting ',' delimiter at character 7 of 7"),
    (b"{'a': 1}", "not valid JSON: Expecting property name enclosed in double quotes at character 1 of 8"),
    (b'{"a": NaN}', "not valid JSON: NaN is not a JSON number"),
    (b'{"a": -Infinity}', "not valid JSON: -Infinity is not a JSON number"),
    (b'{"a": 1e999}', "not valid JSON: number 1e999 is too large"),
    (b'{"a": %s}' % (b"9" * 5000), "not valid JSON: number of 5000 digits"),
    (b'{"a": 1, "b": {"c": 1, "c": 2}}', "not valid JSON: key 'c' twice in one object"),
    (b'{"a": "\xff"}', "not valid UTF-8: byte 0xff at byte 7 of the row"),
    (b'{"a": "\\ud83d"}', "not valid Unicode: half of a surrogate pair, '\\ud83d'"),
    (b"[" * 100_000, "not usable JSON: nested too deeply"),
    (b'{"a": 1} {"b": 2}', "not valid JSON: Extra data at character 9 of 17"),
    (b'{"a": "\x01"}', "not valid JSON: Invalid control character at at character 7 of 10"),
]


@pytest.mark.parametrize(("text", "detail"), BAD_ROWS)
def test_what_is_not_strict_json_is_rejected_with_the_reason(text: bytes, detail: str) -> None:
    value, error = parse_json(text)
    assert value is None
    assert error is not None
    assert (error.reason, error.detail) == (Reason.SCHEMA_INVALID, detail)


@pytest.mark.parametrize(
    "text", ['{"a": 123456789012345678901234567890}', '{"a": "\\ud83d\\ude00"}', '{"a": "\\\\ud83d"}', "[1.5e300]"]
)
def test_unusual_but_valid_json_is_read_exactly(text: str) -> None:
    assert parse_json(text.encode()) == (json.loads(text), None)


def test_bad_lines_stand_between_good_ones_with_their_own_bytes_and_line_numbers(tmp_path: Path) -> None:
    lines = [b'\xef\xbb\xbf{"n": 0}\r', b"", b"  \t", b'{"n": 1}', *(text for text, _ in BAD_ROWS), b"\r", b' {"n": 2} ']
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))  # no line end after the last
    source = JsonlSource(name="s", path=str(path))
    for rows_per_partition in (1, 3, 100):
        rows = [row for part in source.partitions(rows_per_partition=rows_per_partition) for row in source.read(part)]
        assert [row.value for row in rows] == [{"n": 0}, {"n": 1}, *([None] * len(BAD_ROWS)), {"n": 2}]
        assert [row.error.detail for row in rows if row.error is not None] == [detail for _, detail in BAD_ROWS]
        numbers = [1, 4, *range(5, 5 + len(BAD_ROWS)), 6 + len(BAD_ROWS)]
        assert [row.place for row in rows] == [f"a.jsonl:{number}" for number in numbers]
        assert [row.raw for row in rows] == [b'{"n": 0}', b'{"n": 1}', *(text for text, _ in BAD_ROWS), b'{"n": 2}']


def test_a_line_without_end_is_one_bad_row_and_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_ROW_BYTES", 1 << 20)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 0}\n"' + b"x" * (5 << 20) + b'"\n{"n": 1}\n')
    source = JsonlSource(name="s", path=str(path))
    rows = [row for part in source.partitions(rows_per_partition=1) for row in source.read(part)]
    assert [row.value for row in rows] == [{"n": 0}, None, {"n": 1}]
    assert rows[1].error is not None
    assert rows[1].error.detail == "row of 1 MiB or more; is the file one JSON value per line?"
    assert len(rows[1].raw) == 1 << 20


@pytest.mark.parametrize(
    ("text", "values", "errors"),
    [
        ("[]", [], 0),
        (" [ ] ", [], 0),
        ('[{"a": "],[\\"}"}, 2,\n[3, [4]]]', [{"a": '],["}'}, 2, [3, [4]]], 0),
        ('[{"a": 1}, {"a": oops}, {"a": 3}]', [{"a": 1}, None, {"a": 3}], 1),
        ('[{"a": 1}, {"a": 2', [{"a": 1}, None], 1),
        ('[{"a": 1}] {"b": 2}', [{"a": 1}, None], 1),
        ('[{"a": 1},, {"a": 2},]', [{"a": 1}, None, {"a": 2}], 1),
    ],
)
def test_a_json_array_loses_no_element(tmp_path: Path, text: str, values: list[object], errors: int) -> None:
    (tmp_path / "a.json").write_text(text)
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("a.json", "b.json.gz"):
        source = JsonlSource(name="s", path=str(tmp_path / name))
        for rows_per_partition in (1, 2, 9):
            rows = [row for part in source.partitions(rows_per_partition=rows_per_partition) for row in source.read(part)]
            assert [row.value for row in rows] == values
            assert [row.place for row in rows] == [f"{name}[{k}]" for k in range(len(values))]
            assert sum(row.error is not None for row in rows) == errors


def test_json_lines_in_a_json_file_are_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1}\n{"a": 2}\n')
    source = JsonlSource(name="s", path=str(tmp_path / "a.json"))
    (part,) = source.partitions(rows_per_partition=9)
    assert [row.place for row in source.read(part)] == ["a.json:1", "a.json:2"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl.gz", gzip.compress(mtime=0, data=b'{"a": 1}\n' * 1000)[:12]),
        ("a.jsonl.gz", b"not gzip at all"),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress(bytes(range(256)) * 50)[:-20]),
        ("a.jsonl.zst", b"not zstd at all"),
    ],
)
def test_a_damaged_compressed_file_stops_the_run_before_it_starts(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match="cannot be read: "):
        JsonlSource(name="s", path=str(tmp_path / name)).partitions(rows_per_partition=10)


def tar_of(*members: tuple[str, bytes]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


GOOD = [(f"{k}.json", b'{"text": "%d"}' % k) for k in range(6)]


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
@pytest.mark.parametrize(
    ("damage", "num_good", "place"),
    [
        ("cut in a header", 4, "byte 4096"),
        ("cut in a member", 3, "3"),
        ("overwritten header", 4, "byte 4096"),
        ("no end mark", 6, None),
    ],
)
def test_a_damaged_tar_gives_what_is_whole_and_one_row_for_the_rest(
    tmp_path: Path, damage: str, num_good: int, place: str | None, name: str
) -> None:
    data = bytearray(tar_of(*GOOD))  # a header and a block of data each: 1024 bytes a member
    if damage == "cut in a header":
        del data[4 * 1024 + 100 :]
    elif damage == "cut in a member":
        del data[3 * 1024 + 520 :]
    elif damage == "overwritten header":
        data[4 * 1024 : 4 * 1024 + 512] = b"\x01" * 512
    else:
        del data[6 * 1024 :]
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    source = WebDatasetSource(name="s", path=str(tmp_path / name))
    for rows_per_partition in (1, 2, 3, 9):
        rows = [row for part in source.partitions(rows_per_partition=rows_per_partition) for row in source.read(part)]
        assert [row.value["text"] for row in rows if row.error is None] == [str(k) for k in range(num_good)]
        bad = [(row.place, row.error.detail) for row in rows[num_good:] if row.error]
        assert [where for where, _ in bad] == ([] if place is None else [f"{name}/{place}"])
        assert all("the tar is damaged" in detail for _, detail in bad)


@pytest.mark.parametrize("data", [b"", b"this is not a tar" * 100, b"short"])
def test_what_is_not_a_tar_is_a_config_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ConfigError, match="cannot be read as a tar"):
        WebDatasetSource(name="s", path=str(tmp_path / "a.tar")).partitions(rows_per_partition=9)


def test_a_bad_json_member_is_a_row_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of(("0.json", b"{"), ("1.json", b"[]"), ("2.cls", b"7"), *GOOD[3:5]))
    source = WebDatasetSource(name="s", path=str(tmp_path / "a.tar"))
    (part,) = source.partitions(rows_per_partition=9)
    rows = list(source.read(part))
    details = [row.error.detail if row.error else None for row in rows]
    assert details == [
        "0.json: not valid JSON: Expecting property name enclosed in double quotes at character 1 of 1",
        "1.json: expected a JSON object, got list",
        "expected a .json, .txt or media member; got 2.cls",
        None,
        None,
    ]
    assert [row.place for row in rows] == [f"a.tar/{k}" for k in range(5)]
    assert set(rows[2].blobs.values()) == {b"7"}
