"""Hostile tars: every row is there with its reason, the same for any partition, in bounded time and memory."""

import gzip
import time
import tracemalloc
from functools import partial
from pathlib import Path

import pytest

from omniprep.errors import ConfigError, Reason, RejectSample
from omniprep.sources import webdataset
from omniprep.sources.media_store import MediaConfig, MediaStore
from omniprep.sources.partitions import Row
from omniprep.sources.webdataset import WebDatasetSource
from tests.hostile.tars import ATTACKS, END, FIRST, LAST, extended, member


def read(path: Path, rows_per_partition: int) -> list[Row]:
    source = WebDatasetSource(name="s", path=(str(path),))
    return [row for part in source.partitions(rows_per_partition=rows_per_partition) for row in source.read(part)]


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_tar_gives_every_row_with_its_reason(tmp_path: Path, name: str, suffix: str) -> None:
    blocks, told = ATTACKS[name]
    data = FIRST + blocks + LAST + END
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(gzip.compress(data) if suffix == "tar.gz" else data)
    started_s = time.monotonic()
    tracemalloc.start()
    try:
        by_size = {size: read(path, size) for size in (1, 2, 9)}
        peak_mb = tracemalloc.get_traced_memory()[1] >> 20
    finally:
        tracemalloc.stop()
    assert peak_mb < 100
    assert time.monotonic() - started_s < 60
    facts = [[(row.place, row.error and row.error.detail, row.index) for row in rows] for rows in by_size.values()]
    assert facts[0] == facts[1] == facts[2]
    rows = by_size[9]
    assert rows[0].value == {"text": "first"}
    assert len(rows) == 1 + len(told)
    for row, part in zip(rows[1:], told, strict=True):
        assert row.place.isprintable()
        assert row.raw is not None
        if part is None:
            assert row.error is None
        else:
            assert row.error is not None
            assert row.error.reason is Reason.SCHEMA_INVALID
            assert part in row.error.detail


def test_a_compressed_member_of_gigabytes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "MAX_SAMPLE_BYTES", 1 << 20)
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(FIRST + member(b"1.json", bytes(100 << 20)) + LAST + END))
    tracemalloc.start()
    rows = read(path, 9)
    peak_mb = tracemalloc.get_traced_memory()[1] >> 20
    tracemalloc.stop()
    assert [row.error and row.error.detail for row in rows] == [
        None,
        "1.json: with this member the sample has 104857600 bytes, expected at most 1048576",
        None,
    ]
    assert peak_mb < 10


def test_a_global_header_that_renames_every_member_is_refused_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(extended((b"path", b"same.json"), kind=b"g") + FIRST + LAST + END)
    with pytest.raises(ConfigError, match="a global header that states `path`"):
        read(tmp_path / "a.tar", 9)
    (tmp_path / "b.tar").write_bytes(extended((b"comment", b"by git archive"), kind=b"g") + FIRST + LAST + END)
    assert [row.value for row in read(tmp_path / "b.tar", 1)] == [{"text": "first"}, {"text": "last"}]


def test_a_row_cannot_name_files_outside_through_its_own_members_names(tmp_path: Path) -> None:
    """A member is data under a name, never a file: `../../secret.png` in the JSON is the member if there is one, else refused."""
    (tmp_path / "secret.png").write_bytes(b"secret")
    folder = tmp_path / "data" / "deep"
    folder.mkdir(parents=True)
    image = b'{"parts": [{"type": "image", "image": "../../secret.png"}]}'
    (folder / "a.tar").write_bytes(member(b"../../secret.json", image) + member(b"../../secret.png", b"inside") + LAST + END)
    (folder / "b.tar").write_bytes(member(b"../../secret.json", image) + LAST + END)
    resolve = partial(MediaStore(MediaConfig()).resolve, base=str(folder))
    source = WebDatasetSource(name="s", path=(str(folder / "a.tar"),))
    record = source.to_record(read(folder / "a.tar", 9)[0].value)
    assert resolve(record.parts[0].image).data == b"inside"  # type: ignore[union-attr]
    record = source.to_record(read(folder / "b.tar", 9)[0].value)
    with pytest.raises(RejectSample) as caught:
        resolve(record.parts[0].image)  # type: ignore[union-attr]
    assert caught.value.reason is Reason.MEDIA_FORBIDDEN
