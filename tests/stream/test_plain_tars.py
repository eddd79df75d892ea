"""Tars that other tools wrote from OmniPrep's members: read from front to back, whatever they did to the rest."""

import io
import json
import logging
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import webdataset

from omniprep.errors import DatasetError
from omniprep.shards.members import MemberFormat, to_members
from omniprep.stream.plain_tars import read_plain_tars
from omniprep.types import EncodedSample
from tests.s3_server import S3, s3
from tests.stream.stored import PREFERENCES, SAMPLES, assert_same, stored

__all__ = ["s3"]

Members = dict[str, bytes]


def same(members: Members) -> Members:
    return members


def tar(
    path: Path, samples: Sequence[EncodedSample], *, form: MemberFormat | None = None, change: Callable[[Members], Members] = same
) -> Path:
    """Write samples as GNU tar would: other headers, other order of members, folders."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        folder = tarfile.TarInfo("some")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for number, sample in enumerate(samples):
            for name, data in reversed(change(to_members(sample, form)).items()):
                info = tarfile.TarInfo(f"some/{number:03d}.{name}")
                info.size, info.mtime = len(data), 1234567.8
                archive.addfile(info, io.BytesIO(data))
    return path


def test_shards_without_index_and_manifest_are_read(tmp_path: Path) -> None:
    manifest = stored(tmp_path)
    tars = [tmp_path / shard.name for shard in manifest.shards]
    for other in [*tmp_path.glob("*.parquet"), tmp_path / "manifest.json"]:
        other.unlink()
    for record, sample in zip(read_plain_tars(tars), SAMPLES, strict=True):
        assert_same(record, sample)


@pytest.mark.parametrize(
    ("samples", "form"),
    [
        (SAMPLES, MemberFormat()),
        (SAMPLES, MemberFormat(mel_dtype="float32")),
        (PREFERENCES, MemberFormat(kind="preference")),
        (SAMPLES[:1], MemberFormat(frame_format="raw")),
    ],
    ids=["sequences", "float32 mel", "preferences", "raw frames"],
)
def test_other_headers_and_another_order_do_not_matter(
    tmp_path: Path, samples: Sequence[EncodedSample], form: MemberFormat
) -> None:
    for record, sample in zip(read_plain_tars([tar(tmp_path / "a.tar", samples, form=form)]), samples, strict=True):
        assert_same(record, sample)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves the tars open
def test_what_webdataset_filtered_and_wrote_is_read(tmp_path: Path) -> None:
    manifest = stored(tmp_path)
    kept = []
    with webdataset.TarWriter(str(tmp_path / "filtered.tar.gz")) as sink:
        for raw in webdataset.WebDataset([str(tmp_path / shard.name) for shard in manifest.shards], shardshuffle=False):
            members = {name: data for name, data in raw.items() if not name.startswith("__")}
            row = json.loads(members["json"])["row"]
            if row % 2:
                kept.append(row)
                sink.write({**members, "__key__": f"x{row}", "note.txt": "seen"})
    assert (tmp_path / "filtered.tar.gz").read_bytes()[:2] == b"\x1f\x8b"
    for record, row in zip(read_plain_tars([tmp_path / "filtered.tar.gz"]), kept, strict=True):
        assert_same(record, SAMPLES[row])


def test_a_shuffle_loses_and_repeats_nothing_and_is_the_same_for_a_seed(tmp_path: Path) -> None:
    tars = [tar(tmp_path / f"{number}.tar", SAMPLES[number::4]) for number in range(4)]

    def keys(**options: int) -> list[str]:
        return [record.key for record in read_plain_tars(tars, **options)]

    shuffled = keys(shuffle_buffer=5, seed=1)
    assert sorted(shuffled) == sorted(keys())
    assert shuffled == keys(shuffle_buffer=5, seed=1)
    assert len({tuple(shuffled), tuple(keys()), tuple(keys(shuffle_buffer=5, seed=2))}) == 3


def drop(name: str) -> Callable[[Members], Members]:
    return lambda members: {other: data for other, data in members.items() if other != name}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (drop("mel.npy"), "mel.npy: member is missing"),
        (drop("json"), "json: 'json' is missing"),
        (drop("tokens.npy"), "tokens.npy: member is missing"),
        (lambda members: {**members, "json": b"{}"}, "json: 'format' is missing"),
        (lambda members: {**members, "tokens.npy": members["tokens.npy"][:-4]}, "tokens.npy: expected"),
        (lambda members: {**members, "json": b'{"format":1}'}, "json: does not describe"),
    ],
    ids=["no mel", "no json", "no tokens", "another json", "cut tokens", "empty json"],
)
def test_a_record_that_cannot_be_used_is_left_out(
    tmp_path: Path, change: Callable[[Members], Members], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    tars = [tar(tmp_path / "a.tar", SAMPLES[:2]), tar(tmp_path / "b.tar", SAMPLES[2:4], change=change), tmp_path / "a.tar"]
    with caplog.at_level(logging.WARNING):
        assert len(list(read_plain_tars(tars))) == 4
    assert len(caplog.messages) == 2
    assert all(why in message and "b.tar: some/00" in message for message in caplog.messages)
    with pytest.raises(DatasetError, match=r"2 records .*max_corrupt=1"):
        list(read_plain_tars(tars, max_corrupt=1))


def test_of_a_tar_that_is_cut_the_records_before_the_cut_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tar(tmp_path / "a.tar", SAMPLES)
    path.write_bytes(path.read_bytes()[:100_000])
    with caplog.at_level(logging.WARNING):
        records = list(read_plain_tars([path, tar(tmp_path / "b.tar", SAMPLES[:1])]))
    assert 2 < len(records) < len(SAMPLES)
    for record, sample in zip(records, SAMPLES[: len(records) - 1], strict=False):
        assert_same(record, sample)
    assert "the tar is damaged" in caplog.messages[0]
    assert "what follows is lost" in caplog.messages[0]


def test_what_is_no_tar_of_records_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "text.tar").write_text("hello" * 500)
    (tmp_path / "empty.tar").write_bytes(bytes(10240))
    for name, told in {"text.tar": "the tar is damaged", "empty.tar": "holds no records", "absent.tar": "no such file"}.items():
        with pytest.raises(DatasetError, match=f"{name}: {told}"):
            list(read_plain_tars([tmp_path / name]))


def test_tars_at_urls_are_read(s3: S3, tmp_path: Path) -> None:
    s3.put("tars/a.tar", tar(tmp_path / "a.tar", SAMPLES[:5]).read_bytes())
    for record, sample in zip(read_plain_tars([f"{s3.url}/tars/a.tar"]), SAMPLES[:5], strict=True):
        assert_same(record, sample)
