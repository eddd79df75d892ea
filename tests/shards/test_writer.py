"""Shards: reproducible, atomic, and readable by everyone."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniprep.errors import DatasetError
from omniprep.shards.index import COLUMNS, describe_sample, read_index
from omniprep.shards.members import MemberFormat, from_members, to_members
from omniprep.shards.reader import ShardReader
from omniprep.shards.writer import (
    PartitionWriter,
    ShardRecord,
    ShardWriter,
    check_storable,
    record_key,
    safe_name,
    tar_header,
    to_record,
)
from omniprep.storage.folder import open_folder
from tests.shards.builders import assert_equal, media_sample, preference_sample, text_sample


def samples(count: int = 6):
    """Return text first, so that readers which infer types from the first records meet empty media."""
    made = [text_sample(f"s-{number:08d}", length=3 + number) for number in range(count)]
    return [*made, *(media_sample(f"s-{number:08d}") for number in range(count, count + 3))]


def write(folder: Path, records, *, form: MemberFormat | None = None, max_shard_bytes: int = 1 << 30):
    form = form or MemberFormat()
    with PartitionWriter(open_folder(str(folder)), source="s", partition=0, form=form, max_shard_bytes=max_shard_bytes) as writer:
        for record in records:
            writer.add(to_record(record, form))
        return writer.close()


@given(name=st.from_regex(r"[a-z0-9._-]{1,100}", fullmatch=True), size=st.integers(0, 8**11 - 1))
def test_tar_header_is_tarfiles(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    assert tar_header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)


def test_a_shard_is_the_tar_of_its_members_however_large_they_are(tmp_path: Path) -> None:
    """Pieces are gathered before they are written; large ones are not."""
    sizes = [0, 1, 512, 513, 100_000, 300_000, 7, 700_000, 3, 0, 1_500_000, 511, 200_000]
    records = [{"a": bytes([k]) * size, "b.npy": b"b" * (size % 1000)} for k, size in enumerate(sizes)]
    facts = describe_sample(text_sample("s"))
    place = {"source": "s", "split": "train", "partition": 0, "form": MemberFormat()}
    writer = ShardWriter(open_folder(str(tmp_path)), "train-s-00000", **place)
    expected = io.BytesIO()
    with tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for k, members in enumerate(records):
            key = f"s-{k:08d}"
            told = {**facts, "key": key, "member_sizes": [len(data) for data in members.values()], "content_sha256": ""}
            writer.add(ShardRecord(key=key, split="train", members=members, facts=told))
            for name, data in members.items():
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        num_bytes = tar.offset + 2 * 512
    info = writer.close()
    written = (tmp_path / info.name).read_bytes()
    assert written == expected.getvalue()[:num_bytes]  # tarfile fills up to its block of 10,240 bytes
    assert (info.num_bytes, info.sha256) == (len(written), hashlib.sha256(written).hexdigest())


def test_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a", samples()), write(tmp_path / "b", samples())
    assert one == two
    for name in ("train-s-00000.tar", "train-s-00000.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_index_reads_every_record_and_member(tmp_path: Path) -> None:
    records = samples()
    (info,) = write(tmp_path, records)
    assert info.num_bytes == (tmp_path / info.name).stat().st_size
    with ShardReader(tmp_path, info.name) as reader:
        assert len(reader) == len(records)
        for number in reversed(range(len(records))):
            assert reader.read_members(number) == to_members(records[number])
            assert_equal(reader.read(number), records[number])


def test_tarfile_lists_the_members_in_order(tmp_path: Path) -> None:
    records = samples()
    (info,) = write(tmp_path, records)
    with tarfile.open(tmp_path / info.name) as tar:
        members = tar.getmembers()
        assert [member.name for member in members] == [f"{r.key}.{name}" for r in records for name in MemberFormat().names]
        assert {(member.mtime, member.uid, member.gid, member.uname) for member in members} == {(0, 0, 0, "")}
        found = {member.name.partition(".")[2]: tar.extractfile(member).read() for member in members[-4:]}
    assert_equal(from_members(found), records[-1])


def test_index_columns_are_as_documented(tmp_path: Path) -> None:
    (info,) = write(tmp_path, samples())
    schema = pq.read_schema(tmp_path / info.index_name)
    assert {field.name: str(field.type).replace("element", "item") for field in schema} == {
        name: "list<item: int64>" if kind.startswith("list") else kind for name, kind in COLUMNS.items()
    }
    row = read_index(open_folder(str(tmp_path)), info.index_name)[0][-1]
    facts = {name: row[name] for name in ("num_mel_frames", "num_patches", "num_images", "num_videos", "audio_s", "video_s")}
    assert facts == {"num_mel_frames": 125, "num_patches": 16, "num_images": 1, "num_videos": 1, "audio_s": 1.25, "video_s": 1.6}
    assert (row["has_audio"], row["has_image"], row["has_video"], row["has_video_with_sound"]) == (True, True, True, False)
    assert row["id"] == "user.id/1"


def test_shards_split_by_size_and_by_split(tmp_path: Path) -> None:
    records = [text_sample(f"s-{n:08d}", split="val" if n == 2 else "train") for n in range(6)]
    shards = write(tmp_path, records, max_shard_bytes=9_000)
    assert [shard.name for shard in shards] == [
        "train-s-00000-01.tar",
        "train-s-00000-02.tar",
        "train-s-00000.tar",
        "val-s-00000.tar",
    ]
    assert sum(shard.totals.num_records for shard in shards) == 6
    assert all(shard.num_bytes <= 9_000 + 1024 for shard in shards)


def test_a_record_larger_than_the_limit_gets_a_shard_of_its_own(tmp_path: Path) -> None:
    shards = write(tmp_path, samples(2), max_shard_bytes=1)
    assert [shard.totals.num_records for shard in shards] == [1] * 5


def test_nothing_is_left_when_an_exception_passes(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError),
        PartitionWriter(
            open_folder(str(tmp_path)), source="s", partition=0, form=MemberFormat(), max_shard_bytes=1 << 30
        ) as writer,
    ):
        writer.add(to_record(text_sample()))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_no_final_name_before_close(tmp_path: Path) -> None:
    writer = ShardWriter(open_folder(str(tmp_path)), "train-s-00000", source="s", split="train", partition=0, form=MemberFormat())
    writer.add(to_record(text_sample()))
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
    writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train-s-00000.parquet", "train-s-00000.tar"]


@given(name=st.text(min_size=1, max_size=80))
def test_keys_survive_webdatasets_rule(name: str) -> None:
    key = record_key(name, 123456789)
    check_storable(key, {member: b"" for member in MemberFormat(kind="preference").names})


def test_different_sources_never_share_a_safe_name() -> None:
    assert len({safe_name(name) for name in ("a.b", "a/b", "a_b", "a b", "ä_b")}) == 5


def test_truncated_shard_names_the_record(tmp_path: Path) -> None:
    (info,) = write(tmp_path, samples())
    path = tmp_path / info.name
    path.write_bytes(path.read_bytes()[:-40_000])
    with (
        ShardReader(tmp_path, path.name) as reader,
        pytest.raises(DatasetError, match=r"train-s-00000.tar: s-00000008: .*cut short"),
    ):
        reader.read(8)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its file to the collector
@pytest.mark.parametrize("kind", ["sequence", "preference"])
def test_plain_webdataset_opens_it(tmp_path: Path, kind) -> None:
    import webdataset

    records = samples() if kind == "sequence" else [preference_sample(f"d-{n:08d}") for n in range(3)]
    (info,) = write(tmp_path, records, form=MemberFormat(kind=kind))
    dataset = webdataset.WebDataset(str(tmp_path / info.name), shardshuffle=False, empty_check=False).decode()
    read = list(dataset)
    assert [record["__key__"] for record in read] == [record.key for record in records]
    for record, expected in zip(read, records, strict=True):
        assert record["json"]["key"] == expected.key
        for name, layout in expected.layouts.items():
            np.testing.assert_array_equal(record[f"{name}.npy"][0], layout.input_ids)
        assert record["mel.npy"].dtype == np.float16
        assert record["frames.mjpg"] == b"".join(frame for item in expected.vision for frame in item.frames)


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("streaming", [True, False])
def test_hugging_face_datasets_opens_it(tmp_path: Path, monkeypatch, streaming: bool, text_first: bool) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    import datasets

    records = samples() if text_first else samples()[::-1]
    (info,) = write(tmp_path, records)
    dataset = datasets.load_dataset(
        "webdataset", data_files=str(tmp_path / info.name), split="train", streaming=streaming, cache_dir=str(tmp_path / "cache")
    )
    read = list(dataset)
    assert len(read) == len(records)
    for record, expected in zip(read, records, strict=True):
        np.testing.assert_array_equal(np.array(record["tokens.npy"], np.int32)[1], expected.layouts["tokens"].labels)
        mel = np.array(record["mel.npy"], np.float32)
        assert mel.shape == (128, sum(item.num_mel_frames for item in expected.audio))
        if expected.audio:
            np.testing.assert_array_equal(mel, np.concatenate([item.mel for item in expected.audio], axis=1))
        assert record["json"]["key"] == expected.key


def test_ffmpeg_style_readers_can_play_the_frames(tmp_path: Path) -> None:
    import av

    data = to_members(media_sample())["frames.mjpg"]
    with av.open(io.BytesIO(data), format="mjpeg") as container:
        assert sum(1 for _ in container.decode(video=0)) == 5
