"""Verify finds every kind of damage and says where it is."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniprep.errors import DatasetError
from omniprep.prepare import prepare
from omniprep.shards.manifest import canonical_sha256, read_manifest, write_manifest
from omniprep.shards.members import MemberFormat
from omniprep.shards.reader import ShardReader
from omniprep.verify import verify
from omniprep.verify_sample import check_sample
from tests.prepare_builders import chat, recipe, write_media
from tests.shards.builders import audio_item, jpeg, layout, media_sample, preference_sample, text_sample


@pytest.fixture(scope="module")
def sound_dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    write_media(folder / "data")
    rows = [chat(0), chat(1, {"audio": "a.wav"}), chat(2, {"image": "i.png"}), "{", chat(4), chat(5, {"audio": "a.wav"})]
    prepare(recipe(folder, rows))
    return folder / "out"


@pytest.fixture
def dataset(sound_dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound_dataset, tmp_path / "out"))


def findings(folder: Path) -> list[str]:
    return [str(finding) for finding in verify(folder)]


def span(folder: Path, key: str, member: str) -> tuple[Path, int, int]:
    """Return the shard, offset and size of one member."""
    for shard in read_manifest(folder).shards:
        with ShardReader(folder, shard.name) as reader:
            for row in reader.rows:
                if row["key"] == key:
                    number = reader.member_names.index(member)
                    return folder / shard.name, row["member_offsets"][number], row["member_sizes"][number]
    raise KeyError(key)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x55
    path.write_bytes(data)


def test_a_sound_dataset_has_no_findings(dataset: Path) -> None:
    assert findings(dataset) == []


@pytest.mark.parametrize(
    ("key", "member", "where"),
    [
        ("chat-00000001", "tokens.npy", -3),
        ("chat-00000001", "mel.npy", -1),
        ("chat-00000002", "frames.mjpg", 5),
        ("chat-00000001", "mel.npy", 3),
        ("chat-00000002", "json", 1),
    ],
)
def test_a_flipped_byte_is_found_in_its_member(dataset: Path, key: str, member: str, where: int) -> None:
    path, offset, size = span(dataset, key, member)
    flip(path, offset + where % size)
    found = findings(dataset)
    assert any("its bytes changed" in line and line.startswith(path.name) for line in found)
    assert any(line.startswith(f"{path.name}: {key}") for line in found)


@settings(max_examples=40)
@given(data=st.data())
def test_any_flipped_byte_of_any_shard_is_found(sound_dataset: Path, tmp_path_factory, data) -> None:
    folder = Path(shutil.copytree(sound_dataset, tmp_path_factory.mktemp("flip") / "out"))
    path = data.draw(st.sampled_from(sorted([*folder.glob("*.tar"), *folder.glob("*.parquet"), *folder.glob("quarantine/*")])))
    flip(path, data.draw(st.integers(0, path.stat().st_size - 1)))
    assert any(path.name in line for line in findings(folder))


def test_a_damaged_tar_header_is_found_in_its_member(dataset: Path) -> None:
    path, offset, _ = span(dataset, "chat-00000001", "json")
    flip(path, offset - 512)
    assert f"{path.name}: chat-00000001: json: tar header is not what the index says" in findings(dataset)


def test_a_truncated_shard_names_its_records(dataset: Path) -> None:
    path, offset, _ = span(dataset, "chat-00000002", "json")
    path.write_bytes(path.read_bytes()[:offset])
    found = findings(dataset)
    assert any(f"{path.name}: expected " in line and "bytes, got" in line for line in found)
    assert any(line.startswith(f"{path.name}: chat-00000002: expected") and "cut short" in line for line in found)


@pytest.mark.parametrize("name", ["train-chat-00000.tar", "train-chat-00000.parquet", "quarantine/chat-00000.parquet"])
def test_a_missing_file_is_found(dataset: Path, name: str) -> None:
    (dataset / name).unlink()
    assert f"{name}: missing, though the manifest names it" in findings(dataset)


def test_a_file_too_many_is_found(dataset: Path) -> None:
    shutil.copy(dataset / "train-chat-00000.tar", dataset / "train-chat-00009.tar")
    (dataset / "train-chat-00010.tar.77.partial").touch()
    found = sorted(findings(dataset))
    assert found[0].startswith("train-chat-00009.tar: not in the manifest; remove it")
    assert found[1].startswith("train-chat-00010.tar.77.partial: half-written file")


def test_an_edited_manifest_is_refused(dataset: Path) -> None:
    path = dataset / "manifest.json"
    path.write_text(path.read_text().replace('"num_rows": 6', '"num_rows": 5'))
    with pytest.raises(DatasetError, match="does not match its own sha256"):
        findings(dataset)


def test_a_manifest_edited_with_its_digest_is_found(dataset: Path) -> None:
    manifest = read_manifest(dataset)
    totals = manifest.totals.model_copy(update={"num_tokens": 1})
    write_manifest(dataset, manifest.model_copy(update={"num_rows": 7, "totals": totals}))
    assert findings(dataset) == [
        "manifest.json: totals is not the sum over the shards",
        "manifest.json: 7 rows came in, but 5 are in shards and 1 in the quarantine",
    ]


def test_an_edited_index_is_found(dataset: Path) -> None:
    path = dataset / "train-chat-00000.parquet"
    table = pq.ParquetFile(path).read()
    rows = table.to_pylist()
    rows[1]["num_tokens"] += 1
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    found = findings(dataset)
    assert any("train-chat-00000.tar: chat-00000001: index: num_tokens is" in line for line in found)
    assert any("train-chat-00000.tar: manifest: totals are num_tokens" in line for line in found)


def test_a_manifest_of_another_format_is_refused(dataset: Path) -> None:
    path = dataset / "manifest.json"
    values = {**json.loads(path.read_text()), "format": 2}
    values.pop("sha256")
    path.write_text(json.dumps({**values, "sha256": canonical_sha256(values)}))
    with pytest.raises(DatasetError, match="expected format 1, got 2"):
        findings(dataset)


@pytest.mark.parametrize("sample", [text_sample(), media_sample()], ids=["text", "media"])
def test_sound_samples_break_no_rule(sample) -> None:
    assert list(check_sample(sample, MemberFormat())) == []


def changed(**changes):
    """Return the media sample with changes to its layout."""
    sample = media_sample()
    return replace(sample, layouts={"tokens": replace(sample.layouts["tokens"], **changes)})


def array(name: str, at, value: int):
    values = getattr(media_sample().layouts["tokens"], name).copy()
    values[at] = value
    return values


TOKENS = media_sample().layouts["tokens"]
SEGMENTS = TOKENS.segments
FOLDED = TOKENS.position_ids * 0 + np.arange(len(TOKENS.labels)) % 28
NOT_A_NUMBER = replace(audio_item(), mel=np.full((128, 100), np.nan, np.float32))


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (changed(labels=array("labels", -1, 7)), "label 7 is neither its id"),
        (changed(labels=array("labels", 0, int(TOKENS.input_ids[0]))), r"segment \[0, 3\) is not supervised, but 1 of its 3"),
        (changed(labels=array("labels", -1, -100)), r"is supervised, but 3 of its 4 tokens have labels"),
        (changed(input_ids=array("input_ids", 4, 5)), "audio segment .* holds other tokens than"),
        (changed(input_ids=array("input_ids", 0, 151_655)), "token 0 is a placeholder outside of any media segment"),
        (changed(input_ids=array("input_ids", 0, 999_999)), "ids reach from .* to 999999"),
        (changed(position_ids=array("position_ids", (0, 1), -4)), "positions reach down to -4"),
        (changed(position_ids=array("position_ids", (0, 6), 0)), "audio segment .* runs backwards in time"),
        (changed(position_ids=array("position_ids", (1, 1), 9)), r"text \[0, 3\) does not count up by one"),
        (
            changed(position_ids=TOKENS.position_ids * 0 + np.arange(len(TOKENS.labels)) % 28),
            "starts at position 0, not above 27",
        ),
        (changed(segments=(*SEGMENTS[:2], *SEGMENTS[3:])), "segments do not tile"),
        (changed(segments=(SEGMENTS[0], SEGMENTS[1]._replace(offset=3), *SEGMENTS[2:])), "starts at token 3 of its item"),
        (replace(media_sample(), audio=(audio_item(32_000), media_sample().audio[1])), "audio item 0: expected 50 .*got 25"),
        (replace(media_sample(), audio=media_sample().audio[:1]), "audio item 1: expected None placeholder tokens, got 6"),
        (replace(media_sample(), audio=(replace(audio_item(), num_samples=1), audio_item(4_000))), "1 samples make 1 mel frames"),
        (
            replace(
                media_sample(), audio=(replace(audio_item(), mel=np.full((128, 100), np.nan, np.float32)), audio_item(4_000))
            ),
            "audio 0: mel holds NaN",
        ),
    ],
)
def test_a_broken_rule_is_named(sample, message: str) -> None:
    import re

    found = [f"{member}: {text}" for member, text in check_sample(sample, MemberFormat())]
    assert any(re.search(message, line) for line in found), found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": (jpeg(28, 56)[:300],)}, "frame 0: not a readable JPEG"),
        ({"frames": (jpeg(28, 28),)}, "frame 0: expected a JPEG of 28x56, got JPEG of 28x28"),
        ({"grid_thw": (1, 4, 4)}, r"make the grid \(1, 2, 4\), got \(1, 4, 4\)"),
        ({"kind": "video"}, "a video must have a timing contract"),
        ({"audio_index": 7}, "its sound is audio item 7 of 2"),
    ],
)
def test_a_broken_picture_is_named(change: dict, message: str) -> None:
    import re

    sample = media_sample()
    sample = replace(sample, vision=(replace(sample.vision[0], **change), sample.vision[1]))
    found = [f"{member}: {text}" for member, text in check_sample(sample, MemberFormat())]
    assert any(re.search(message, line) and line.startswith("frames.mjpg") for line in found), found


def test_blocks_may_meet_in_reference_mode_only() -> None:
    sample = replace(changed(position_ids=FOLDED), rope_mode="reference")
    assert not any("not above" in text for _, text in check_sample(sample, MemberFormat()))


def test_preferences_are_checked_in_both_sequences() -> None:
    sample = preference_sample()
    bad = layout([("text", 4, -1, False), ("image", 1, 0, False), ("text", 3, -1, True)])
    sample = replace(sample, layouts={"chosen": sample.layouts["chosen"], "rejected": bad})
    found = list(check_sample(sample, MemberFormat(kind="preference")))
    assert [(member, "expected 2 placeholder tokens, got 1" in text) for member, text in found] == [("rejected.npy", True)]
